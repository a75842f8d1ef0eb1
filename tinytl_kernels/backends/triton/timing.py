"""Seconds on a device: CUDA events around a call, nothing of the last call left in the L2 cache, medians."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

Run = Callable[[], object]


class Stopwatch:
    """Times calls on one device; on the CPU by the clock of the process, so that what uses it can be tried there.

    Args:
        device: Where the calls work.
        flush: Empty the L2 cache before each call, as between the layers of a network that is larger than it.
    """

    def __init__(self, device: torch.device | str, *, flush: bool = True) -> None:
        self.device = torch.device(device)
        self._on_gpu = self.device.type == "cuda"
        self._rinse = None
        if self._on_gpu and flush:
            l2 = getattr(torch.cuda.get_device_properties(self.device), "L2_cache_size", 0)
            # It also keeps the GPU busy for about 0.1 ms, in which the call to be timed is queued.
            self._rinse = torch.empty(max(4 * l2, 256 << 20), dtype=torch.uint8, device=self.device)

    def once(self, run: Run) -> float:
        """Seconds of one call; waits for it."""
        if not self._on_gpu:
            start = time.perf_counter()
            run()
            return time.perf_counter() - start
        if self._rinse is not None:
            self._rinse.zero_()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3

    def median(self, run: Run, *, rounds: int = 15, warmup: int = 2) -> float:
        """Median seconds of ``rounds`` calls."""
        for _ in range(warmup):
            run()
        return statistics.median(self.once(run) for _ in range(rounds))


def captured(run: Run, pool: tuple[int, int] | None = None, stream: torch.cuda.Stream | None = None) -> Run:
    """``run`` as a CUDA graph: what it launches, without the time that Python takes to launch it.

    Args:
        run: Called twice to warm up, then once to be recorded.
        pool: Memory to work in, from ``torch.cuda.graph_pool_handle``; by default its own. Graphs that share one spoil
            each other's results.
        stream: Where ``run`` works; by default one of its own. A backward works on the stream of its forward: where
            the forward is not a part of ``run``, it must have been on this one.

    Returns:
        What replays it. It keeps the memory of the recorded call.
    """
    stream = torch.cuda.Stream() if stream is None else stream
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool, stream=stream):
        kept = run()

    def replay() -> object:
        graph.replay()
        return kept

    return replay
