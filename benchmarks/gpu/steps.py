"""Training steps on a GPU beside their peers': layers, blocks, networks; answers checked, eager and as CUDA graphs."""

from __future__ import annotations

import contextlib
import copy
import gc
import statistics
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace

import torch
from torch import Tensor, nn

from benchmarks import ours, peers
from benchmarks.answers import answer_of, exact_answer, judge
from benchmarks.cases import Case
from benchmarks.contestants import Contestant, Entry, always
from benchmarks.gpu.schedule import Row
from benchmarks.gpu.worker import Context
from tinytl_kernels.backends.triton.timing import Stopwatch, captured

STOCK_BIAS = "stock_bias"
COMPILED = "compiled"


class DeviceEntry(Entry):
    """A contestant on a device.

    Args:
        contestant: Who.
        case: What.
        stock: The stock module on the CPU; it is copied.
        input: On the device, shared by everybody; it is not copied, unless a gradient is asked of it.
    """

    def __init__(self, contestant: Contestant, case: Case, stock: nn.Module, input: Tensor) -> None:
        self.contestant = contestant
        self.case = case
        # Folding and converting look at an example, of which a few images say as much.
        few = replace(case, input_size=(min(case.batch, 2), *case.input_size[1:]))
        module = contestant.build(copy.deepcopy(stock).requires_grad_(False), few)
        self.module = module.to(input.device)
        self.parameters = [p for p in self.module.parameters() if p.requires_grad]
        self.input = input
        if case.inner:
            precision = torch.bfloat16 if contestant.precision == "bfloat16" else torch.float32
            self.input = input.detach().clone().to(precision).requires_grad_(contestant.kind == "step")
        self.target = torch.arange(case.batch, device=input.device)
        self._grad_output = None

    @contextlib.contextmanager
    def setting(self) -> Iterator[None]:
        half = self.contestant.precision == "bfloat16"
        with self.backend(), torch.autocast(self.input.device.type, torch.bfloat16, enabled=half):
            yield

    def peak(self) -> int | None:
        """Most bytes alive in a step beyond what was alive before it; None where nobody counts."""
        device = self.input.device
        if device.type != "cuda":
            return None
        self.clear()
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        self.run()
        peak = torch.cuda.max_memory_allocated(device) - before
        self.clear()
        return peak


@dataclass(frozen=True)
class Times:
    """Median seconds of rounds in which everybody took a turn."""

    eager: dict[str, float]
    graph: dict[str, float]
    rounds: int


def contestants(level: str, precision: str, context: Context) -> tuple[list[Contestant], list[Contestant]]:
    """Everybody who runs in the first match, and those of the second, that with torch.compile.

    What takes a minute to compile must not cost the rows of those that do not.
    """
    backends = list(dict.fromkeys(("reference", context.backend)))
    methods = ["bias"] if level == "layer" else ["bias", "lite_residual+bias"]
    mine = [
        c
        for backend in backends
        for c in ours.contestants(backend, *(methods if backend == context.backend else ["bias"]), half=False)
    ]
    first = [peers.STOCK_INFERENCE, peers.STOCK_BIAS, peers.FOLDED]
    if level == "network":
        first.append(peers.STOCK_FULL)
    tested = next(c for c in mine if c.backend == context.backend)
    second = [peers.STOCK_BIAS, peers.COMPILED, tested]
    return [_in(precision, c) for c in (*first, *mine)], [_in(precision, c) for c in second]


def _in(precision: str, contestant: Contestant) -> Contestant:
    # Whether a backend can run is the device's question here, not the CPU's; it is an error, and so a row, if not.
    keep = contestant.unavailable if contestant.key in ("folded", "memsave") else always
    return replace(contestant, precision=precision, unavailable=keep)


def matches(case: Case, stock: nn.Module, precision: str, context: Context) -> Iterator[Row]:
    """Rows of all contestants of a case: answers, medians, peak memory.

    Args:
        case: What.
        stock: Its stock module, on the CPU; one serves several batch sizes.
        precision: ``"float32"``, or ``"bfloat16"`` by autocast.
        context: Where, and how long.
    """
    first, second = contestants(case.level, precision, context)
    if context.device.type != "cuda":
        second = []  # Inductor writes C++ there, which takes minutes to compile and is no peer of ours
    if context.warm:
        yield from _warm(case, stock, [*(c for c in first if c.backend == context.backend), *second], context)
        return
    yield from _match(case, stock, first, "first", context)
    if second and context.left > 10:
        yield from _match(case, stock, second, "compiled", context)


def _enter(
    case: Case, stock: nn.Module, everybody: list[Contestant], context: Context
) -> Iterator[tuple[Contestant, DeviceEntry | None, str]]:
    """Each contestant ready to run, or None and why it is not."""
    generator = torch.Generator(context.device).manual_seed(20260101)
    input = torch.randn(case.input_size, generator=generator, device=context.device)
    input = input.contiguous(memory_format=torch.channels_last)
    for contestant in everybody:
        if reason := contestant.unavailable(case):
            yield contestant, None, reason
            continue
        try:
            yield contestant, DeviceEntry(contestant, case, stock, input), ""
        except Exception as error:
            yield contestant, None, _told(error)


def _warm(case: Case, stock: nn.Module, everybody: list[Contestant], context: Context) -> Iterator[Row]:
    for contestant, entry, why in _enter(case, stock, everybody, context):
        started = time.monotonic()
        if entry is not None and context.left > 0:
            try:
                entry.run()
            except Exception as error:
                why = _told(error)
        del entry
        yield {"warm": case.name, "contestant": contestant.key, "seconds": time.monotonic() - started, "note": why}


def _match(case: Case, stock: nn.Module, everybody: list[Contestant], match: str, context: Context) -> Iterator[Row]:
    rows: dict[str, Row] = {}
    entries: dict[str, DeviceEntry] = {}
    for contestant, entry, why in _enter(case, stock, everybody, context):
        rows[contestant.key] = {
            "case": case.name, "level": case.level, "batch": case.batch, "match": match,
            "contestant": contestant.key, "label": contestant.label, "ours": contestant.ours,
            "backend": contestant.backend, "method": contestant.method, "kind": contestant.kind,
            "precision": contestant.precision, "absent": why,
        }  # fmt: skip
        if entry is not None:
            entries[contestant.key] = entry
    # Memory first: what a graph keeps, or a judge, would be in the way.
    for key, entry in list(entries.items()):
        try:
            entry.run()
            rows[key]["peak_bytes"] = entry.peak()
        except Exception as error:
            rows[key]["absent" if not entry.contestant.ours else "wrong"] = _told(error)
            del entries[key]
    _judge(case, stock, entries, rows, context)
    times = _time(entries, rows, context)
    for key, row in rows.items():
        row["eager_s"], row["graph_s"] = times.eager.get(key), times.graph.get(key)
        row["rounds"] = times.rounds
        yield row
    entries.clear()
    gc.collect()
    if context.device.type == "cuda":
        torch.cuda.empty_cache()


def _judge(
    case: Case, stock: nn.Module, entries: Mapping[str, DeviceEntry], rows: dict[str, Row], context: Context
) -> None:
    """Compare every answer with stock PyTorch's in float64. Who is wrong is timed too, and the row says so."""
    if STOCK_BIAS not in entries:
        return
    try:
        twin = entries[STOCK_BIAS]
        exact, passing = exact_answer(case, stock, twin.input.detach())
        reference = answer_of(twin)
    except torch.cuda.OutOfMemoryError:
        for row in rows.values():
            row["unchecked"] = "no room for float64"
        return
    for key, entry in entries.items():
        try:
            rows[key]["answer"] = asdict(judge(entry.contestant, answer_of(entry), reference, exact, passing))
        except Exception as error:
            rows[key]["wrong"] = _told(error)
        entry.clear()


def _time(entries: Mapping[str, DeviceEntry], rows: dict[str, Row], context: Context) -> Times:
    """Rounds in which everybody takes a turn, first eager, then as CUDA graphs."""
    network = any(entry.case.level == "network" for entry in entries.values())
    stopwatch = Stopwatch(context.device, flush=not network)
    eager = _rounds({key: entry.run for key, entry in entries.items()}, stopwatch, context)
    graphs = {}
    if context.device.type == "cuda":
        # Nobody looks at what a replay leaves, so that all graphs may work in the same memory.
        pool = torch.cuda.graph_pool_handle()
        for key, entry in entries.items():
            try:
                graphs[key] = captured(entry.run, pool)
            except Exception as error:
                rows[key]["no_graph"] = _told(error)
                with contextlib.suppress(RuntimeError):
                    torch.cuda.synchronize()
    graph = _rounds(graphs, stopwatch, context) if graphs else {}
    count = min((len(seconds) for seconds in (*eager.values(), *graph.values())), default=0)
    return Times(_medians(eager), _medians(graph), count)


def _rounds(runs: Mapping, stopwatch: Stopwatch, context: Context) -> dict[str, list[float]]:
    least, most, budget = (1, 1, 0.0) if context.tiny else (5, 25, 2.5)
    for run in runs.values():
        run()
    seconds: dict[str, list[float]] = {key: [] for key in runs}
    opened = time.monotonic()
    for done in range(most):
        if done >= least and (time.monotonic() - opened > budget or context.left < 0):
            break
        for key, run in runs.items():
            seconds[key].append(stopwatch.once(run))
    return seconds


def _medians(seconds: Mapping[str, list[float]]) -> dict[str, float]:
    return {key: statistics.median(durations) for key, durations in seconds.items()}


def _told(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0][:300]
