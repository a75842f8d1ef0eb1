"""Builds the C++ kernels for ARM on a machine that is none, and runs their tests under emulation: ``make neon``.

Needs a cross compiler, ``aarch64-linux-gnu-g++`` or what ``CXX`` says. Every source is compiled with the flags of an
ARM machine, against the headers of the torch that is installed (they hold the vectors of every processor), and the
objects are searched for NEON's multiply-add: where it is missing, ATen's vectors have become plain loops.

The tests run too where an emulated Python is given. ``NEON_PYTHON`` is the command that starts it, ``NEON_SITE`` its
site-packages, with torch, numpy, pytest, pytest-timeout and hypothesis for AArch64. Such a Python builds the kernels as
an ARM machine does, at first use, but with the cross compiler.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from tinytl_kernels.backends.cpu import build

ROOT = Path(__file__).parents[3]

# What builds and packages is not C++ of ours, and is native; torch.compile starts compilers of its own.
TESTS = [
    "tests/backends/cpu",
    "tests/ops",
    "--ignore=tests/backends/cpu/test_build.py",
    "--ignore=tests/backends/cpu/test_parallel.py",
]
DESELECTED = "not compiles and not opcheck and not gradcheck and not process"

# The kernels whose speed is their multiply-add.
ARITHMETIC = ["dense_conv", "depthwise_conv", "inverted_residual_backward", "inverted_residual_forward", "pointwise"]
VECTOR_FMA = re.compile(r"\bfmla\s+v\d+\.4s")


def cross_compile() -> None:
    """Compile every source for AArch64, and look at the instructions.

    Raises:
        SystemExit: the compiler failed, or made plain loops of the vectors.
    """
    include = Path(torch.__file__).parent / "include"
    with tempfile.TemporaryDirectory() as folder:
        try:
            objects = build.compile_objects(build.kernel_sources(), Path(folder), build.compile_flags("NEON"), include)
        except RuntimeError as error:
            raise SystemExit(str(error)) from error
        counts = {path.stem: len(VECTOR_FMA.findall(disassembled(path))) for path in objects}
    for name, count in sorted(counts.items()):
        print(f"{name:28} {count:5} x fmla v.4s")
    if plain := [name for name in ARITHMETIC if not counts[name]]:
        raise SystemExit(f"no vector multiply-add in {', '.join(plain)}: at::vec::Vectorized<float> is not NEON's")


def disassembled(path: Path) -> str:
    """The instructions of an object file."""
    tool = subprocess.run(
        [*shlex.split(os.environ["CXX"]), "-print-prog-name=objdump"], capture_output=True, text=True, check=True
    ).stdout.strip()
    return subprocess.run([tool, "-d", path], capture_output=True, text=True, check=True).stdout


def run_tests(python: str, site: str) -> int:
    """The exit status of pytest under the emulated Python."""
    search = os.pathsep.join([str(ROOT), os.path.abspath(site)])
    command = [
        *shlex.split(python), "-m", "pytest", "-q", "-p", "no:cacheprovider", "--timeout=1800",
        "-o", "faulthandler_timeout=0", "-k", DESELECTED, *TESTS, *sys.argv[1:],
    ]  # fmt: skip
    return subprocess.run(command, cwd=ROOT, env={**os.environ, "PYTHONPATH": search}, check=False).returncode


def main() -> int:
    compiler = os.environ.setdefault("CXX", "aarch64-linux-gnu-g++")
    if shutil.which(shlex.split(compiler)[0]) is None:
        raise SystemExit(f"{compiler} is not installed: install a C++ compiler for AArch64, or name it in CXX")
    cross_compile()
    python, site = os.environ.get("NEON_PYTHON"), os.environ.get("NEON_SITE")
    if not (python and site):
        print("compiled, not run: NEON_PYTHON and NEON_SITE name an emulated Python and its packages")
        return 0
    return run_tests(python, site)


if __name__ == "__main__":
    sys.exit(main())
