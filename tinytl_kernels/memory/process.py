"""The operating system's view of this process: blunt, but it sees what no operator-level count can."""

from __future__ import annotations

from pathlib import Path

_CLEAR_REFS = Path("/proc/self/clear_refs")
_STATUS = Path("/proc/self/status")
_RESET_HIGH_WATER_MARK = "5"  # proc(5): sets VmHWM to the current VmRSS


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
