"""The lite residual's branch and its gradients: trained convolutions between norms, beside the reference's."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.backends.cpu.exact import poisoned_memory
from tests.backends.triton.interpreted.against import LAYOUTS, compare
from tinytl_kernels.backends import reference
from tinytl_kernels.backends.triton import choice, dense, lite_branch_backward, lite_branch_forward
from tinytl_kernels.backends.triton.launch import record
from tinytl_kernels.backends.triton.operators import OPERATORS

# (N, C, H, W), inner and output channels, kernel, stride, groups; and a norm behind each convolution
BRANCHES = {
    "5 x 5": ((2, 16, 6, 5), 16, 24, 5, 1, 2, "batch", "batch"),
    "stride 2, odd size, several tiles": ((2, 24, 17, 9), 24, 20, 3, 2, 2, "batch", "batch"),
    "stride 2, odd size, tiles of an image": ((2, 8, 17, 9), 8, 12, 3, 2, 2, "group", "group"),
    # A tile of the second product has to stay in one image for either norm's sake.
    "GroupNorm behind BatchNorm": ((3, 8, 4, 5), 16, 12, 3, 1, 2, "batch", "group"),
    "BatchNorm behind GroupNorm": ((3, 8, 4, 5), 16, 12, 3, 1, 2, "group", "batch"),
    "constants behind statistics": ((2, 8, 4, 5), 16, 12, 3, 1, 2, "group", "running"),
    "stride beyond the kernel": ((2, 12, 8, 10), 12, 8, 3, 4, 1, "running", "running"),
    "kernel beyond the image": ((4, 8, 2, 3), 8, 40, 5, 1, 2, "running", "batch"),
    # 7 channels a group: a tile of 16 must not write the next group's.
    "more groups, no multiple of a vector": ((2, 15, 6, 5), 21, 13, 3, 2, 3, "batch", "batch"),
    "one channel more than a tile": ((2, 72, 3, 2), 72, 65, 1, 1, 2, "batch", "batch"),
    "one row, one output": ((5, 16, 1, 2), 16, 1, 1, 1, 2, "batch", "batch"),
    "depthwise": ((2, 6, 5, 4), 12, 8, 3, 1, 6, "batch", "batch"),
}
SMALL = "kernel beyond the image"
ALL = (True,) * 7


def images(size: tuple[int, ...], dtype: torch.dtype, layout: str = "channels_last") -> Tensor:
    n, c, h, w = size
    if layout == "sliced":
        return torch.randn(n, c + 3, 2 * h, w + 1).to(dtype)[:, 1:-2, ::2, 1:]
    x = torch.randn(size).to(dtype)
    return x.contiguous(memory_format=torch.channels_last) if layout == "channels_last" else x


def norm_groups(channels: int) -> int:
    return next(g for g in (4, 3, 1) if channels % g == 0)


def norm(kind: str, channels: int, dtype: torch.dtype, affine: bool = True) -> tuple[list[Tensor | None], int]:
    """(weight, bias, running mean, running variance), groups."""
    running = [torch.linspace(0.5, 2, channels).to(dtype) - shift for shift in (1, 0)]
    trained = [torch.randn(channels).to(dtype) for _ in range(2)] if affine else [None, None]
    return trained + (running if kind == "running" else [None, None]), norm_groups(channels) if kind == "group" else 0


def arguments(
    name: str, dtype: torch.dtype = torch.float32, layout: str = "channels_last", activation: str = "relu",
    keep_conv: bool = True, affine: bool = True, weight_dtype: torch.dtype | None = None,
) -> list:  # fmt: skip
    """Of the operator ``lite_branch``."""
    size, inner, out, k, stride, groups, *norms = BRANCHES[name]
    weight_dtype = weight_dtype or dtype
    weight1 = torch.randn(inner, size[1] // groups, k, k).div((size[1] // groups * k * k) ** 0.5).to(weight_dtype)
    weight2 = torch.randn(out, inner, 1, 1).div(inner**0.5).to(weight_dtype)
    (norm1, groups1), (norm2, groups2) = (
        norm(kind, channels, weight_dtype, affine) for kind, channels in zip(norms, (inner, out), strict=True)
    )
    return [
        images(size, dtype, layout), weight1, *norm1, weight2, *norm2, stride, groups, activation, groups1, groups2,
        1e-5, 1e-3, keep_conv,
    ]  # fmt: skip


def backward_arguments(forward: list, outputs: tuple[Tensor, ...], needed=ALL, grad: Tensor | None = None) -> list:
    """Of the operator ``lite_branch_backward``, for a random gradient laid out as the output is."""
    pooled, weight1, scale1, shift1, mean1, _, weight2, scale2, _, mean2, *_ = forward
    output, conv, *statistics = outputs
    return [
        torch.randn_like(output) if grad is None else grad, pooled, conv, *statistics, weight1, scale1, shift1, weight2,
        scale2, *forward[11:18], mean1 is None, mean2 is None, list(needed),
    ]  # fmt: skip


def check(name: str, *args, needed=ALL, **kwargs) -> None:
    """Outputs, statistics and gradients agree with the reference's."""
    forward = arguments(name, *args, **kwargs)
    outputs = compare("lite_branch", *forward)
    compare("lite_branch_backward", *backward_arguments(forward, outputs, needed))


@pytest.mark.parametrize("name", BRANCHES)
def test_every_branch(name):
    check(name)


@pytest.mark.parametrize("name", ["GroupNorm behind BatchNorm", "more groups, no multiple of a vector"])
def test_half_precision(name):
    check(name, torch.float16, activation="relu6")


@pytest.mark.parametrize("layout", LAYOUTS[1:])
def test_every_layout(layout):
    check("BatchNorm behind GroupNorm", layout=layout)


@pytest.mark.parametrize("name", ["GroupNorm behind BatchNorm", SMALL])
def test_without_weights_of_norms_and_with_the_convolution_computed_again(name):
    check(name, keep_conv=False, affine=False, needed=(True, True, False, False, True, False, False))


def test_weights_of_float32_beside_a_half_input():
    check("GroupNorm behind BatchNorm", torch.float16, weight_dtype=torch.float32)


@pytest.mark.parametrize("by", choice.DENSE)
def test_whoever_computes_the_gradient_of_the_input(by, monkeypatch):
    monkeypatch.setenv(choice.ENVIRONMENT_VARIABLE, by)
    check("stride beyond the kernel")


def test_offsets_of_64_bits_give_the_same_answers(monkeypatch):
    for module in (dense, lite_branch_forward, lite_branch_backward):
        monkeypatch.setattr(module, "needs_wide_offsets", lambda *tensors: True)
    check("GroupNorm behind BatchNorm", layout="contiguous")


@pytest.mark.parametrize("name", ["BatchNorm behind GroupNorm", "constants behind statistics"])
def test_one_gradient_alone_is_the_same_and_the_others_have_no_elements(name):
    forward = arguments(name)
    outputs = OPERATORS["lite_branch"](*forward)
    grad = torch.randn_like(outputs[0])
    expected = OPERATORS["lite_branch_backward"](*backward_arguments(forward, outputs, grad=grad))
    for wanted in range(7):
        needed = tuple(i == wanted for i in range(7))
        alone = OPERATORS["lite_branch_backward"](*backward_arguments(forward, outputs, needed, grad))
        assert torch.equal(alone[wanted], expected[wanted]), wanted
        assert all(alone[i].numel() == 0 for i in range(7) if i != wanted)


@pytest.mark.parametrize("name", ["BatchNorm behind GroupNorm", "stride beyond the kernel"])
def test_every_element_is_written(name):
    forward = arguments(name)
    with poisoned_memory():
        outputs = OPERATORS["lite_branch"](*forward)
        grads = OPERATORS["lite_branch_backward"](*backward_arguments(forward, outputs))
    assert not any(t.isnan().any() for t in (*outputs, *grads))


def test_an_expanded_gradient_is_read_as_it_is():
    # What an average over the image hands back: strides of 0 over height and width.
    forward = arguments(SMALL)
    outputs = OPERATORS["lite_branch"](*forward)
    grad = torch.randn(*outputs[0].shape[:2], 1, 1).expand(outputs[0].shape)
    compare("lite_branch_backward", *backward_arguments(forward, outputs, grad=grad))


@pytest.mark.parametrize("groups", [0, 2])
def test_large_means_do_not_swallow_the_variance(groups):
    # Sums of squares in float32 would: the mean is a thousand standard deviations. Several tiles, put together.
    pooled = torch.randn(2, 8, 12, 9) + 1000
    weight = torch.eye(8).view(8, 8, 1, 1)
    rest = (None, None, None, None, weight, None, None, None, None, 1, 1, "relu", groups, 0, 1e-5, 1e-5, False)
    _, _, (mean, var), _ = OPERATORS["lite_branch"](pooled, weight, *rest)
    exact_var, exact_mean = torch.var_mean(
        pooled.double().reshape(2 * groups, -1) if groups else pooled.double(), 1 if groups else (0, 2, 3), correction=0
    )
    torch.testing.assert_close(mean.double(), exact_mean, rtol=4 * torch.finfo(torch.float32).eps, atol=0)
    # A tile's mean is off by half of float32's spacing at 1000, and lies 4 standard errors of 32 pixels away at most.
    torch.testing.assert_close(var.double(), exact_var, rtol=0, atol=2 * (4 / 32**0.5) * 2**-15)


@pytest.mark.parametrize("special", [float("nan"), float("inf")])
def test_special_values_travel_as_in_the_reference(special):
    forward = arguments("stride beyond the kernel")
    forward[0][0, 3, 1, 1] = special
    ours, theirs = (table["lite_branch"](*forward) for table in (OPERATORS, reference.OPERATORS))
    assert theirs[0].isnan().any()
    assert torch.equal(ours[0].isnan(), theirs[0].isnan())
    grads = [
        table["lite_branch_backward"](*backward_arguments(forward, theirs, grad=torch.ones_like(theirs[0])))
        for table in (OPERATORS, reference.OPERATORS)
    ]
    for a, b in zip(*grads, strict=True):
        assert torch.equal(a.isnan(), b.isnan())


def test_few_launches_forward_and_backward():
    forward = arguments("5 x 5")
    with record() as recorded:
        outputs = OPERATORS["lite_branch"](*forward)
    assert [launch.kernel.__name__ for launch in recorded] == [
        "dense_kernel", "merge_statistics_kernel", "lite_branch_product_kernel", "merge_statistics_kernel",
        "lite_branch_norm_kernel",
    ]  # fmt: skip
    with record() as recorded:
        OPERATORS["lite_branch_backward"](*backward_arguments(forward, outputs))
    assert [launch.kernel.__name__ for launch in recorded] == [
        "lite_branch_product_kernel", "merge_sums_kernel", "lite_branch_weight_kernel", "lite_branch_gradient_kernel",
        "merge_sums_kernel", "lite_branch_norm_backward_kernel", "dense_backward_kernel",
    ]  # fmt: skip
