"""Times contestants in turn, A B C A B C ..., so that every ratio is of one run.

A machine's speed wanders by tens of percent over minutes: clock, neighbours, page cache. Two functions timed one after
the other differ by that much for nothing. Here every round times everybody once, so that what wanders hits all alike.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Rounds:
    """Durations of every round.

    Args:
        seconds: Contestant -> one duration a round, in seconds, the same number for everybody.
    """

    seconds: Mapping[str, list[float]]

    @property
    def count(self) -> int:
        """Rounds run."""
        return len(next(iter(self.seconds.values()), []))

    @property
    def medians(self) -> dict[str, float]:
        """Contestant -> median duration in seconds."""
        return {name: statistics.median(durations) for name, durations in self.seconds.items()}

    def ratio(self, name: str, to: str) -> float:
        """Median of ``name`` over median of ``to``; below 1, ``name`` is faster."""
        return self.medians[name] / self.medians[to]


def interleave(
    contestants: Mapping[str, Callable[[], object]],
    *,
    warmup: int = 2,
    min_rounds: int = 5,
    max_rounds: int = 40,
    budget: float = 20.0,
    clock: Callable[[], float] = time.perf_counter,
) -> Rounds:
    """Run everybody in turn, and time each call.

    Args:
        contestants: Name -> function without arguments. What it returns is dropped outside of its timing.
        warmup: Rounds that are run and not counted: caches, allocator, oneDNN's primitives, compilers.
        min_rounds, max_rounds: Bounds on the number of counted rounds.
        budget: Seconds of counted rounds after which no further round starts, once there are ``min_rounds``.
        clock: Seconds, monotonic.

    Returns:
        The durations.

    Raises:
        ValueError: There is nobody to time, or the numbers of rounds do not fit.

    Example:
        >>> rounds = interleave({"sum": lambda: sum(range(1000)), "len": lambda: len("abc")}, budget=0.1)
        >>> rounds.ratio("len", to="sum") < 1
        True
    """
    if not contestants:
        raise ValueError("contestants: expected at least one, got none")
    if not 1 <= min_rounds <= max_rounds:
        raise ValueError(f"min_rounds, max_rounds: expected 1 <= min <= max, got {min_rounds} and {max_rounds}")
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(warmup):
        for run in contestants.values():
            run()
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()  # a collection would be charged to whoever happens to run
    try:
        opened = clock()
        for done in range(max_rounds):
            if done >= min_rounds and clock() - opened > budget:
                break
            for name, run in contestants.items():
                start = clock()
                result = run()
                seconds[name].append(clock() - start)
                del result
    finally:
        if collecting:
            gc.enable()
    return Rounds(seconds)
