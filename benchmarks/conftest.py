"""pytest's side: options, one match a case shared by its contestants, and their durations for pytest-benchmark."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

import tinytl_kernels as tk
from benchmarks import peers
from benchmarks.cases import Case
from benchmarks.contestants import Contestant
from benchmarks.kernels import KernelCase
from benchmarks.lineup import lineup
from benchmarks.machine import machine
from benchmarks.match import Match, Plan, play
from benchmarks.roofline import BACKEND, Direction, Measurement, WrongKernel, check, measure

_HERE = Path(__file__).parent


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("tinytl_kernels benchmarks")
    group.addoption(
        "--quick", action="store_true", help="small images and two rounds: tries the suite, measures nothing"
    )
    group.addoption("--everything", action="store_true", help="every contestant on every network, also the slow ones")
    group.addoption("--threads", type=int, help="threads of PyTorch (default: PyTorch's own choice)")


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--benchmark-only", default=False):
        config.option.benchmark_disable = False  # a default of the tests, which pytest-benchmark takes for a conflict
    peers.EVERYTHING = bool(config.getoption("--everything", default=False))
    if threads := config.getoption("--threads", default=None):
        torch.set_num_threads(threads)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.pluginmanager.hasplugin("timeout"):
        for item in items:
            if item.path.is_relative_to(_HERE):
                item.add_marker(pytest.mark.timeout(0))  # the first test of a case plays the match for all


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict) -> None:
    machine_info["tinytl_kernels"] = machine()


def pairs(cases: tuple[Case, ...]) -> list:
    """pytest parameters: every contestant of every case."""
    return [
        pytest.param(case, contestant, id=f"{case.name}-{contestant.key}")
        for case in cases
        for contestant in lineup(case.level)
    ]


class Replay:
    """A timer that hands out durations which were measured already.

    pytest-benchmark times one test after the other; a ratio of two of its medians would compare two moments of the
    machine. The rounds are therefore run in turn by :func:`benchmarks.interleave.interleave`, and pytest-benchmark
    reads them off this clock, so that its statistics, JSON and comparisons are those of the interleaved rounds.
    """

    __name__ = "interleaved perf_counter"

    def __init__(self) -> None:
        self._readings: Iterator[float] = iter(())

    def load(self, durations: list[float]) -> None:
        """Hand these out, in order."""
        self._readings = iter([reading for duration in durations for reading in (0.0, duration)])

    def __call__(self) -> float:
        return next(self._readings)


REPLAY = Replay()


@pytest.fixture(scope="session")
def matches(request: pytest.FixtureRequest) -> Callable[[Case, bool], Match]:
    """``matches(case, timed)``: the outcome for a case, played once for all its selected contestants."""
    played: dict[tuple[str, bool], Match] = {}
    wanted: dict[str, list[Contestant]] = {}
    for item in request.session.items:
        parameters = getattr(item, "callspec", None)
        if parameters and {"case", "contestant"} <= set(parameters.params):
            wanted.setdefault(parameters.params["case"].name, []).append(parameters.params["contestant"])

    def outcome(case: Case, timed: bool) -> Match:
        if (case.name, timed) not in played:
            plan = Plan(timed, request.config.getoption("--quick"))
            played[case.name, timed] = play(case, wanted[case.name], plan)
        return played[case.name, timed]

    return outcome


@pytest.fixture
def take_part(benchmark, matches) -> Callable[[Case, Contestant], None]:
    """``take_part(case, contestant)``: skip, fail, or report one contestant's share of the match."""

    def report(case: Case, contestant: Contestant) -> None:
        match = matches(case, not benchmark.disabled)
        if reason := match.absent.get(contestant.key):
            pytest.skip(reason)
        if wrong := match.wrong.get(contestant.key):
            pytest.fail(f"{contestant.key} on {case.name}: {wrong}", pytrace=False)
        _replay(benchmark, case.name, match.rounds.seconds[contestant.key] if match.rounds else [0.0])
        if match.rounds:
            benchmark.extra_info.update(match.extra_info(contestant.key))

    return report


@pytest.fixture(scope="session")
def measured_kernels() -> dict[str, dict[Direction, Measurement]]:
    """What the two directions of a kernel share: both are timed in the same rounds."""
    return {}


@pytest.fixture
def against_limit(benchmark, request, measured_kernels) -> Callable[[KernelCase, Direction], None]:
    """``against_limit(kernel, direction)``: skip, fail, or report one direction of a kernel."""
    state = tk.available_backends()[BACKEND]
    if state != "available":
        pytest.skip(f"backend {BACKEND}: {state}")
    quick = request.config.getoption("--quick")

    def report(kernel: KernelCase, direction: Direction) -> None:
        try:
            if benchmark.disabled:
                check(kernel.quick() if quick else kernel)
                return
            if kernel.name not in measured_kernels:
                measured_kernels[kernel.name] = measure(kernel, quick=quick)
        except WrongKernel as error:
            pytest.fail(str(error), pytrace=False)
        measurement = measured_kernels[kernel.name][direction]
        _replay(benchmark, kernel.name, measurement.seconds)
        benchmark.extra_info.update(measurement.info)

    return report


def _replay(benchmark, group: str, durations: list[float]) -> None:
    REPLAY.load(durations)
    benchmark.group = group
    benchmark.pedantic(lambda: None, rounds=len(durations))
