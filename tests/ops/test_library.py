"""An operator called directly and through the dispatcher is the same operator."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from tinytl_kernels import ops
from tinytl_kernels.ops import library


def block(x: Tensor, bias: Tensor) -> Tensor:
    """Three operators, one of them with an autocast rule."""
    weight = torch.linspace(-1, 1, 12 * 8 * 9).reshape(12, 8, 3, 3)
    y = ops.frozen_conv(x, weight, bias, padding=1, activation="relu6")
    return ops.avg_pool2d(ops.max_pool2d(y, 2), 2)


def run(x: Tensor, bias: Tensor, **autocast: object) -> list[Tensor]:
    x, bias = x.detach().requires_grad_(), bias.detach().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bool(autocast)):
        y = block(x, bias)
    return [y, *torch.autograd.grad(y.square().sum(), [x, bias])]


@pytest.fixture
def inputs() -> tuple[Tensor, Tensor]:
    return torch.randn(2, 8, 9, 10), torch.randn(12)


class Names(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("autocast", [{}, {"enabled": True}], ids=["plain", "autocast"])
def test_both_ways_give_the_same_bits(inputs, autocast) -> None:
    direct = run(*inputs, **autocast)
    with Names():
        dispatched = run(*inputs, **autocast)
    for ours, theirs in zip(direct, dispatched, strict=True):
        assert ours.dtype == theirs.dtype
        assert ours.stride() == theirs.stride()
        assert torch.equal(ours, theirs)


def test_a_dispatch_mode_sees_the_operators(inputs) -> None:
    with Names() as names:
        run(*inputs)
    assert {"tinytl.frozen_conv.default", "tinytl.frozen_conv_backward.default"} <= set(names.seen)


def test_plain_eager_calls_leave_the_dispatcher_out(inputs) -> None:
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        run(*inputs)
    names = {event.key for event in profiled.key_averages()}
    assert "frozen_conv" in names  # the autograd node
    assert "tinytl::frozen_conv" not in names


class Subclass(Tensor):
    """A tensor that some system wraps around another."""


@pytest.mark.parametrize(
    "tensor",
    [
        pytest.param(lambda x: x.as_subclass(Subclass), id="subclass"),
        pytest.param(lambda x: x.to("meta"), id="meta"),
    ],
)
def test_what_is_no_plain_tensor_goes_through_the_dispatcher(inputs, tensor, monkeypatch) -> None:
    def refuse(self, args):
        raise AssertionError("called directly")

    monkeypatch.setattr(library.Operator, "_run", refuse)
    assert ops.avg_pool2d(tensor(inputs[0]), 2).shape == (2, 8, 4, 5)


def test_a_functorch_transform_is_refused_by_the_dispatcher(inputs) -> None:
    """As for every operator of torch.library; called directly it would see no history and give zeros."""
    with pytest.raises(RuntimeError, match="functorch transforms"):
        torch.func.grad(lambda x: ops.avg_pool2d(x, 2).square().sum())(inputs[0])


def test_autocast_does_not_reach_into_an_operator(inputs) -> None:
    """Accumulation stays float32 inside: the reference's own ATen calls must not be autocast."""
    x = inputs[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        pooled = ops.avg_pool2d(x, 2)
    assert pooled.dtype == torch.float32
    assert torch.equal(pooled, ops.avg_pool2d(x, 2))


def test_a_second_backward_through_a_direct_call_is_refused(inputs) -> None:
    x = inputs[0].requires_grad_()
    (gradient,) = torch.autograd.grad(ops.avg_pool2d(x, 2).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="avg_pool2d_backward has no second derivative"):
        gradient.sum().backward()
