"""``python -m benchmarks.nsight OPERATOR [NxCxHxW]``: one operator in a loop, for Nsight to look at.

The rounds to be looked at lie between cudaProfilerStart and cudaProfilerStop, in NVTX ranges ``round``, ``forward`` and
``backward``; inside them every operator has a range of its own name. ``--commands`` prints how ncu and nsys wrap this,
``--profile`` runs those of them that are here.
"""

from __future__ import annotations

import argparse
import contextlib
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence

import torch

import tinytl_kernels as tk
from benchmarks.gpu.bandwidth import prepared
from benchmarks.gpu.operators import DTYPES, OPERATORS, Size

NO_GPU = 3
_DIRECTIONS = ("forward", "backward")


def size(text: str) -> Size:
    """An argparse type: ``128x144x56x56``."""
    try:
        n, c, h, w = (int(part) for part in text.lower().split("x"))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size such as 128x144x56x56 (N, C, H, W)") from None
    if min(n, c, h, w) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: expected four numbers of at least 1")
    return n, c, h, w


def parser() -> argparse.ArgumentParser:
    """The command line."""
    raw = argparse.RawDescriptionHelpFormatter
    shapes = "\n".join(f"  {name:26} {'x'.join(map(str, shape))}" for name, (_, shape) in OPERATORS.items())
    made = argparse.ArgumentParser(
        prog="python -m benchmarks.nsight", description=__doc__, formatter_class=raw,
        epilog=f"operators, and the sizes that they have by default:\n{shapes}",
    )  # fmt: skip
    made.add_argument("operator", choices=OPERATORS, metavar="OPERATOR")
    made.add_argument("size", nargs="?", type=size, metavar="NxCxHxW", help="of the input")
    made.add_argument("--dtype", choices=[d for d in DTYPES if d != "tf32"], default="bfloat16", help="(%(default)s)")
    made.add_argument("--direction", choices=[*_DIRECTIONS, "both"], default="both", help="(%(default)s)")
    made.add_argument("--rounds", type=int, default=3, metavar="N", help="after as many to warm up (%(default)s)")
    made.add_argument("--device", default="cuda", help="(%(default)s); cpu tries the code")
    made.add_argument("--backend", choices=("triton", "reference"), default="triton", help="(%(default)s)")
    made.add_argument("--commands", action="store_true", help="print how to wrap this, and do nothing else")
    made.add_argument("--profile", action="store_true", help="print it, and run what is here")
    return made


def commands(arguments: Sequence[str]) -> dict[str, list[str]]:
    """``"ncu"``, ``"nsys"`` -> the command that wraps this program with ``arguments``."""
    # As named here, so that what is printed can be typed.
    loop = ["python3", "-m", "benchmarks.nsight", *arguments]
    sections = ("SpeedOfLight", "MemoryWorkloadAnalysis", "LaunchStats", "Occupancy", "WarpStateStats")
    return {
        # Clocks are left as they are: fixing them takes rights, and changes the machine for others.
        "ncu": [
            "ncu", "--profile-from-start", "off", "--clock-control", "none", "--nvtx",
            *(word for section in sections for word in ("--section", section)), *loop,
        ],
        "nsys": [
            "nsys", "profile", "--capture-range", "cudaProfilerApi", "--trace", "cuda,nvtx", "--stats", "true",
            "--force-overwrite", "true", "--output", "nsight_profile", *loop,
        ],
    }  # fmt: skip


def loop(options: argparse.Namespace) -> None:
    """Run the operator: warm up unseen, then the rounds that a profiler is told of."""
    device = torch.device(options.device)
    on_gpu = device.type == "cuda"
    make, usual = OPERATORS[options.operator]
    torch.manual_seed(20260101)
    sample = make(options.size or usual)(DTYPES[options.dtype], device)

    def named(name: str) -> contextlib.AbstractContextManager:
        return torch.cuda.nvtx.range(name) if on_gpu else contextlib.nullcontext()

    with tk.use_backend(options.backend):
        parts = prepared(sample)
        wanted = _DIRECTIONS if options.direction == "both" else (options.direction,)
        for _ in range(options.rounds):
            for name in wanted:
                parts[name][0]()
        if on_gpu:
            torch.cuda.synchronize()
        with torch.cuda.profiler.profile() if on_gpu else contextlib.nullcontext():
            for _ in range(options.rounds):
                with named("round"):
                    for name in wanted:
                        with named(name):
                            parts[name][0]()
            if on_gpu:
                torch.cuda.synchronize()
    shape = "x".join(map(str, sample.inputs[0].shape))
    moved = ", ".join(f"{name} {parts[name][1] / 1e6:.1f} MB" for name in wanted)
    print(f"{options.operator} {shape} {options.dtype}, {options.rounds} rounds; at least has to move: {moved}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the loop, or what wraps it; returns the exit status."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    options = parser().parse_args(words)
    if options.rounds < 1:
        parser().error(f"argument --rounds: expected at least 1, got {options.rounds}")
    gpu = torch.cuda.is_available()
    if options.commands or options.profile:
        return _wrap([word for word in words if word not in ("--commands", "--profile")], options.profile and gpu)
    if options.device.startswith("cuda") and not gpu:
        print("benchmarks.nsight: PyTorch sees no GPU here; nothing was run (--commands shows what would be)")
        return NO_GPU
    loop(options)
    return 0


def _wrap(words: list[str], run: bool) -> int:
    """Print the commands; run those whose tool is here. The status of the first that fails."""
    status = 0
    for tool, command in commands(words).items():
        print(shlex.join(command), flush=True)
        if not run:
            continue
        if shutil.which(tool) is None:
            print(f"  {tool} is not on the PATH", flush=True)
            continue
        here = [sys.executable if word == "python3" else word for word in command]
        status = status or subprocess.run(here, check=False).returncode
    return status


if __name__ == "__main__":
    sys.exit(main())
