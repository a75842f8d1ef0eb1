"""tinytl::lite_branch against two convolutions, two norms and an activation of torch.nn."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from tests.checks import compare_with_torch, saved_bytes
from tests.ops.layouts import DTYPES, LAYOUTS, has_layout, images
from tinytl_kernels.ops import Norm, lite_branch

# input, inner and output channels, kernel, stride, groups
BRANCHES = {
    "default": ((3, 16, 7, 6), 16, 24, 5, 1, 2),
    "stride 2, odd size": ((2, 24, 9, 11), 24, 20, 5, 2, 2),
    "stride beyond the kernel": ((2, 12, 8, 10), 12, 8, 3, 4, 1),
    "kernel beyond the image": ((4, 8, 2, 3), 8, 40, 5, 1, 2),
    "more groups, no multiple of a vector": ((2, 15, 6, 5), 21, 13, 3, 2, 3),
    "batch 1": ((1, 40, 8, 7), 40, 24, 5, 1, 2),
    "a batch larger than a tile": ((19, 8, 5, 4), 8, 8, 3, 1, 2),
    "wide": ((2, 160, 3, 3), 160, 136, 3, 1, 2),
    "one pixel": ((5, 16, 1, 1), 16, 24, 1, 1, 2),
}
NORMS = ("batch", "running", "group")
NAMES = ("pooled", "weight1", "norm weight1", "norm bias1", "weight2", "norm weight2", "norm bias2")


def make_inputs(name: str, dtype: torch.dtype = torch.float32, layout: str = "channels_last") -> list[torch.Tensor]:
    """In the order of ``NAMES``."""
    size, inner, out, k, _, groups = BRANCHES[name]
    weight1 = torch.randn(inner, size[1] // groups, k, k).div((size[1] // groups * k * k) ** 0.5)
    weight2 = torch.randn(out, inner, 1, 1).div(inner**0.5)
    norms = [t.to(dtype) for c in (inner, out) for t in (torch.randn(c), torch.randn(c))]
    pooled = images(size, dtype, layout)
    weight1 = weight1.to(dtype).contiguous(
        memory_format=torch.channels_last if layout == "sliced" else torch.contiguous_format
    )
    return [pooled, weight1, *norms[:2], weight2.to(dtype), *norms[2:]]


def norm_groups(channels: int) -> int:
    return next(g for g in (4, 3, 1) if channels % g == 0)


def running(channels: int, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    steps = torch.linspace(0.5, 2, channels, dtype=like.dtype)
    return steps - 1, steps


def ours(name: str, norm: str, activation: str, keep_conv: bool = True):
    *_, stride, groups = BRANCHES[name]

    def branch(pooled, weight1, scale1, shift1, weight2, scale2, shift2):
        norms = []
        for scale, shift in ((scale1, shift1), (scale2, shift2)):
            statistics = running(scale.numel(), scale) if norm == "running" else (None, None)
            norms.append(Norm(scale, shift, *statistics, norm_groups(scale.numel()) if norm == "group" else 0))
        return lite_branch(pooled, weight1, norms[0], weight2, norms[1], stride, groups, activation, keep_conv)[0]

    return branch


def stock(name: str, norm: str, activation: str):
    _, _, _, k, stride, groups = BRANCHES[name]

    def normalise(x, scale, shift):
        if norm == "group":
            return F.group_norm(x, norm_groups(x.size(1)), scale, shift)
        if norm == "running":
            return F.batch_norm(x, *running(x.size(1), scale), scale, shift)
        return F.batch_norm(x, None, None, scale, shift, training=True)

    def branch(pooled, weight1, scale1, shift1, weight2, scale2, shift2):
        x = normalise(F.conv2d(pooled, weight1, None, stride, k // 2, 1, groups), scale1, shift1)
        return normalise(F.conv2d(getattr(F, activation)(x), weight2), scale2, shift2)

    return branch


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("name", BRANCHES)
def test_values_and_gradients_are_as_exact_as_pytorchs(name, norm):
    activation = "relu6" if norm == "group" else "relu"
    compare_with_torch(ours(name, norm, activation), stock(name, norm, activation), make_inputs(name))


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("name", ["default", "stride 2, odd size"])
def test_half_precision_is_as_exact_as_pytorchs(name, dtype, norm):
    compare_with_torch(ours(name, norm, "relu"), stock(name, norm, "relu"), make_inputs(name, dtype))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_may_differ_and_gradients_keep_theirs(layout):
    inputs = [t.requires_grad_() for t in make_inputs("stride 2, odd size", layout=layout)]
    branch, plain = ours("stride 2, odd size", "batch", "relu"), stock("stride 2, odd size", "batch", "relu")
    compare_with_torch(branch, plain, [t.detach() for t in inputs])
    output = branch(*inputs)
    grad_pooled, grad_weight, *_ = torch.autograd.grad(output.square().sum(), inputs)
    assert has_layout(output, layout)
    assert has_layout(grad_pooled, layout)
    assert grad_weight.stride() == inputs[1].stride()


@pytest.mark.parametrize("norm", NORMS)
def test_gradcheck_in_float64(norm):
    inputs = [t.double().requires_grad_() for t in make_inputs("kernel beyond the image")]
    torch.autograd.gradcheck(ours("kernel beyond the image", norm, "relu6"), inputs, fast_mode=True)


def test_values_and_gradients_are_as_exact_when_the_convolution_is_computed_again():
    name = "stride 2, odd size"
    compare_with_torch(ours(name, "batch", "relu", keep_conv=False), stock(name, "batch", "relu"), make_inputs(name))


@pytest.mark.parametrize("keep_conv", [True, False])
def test_keeps_the_pooled_input_the_convolution_and_statistics(keep_conv):
    inputs = [t.requires_grad_() for t in make_inputs("default")]
    kept = saved_bytes(lambda: ours("default", "batch", "relu", keep_conv)(*inputs), exclude=inputs)
    assert kept == 4 * (2 * 16 + 2 * 24 + (3 * 7 * 6 * 16 if keep_conv else 0))


def test_keeps_no_convolution_without_a_gradient():
    inputs = make_inputs("default")
    conv = torch.ops.tinytl.lite_branch.default
    seen = []

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            if function is conv:
                seen.append(result[1].numel())
            return result

    with Recorder():
        ours("default", "batch", "relu")(*inputs)
    assert seen == [0]


@pytest.mark.parametrize("wanted", range(7), ids=NAMES)
def test_one_gradient_alone_is_the_same(wanted):
    inputs = [t.requires_grad_() for t in make_inputs("stride 2, odd size")]
    branch = ours("stride 2, odd size", "batch", "relu")
    expected = torch.autograd.grad(branch(*inputs).sin().sum(), inputs)[wanted]
    alone = [t.detach().requires_grad_(i == wanted) for i, t in enumerate(inputs)]
    (grad,) = torch.autograd.grad(branch(*alone).sin().sum(), alone[wanted])
    assert torch.equal(grad, expected)


def test_statistics_are_means_and_biased_variances():
    pooled, weight1, *_ = make_inputs("default")
    nothing = Norm(None, None)
    _, statistics, _ = lite_branch(pooled, weight1, nothing, torch.randn(8, 16, 1, 1), nothing, groups=2)
    var, mean = torch.var_mean(F.conv2d(pooled, weight1, padding=2, groups=2), (0, 2, 3), correction=0)
    torch.testing.assert_close(statistics, torch.stack([mean, var]))


def test_large_means_do_not_swallow_the_variance():
    # Sums of squares in float32 would: the mean is a thousand standard deviations.
    pooled = torch.randn(4, 8, 12, 12) + 1000
    weight = torch.zeros(8, 8, 1, 1)
    weight[range(8), range(8)] = 1
    nothing = Norm(None, None)
    _, statistics, _ = lite_branch(pooled, weight, nothing, weight, nothing)
    torch.testing.assert_close(statistics[1], pooled.double().var((0, 2, 3), correction=0).float(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("special", [float("nan"), float("inf")])
def test_special_values_travel_as_in_pytorch(special):
    inputs = make_inputs("default")
    inputs[0][0, 3, 2, 2] = special
    branches = [f("default", "running", "relu")(*inputs) for f in (ours, stock)]
    assert torch.equal(branches[0].isnan(), branches[1].isnan())


def test_a_second_derivative_is_refused():
    inputs = [t.requires_grad_() for t in make_inputs("default")]
    (grad,) = torch.autograd.grad(ours("default", "batch", "relu")(*inputs).sin().sum(), inputs[0], create_graph=True)
    with pytest.raises(RuntimeError, match="tinytl::lite_branch_backward has no second derivative"):
        grad.sum().backward()


@pytest.mark.parametrize("norm", NORMS)
def test_opcheck(norm):
    pooled, weight1, scale1, shift1, weight2, scale2, shift2 = (t.requires_grad_() for t in make_inputs("default"))
    groups = [norm_groups(s.numel()) if norm == "group" else 0 for s in (scale1, scale2)]
    statistics = [running(s.numel(), s.detach()) if norm == "running" else (None, None) for s in (scale1, scale2)]
    torch.library.opcheck(
        torch.ops.tinytl.lite_branch.default,
        (
            pooled, weight1, scale1, shift1, *statistics[0], weight2, scale2, shift2, *statistics[1],
            1, 2, "relu", *groups, 1e-5, 1e-5, True,
        ),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(activation="silu"), "activation: expected one of 'relu', 'relu6', got 'silu'"),
        (dict(stride=0), "stride, groups: expected at least 1, got 0, 2"),
        (dict(groups=3), "weight1: expected an odd kernel and 3 groups"),
        (dict(pooled=torch.randn(0, 16, 7, 7)), "pooled: expected at least one value to normalise"),
        (dict(weight1=torch.randn(16, 8, 4, 4)), "weight1: expected an odd kernel"),
        (dict(weight2=torch.randn(24, 12, 1, 1)), r"weight2: expected shape \(24, 16, 1, 1\), got \(24, 12, 1, 1\)"),
        (dict(norm1=Norm(torch.ones(8), None)), r"norm1.weight: expected shape \(16,\), got \(8,\)"),
        (dict(norm1=Norm(torch.ones(16).double(), None)), "norm1.weight: expected dtype torch.float32"),
        (dict(norm2=Norm(None, None, groups=5)), "norm2.groups: expected 0 or a divisor of its 24 channels, got 5"),
        (dict(norm2=Norm(None, None, torch.zeros(24))), "norm2: expected both running statistics or neither"),
    ],
)
def test_bad_arguments_are_named(change, message):
    pooled, weight1, *_ = make_inputs("default")
    arguments = dict(
        pooled=pooled, weight1=weight1, norm1=Norm(None, None), weight2=torch.randn(24, 16, 1, 1),
        norm2=Norm(None, None), stride=1, groups=2,
    )  # fmt: skip
    with pytest.raises(ValueError, match=message):
        lite_branch(**{**arguments, **change})
