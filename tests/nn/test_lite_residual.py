"""LiteResidual and LiteResidualBlock against a plain transcription of the module in PyTorch."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import prune
from torch.utils._python_dispatch import TorchDispatchMode

from tests.allocations import allocated
from tests.checks import assert_as_exact_as_torch
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


class OwnNorm(nn.BatchNorm2d):
    """A class that the operator does not know: the children are called one by one."""


VARIANTS = {
    "default": {},
    "stride 2": dict(stride=2),
    "3x3, relu6, wide": dict(kernel_size=3, activation="relu6", expand=1.5, groups=4),
    "global": dict(downsample=None, kernel_size=1),
    "group norm": dict(norm=lambda channels: nn.GroupNorm(channels // 8, channels)),
    "recomputed": dict(recompute=True),
    "pooled by 3": dict(downsample=3),
    "average of all batches": dict(norm=lambda channels: nn.BatchNorm2d(channels, momentum=None)),
    "a norm of another class": dict(norm=OwnNorm),
    "a norm of another class, recomputed": dict(norm=OwnNorm, recompute=True),
    "no running statistics": dict(norm=lambda channels: nn.BatchNorm2d(channels, track_running_stats=False)),
}


def two_steps(module: nn.Module, x: torch.Tensor, grad_outputs: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    """Output and gradients of the second of two steps (it would see statistics counted twice), and the buffers."""
    for grad_output in grad_outputs:
        x = x.detach().requires_grad_()
        module.zero_grad()
        output = module(x)
        output.backward(grad_output.to(output.dtype))
    gradients = [p.grad for p in module.parameters()]
    return {
        "output": output.detach(),
        "grad of input": x.grad,
        **{f"grad {i}": g for i, g in enumerate(gradients)},
        **{f"buffer {i}": b.clone() for i, b in enumerate(module.buffers())},
    }


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("variant", VARIANTS)
def test_values_gradients_and_statistics_are_as_exact_as_the_plain_modules(variant, training):
    lite = make(**VARIANTS[variant]).train(training)
    stock = plain(lite)
    exact = copy.deepcopy(stock).double()
    x = torch.randn(3, 16, 13, 12)
    grads = [torch.randn_like(copy.deepcopy(lite)(x)) for _ in range(2)]
    mine, theirs = two_steps(lite, x, grads), two_steps(stock, x, grads)
    exact = two_steps(exact, x.double(), grads)
    for name, result in mine.items():
        if result.is_floating_point():
            assert_as_exact_as_torch(name, result, theirs[name], exact[name])
        else:
            assert torch.equal(result, exact[name]), name


@pytest.mark.parametrize("norm", [nn.BatchNorm2d, OwnNorm])
def test_eval_between_forward_and_backward_does_not_change_the_gradient(norm):
    lite, x = make(norm=norm), torch.randn(2, 16, 12, 12)
    gradients = []
    for mode in (True, False):
        loss = lite.train()(x).square().sum()
        lite.train(mode)
        gradients.append(torch.autograd.grad(loss, lite.conv1.weight)[0])
    assert torch.equal(*gradients)
    assert not lite.bn1.training


@pytest.mark.parametrize("norm", [nn.BatchNorm2d, OwnNorm])
@pytest.mark.parametrize("recompute", [True, False])
def test_keeps_the_pooled_input_and_the_first_convolution(recompute, norm):
    lite, x = make(recompute=recompute, norm=norm), torch.randn(8, 16, 40, 40)
    lite(x)
    pooled = 8 * 16 * 20 * 20 * 4  # and as much behind the convolution
    _, left = allocated(lambda: lite(x))
    left -= 8 * 24 * 20 * 20 * 4  # the output itself
    expected = pooled if recompute else 2 * pooled
    assert expected <= left < 1.05 * expected  # and the statistics of the norms


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    "norm", [nn.BatchNorm2d, lambda c: nn.GroupNorm(c // 8, c), lambda c: nn.BatchNorm2d(c, momentum=None)]
)
def test_one_operator_and_the_children_agree(norm, training):
    lite = make(norm=norm).train(training)
    children = copy.deepcopy(lite)
    children.fused = False
    x, grads = torch.randn(2, 16, 12, 12), [torch.randn(2, 24, 6, 6) for _ in range(2)]
    exact = two_steps(plain(lite).double(), x.double(), grads)
    theirs = two_steps(children, x, grads)
    for name, result in two_steps(lite, x, grads).items():
        if result.is_floating_point():
            assert_as_exact_as_torch(name, result, theirs[name], exact[name])


def test_one_value_a_channel_is_pytorchs_error():
    with pytest.raises(ValueError, match="Expected more than 1 value per channel when training"):
        make(downsample=None, kernel_size=1)(torch.randn(1, 16, 4, 4))
    assert make(downsample=None, kernel_size=1).eval()(torch.randn(1, 16, 4, 4)).shape == (1, 24, 1, 1)


def test_a_pruned_convolution_is_computed_by_its_own_class():
    lite, x = make().eval(), torch.randn(2, 16, 12, 12)
    prune.l1_unstructured(lite.conv1, "weight", 0.5)
    children = nn.Sequential(nn.AvgPool2d(2), lite.conv1, lite.bn1, lite.act, lite.conv2, lite.final_bn)
    torch.testing.assert_close(lite(x), children(x))


def test_an_empty_batch_is_what_the_children_make_of_it():
    assert make().eval()(torch.randn(0, 16, 12, 12)).shape == (0, 24, 6, 6)


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


@pytest.mark.parametrize("norm", [nn.BatchNorm2d, lambda channels: nn.GroupNorm(channels // 8, channels)])
def test_autocast(norm):
    lite, x = make(norm=norm), torch.randn(2, 16, 12, 12)
    stock = plain(lite)
    grads = [torch.randn(2, 24, 6, 6).bfloat16() for _ in range(2)]
    exact = two_steps(copy.deepcopy(stock).double(), x.double(), grads)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mine, theirs = two_steps(lite, x, grads), two_steps(stock, x, grads)
    assert mine["output"].dtype == torch.bfloat16
    assert lite.conv1.weight.grad.dtype == torch.float32
    for name, result in mine.items():
        if result.is_floating_point():
            assert_as_exact_as_torch(name, result, theirs[name].to(result.dtype), exact[name])


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
