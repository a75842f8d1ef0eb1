"""The operating system's view of this process: blunt, but it sees what no operator-level count can."""

from __future__ import annotations

import ctypes
import gc
import mmap
from pathlib import Path

_CLEAR_REFS = Path("/proc/self/clear_refs")
_STATUS = Path("/proc/self/status")
_RESET_HIGH_WATER_MARK = "5"  # proc(5): sets VmHWM to the current VmRSS
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8  # malloc.h of glibc


def map_blocks_by_themselves() -> bool:
    """From here on, every block of a page or more is mapped by itself, and leaves the process when it is freed.

    Resident memory is then what is alive, in whole pages. With the C library's own threshold, blocks of a few pages
    settle in the holes that earlier ones left, and those holes stay resident: as much again as a small training step
    needs, and different after every history.

    Returns:
        Whether the C library can (glibc).
    """
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "malloc_trim"):
        return False
    options = {_M_MMAP_THRESHOLD: mmap.PAGESIZE, _M_TRIM_THRESHOLD: mmap.PAGESIZE, _M_ARENA_MAX: 1}
    return all(libc.mallopt(option, value) == 1 for option, value in options.items())


def settle() -> int | None:
    """Collect garbage, hand free memory back to the system, and start a new high-water mark.

    Returns:
        Resident bytes now; ``None`` where unknown, as :func:`reset_high_water_mark`.
    """
    gc.collect()
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)
    return reset_high_water_mark()


def reset_high_water_mark() -> int | None:
    """Start a new high-water mark of resident memory, for the whole process (``VmHWM``, ``ru_maxrss``).

    Returns:
        Resident bytes now; ``None`` where the kernel does not offer the reset (anything but Linux, some sandboxes).
    """
    try:
        _CLEAR_REFS.write_text(_RESET_HIGH_WATER_MARK)
        return _field("VmRSS")
    except OSError:
        return None


def high_water_mark() -> int | None:
    """Most resident bytes since :func:`reset_high_water_mark`; ``None`` where unknown."""
    try:
        return _field("VmHWM")
    except OSError:
        return None


def _field(name: str) -> int | None:
    for line in _STATUS.read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    return None
