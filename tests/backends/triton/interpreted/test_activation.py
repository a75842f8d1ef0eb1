"""Stand-alone activations: any shape, every name."""

from __future__ import annotations

import pytest
import torch

from tests.backends.triton.interpreted.against import DTYPES, LAYOUTS, compare, image
from tinytl_kernels.backends.triton import activation as kernels
from tinytl_kernels.core.activations import ACTIVATIONS, BIT_MASK


def check(x, name, slope=0.2):
    _, mask = compare("activation", x, name, slope, True)
    saved = mask if name in BIT_MASK else x
    compare("activation_backward", torch.randn(x.shape).to(x.dtype), saved, name, slope)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_every_activation(name, dtype):
    check(torch.randn(2, 13, 3, 5).mul(3).to(dtype), name)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout(layout):
    check(image((2, 11, 4, 3), torch.float32, layout), "relu6")
    check(image((2, 11, 4, 3), torch.float32, layout), "silu")


@pytest.mark.parametrize("shape", [(7,), (), (3, 4, 11), (0, 3), (2, 0, 3, 3), (300, 9), (2, 144, 6, 6)], ids=str)
def test_every_shape(shape):
    # 300 rows of 9 channels are several tiles of pixels, 144 channels several of channels.
    check(torch.randn(shape) * 4, "relu6")
    check(torch.randn(shape) * 4, "silu")


def test_a_view_of_other_rank_that_has_no_rows_of_channels():
    check(torch.randn(4, 6).t(), "relu")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_bias_is_added_first_and_the_result_may_take_the_place_of_the_input(dtype):
    # The epilogue of a convolution that cuDNN computes.
    x, bias = image((2, 19, 3, 4), dtype), torch.arange(-9.0, 10.0) / 4
    expected, expected_mask = kernels.reference.activation(x + bias.to(dtype).view(19, 1, 1), "relu6", 0.01, True)
    mask = torch.empty_like(expected_mask)
    kernels.activate_into(x, bias, "relu6", x, mask)
    assert torch.equal(x, expected)
    assert torch.equal(mask, expected_mask)


def test_offsets_of_64_bits_give_the_same_answers(monkeypatch):
    monkeypatch.setattr(kernels, "needs_wide_offsets", lambda *tensors: True)
    check(image((2, 11, 4, 3), torch.float32), "hardsigmoid")


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_at_the_corners_and_at_nan(name):
    x = torch.tensor([-3.0, 0.0, -0.0, 3.0, 6.0, 2.999, float("inf"), -float("inf"), float("nan")])
    ours, mask = kernels.activation(x, name, 0.01, True)
    # In float64, because ATen's vectorised float32 GELU of an infinity is NaN on some CPUs.
    theirs, their_mask = kernels.reference.activation(x.double(), name, 0.01, True)
    torch.testing.assert_close(ours, theirs.float(), equal_nan=True)
    assert torch.equal(mask, their_mask)
    saved = mask if name in BIT_MASK else x[:6]
    grad = torch.randn_like(x) if name in BIT_MASK else torch.randn(6)
    torch.testing.assert_close(
        kernels.activation_backward(grad, saved, name, 0.01),
        kernels.reference.activation_gradient(grad, saved, name, 0.01),
    )
