"""Compiles and loads the C++ kernels: a prebuilt library if the package carries one, else built once and cached.

The cache is keyed by everything that decides the result: the sources, the flags, the compiler, the processor and
torch. A build happens in a folder of its own under a lock that dies with its process, and the finished library is
moved into place in one step. So an interrupted build is begun anew, two processes at once are safe, and a failed build
is remembered until the sources or the compiler change (``TINYTL_REBUILD=1`` tries again).

This file stands alone, without the rest of the package: ``setup.py`` builds ahead of time with it.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import torch

LIBRARY = "tinytl_cpu"
CACHE_VARIABLE = "TINYTL_CACHE_DIR"
REBUILD_VARIABLE = "TINYTL_REBUILD"
# "AVX512", "AVX2", "DEFAULT": build for less than this machine has (tests and portable wheels do). On ARM only "NEON".
CAPABILITY_VARIABLE = "TINYTL_CPU_CAPABILITY"
# "1": build with AddressSanitizer and UndefinedBehaviorSanitizer (`make asan`).
SANITIZE_VARIABLE = "TINYTL_SANITIZE"

_COMMON_FLAGS = ["-O3", "-std=c++20", "-fno-math-errno", "-Wno-psabi"]
# What at::vec::Vectorized is told, and what the compiler may use beside it, widest first. Native: the bfloat16 dot
# products.
_CAPABILITY_FLAGS = {
    "AVX512": ["-march=native", "-DCPU_CAPABILITY=AVX512", "-DCPU_CAPABILITY_AVX512"],
    "AVX2": ["-march=haswell", "-DCPU_CAPABILITY=AVX2", "-DCPU_CAPABILITY_AVX2"],
    "DEFAULT": ["-DCPU_CAPABILITY=DEFAULT", "-DCPU_CAPABILITY_DEFAULT"],
    # Every AArch64 processor has NEON, so ATen's default is NEON there. GCC moves loads ahead there before it allots
    # registers, and 6 x 4 sums, a row of B and six broadcasts are more than 32: a sum would pass through memory.
    "NEON": ["-DCPU_CAPABILITY=DEFAULT", "-DCPU_CAPABILITY_DEFAULT", "-fno-schedule-insns"],
}
# -O1 wins over the -O3 before it: optimised further, instrumented code takes minutes to compile. The first error ends
# the process, so that no test passes over it.
_SANITIZER_FLAGS = [
    "-O1", "-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer",
]  # fmt: skip

# What nearly every file includes.
_PRECOMPILED = ("common.h", "parallel.h")

# A compiler at work on one of the larger files takes up to a gigabyte.
_BYTES_PER_JOB = 3 << 29


@cache
def load_kernels() -> str | None:
    """Load the kernels into ``torch.ops.tinytl_cpu``, compiling them if need be. None, or why there are none."""
    sources = kernel_sources()
    if not sources:
        return "the C++ sources are missing from this installation"
    prebuilt = _prebuilt_library(sources)
    if prebuilt is not None:
        return _load(prebuilt)
    if reason := _no_compiler():
        return reason
    try:
        folder = _cache_folder(sources)
        folder.mkdir(parents=True, exist_ok=True)
        library = folder / f"{LIBRARY}.so"
        if not library.exists():
            with _lock(folder / "lock"):
                # Another process may have built it while this one waited.
                if not library.exists() and (reason := _build(sources, folder, library)):
                    return reason
    except OSError as error:
        return f"no folder to build in ({error}); set {CACHE_VARIABLE} to a writable one"
    return _load(library)


def kernel_sources() -> list[Path]:
    """The C++ files, in a checkout or inside an installed package; empty where there are none."""
    package = Path(__file__).resolve().parents[2]
    for root in (package.parent / "kernels" / "cpu", package / "kernels" / "cpu"):
        if (root / "bindings.cpp").exists():
            return sorted(root.glob("*.cpp")) + sorted(root.glob("*.h"))
    return []


def compile_flags(capability: str | None = None) -> list[str]:
    """Flags for a capability of :func:`cpu_capability`; every build of the sources uses these, ahead of time or not."""
    sanitizers = _SANITIZER_FLAGS if os.environ.get(SANITIZE_VARIABLE) == "1" else []
    return _COMMON_FLAGS + _openmp_flags() + _CAPABILITY_FLAGS[capability or cpu_capability()] + sanitizers


def cpu_capability() -> str:
    """The widest vector instructions to build for: what torch found, or what ``TINYTL_CPU_CAPABILITY`` says.

    Raises:
        ValueError: the variable names no capability, or one that this machine does not have.
    """
    return _capabilities()[0]


def prebuilt_name(sources: list[Path], capability: str) -> str:
    """File name of a library built ahead of time. A library for other sources, another torch (it would crash rather
    than fail) or another processor has another name, and is not found."""
    facts = [torch.__version__, platform.system(), platform.machine(), *compile_flags(capability)]
    return f"{LIBRARY}-torch{torch.__version__.split('+')[0]}-{capability.lower()}-{_digest(sources, facts)}.so"


def build_library(sources: list[Path], target: Path, work: Path) -> None:
    """Compile ``sources`` in the folder ``work`` and move the finished library to ``target`` in one step.

    Raises:
        RuntimeError: the compiler failed; its command and its messages.
        OSError: a folder that cannot be written, or a full disk.
    """
    root = Path(torch.__file__).parent
    flags = compile_flags()
    objects = compile_objects(sources, work, flags, root / "include")
    linked = work / f"{LIBRARY}.so"
    _run([*compiler(), *flags, "-shared", *map(str, objects), *_link_flags(root / "lib"), "-o", str(linked)])
    # Another file system would copy, and a reader could meet half a library; so beside the target first.
    beside = target.with_name(f".{target.name}.{os.getpid()}")
    shutil.move(linked, beside)
    os.replace(beside, target)


def compile_objects(sources: list[Path], folder: Path, flags: list[str], include: Path) -> list[Path]:
    """Compile every ``.cpp`` of ``sources`` into ``folder`` against the torch headers in ``include``.

    Raises:
        RuntimeError: the compiler failed; its command and its messages.
    """
    # The longest first, so that no core waits for it at the end.
    units = sorted((s for s in sources if s.suffix == ".cpp"), key=lambda s: s.stat().st_size, reverse=True)
    objects = [folder / f"{unit.stem}.o" for unit in units]
    # No -D_GLIBCXX_USE_CXX11_ABI: torch has had compilers' default since 2.7.
    command = [*compiler(), *flags, "-fPIC", "-isystem", str(include)]
    if headers := [source for source in sources if source.name in _PRECOMPILED]:
        command += ["-include", str(_precompile(headers, folder, command))]

    def compile_unit(unit: Path, output: Path) -> None:
        _run([*command, "-c", str(unit), "-o", str(output)])

    with ThreadPoolExecutor(_jobs()) as pool:
        list(pool.map(compile_unit, units, objects))
    return objects


def _precompile(headers: list[Path], folder: Path, command: list[str]) -> Path:
    """A header in ``folder`` that includes ``headers``, with what a compiler has read of them beside it.

    Reading torch's headers anew takes longer than half of the files take to compile. GCC and Clang find the ``.gch`` by
    themselves; one that does not, or cannot make it, reads the header."""
    header = folder / "precompiled.h"
    header.write_text("".join(f'#include "{path}"\n' for path in headers), encoding="utf-8")
    with contextlib.suppress(RuntimeError):
        _run([*command, "-x", "c++-header", str(header), "-o", f"{header}.gch"])
    return header


def _openmp_flags() -> list[str]:
    # Apple's clang has OpenMP but hides the flag; torch brings the header.
    return ["-Xpreprocessor", "-fopenmp"] if platform.system() == "Darwin" else ["-fopenmp"]


def _link_flags(folder: Path) -> list[str]:
    """Against torch's libraries in ``folder``, which are loaded by the time that the kernels are."""
    libraries = [f"-L{folder}", "-lc10", "-ltorch_cpu", "-ltorch"]
    if platform.system() == "Darwin":
        # OpenMP is looked up in what is loaded then: the one that torch runs on. To name a library here would bring a
        # second one, with threads of its own.
        return [*libraries, f"-Wl,-rpath,{folder}", "-Wl,-undefined,dynamic_lookup"]
    return libraries


def _capabilities() -> list[str]:
    """What this machine can run, widest first; from the wanted one on where ``TINYTL_CPU_CAPABILITY`` names one."""
    if platform.machine() in ("aarch64", "arm64"):
        here = ["NEON"]  # also where torch found SVE: the vectors of those builds are not these
    else:
        known = [capability for capability in _CAPABILITY_FLAGS if capability != "NEON"]
        found = torch.backends.cpu.get_cpu_capability()
        here = known[known.index(found if found in known else "DEFAULT") :]
    wanted = os.environ.get(CAPABILITY_VARIABLE) or here[0]
    if wanted not in here:
        raise ValueError(f"{CAPABILITY_VARIABLE}: expected one of {', '.join(here)} on this machine, got {wanted!r}")
    return here[here.index(wanted) :]


def _prebuilt_library(sources: list[Path]) -> Path | None:
    # A library for fewer instructions than this machine has still saves the build; the variable asks for one exactly.
    wanted = _capabilities()
    for capability in wanted[:1] if CAPABILITY_VARIABLE in os.environ else wanted:
        path = Path(__file__).with_name(prebuilt_name(sources, capability))
        if path.exists():
            return path
    return None


def _no_compiler() -> str | None:
    if os.name == "nt":
        return "no build for Windows yet"
    if shutil.which(compiler()[0]) is None:
        return "no C++ compiler found (install g++ or clang, or set CXX)"
    return None


def compiler() -> list[str]:
    """The C++ compiler's command: ``CXX``, words and all (``ccache g++``), else ``c++``."""
    return shlex.split(os.environ.get("CXX", "")) or ["c++"]


def _cache_folder(sources: list[Path]) -> Path:
    root = os.environ.get(CACHE_VARIABLE)
    base = Path(root) if root else Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "tinytl_kernels"
    version = subprocess.run([*compiler(), "--version"], capture_output=True, text=True, check=False).stdout
    facts = [torch.__version__, platform.system(), platform.machine(), version, *compile_flags()]
    return base / f"cpu-{_digest(sources, facts)}"


def _digest(sources: list[Path], facts: list[str]) -> str:
    digest = hashlib.sha256()
    for source in sources:
        digest.update(source.name.encode() + b"\0" + source.read_bytes())
    if "-march=native" in facts:
        facts = [*facts, _processor()]
    for fact in facts:
        digest.update(b"\0" + fact.encode())
    return digest.hexdigest()[:16]


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
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            _say("waiting for another process that compiles the CPU kernels ...")
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def _build(sources: list[Path], folder: Path, library: Path) -> str | None:
    failure = folder / "failed.txt"
    if failure.exists() and os.environ.get(REBUILD_VARIABLE) != "1":
        return f"an earlier build failed, see {failure} ({REBUILD_VARIABLE}=1 tries again)"
    # What a killed process left behind. Its compilers may still be at work, so the next build goes elsewhere.
    for abandoned in folder.glob("build-*"):
        shutil.rmtree(abandoned, ignore_errors=True)
    _say("compiling the CPU kernels for this machine, once ...")
    started = time.monotonic()
    try:
        with tempfile.TemporaryDirectory(prefix="build-", dir=folder, ignore_cleanup_errors=True) as work:
            build_library(sources, library, Path(work))
    except (RuntimeError, OSError) as error:
        with contextlib.suppress(OSError):
            failure.write_text(str(error), encoding="utf-8")
        _say(f"the CPU kernels could not be compiled ({failure}); going on with the reference backend")
        return f"the build failed, see {failure}"
    failure.unlink(missing_ok=True)
    _say(f"compiled in {time.monotonic() - started:.0f} s")
    return None


def _jobs() -> int:
    """Compilers to run at once: one a core, fewer where memory is short, or ``MAX_JOBS``."""
    if limit := os.environ.get("MAX_JOBS"):
        return max(int(limit), 1)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return max(min(cores, memory // _BYTES_PER_JOB), 1)


def _run(command: list[str]) -> None:
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{shlex.join(command)}\nexited with {done.returncode}:\n{done.stdout}")


def _load(library: Path) -> str | None:
    try:
        torch.ops.load_library(str(library))
    except OSError as error:
        return f"{library} could not be loaded: {error}"
    return None


def _say(message: str) -> None:
    print(f"tinytl_kernels: {message}", file=sys.stderr, flush=True)
