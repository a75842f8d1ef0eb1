"""Compiles and loads the C++ kernels: a prebuilt library if the package carries one, else built once and cached.

The cache is keyed by everything that decides the result: the sources, the flags, the processor, torch and Python. A
build happens in a folder of its own under a lock that dies with its process; the finished library is moved into place
in one step. So an interrupted build is begun anew, two processes at once are safe, and a failed build is remembered
until the sources or the compiler change (``TINYTL_REBUILD=1`` tries again).
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import torch

LIBRARY = "tinytl_cpu"
CACHE_VARIABLE = "TINYTL_CACHE_DIR"
REBUILD_VARIABLE = "TINYTL_REBUILD"
# "AVX512", "AVX2", "DEFAULT": build for less than this machine has (tests do).
CAPABILITY_VARIABLE = "TINYTL_CPU_CAPABILITY"

_COMMON_FLAGS = ["-O3", "-fopenmp", "-std=c++20", "-fno-math-errno", "-Wno-psabi"]
# What at::vec::Vectorized is told, and what the compiler may use beside it. Native: the bfloat16 dot products.
_CAPABILITY_FLAGS = {
    "AVX512": ["-march=native", "-DCPU_CAPABILITY=AVX512", "-DCPU_CAPABILITY_AVX512"],
    "AVX2": ["-march=haswell", "-DCPU_CAPABILITY=AVX2", "-DCPU_CAPABILITY_AVX2"],
    "DEFAULT": ["-DCPU_CAPABILITY=DEFAULT", "-DCPU_CAPABILITY_DEFAULT"],
}


@cache
def load_kernels() -> str | None:
    """Load the kernels into ``torch.ops.tinytl_cpu``, compiling them if need be. None, or why there are none."""
    prebuilt = _prebuilt_library()
    if prebuilt is not None:
        return _load(prebuilt)
    sources = kernel_sources()
    if not sources:
        return "the C++ sources are missing from this installation"
    if reason := _no_toolchain():
        return reason
    try:
        folder = _cache_folder(sources)
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        return f"no folder to build in ({error}); set {CACHE_VARIABLE} to a writable one"
    library = folder / f"{LIBRARY}.so"
    if not library.exists():
        with _lock(folder / "lock"):
            # Another process may have built it while this one waited.
            if not library.exists() and (reason := _build(sources, folder, library)):
                return reason
    return _load(library)


def kernel_sources() -> list[Path]:
    """The C++ files, in a checkout or inside an installed package; empty where there are none."""
    package = Path(__file__).resolve().parents[2]
    for root in (package.parent / "kernels" / "cpu", package / "kernels" / "cpu"):
        if (root / "bindings.cpp").exists():
            return sorted(root.glob("*.cpp")) + sorted(root.glob("*.h"))
    return []


def compile_flags(capability: str | None = None) -> list[str]:
    """Flags for a capability of :func:`capability`; every build of the sources uses these, ahead of time or not."""
    return _COMMON_FLAGS + _CAPABILITY_FLAGS[capability or cpu_capability()]


def cpu_capability() -> str:
    """The widest vector instructions to build for: what torch found, or what ``TINYTL_CPU_CAPABILITY`` says."""
    wanted = os.environ.get(CAPABILITY_VARIABLE)
    found = torch.backends.cpu.get_cpu_capability()
    known = wanted or (found if found in _CAPABILITY_FLAGS else "DEFAULT")
    if known not in _CAPABILITY_FLAGS:
        raise ValueError(f"{CAPABILITY_VARIABLE}: expected one of {', '.join(_CAPABILITY_FLAGS)}, got {known!r}")
    return known


def _prebuilt_library() -> Path | None:
    # Its name carries the torch version: a library built against another one would crash rather than fail.
    name = f"{LIBRARY}-torch{torch.__version__.split('+')[0]}.so"
    path = Path(__file__).with_name(name)
    return path if path.exists() and CAPABILITY_VARIABLE not in os.environ else None


def _no_toolchain() -> str | None:
    if os.name == "nt":
        return "no build for Windows yet"
    if shutil.which(os.environ.get("CXX", "c++")) is None:
        return "no C++ compiler found (install g++ or clang, or set CXX)"
    if shutil.which("ninja") is None and not (Path(sys.executable).parent / "ninja").exists():
        return "ninja not found (pip install ninja)"
    return None


def _cache_folder(sources: list[Path]) -> Path:
    root = os.environ.get(CACHE_VARIABLE)
    base = Path(root) if root else Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "tinytl_kernels"
    digest = hashlib.sha256()
    for source in sources:
        digest.update(source.name.encode() + b"\0" + source.read_bytes())
    compiler = subprocess.run(
        [os.environ.get("CXX", "c++"), "--version"], capture_output=True, text=True, check=False
    ).stdout
    for fact in (torch.__version__, sys.version, platform.machine(), _processor(), compiler, *compile_flags()):
        digest.update(b"\0" + fact.encode())
    return base / f"cpu-{digest.hexdigest()[:16]}"


def _processor() -> str:
    # A home folder may be shared by machines with other instruction sets.
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith(("flags", "Features")):
                return line
    return platform.processor()


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[None]:
    import fcntl

    with path.open("w") as handle:
        # The kernel drops it when the process ends, however it ends: no stale lock can block the next one.
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def _build(sources: list[Path], folder: Path, library: Path) -> str | None:
    failure = folder / "failed.txt"
    if failure.exists() and os.environ.get(REBUILD_VARIABLE) != "1":
        return f"an earlier build failed, see {failure} ({REBUILD_VARIABLE}=1 tries again)"
    from torch.utils.cpp_extension import load

    work = folder / "build"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    print("tinytl_kernels: compiling the CPU kernels for this machine, once ...", file=sys.stderr, flush=True)
    started = time.monotonic()
    try:
        with _ninja_on_path():
            load(
                LIBRARY,
                [str(source) for source in sources if source.suffix == ".cpp"],
                extra_cflags=compile_flags(),
                extra_ldflags=["-fopenmp"],
                build_directory=str(work),
                is_python_module=False,
            )
        os.replace(work / f"{LIBRARY}.so", library)
    except Exception as error:
        with contextlib.suppress(OSError):
            failure.write_text(str(error), encoding="utf-8")
        print(
            f"tinytl_kernels: the CPU kernels could not be compiled ({failure}); going on with the reference backend",
            file=sys.stderr,
        )
        return f"the build failed, see {failure}"
    failure.unlink(missing_ok=True)
    shutil.rmtree(work, ignore_errors=True)
    print(f"tinytl_kernels: compiled in {time.monotonic() - started:.0f} s", file=sys.stderr, flush=True)
    return None


@contextlib.contextmanager
def _ninja_on_path() -> Iterator[None]:
    # pip puts ninja beside python, which is not on PATH where a virtual environment is used without activating it.
    before = os.environ.get("PATH", "")
    os.environ["PATH"] = os.pathsep.join([before, str(Path(sys.executable).parent)])
    try:
        yield
    finally:
        os.environ["PATH"] = before


def _load(library: Path) -> str | None:
    try:
        torch.ops.load_library(str(library))
    except OSError as error:
        return f"{library} could not be loaded: {error}"
    return None
