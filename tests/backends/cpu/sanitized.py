"""Runs the tests of the C++ kernels under AddressSanitizer and UndefinedBehaviorSanitizer: ``make asan``.

The kernels are built with both (``TINYTL_SANITIZE=1``), every piece of scratch memory an allocation of its own; the
first error ends the run with its stack. Python itself is not instrumented, so AddressSanitizer is preloaded, and leaks
are not looked for: Python's own would drown any other. What the sanitizers write goes past pytest, which would keep it
to itself when they end the process.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[3]

# What builds and packages is not C++ of ours; the rest of the suite calls the same kernels through more Python.
TESTS = [
    "tests/backends/cpu",
    "tests/ops",
    "--ignore=tests/backends/cpu/test_build.py",
    "--ignore=tests/backends/cpu/test_parallel.py",  # brings a sanitizer of its own, which bears no other
    "--ignore=tests/ops/test_bitmask.py",  # Python alone, and slow under AddressSanitizer
]
# torch.compile starts compilers, which AddressSanitizer would follow.
DESELECTED = "not compiles and not opcheck and not process and not temporaries"

BUILD = """
from tinytl_kernels.backends.cpu import build
folder = build._cache_folder(build.kernel_sources())
folder.mkdir(parents=True, exist_ok=True)
library = folder / f"{build.LIBRARY}.so"
if not library.exists() and (reason := build._build(build.kernel_sources(), folder, library)):
    raise SystemExit(reason)
"""


def library(name: str) -> str:
    """Path of a run-time library of the compiler's."""
    compiler = shlex.split(os.environ.get("CXX") or "c++")
    path = subprocess.run([*compiler, f"-print-file-name={name}"], capture_output=True, text=True, check=True)
    return os.path.realpath(path.stdout.strip())


def main() -> int:
    environment = {**os.environ, "TINYTL_SANITIZE": "1"}
    # Without the preload: a compiler under AddressSanitizer would take minutes.
    subprocess.run([sys.executable, "-c", BUILD], cwd=ROOT, env=environment, check=True)
    with tempfile.TemporaryDirectory() as folder:
        returned = run_tests(environment, Path(folder) / "report")
        for report in sorted(Path(folder).iterdir()):
            print(report.read_text())
    return returned


def run_tests(environment: dict[str, str], report: Path) -> int:
    """The exit status of pytest; the sanitizers write into files that begin with ``report``."""
    environment = environment | {
        # libstdc++ too: AddressSanitizer looks for its exceptions at the start, before torch brings it.
        "LD_PRELOAD": f"{library('libasan.so')}:{library('libstdc++.so')}",
        "ASAN_OPTIONS": f"detect_leaks=0:abort_on_error=0:exitcode=66:log_path={report}",
        "UBSAN_OPTIONS": f"print_stacktrace=1:log_path={report}",
        "PYTHONMALLOC": "malloc",
    }
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", DESELECTED, *TESTS, *sys.argv[1:]]
    return subprocess.run(command, cwd=ROOT, env=environment, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
