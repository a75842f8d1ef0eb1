"""Adam in 8 bits: Adam's first step exactly, its moments on average, and state and scratch memory as stated."""

from __future__ import annotations

import io
import math

import pytest
import torch
from torch import Tensor, nn

from tests.allocations import allocated
from tinytl_kernels.finetune import Adam8bit, adam8bit


def second_moment(optimizer: Adam8bit, parameter: Tensor) -> Tensor:
    state = optimizer.state[parameter]
    return (state["exp_avg_sq"].float() / 255) ** 4 * state["exp_avg_sq_scale"]


def network(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(3, 24, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(3), nn.Flatten(), nn.Linear(216, 10))


def learn(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> list[float]:
    """Teach the network what another one says about noise; returns the losses."""
    teacher, generator, losses = network(7), torch.Generator().manual_seed(1), []
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 * (1 + math.cos(math.pi * step / steps)) / 2
        x = torch.randn(16, 3, 8, 8, generator=generator) * torch.tensor([0.01, 0.1, 1.0]).view(1, 3, 1, 1)
        loss = nn.functional.cross_entropy(model(x), teacher(x).argmax(1))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def test_it_learns_as_adam_does() -> None:
    start, ours, theirs = network(), network(), network()
    loss = learn(ours, Adam8bit(ours.parameters()), 300)
    expected = learn(theirs, torch.optim.Adam(theirs.parameters()), 300)
    assert sum(expected[-30:]) < 0.9 * sum(expected[:30])
    assert sum(loss[-30:]) == pytest.approx(sum(expected[-30:]), rel=5e-3)
    for (name, one), other, before in zip(
        ours.named_parameters(), theirs.parameters(), start.parameters(), strict=True
    ):
        assert (one - other).norm() < 0.2 * (other - before).norm(), name


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.randn(9, 7),
        lambda: torch.randn(13),
        lambda: torch.randn(()),
        lambda: torch.randn(6, 5, 3, 3).to(memory_format=torch.channels_last),
        lambda: torch.randn(10, 4).t(),
        lambda: torch.randn(12, 12)[::2, ::3],  # holes: elements are not one block of memory
        lambda: torch.randn(3, 40000),  # a row larger than a chunk
        lambda: torch.randn(300, 130),  # several chunks, the last one short
        lambda: torch.randn(0, 4),
        lambda: torch.randn(8, 8, dtype=torch.float64),
    ],
    ids=["matrix", "vector", "number", "channels_last", "transposed", "strided", "wide", "tall", "empty", "float64"],
)
def test_the_first_step_is_adams(make, weight_decay: float) -> None:
    ours = nn.Parameter(make())
    theirs = nn.Parameter(ours.detach().clone())
    gradient = torch.randn_like(ours)
    for parameter, kind in ((ours, Adam8bit), (theirs, torch.optim.Adam)):
        parameter.grad = gradient.clone()
        kind([parameter], lr=1e-2, weight_decay=weight_decay).step()
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)


def test_a_bfloat16_parameter_is_updated_in_float32() -> None:
    parameter = nn.Parameter(torch.randn(64, 64).bfloat16())
    exact = nn.Parameter(parameter.detach().float())
    for one, kind in ((parameter, Adam8bit), (exact, torch.optim.Adam)):
        one.grad = torch.ones_like(one) * torch.linspace(-1, 1, 64).to(one.dtype)
        kind([one], lr=0.3).step()
    assert torch.equal(parameter, exact.bfloat16())


@pytest.mark.parametrize("falls_to", [0.1, 0.01])
def test_a_moment_whose_gradient_falls_comes_down(falls_to: float) -> None:
    """Rounded to the nearest code it would stay, because a step changes it by a thousandth."""
    ours, exact = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(2))
    optimizers = Adam8bit([ours], lr=0.0), torch.optim.Adam([exact], lr=0.0)
    for step in range(1500):
        for parameter, optimizer in zip((ours, exact), optimizers, strict=True):
            parameter.grad = torch.tensor([1.0, 0.5 if step < 100 else 0.5 * falls_to])
            optimizer.step()
    expected = optimizers[1].state[exact]["exp_avg_sq"]
    torch.testing.assert_close(second_moment(optimizers[0], ours)[0], expected, rtol=0.25, atol=0)


def test_small_gradients_keep_a_second_moment() -> None:
    """Divided by eps alone, such an update would be large: 1e-6 of the gradient over 1e-8."""
    parameter = nn.Parameter(torch.zeros(2))
    optimizer = Adam8bit([parameter], lr=1e-3)
    for _ in range(50):
        parameter.grad = torch.tensor([1.0, 1e-6])
        optimizer.step()
    assert (second_moment(optimizer, parameter) > 0).all()
    assert parameter.detach().abs().max() <= 50 * 1e-3 * 1.001


def test_gradients_of_zero_change_nothing() -> None:
    parameter = nn.Parameter(torch.randn(5, 5))
    before, optimizer = parameter.detach().clone(), Adam8bit([parameter])
    for _ in range(3):
        parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
    assert torch.equal(parameter, before)


def test_a_gradient_that_is_not_a_number_shows() -> None:
    parameter = nn.Parameter(torch.zeros(2, 3))
    optimizer = Adam8bit([parameter])
    for value in (math.nan, 1.0):
        parameter.grad = torch.ones(2, 3)
        parameter.grad[0, 1] = value
        optimizer.step()
    assert parameter[0].isnan().all()  # its row shares the scale
    assert parameter[1].isfinite().all()


def test_the_state_takes_two_bytes_an_element_and_two_scales_a_row() -> None:
    weight, bias = nn.Parameter(torch.zeros(40, 30, 3, 3)), nn.Parameter(torch.zeros(40))
    optimizer = Adam8bit([weight, bias])
    weight.grad, bias.grad = torch.ones_like(weight), torch.ones_like(bias)
    optimizer.step()

    def size(parameter: Tensor) -> int:
        return sum(value.numel() * value.element_size() for value in optimizer.state[parameter].values())

    assert size(weight) == 2 * weight.numel() + 8 * 40 + 4
    assert size(bias) == 2 * 40 + 8 + 4


def test_a_step_takes_eight_chunks_of_memory_whatever_the_parameter() -> None:
    parameter = nn.Parameter(torch.zeros(1000, 50, 5, 2).to(memory_format=torch.channels_last))
    optimizer = Adam8bit([parameter])
    parameter.grad = torch.ones_like(parameter)
    optimizer.step()  # makes the state
    peak, left = allocated(optimizer.step)
    assert peak <= 8 * 4 * adam8bit.CHUNK
    assert left == 0


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_a_restored_optimizer_goes_on_with_the_same_bits(layout: torch.memory_format) -> None:
    whole, halves = network().to(memory_format=layout), network().to(memory_format=layout)
    one, first = Adam8bit(whole.parameters()), Adam8bit(halves.parameters())
    learn(whole, one, 5), learn(halves, first, 5)
    file = io.BytesIO()
    torch.save({"model": halves.state_dict(), "optimizer": first.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    resumed = network(3).to(memory_format=layout)
    resumed.load_state_dict(saved["model"])
    second = Adam8bit(resumed.parameters(), lr=1.0)
    second.load_state_dict(saved["optimizer"])
    learn(whole, one, 5), learn(resumed, second, 5)
    for (name, expected), found in zip(whole.named_parameters(), resumed.parameters(), strict=True):
        assert torch.equal(found, expected), name
        for key, value in one.state[expected].items():
            assert second.state[found][key].dtype == value.dtype
            assert torch.equal(second.state[found][key], value), (name, key)


def test_loading_copies() -> None:
    parameter, other = nn.Parameter(torch.zeros(3, 3)), nn.Parameter(torch.zeros(3, 3))
    source, target = Adam8bit([parameter]), Adam8bit([other])
    parameter.grad = torch.ones(3, 3)
    source.step()
    target.load_state_dict(source.state_dict())
    other.grad = -torch.ones(3, 3)
    target.step()
    assert (source.state[parameter]["step"], target.state[other]["step"]) == (1, 2)
    assert not torch.equal(source.state[parameter]["exp_avg_scale"], target.state[other]["exp_avg_scale"])


def test_the_closures_loss_is_returned() -> None:
    parameter = nn.Parameter(torch.ones(1))
    optimizer = Adam8bit([parameter])

    def closure() -> Tensor:
        loss = parameter.square().sum()
        loss.backward()
        return loss

    assert optimizer.step(closure) == 1
    assert parameter < 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -1.0}, "lr: expected 0 or more, got -1.0"),
        ({"eps": math.nan}, "eps: expected 0 or more, got nan"),
        ({"weight_decay": -0.1}, "weight_decay: expected 0 or more, got -0.1"),
        ({"betas": (0.9, 1.0)}, r"betas: expected two numbers in \[0, 1\), got \(0.9, 1.0\)"),
    ],
)
def test_values_out_of_range_are_refused(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Adam8bit([nn.Parameter(torch.zeros(1))], **options)


def test_complex_parameters_and_sparse_gradients_are_refused() -> None:
    with pytest.raises(ValueError, match=r"real floating-point dtype, got torch\.complex64"):
        Adam8bit([nn.Parameter(torch.zeros(1, dtype=torch.complex64))])
    embedding = nn.Embedding(4, 2, sparse=True)
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(RuntimeError, match="sparse gradients"):
        Adam8bit(embedding.parameters()).step()
