"""Tuning, with kernels that the interpreter runs and a timer that says what the test wants."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from tinytl_kernels import ops, use_backend
from tinytl_kernels.backends.triton import tune
from tinytl_kernels.backends.triton.configurations import Choice, watch
from tinytl_kernels.backends.triton.frozen_conv import frozen_conv
from tinytl_kernels.backends.triton.launch import Launch, start
from tinytl_kernels.backends.triton.operators import OPERATORS
from tinytl_kernels.backends.triton.tiles import tile_shape
from tinytl_kernels.backends.triton.tune import Blank, Call, Trial, record, search, winners

CPU = torch.device("cpu")
WEIGHT = torch.randint(-1, 2, (24, 1, 3, 3)).float()


def step() -> None:
    x = torch.randn(1, 24, 6, 5).contiguous(memory_format=torch.channels_last).requires_grad_()
    with use_backend("triton"):
        y = ops.frozen_conv(x, WEIGHT, torch.zeros(24, requires_grad=True), 1, 1, 1, 24, "relu6")
        y = ops.frozen_conv(y, WEIGHT, torch.zeros(24, requires_grad=True), 1, 1, 1, 24, "relu6")
        F.relu(y).sum().backward()


def test_a_step_is_recorded_as_distinct_calls_without_data():
    calls = record(step)
    assert {(call.operator.__name__, count) for call, count in calls.items()} == {
        ("frozen_conv", 2),
        ("frozen_conv_backward", 2),
    }
    forward = next(call for call in calls if call.operator.__name__ == "frozen_conv")
    assert forward.arguments[0] == Blank((1, 24, 6, 5), (720, 1, 120, 24), torch.float32)
    assert not any(isinstance(a, torch.Tensor) for call in calls for a in call.arguments)


def conv_call() -> Call:
    x = torch.empty(1, 24, 6, 5).contiguous(memory_format=torch.channels_last)
    calls = record(lambda: frozen_conv(x, WEIGHT, None, (1, 1), (1, 1, 1, 1), (1, 1), 24, "relu6", True))
    (call,) = calls
    return call


class Timer:
    """A timer for which one candidate is fast and all others are slow."""

    def __init__(self, fast: int, gain: float = 0.5) -> None:
        self.fast, self.gain, self.calls = fast, gain, 0

    def __call__(self, run) -> float:
        run()
        self.calls += 1
        return 1.0 - self.gain * (self.calls - 1 == self.fast)


def only_choice(call: Call) -> tuple[Choice, tuple]:
    with watch() as seen:
        call.on(CPU)()
    ((choice, candidates),) = seen.items()
    return choice, candidates


def test_the_fastest_that_gives_the_same_answer_wins():
    call = conv_call()
    choice, candidates = only_choice(call)
    trials = search({call: 3}, Timer(fast=4), CPU)
    assert not trials[choice].failed
    assert winners(trials) == {choice: candidates[4]}
    assert trials[choice].seconds[candidates[4]] == 1.5  # three a step
    assert trials[choice].gain == 1.5


def test_a_gain_within_the_noise_changes_nothing():
    call = conv_call()
    assert winners(search({call: 1}, Timer(fast=4, gain=0.01), CPU)) == {}


def test_a_wrong_answer_is_left_out_however_fast():
    call = conv_call()
    choice, candidates = only_choice(call)

    def tried() -> bool:
        return tile_shape(6, 5, 24, (1, 1), (3, 3), torch.float32) == candidates[4]

    def broken(input, *rest):
        output, saved = frozen_conv(input, *rest)
        output[0, 0, 0, 0] += tried()
        return output, saved

    trials = search({Call(broken, call.arguments): 1}, lambda run: 0.5 if tried() else 1.0, CPU)
    assert set(trials[choice].failed) == {candidates[4]}
    assert "output 0: another answer" in trials[choice].failed[candidates[4]]
    assert winners(trials) == {}


def test_a_candidate_that_fails_is_left_out_and_the_others_go_on():
    call = conv_call()
    choice, candidates = only_choice(call)
    calls = 0

    def timer(run) -> float:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise RuntimeError("out of resource: shared memory\nand more")
        return 1.0

    trials = search({call: 1}, timer, CPU)
    assert trials[choice].failed == {candidates[2]: "RuntimeError: out of resource: shared memory"}
    assert len(trials[choice].seconds) == len(candidates) - 1


def test_a_candidate_that_failed_in_one_call_is_not_chosen_for_its_time_in_another():
    trial = Trial((1,), {(1,): 2.0, (2,): 0.5, (3,): 1.0}, {(2,): "wrong"})
    assert trial.best == (3,)


def test_a_candidate_that_spills_more_than_the_rule_is_left_out_however_fast():
    call = conv_call()
    choice, candidates = only_choice(call)

    def spilled() -> int:
        return {candidates[0]: 2, candidates[3]: 1}.get(tile_shape(6, 5, 24, (1, 1), (3, 3), torch.float32), 9)

    class Compiled:
        """A kernel that says what it spills; the interpreter's do not."""

        def __getitem__(self, grid):
            return lambda **arguments: SimpleNamespace(n_spills=spilled())

    def spilling(input, *rest):
        start(Launch(Compiled(), (1,), {}, {}))
        return frozen_conv(input, *rest)

    trials = search({Call(spilling, call.arguments): 1}, lambda run: 2.0 - spilled() / 10, CPU)
    assert set(trials[choice].failed) == set(candidates) - {candidates[0], candidates[3]}
    assert "spills 9 registers, the rule's kernels 2" in trials[choice].failed[candidates[4]]


def test_what_a_kernel_does_not_write_is_not_taken_for_an_answer():
    expected = (torch.ones(64, 64),)
    tune._check(expected, (got := torch.ones(64, 64),))
    assert got.isnan().all()  # the allocator hands the same memory to the next candidate
    with pytest.raises(ValueError, match="another answer"):
        tune._check(expected, (torch.full((64, 64), float("nan")),))


def image(channels: int) -> torch.Tensor:
    return torch.empty(1, channels, 6, 5).contiguous(memory_format=torch.channels_last)


def run_activation() -> None:
    y, mask = OPERATORS["activation"](image(16), "relu", 0.0, True)
    OPERATORS["activation_backward"](y, mask, "relu", 0.0)


def run_dropout() -> None:
    y, mask = OPERATORS["dropout"](image(16), 0.5)
    OPERATORS["dropout_backward"](y, mask, 0.5)


def run_group_norm() -> None:
    x, affine = image(16), (torch.empty(16), torch.empty(16))
    _, mean, rstd, _, _ = OPERATORS["group_norm_activation"](x, *affine, 2, 1e-5, "relu6", True)
    OPERATORS["group_norm_activation_backward"](x, x, mean, rstd, rstd, *affine, 2, "relu6", [True] * 3)


def run_dense() -> None:
    weight, geometry = torch.empty(16, 8, 2, 2), ((1, 1), (0, 1, 1, 0), (1, 1), 2)
    y, mask = frozen_conv(image(16), weight, torch.empty(16), *geometry, "relu", True)
    OPERATORS["frozen_conv_backward"](y, weight, mask, (1, 16, 6, 5), *geometry, "relu", True, True, True)


@pytest.mark.parametrize(
    ("run", "tunables"),
    [
        (run_activation, {"pixels.tile_sizes"}),
        (run_dropout, {"pixels.tile_sizes"}),
        (run_group_norm, {"group_norm.cut_shape"}),
        (run_dense, {"dense.tile_sizes", "choice.dense_by"}),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_every_candidate_gives_the_answer_of_the_rule(run, tunables):
    trials = search(record(run), lambda run: 1.0, CPU)
    assert {choice.tunable for choice in trials} == tunables
    for choice, trial in trials.items():
        assert not trial.failed, choice
        assert len(trial.seconds) > 1


def test_data_for_a_call_has_its_shapes_and_strides():
    expanded = Blank((2, 8, 4, 3), (8, 1, 0, 0), torch.float16)
    filled = expanded.filled(CPU)
    assert (tuple(filled.shape), filled.stride(), filled.dtype) == ((2, 8, 4, 3), (8, 1, 0, 0), torch.float16)
    assert filled.untyped_storage().nbytes() == 32
    assert Blank((0,), (1,), torch.uint8).filled(CPU).numel() == 0
