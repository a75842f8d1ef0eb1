"""A match: everybody who can run a case answers, is checked, is timed in turn, and is measured."""

from __future__ import annotations

import copy
import gc
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.answers import Answer, Verdict, WrongAnswer, answer_of, exact_answer, judge
from benchmarks.cases import Case
from benchmarks.contestants import Contestant, Entry
from benchmarks.interleave import Rounds, interleave
from benchmarks.lineup import YARDSTICKS
from benchmarks.machine import machine
from benchmarks.memory import Memory, memory_of, process_peaks
from benchmarks.networks import FULL_LINEUP
from benchmarks.peers import STOCK_BIAS, STOCK_BIAS_BF16, STOCK_INFERENCE

# Seconds of counted rounds.
BUDGET = {"layer": 1.5, "block": 3.0, "network": 15.0}


@dataclass(frozen=True)
class Plan:
    """How thorough to be.

    Args:
        timed: False checks the answers and no more.
        quick: Small images (:meth:`Case.quick`), two rounds, no compiler.
    """

    timed: bool = True
    quick: bool = False


@dataclass
class Match:
    """The outcome for one case.

    Args:
        case: What was run.
        contestants: Who was asked to, by key.
        absent: Key -> why it did not run.
        wrong: Key -> how its answer was wrong, or how it failed.
        verdicts: Key -> how right it was.
        rounds: Durations, of those that were right.
        memory: Key -> bytes.
        process_peaks: Key -> bytes, of networks.
        flops: Kind of work -> floating-point operations.
        moved: Bytes of input and output.
    """

    case: Case
    contestants: dict[str, Contestant]
    absent: dict[str, str] = field(default_factory=dict)
    wrong: dict[str, str] = field(default_factory=dict)
    verdicts: dict[str, Verdict] = field(default_factory=dict)
    rounds: Rounds | None = None
    memory: dict[str, Memory] = field(default_factory=dict)
    process_peaks: dict[str, int | None] = field(default_factory=dict)
    flops: dict[str, int] = field(default_factory=dict)
    moved: int = 0

    def fastest_peer(self, precision: str) -> str | None:
        """Key of the fastest step among the peers that train the biases in ``precision``."""
        medians = self.rounds.medians if self.rounds else {}
        peers = [
            key
            for key, c in self.contestants.items()
            if key in medians and not c.ours and c.kind == "step" and (c.method, c.precision) == ("bias", precision)
        ]
        return min(peers, key=lambda key: medians[key], default=None)

    def extra_info(self, key: str) -> dict[str, Any]:
        """All that is known about one contestant, as JSON."""
        contestant, case = self.contestants[key], self.case
        info: dict[str, Any] = {
            "case": case.name,
            "level": case.level,
            "input_size": list(case.input_size),
            "contestant": key,
            "label": contestant.label,
            "ours": contestant.ours,
            "kind": contestant.kind,
            "method": contestant.method,
            "precision": contestant.precision,
            "backend": contestant.backend,
            "limit": case.limit,
            "answer": asdict(self.verdicts[key]),
            "absent": self.absent,
            "saved_bytes": self.memory[key].saved,
            "peak_bytes": self.memory[key].peak,
            "memory_counted_by": self.memory[key].counted_by,
            "process_peak_bytes": self.process_peaks.get(key),
            "machine": machine(),
        }
        if self.rounds:
            info |= self._speed(key)
        return info

    def _speed(self, key: str) -> dict[str, Any]:
        contestant, rounds = self.contestants[key], self.rounds
        median = rounds.medians[key]
        peer = self.fastest_peer(contestant.precision)
        flops = self._flops(contestant)
        # Each tensor read once and written once; a step moves the gradients as well. Bit masks are a 32nd of it.
        moved = self.moved * (2 if contestant.kind == "step" else 1)
        return {
            "median_s": median,
            "medians_s": rounds.medians,
            "rounds": rounds.count,
            "ratio_to_stock_inference": rounds.ratio(key, to=STOCK_INFERENCE.key),
            "ratio_to_stock_bias": rounds.ratio(key, to=STOCK_BIAS.key),
            "fastest_peer": peer,
            "ratio_to_fastest_peer": rounds.ratio(key, to=peer) if peer else None,
            "images_per_s": self.case.batch / median,
            "gflops_per_s": flops / median / 1e9 if flops else None,
            "gb_per_s": moved / median / 1e9 if self.case.limit == "bytes" else None,
        }

    def _flops(self, contestant: Contestant) -> int | None:
        """Useful operations: what recomputation adds does not count. Unknown for methods that stock has no twin of."""
        if contestant.kind == "inference":
            return self.flops["inference"]
        return self.flops["bias"] if contestant.method == "bias" else None


def play(case: Case, contestants: Iterable[Contestant], plan: Plan) -> Match:
    """Build, check, time and measure.

    Args:
        case: What to run; full size, ``plan.quick`` shrinks it.
        contestants: Who is wanted; the yardsticks run in any case.
        plan: How thorough to be.

    Returns:
        The outcome. A wrong or failing contestant is in ``wrong`` and is not timed; all others go on.
    """
    case = case.quick() if plan.quick else case
    everybody = {c.key: c for c in (*YARDSTICKS, *contestants)}
    match = Match(case, everybody)
    stock = case.stock()
    entries = _enter(match, stock, plan)
    _check(match, entries, stock)
    if not plan.timed:
        return match
    bounds = {"min_rounds": 2, "max_rounds": 2} if plan.quick else {"budget": BUDGET[case.level]}
    # One round of warm-up, for the check has run everybody once already.
    match.rounds = interleave({key: entry.run for key, entry in entries.items()}, warmup=1, **bounds)
    match.memory = {key: memory_of(entry) for key, entry in entries.items()}
    match.flops = {"inference": _count(entries["stock_inference"]), "bias": _count(entries["stock_bias"])}
    output = entries["stock_inference"].run()
    match.moved = entries["stock_inference"].input.nbytes + output.nbytes
    keys = list(entries)
    entries.clear()
    torch.compiler.reset()
    gc.collect()
    # A fresh process takes ten seconds to get going: enough to try it once.
    if case.level == "network" and case.batch > 1 and (case.name == FULL_LINEUP or not plan.quick):
        match.process_peaks = process_peaks(case.name, keys, quick=plan.quick)
    return match


def _enter(match: Match, stock: nn.Module, plan: Plan) -> dict[str, Entry]:
    entries = {}
    for key, contestant in match.contestants.items():
        reason = contestant.unavailable(match.case)
        if reason is None and plan.quick and contestant.compiled:
            reason = "compiling takes longer than --quick has"
        if reason is not None:
            match.absent[key] = reason
            continue
        try:
            entries[key] = Entry(contestant, match.case, stock)
        except Exception as error:
            _fail(match, key, error)
    return entries


def _check(match: Match, entries: dict[str, Entry], stock: nn.Module) -> None:
    """Judge everybody; who is wrong leaves ``entries``."""
    exact, passing = exact_answer(match.case, stock)
    references: dict[str, Answer] = {}
    for twin in (STOCK_BIAS, STOCK_BIAS_BF16):
        if any(entry.contestant.precision == twin.precision for entry in entries.values()):
            references[twin.precision] = answer_of(Entry(twin, match.case, copy.deepcopy(stock)))
    for key, entry in list(entries.items()):
        try:
            got = answer_of(entry)
            match.verdicts[key] = judge(entry.contestant, got, references[entry.contestant.precision], exact, passing)
        except Exception as error:
            _fail(match, key, error)
            del entries[key]
            if key in (STOCK_INFERENCE.key, STOCK_BIAS.key):
                raise


def _fail(match: Match, key: str, error: Exception) -> None:
    what = str(error) if isinstance(error, WrongAnswer) else f"{type(error).__name__}: {error}"
    # A peer that cannot take a network is a fact about the peer; ours must.
    if match.contestants[key].ours or isinstance(error, WrongAnswer):
        match.wrong[key] = what
    else:
        match.absent[key] = f"fails: {what.splitlines()[0][:300]}"


def _count(entry: Entry) -> int:
    with FlopCounterMode(display=False) as counter:
        entry.run()
    return counter.get_total_flops()
