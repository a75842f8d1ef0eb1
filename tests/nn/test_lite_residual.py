"""LiteResidual and LiteResidualBlock against a plain transcription of the module in PyTorch."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from tests.allocations import allocated
from tinytl_kernels import FrozenConvBias, LiteResidual, LiteResidualBlock
from tinytl_kernels.nn.lite_residual import make_divisible


def plain(lite: LiteResidual) -> nn.Sequential:
    """pool -> grouped k x k -> norm -> activation -> 1x1 -> norm, with the parameters of ``lite``, all of torch.nn."""
    pool = nn.AdaptiveAvgPool2d(1) if lite.downsample is None else nn.AvgPool2d(lite.downsample, lite.downsample)
    act = nn.ReLU6() if isinstance(lite.act, nn.ReLU6) else nn.ReLU()
    return copy.deepcopy(nn.Sequential(pool, lite.conv1, lite.bn1, act, lite.conv2, lite.final_bn))


def make(**arguments) -> LiteResidual:
    lite = LiteResidual(16, 24, **arguments)
    nn.init.normal_(lite.final_bn.weight)  # zero at first, and a zero would hide everything before it
    return lite


VARIANTS = {
    "default": {},
    "stride 2": dict(stride=2),
    "3x3, relu6, wide": dict(kernel_size=3, activation="relu6", expand=1.5, groups=4),
    "global": dict(downsample=None, kernel_size=1),
    "group norm": dict(norm=lambda channels: nn.GroupNorm(channels // 8, channels)),
    "kept": dict(recompute=False),
    "pooled by 3": dict(downsample=3),
}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("variant", VARIANTS)
def test_values_gradients_and_statistics_are_those_of_the_plain_module(variant, training):
    lite = make(**VARIANTS[variant]).train(training)
    stock = plain(lite).train(training)
    x = torch.randn(3, 16, 13, 12)
    for _ in range(2):  # the second step would see statistics that were counted twice
        mine, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
        a, b = lite(mine), stock(theirs)
        torch.testing.assert_close(a, b)
        grad_output = torch.randn_like(a)
        a.backward(grad_output)
        b.backward(grad_output)
        torch.testing.assert_close(mine.grad, theirs.grad)
        for (name, p), q in zip(lite.named_parameters(), stock.parameters(), strict=True):
            torch.testing.assert_close(p.grad, q.grad, msg=lambda m, name=name: f"{name}: {m}")
        for (name, p), q in zip(lite.named_buffers(), stock.buffers(), strict=True):
            torch.testing.assert_close(p, q, msg=lambda m, name=name: f"{name}: {m}")


def test_eval_between_forward_and_backward_does_not_change_the_gradient():
    lite = make()
    x = torch.randn(2, 16, 12, 12)
    stock = plain(lite)
    y = lite(x).square().sum()
    lite.eval()
    y.backward()
    stock(x).square().sum().backward()
    torch.testing.assert_close(lite.conv1.weight.grad, stock[1].weight.grad)
    assert not lite.bn1.training


@pytest.mark.parametrize(("recompute", "kept"), [(True, 1), (False, 4)])
def test_keeps_the_pooled_input_alone(recompute, kept):
    lite, x = make(recompute=recompute), torch.randn(8, 16, 40, 40)
    lite(x)
    pooled = 8 * 16 * 20 * 20 * 4
    _, left = allocated(lambda: lite(x))
    left -= 8 * 24 * 20 * 20 * 4  # the output itself
    if recompute:
        assert pooled <= left < 1.05 * pooled  # and the statistics of the norms
    else:
        assert left >= kept * pooled


def test_a_new_branch_changes_nothing():
    assert torch.equal(LiteResidual(16, 24)(torch.randn(2, 16, 8, 8)), torch.zeros(2, 24, 4, 4))


@pytest.mark.parametrize("training", [True, False])
def test_compiles_without_a_graph_break(training):
    lite = make().train(training)
    compiled = torch.compile(copy.deepcopy(lite), fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 16, 12, 12)
    y, expected = compiled(x), lite(x)
    torch.testing.assert_close(y, expected)
    y.square().sum().backward()
    expected.square().sum().backward()
    torch.testing.assert_close(compiled.conv1.weight.grad, lite.conv1.weight.grad)
    torch.testing.assert_close(compiled.bn1.running_mean, lite.bn1.running_mean)


def test_autocast():
    lite, x = make(), torch.randn(2, 16, 12, 12, requires_grad=True)
    stock = plain(lite)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, expected = lite(x), stock(x)
    assert torch.equal(y, expected)
    y.sum().backward()
    assert lite.conv1.weight.grad.dtype == torch.float32


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(kernel_size=4), "kernel_size: expected an odd number, got 4"),
        (dict(groups=3), "groups: expected a divisor of in_channels 16"),
        (dict(downsample=0), "downsample: expected None or at least 1, got 0"),
        (dict(activation="silu"), "activation: expected one of 'relu', 'relu6', got 'silu'"),
        (dict(activation="relu7"), "activation: expected None or one of"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        LiteResidual(16, 24, **arguments)


@pytest.mark.parametrize(("channels", "expected"), [(3, 8), (16, 16), (18, 24), (20, 24), (26, 24), (27, 32), (8.4, 8)])
def test_make_divisible_never_loses_a_tenth(channels, expected):
    assert make_divisible(channels) == expected


def make_block(stride=1) -> LiteResidualBlock:
    main = FrozenConvBias(16, 24, 3, stride=stride, padding=1, activation="relu6")
    return LiteResidualBlock(main, make(stride=stride))


@pytest.mark.parametrize("stride", [1, 2])
def test_block_adds_the_upsampled_branch(stride):
    block = make_block(stride)
    x = torch.randn(2, 16, 12, 10)
    stock = plain(block.lite)
    mine, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    a, main = block(mine), block.main(theirs)
    b = main + F.interpolate(stock(theirs), main.shape[2:], mode="bilinear", align_corners=False)
    torch.testing.assert_close(a, b)
    grad_output = torch.randn_like(a)
    a.backward(grad_output)
    b.backward(grad_output)
    torch.testing.assert_close(mine.grad, theirs.grad)
    torch.testing.assert_close(block.lite.conv1.weight.grad, stock[1].weight.grad)


class FullResolution(TorchDispatchMode):
    """Names the operators whose result has the height and width of the block's input."""

    def __init__(self, height: int, width: int) -> None:
        super().__init__()
        self.size, self.made = (height, width), []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, torch.Tensor) and tensor.dim() == 4 and tuple(tensor.shape[2:]) == self.size:
                self.made.append(func.name())
        return result


def test_the_branch_makes_no_full_resolution_tensor_but_the_gradient_of_its_input():
    lite = make()
    x = torch.randn(2, 16, 12, 10, requires_grad=True)
    with FullResolution(12, 10) as seen:
        y = lite(x)
        assert seen.made == []
        torch.autograd.grad(y, [x, lite.conv1.weight], torch.ones_like(y))
    assert seen.made == ["tinytl::avg_pool2d_backward"]


def test_attributes_of_the_main_block_stay_reachable():
    block = make_block()
    assert block.out_channels == 24
    assert not hasattr(block, "use_res_connect")
    with pytest.raises(AttributeError):
        _ = block._hidden


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_compute_the_same(clone):
    block, x = make_block().eval(), torch.randn(1, 16, 8, 8)
    assert torch.equal(clone(block)(x), block(x))
