"""The optimizer in backward: the same bits, gradients that are gone at once, and clear words where it cannot be."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from tinytl_kernels.errors import TinyTLError
from tinytl_kernels.finetune import Adam8bit, Options, Process, Training, step_in_backward
from tinytl_kernels.models import InputConfig

from .conftest import RECIPE, make_data, make_tiny

QUIET = Options(checkpoints=False, progress=False, tensorboard=False)


def train(*, optimizer: str = "adam", epochs: int = 2, **options) -> Training:
    recipe = replace(RECIPE, optimizer=optimizer, epochs=epochs)
    training = Training(make_tiny(), make_data(), recipe, InputConfig(), options=replace(QUIET, **options))
    training.run()
    return training


def assert_same_bits(one: Training, other: Training) -> None:
    for name, value in one.model.state_dict().items():
        assert torch.equal(value, other.model.state_dict()[name]), name
    states = [training.optimizer.state_dict()["state"] for training in (one, other)]
    for index, state in states[0].items():
        for name, value in state.items():
            assert torch.equal(value, states[1][index][name]), (index, name)


@pytest.mark.parametrize("optimizer", ["adam", "adam8bit"])
def test_a_run_has_the_same_bits_with_and_without(optimizer: str) -> None:
    assert_same_bits(train(optimizer=optimizer), train(optimizer=optimizer, step_in_backward=True))


@pytest.mark.parametrize("optimizer", ["adam", "adam8bit"])
@pytest.mark.parametrize("before", [True, False])
def test_a_run_may_be_resumed_with_the_other_choice(optimizer: str, before: bool, tmp_path: Path) -> None:
    class Stop(Exception):
        pass

    recipe = replace(RECIPE, optimizer=optimizer, epochs=2)
    options = replace(QUIET, folder=tmp_path, checkpoints=True, step_in_backward=before)
    broken = Training(make_tiny(), make_data(), recipe, InputConfig(), options=options)
    after_first_epoch = broken._end_epoch

    def end_epoch(*args: object) -> None:
        after_first_epoch(*args)
        raise Stop

    broken._end_epoch = end_epoch
    with pytest.raises(Stop):
        broken.run()
    resumed = train(optimizer=optimizer, folder=tmp_path, resume=tmp_path / "last.pt", step_in_backward=not before)
    assert_same_bits(resumed, train(optimizer=optimizer))


def test_gradients_are_never_all_alive() -> None:
    model = nn.Sequential(*[layer for _ in range(6) for layer in (nn.Linear(8, 8), nn.ReLU())])
    alive = []
    optimizer = torch.optim.Adam(model.parameters())
    optimizer.register_step_pre_hook(lambda *_: alive.append(sum(p.grad is not None for p in model.parameters())))
    with step_in_backward(optimizer):
        model(torch.randn(2, 8)).sum().backward()
    assert alive == [1] * 12
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_parameter_used_twice_takes_one_step_on_the_sum() -> None:
    def step(in_backward: bool) -> tuple[nn.Linear, torch.optim.Optimizer]:
        torch.manual_seed(0)
        layer = nn.Linear(4, 4)
        optimizer = torch.optim.Adam(layer.parameters())
        loss = layer(layer(torch.linspace(-1, 1, 4))).square().sum()
        if in_backward:
            with step_in_backward(optimizer):
                loss.backward()
        else:
            loss.backward()
            optimizer.step()
        return layer, optimizer

    (ours, optimizer), (theirs, _) = step(True), step(False)
    assert torch.equal(ours.weight, theirs.weight)
    assert optimizer.state[ours.weight]["step"] == 1


def test_after_the_block_gradients_stay() -> None:
    model = nn.Linear(2, 2)
    optimizer = Adam8bit(model.parameters())
    with step_in_backward(optimizer):
        pass
    model(torch.ones(1, 2)).sum().backward()
    assert model.weight.grad is not None
    assert not optimizer.state


def test_gradients_from_before_are_refused() -> None:
    model = nn.Linear(2, 2)
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.ones(1, 2)).sum().backward()
    with pytest.raises(ValueError, match=r"2 of 2 .* hold one; call optimizer\.zero_grad"), step_in_backward(optimizer):
        pass
    assert not model.weight._post_accumulate_grad_hooks


@pytest.mark.parametrize(
    ("changed", "process", "message"),
    [
        ({"accumulate": 4}, Process(torch.device("cpu")), "gradients of 4 forward passes cannot be added up"),
        ({"amp": "float16"}, Process(torch.device("cpu")), "use --amp bfloat16"),
        ({}, Process(torch.device("cpu"), 0, 2), "gradients of 2 processes are averaged after backward"),
    ],
)
def test_what_needs_all_gradients_is_refused(changed: dict, process: Process, message: str) -> None:
    options = replace(QUIET, step_in_backward=True)
    with pytest.raises(TinyTLError, match=message):
        Training(make_tiny(), make_data(), replace(RECIPE, **changed), InputConfig(), process=process, options=options)


def test_a_loss_that_is_not_a_number_does_not_reach_the_parameters() -> None:
    model = make_tiny()
    with torch.no_grad():
        model[8].bias.fill_(float("nan"))
    before = model[3].weight.detach().clone()
    options = replace(QUIET, step_in_backward=True)
    with pytest.raises(TinyTLError, match="the loss became nan in epoch 1"):
        Training(model, make_data(), RECIPE, InputConfig(), options=options).run()
    assert torch.equal(model[3].weight, before)
    assert not model[3].weight._post_accumulate_grad_hooks


def test_an_unknown_optimizer_is_refused() -> None:
    with pytest.raises(TinyTLError, match="optimizer: expected one of adam, adam8bit, got 'sgd'"):
        replace(RECIPE, optimizer="sgd")
