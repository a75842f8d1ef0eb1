"""The stopwatch on the CPU, and on a GPU that is played: what is called, in which order, with which arguments."""

from __future__ import annotations

from unittest.mock import MagicMock, create_autospec

import pytest
import torch

from tinytl_kernels.backends.triton.timing import Stopwatch, captured


def test_on_the_cpu_it_takes_the_median_of_the_rounds():
    calls = []
    seconds = Stopwatch("cpu").median(lambda: calls.append(None), rounds=5, warmup=3)
    assert len(calls) == 8
    assert 0 <= seconds < 1


class Event:
    """An event of a played GPU: a clock that goes on by a second a reading."""

    now = 0

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing
        self.at = None

    def record(self) -> None:
        Event.now += 1
        self.at = Event.now

    def synchronize(self) -> None:
        assert self.at is not None

    def elapsed_time(self, end: Event) -> float:
        return 1e3 * (end.at - self.at)  # milliseconds


def test_the_cache_is_emptied_outside_of_what_is_timed(monkeypatch):
    order = []
    monkeypatch.setattr(torch.cuda, "Event", Event)
    stopwatch = Stopwatch("cuda", flush=False)
    stopwatch._rinse = MagicMock(zero_=lambda: order.append(("rinse", Event.now)))
    start = Event.now
    assert stopwatch.once(lambda: order.append(("run", Event.now))) == 1.0
    assert order == [("rinse", start), ("run", start + 1)]


@pytest.fixture
def played(monkeypatch):
    """Streams and graphs that do nothing, with the signatures of PyTorch's."""
    graph = create_autospec(torch.cuda.graph)
    for name in ("Stream", "current_stream", "CUDAGraph"):
        monkeypatch.setattr(torch.cuda, name, MagicMock())
    monkeypatch.setattr(torch.cuda, "stream", create_autospec(torch.cuda.stream, return_value=MagicMock()))
    monkeypatch.setattr(torch.cuda, "graph", graph)
    graph.return_value.__enter__ = lambda self: None
    graph.return_value.__exit__ = lambda self, *error: None
    return graph


def test_a_call_is_warmed_up_and_recorded_on_one_stream_and_then_replayed(played):
    calls = []
    replay = captured(lambda: calls.append(played.called), pool=(0, 1))
    assert calls == [False, False, True]
    stream = torch.cuda.Stream.return_value
    assert played.call_args.kwargs == {"pool": (0, 1), "stream": stream}
    assert torch.cuda.stream.call_args.args == (stream,)
    replay()
    replay()
    assert len(calls) == 3
    assert torch.cuda.CUDAGraph.return_value.replay.call_count == 2


def test_a_stream_that_is_given_is_taken(played):
    stream = MagicMock()
    captured(lambda: None, stream=stream)
    assert played.call_args.kwargs["stream"] is stream
    torch.cuda.Stream.assert_not_called()
