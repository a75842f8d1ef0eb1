"""How near a kernel comes to its limit: its operations at the machine's best rate, or a copy of as many bytes.

The longer of the two times is the limit. The bytes are the floor: inputs, outputs, weights and what is kept for
backward, each read once and written once. The copy moves exactly as many, half of them read and half written, between
tensors that stay the same, in the same rounds: what fits a cache is held against a copy that fits it, too.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch

import tinytl_kernels as tk
from benchmarks.gpu.bandwidth import prepared
from benchmarks.gpu.operators import Difference, OperatorCase, difference
from benchmarks.interleave import Rounds, interleave
from benchmarks.kernels import KernelCase
from benchmarks.machine import arithmetic_gflops, machine
from tinytl_kernels.backends import backend_module

try:
    import resource
except ModuleNotFoundError:  # Windows
    resource = None

Direction = Literal["forward", "backward"]
Run = Callable[[], object]
DIRECTIONS: tuple[Direction, ...] = ("forward", "backward")
BACKEND = "cpu"
_CPU = torch.device("cpu")
# Seconds of counted rounds, which a kernel's two directions and their two copies share.
_BUDGET = 0.8


class WrongKernel(AssertionError):
    """A kernel computes something else than the reference."""


@dataclass(frozen=True)
class Limit:
    """What a kernel cannot be faster than.

    Args:
        arithmetic_s: Its operations at the machine's best rate.
        copy_s: A copy that moves as many bytes.
    """

    arithmetic_s: float
    copy_s: float

    @property
    def seconds(self) -> float:
        """The longer of the two."""
        return max(self.arithmetic_s, self.copy_s)

    @property
    def nearer(self) -> Literal["arithmetic", "copy"]:
        """Which of the two it is."""
        return "arithmetic" if self.arithmetic_s > self.copy_s else "copy"


@dataclass(frozen=True)
class Measurement:
    """One direction of a kernel.

    Args:
        seconds: Of every round.
        info: What is known about it, as JSON.
    """

    seconds: list[float]
    info: dict[str, Any]


def check(case: KernelCase) -> Difference:
    """Compare a kernel's answer with the reference's.

    Raises:
        WrongKernel: A tensor is off by more than it may; the message names it.
    """
    found = difference(OperatorCase(case.name, case.make(case.size).build), "float32", _CPU, BACKEND)
    if not found.right:
        raise WrongKernel(f"{case.name}, {found.tensor}: off by {found.error:.2e}, allowed {found.allowed:.2e}")
    return found


def measure(case: KernelCase, *, quick: bool) -> dict[Direction, Measurement]:
    """Check a kernel, time it in turn with the copies, and put everything known about it together.

    Args:
        case: What.
        quick: Small images, two rounds.

    Raises:
        WrongKernel: It computes something else than the reference.
    """
    case = case.quick() if quick else case
    answer = check(case)
    work = case.make(case.size)
    bounds = {"min_rounds": 2, "max_rounds": 2} if quick else {"min_rounds": 7, "max_rounds": 200, "budget": _BUDGET}
    with tk.use_backend(BACKEND):
        parts, calls = _prepared(case), _prepared(case.tiny())
        runs = {direction: parts[direction][0] for direction in DIRECTIONS}
        copies = {_copy_of(direction): _copy(parts[direction][1]) for direction in DIRECTIONS}
        rounds = interleave(runs | copies, **bounds)
        info = {
            direction: {
                "computed_by": computed_by(run),
                "page_faults": _page_faults(run),
                "call_s": min(interleave({"call": calls[direction][0]}, max_rounds=20).seconds["call"]),
            }
            for direction, run in runs.items()
        }
    flops = dict(zip(DIRECTIONS, (work.forward_flops, work.backward_flops), strict=True))
    common = {
        "case": case.name,
        "level": "kernel",
        "input_size": list(case.size),
        "precision": "float32",
        "backend": BACKEND,
        "answer": asdict(answer),
        "machine": machine(),
        "rounds": rounds.count,
    }
    return {
        direction: Measurement(
            rounds.seconds[direction],
            common
            | {"direction": direction}
            | info[direction]
            | _speed(rounds, direction, flops[direction], parts[direction][1]),
        )
        for direction in DIRECTIONS
    }


def _prepared(case: KernelCase) -> dict[str, tuple[Run, int]]:
    torch.manual_seed(20260101)
    return prepared(case.make(case.size).build(torch.float32, _CPU))


def _speed(rounds: Rounds, direction: Direction, flops: int, moved: int) -> dict[str, Any]:
    seconds, copy_s = rounds.medians[direction], rounds.medians[_copy_of(direction)]
    limit = Limit(flops / arithmetic_gflops(machine()) / 1e9, copy_s)
    return {
        "median_s": seconds,
        "flops": flops,
        "bytes": moved,
        "gflops_per_s": flops / seconds / 1e9 if flops else None,
        "gb_per_s": moved / seconds / 1e9,
        "copy_gb_per_s": moved / copy_s / 1e9,
        "limit": limit.nearer,
        "limit_s": limit.seconds,
        "of_limit": limit.seconds / seconds,
    }


def _copy_of(direction: Direction) -> str:
    return f"{direction} copy"


def _copy(moved: int) -> Run:
    source = torch.zeros(max(1, moved // 2), dtype=torch.uint8)
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


def computed_by(run: Run) -> list[str]:
    """The C++ operators that a call reaches, without their namespace, and oneDNN; ``["ATen"]`` if neither."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        run()
    names = [event.name for event in profile.events()]
    ours = [name.removeprefix("tinytl_cpu::") for name in names if name.startswith("tinytl_cpu::")]
    backend = backend_module(BACKEND)
    wrappers = {*backend.DIFFERENTIABLE, *backend.FUSED}  # of kernels that are shown by their own names
    ours = [name for name in ours if name not in wrappers]
    library = ["oneDNN"] if any("convolution" in name for name in names) else []
    return list(dict.fromkeys(library + ours)) or ["ATen"]


def _page_faults(run: Run, times: int = 5) -> float | None:
    """Pages of memory that the system hands out afresh in a call: results that the allocator maps anew every time."""
    if resource is None:
        return None
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(times):
        run()
    return (resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) / times
