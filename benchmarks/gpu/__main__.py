"""``python -m benchmarks.gpu``: everything that only a GPU can tell, in less than nine minutes. Installs nothing.

First, side by side: are the answers right (every operator in every precision, CUDA graphs, torch.compile, offsets of
64 bits, the tests that need a GPU, compute-sanitizer), and everything that will be timed is compiled. Then, one after
the other: bandwidths, networks, blocks, layers. Results are written as they come.

Exits with 0; with 1 if an answer was wrong; with 3 if there is no GPU.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.gpu import report
from benchmarks.gpu.schedule import Job, Outcome, Schedule, python

NO_GPU = 3
_MINUTES = 8.5
# Of them, for what is not timed.
_UNTIMED_SECONDS = 180.0

DTYPES = ("float32", "tf32", "float16", "bfloat16")
# What is asked about first comes first: what no time is left for is skipped.
NETWORKS = (
    "mobilenet_v2:bfloat16", "resnet50:bfloat16", "efficientnet_lite0:bfloat16",
    "mobilenet_v2:float32", "resnet50:float32", "efficientnet_lite0:float32",
)  # fmt: skip


def sanitizer() -> str | None:
    """Where compute-sanitizer is."""
    folders = [os.environ.get(name) for name in ("CUDA_HOME", "CUDA_PATH")] + ["/usr/local/cuda"]
    places = [os.path.join(folder, below) for folder in folders if folder for below in ("bin", "compute-sanitizer")]
    return shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path=os.pathsep.join(places))


def _worker(options: argparse.Namespace, section: str, name: str = "", *more: str) -> list[str]:
    tiny = ["--tiny"] if options.dry_run else []
    words = [section, name, f"--device={options.device}", f"--backend={options.backend}", *tiny, *more]
    return python("benchmarks.gpu.worker", *words)


_TESTS = Path(__file__).parents[2] / "tests"
# The same in both stages, for what the compiler keeps on disk.
_COMPILER = {"TORCHINDUCTOR_COMPILE_THREADS": "4"}


def untimed(options: argparse.Namespace) -> list[Job]:
    """What runs side by side: are the answers right? And, on a GPU, what will be timed is compiled."""
    shared = {"OMP_NUM_THREADS": "2", **_COMPILER}
    jobs = [Job(f"operators {d}", _worker(options, "operators", d), 170, shared) for d in DTYPES]
    if options.backend == "triton" and options.device == "cpu":
        jobs = jobs[::2]  # interpreted: there is no TF32, and its bfloat16 is wrong
    jobs.append(Job("system", _worker(options, "system"), 170, shared))
    jobs += _sanitized(options, shared)
    if options.dry_run:
        return jobs
    warm = [("network", name) for name in NETWORKS] + [("kernels", ""), ("inner", "blocks"), ("inner", "layers")]
    jobs += [
        Job(f"warm {section} {name}".strip(), _worker(options, section, name, "--warm"), 170, shared)
        for section, name in warm
    ]
    if importlib.util.find_spec("pytest"):
        # Of the operators, which have had their turn above, only what that leaves out.
        seen = "tests/backends/triton/test_gpu.py::test_forward_and_backward_are_as_exact_as_the_reference"
        files = [str(f) for f in sorted(_TESTS.rglob("test_*.py")) if "mark.gpu" in f.read_text(encoding="utf-8")]
        words = ["-q", "-p", "no:cacheprovider", "-m", "gpu", *files, "--deselect", seen]
        jobs.append(Job("tests", python("pytest", *words), 170, shared, r"\d+ (passed|failed|error)"))
    return jobs


def _sanitized(options: argparse.Namespace, environment: dict[str, str]) -> list[Job]:
    tool = None if options.dry_run else sanitizer()
    touch = _worker(options, "touch", "bfloat16" if options.device == "cuda" else "float32")
    if tool is None:
        return [Job("touch", touch, 170, environment)]
    # Each tensor is an allocation of its own, so that a step beyond its end is seen.
    environment = {**environment, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    jobs = []
    # PyTorch asks the driver for functions that older drivers lack: no error of ours.
    for kind, more in (("memcheck", ["--report-api-errors", "no"]), ("racecheck", [])):
        command = [tool, "--tool", kind, "--error-exitcode", "9", *more, *touch]
        jobs.append(Job(kind, command, 170, environment, r"(ERROR|RACECHECK) SUMMARY"))
    return jobs


def timed(options: argparse.Namespace) -> list[Job]:
    """What runs alone."""

    def job(section: str, name: str, seconds: float) -> Job:
        return Job(f"{section} {name}".strip(), _worker(options, section, name), seconds, _COMPILER)

    networks = [job("network", name, 90) for name in (NETWORKS[:1] if options.dry_run else NETWORKS)]
    blocks, layers = job("inner", "blocks", 60), job("inner", "layers", 60)
    return [job("kernels", "", 60), networks[0], blocks, *networks[1:3], layers, *networks[3:]]


def parser() -> argparse.ArgumentParser:
    """The command line."""
    raw = argparse.RawDescriptionHelpFormatter
    made = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__, formatter_class=raw)
    made.add_argument("--minutes", type=float, default=_MINUTES, help="for everything (%(default)s)")
    made.add_argument("--out", type=Path, help="the JSON (benchmarks/results/DATE-GPU-COMMIT.json)")
    made.add_argument(
        "--only", nargs="+", metavar="JOB", help="only jobs whose names start so; environment runs always"
    )
    made.add_argument(
        "--dry-run", action="store_true",
        help="tiny shapes, on the CPU unless --device says otherwise: tries the code, measures nothing",
    )  # fmt: skip
    made.add_argument("--device", help="cuda (cpu with --dry-run)")
    made.add_argument(
        "--backend",
        choices=("triton", "reference"),
        help="ours, under test: triton (reference with --dry-run, where TRITON_INTERPRET=1 runs triton too)",
    )
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    """Run everything; returns the exit status."""
    options = parser().parse_args(arguments)
    if not options.minutes > 0:
        parser().error(f"argument --minutes: expected more than 0, got {options.minutes:g}")
    options.device = options.device or ("cpu" if options.dry_run else "cuda")
    options.backend = options.backend or ("reference" if options.dry_run else "triton")
    if options.device.startswith("cuda") and not torch.cuda.is_available():
        print("benchmarks.gpu: PyTorch sees no GPU here; nothing was run (--dry-run tries the code on the CPU)")
        return NO_GPU
    path: Path | None = options.out

    def write(outcomes: dict[str, Outcome]) -> None:
        nonlocal path
        if path is None and not options.dry_run and "device" in report.about(outcomes):
            path = report.default_path(outcomes)
        if path is not None:
            report.save(path, report.as_text(outcomes, options.backend))

    schedule = Schedule(options.minutes * 60, write)

    def wanted(jobs: list[Job]) -> list[Job]:
        return [j for j in jobs if not options.only or any(j.name.startswith(word) for word in options.only)]

    schedule.run([Job("environment", _worker(options, "environment"), 60)])
    side_by_side = 1 if options.dry_run else max(1, min(12, (os.cpu_count() or 2) - 2))
    schedule.run(wanted(untimed(options)), side_by_side, _UNTIMED_SECONDS if not options.dry_run else None)
    schedule.run(wanted(timed(options)))
    if not options.dry_run and sanitizer() is None:
        schedule.skip("memcheck and racecheck", "compute-sanitizer is neither on the PATH nor below CUDA_HOME")
    print(report.render(schedule.outcomes, options.backend))
    if path is not None:
        print(f"{path}")
    return 1 if report.wrong_answers(schedule.outcomes) else 0


if __name__ == "__main__":
    sys.exit(main())
