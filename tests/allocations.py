"""What a function really allocates: PyTorch's own CPU allocator, traced, temporaries inside ATen included."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch.profiler import ProfilerActivity, profile


def allocated(function: Callable[[], object]) -> tuple[int, int]:
    """(peak, left) bytes on top of what was there before ``function()``; what it returns is still held for ``left``."""
    with _no_collection(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
        result = function()
        held = torch.empty(7919, dtype=torch.uint8)  # marks the end of the function in the trace
    del result, held
    events = [e for e in trace.profiler.kineto_results.events() if e.name() == "[memory]"]
    now, peak = 0, 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        if event.nbytes() == 7919:
            return peak, now
        now += event.nbytes()
        peak = max(peak, now)
    raise AssertionError("the end of the function is not in the trace")


def steadily_allocated(function: Callable[[], object], calls: int = 4) -> tuple[int, int]:
    """The least of several calls: a thread that takes its first task of a kind grows scratch memory that it keeps, and
    which of several threads takes one is chance."""
    return min(allocated(function) for _ in range(calls))


@contextmanager
def _no_collection() -> Iterator[None]:
    """What earlier tests left in reference cycles is finalised now, not while a function's allocations are counted."""
    gc.collect()
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()
