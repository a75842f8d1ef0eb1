"""GroupNorm and activation, both ways, with the input kept or its codes."""

from __future__ import annotations

import pytest
import torch

from tests.backends.triton.interpreted.against import DTYPES, LAYOUTS, compare
from tests.checks import assert_as_exact_as_torch
from tinytl_kernels.backends import reference
from tinytl_kernels.backends.triton import group_norm, group_norm_backward
from tinytl_kernels.backends.triton.operators import OPERATORS
from tinytl_kernels.core.activations import ACTIVATIONS

# (N, C, H, W), groups
SIZES = {
    "channels of 8": ((2, 24, 5, 7), 3),
    "one group, odd": ((3, 13, 3, 3), 1),
    "a group a channel": ((2, 9, 4, 5), 9),
    "several tiles": ((1, 144, 23, 29), 6),
    "one pixel": ((2, 16, 1, 1), 2),
    "empty batch": ((0, 8, 4, 4), 2),
}


def layered(size, dtype, layout="channels_last"):
    n, c, h, w = size
    # Far from zero, where a sum of squares would cancel.
    if layout == "sliced":
        return (torch.randn(n, c + 3, 2 * h, w + 1) + 7).to(dtype)[:, 1:-2, ::2, 1:]
    x = (torch.randn(size) + 7).to(dtype)
    return x.contiguous(memory_format=torch.channels_last) if layout == "channels_last" else x


def check(case, dtype, layout="channels_last", activation="relu6", affine=True, needed=(True, True, True)):
    size, groups = SIZES[case]
    x = layered(size, dtype, layout)
    weight, bias = (torch.randn(size[1]), torch.randn(size[1])) if affine else (None, None)
    output, mean, rstd, _, _ = compare("group_norm_activation", x, weight, bias, groups, 1e-5, activation, False)
    grad = torch.randn(output.shape).to(dtype).contiguous(memory_format=torch.channels_last)
    if layout != "channels_last":
        grad = grad.contiguous()
    compare("group_norm_activation_backward", grad, x, mean, rstd, rstd, weight, bias, groups, activation, list(needed))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES)
def test_every_size(size, dtype):
    check(size, dtype)


@pytest.mark.parametrize("layout", LAYOUTS[1:])
def test_every_layout(layout):
    check("channels of 8", torch.float32, layout)


@pytest.mark.parametrize("activation", [None, *ACTIVATIONS])
def test_every_activation(activation):
    check("channels of 8", torch.float32, activation=activation)


@pytest.mark.parametrize("needed", [(1, 0, 0), (0, 1, 0), (0, 0, 1)], ids=str)
def test_only_what_is_needed_is_computed(needed):
    check("channels of 8", torch.float32, needed=tuple(map(bool, needed)))


def test_without_weight_and_bias():
    check("channels of 8", torch.float32, affine=False, needed=(True, False, False))


def test_in_chunks_of_the_batch(monkeypatch):
    for module in (group_norm, group_norm_backward):
        monkeypatch.setattr(module, "chunk_images", lambda images, elements, like: 2)
    check("one group, odd", torch.float32)


def test_offsets_of_64_bits_give_the_same_answers(monkeypatch):
    for module in (group_norm, group_norm_backward):
        monkeypatch.setattr(module, "needs_wide_offsets", lambda *tensors: True)
    check("channels of 8", torch.float32)
    check("channels of 8", torch.float32, "contiguous")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_codes_and_their_step(layout):
    x = layered((2, 24, 9, 7), torch.float32, layout)
    x[1, :8] = 3.0  # a constant group: x_hat is 0, and so is every code
    arguments = (torch.randn(24), torch.randn(24), 3, 1e-5, "relu", True)
    _, _, _, codes, step = OPERATORS["group_norm_activation"](x, *arguments)
    _, _, _, expected, expected_step = reference.OPERATORS["group_norm_activation"](x, *arguments)
    torch.testing.assert_close(step, expected_step, rtol=1e-6, atol=0)
    # A value within rounding of the middle between two codes may take either.
    assert (codes.int() - expected.int()).abs().max() <= 1
    assert (codes != expected).sum() <= codes.numel() // 1000
    assert codes.stride() == expected.stride()
    assert codes.max() == 127 or codes.min() == -127
    assert not codes[1, :8].any()


def test_backward_from_codes():
    size = (2, 24, 5, 7)
    x, grad = layered(size, torch.float32), layered(size, torch.float32) - 7
    weight, bias = torch.randn(24), torch.randn(24)
    _, _, rstd, codes, step = OPERATORS["group_norm_activation"](x, weight, bias, 3, 1e-5, "relu6", True)
    compare(
        "group_norm_activation_backward", grad, codes, torch.zeros_like(step), step, rstd, weight, bias, 3, "relu6",
        [True, True, True],
    )  # fmt: skip


def test_statistics_of_a_large_mean_are_as_exact_as_pytorchs():
    x = torch.randn(1, 8, 40, 40) + 1000
    _, mean, rstd, _, _ = OPERATORS["group_norm_activation"](x, None, None, 2, 1e-5, None, False)
    stock = torch.ops.aten.native_group_norm(x, None, None, 1, 8, 1600, 2, 1e-5)
    exact = torch.ops.aten.native_group_norm(x.double(), None, None, 1, 8, 1600, 2, 1e-5)
    assert_as_exact_as_torch("mean", mean, stock[1], exact[1])
    assert_as_exact_as_torch("rstd", rstd, stock[2], exact[2])


def test_a_nan_reaches_its_own_group_and_no_other():
    x = layered((1, 16, 3, 3), torch.float32)
    x[0, 2, 1, 1] = float("nan")
    output, *_ = OPERATORS["group_norm_activation"](x, None, None, 2, 1e-5, None, False)
    assert output[:, :8].isnan().all()
    assert output[:, 8:].isfinite().all()
