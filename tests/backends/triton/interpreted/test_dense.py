"""Dense and grouped k x k convolutions by the implicit matrix product."""

from __future__ import annotations

import pytest
import torch

from tests.backends.triton.interpreted.against import DTYPES, LAYOUTS, check_convolution, compare, image, numbers
from tinytl_kernels.backends.triton import choice, dense
from tinytl_kernels.backends.triton.operators import OPERATORS
from tinytl_kernels.core.activations import ACTIVATIONS

# (N, C, H, W), (O, C / groups, kH, kW), stride, (top, bottom, left, right), dilation, groups
GEOMETRIES = {
    "3 x 3": ((2, 12, 6, 5), (20, 12, 3, 3), (1, 1), (1, 1, 1, 1), (1, 1), 1),
    "several tiles each way": ((1, 72, 9, 10), (136, 72, 2, 1), (1, 1), (1, 0, 0, 0), (1, 1), 1),
    "an image's 3 channels, asymmetric": ((2, 3, 7, 7), (8, 3, 3, 3), (2, 2), (0, 1, 0, 1), (1, 1), 1),
    "stride 2": ((2, 16, 9, 8), (24, 16, 3, 3), (2, 2), (1, 1, 1, 1), (1, 1), 1),
    "dilated": ((1, 8, 9, 9), (16, 8, 3, 3), (1, 1), (2, 2, 2, 2), (2, 2), 1),
    "all numbers differ": ((1, 8, 9, 11), (8, 8, 3, 2), (2, 3), (2, 1, 0, 2), (3, 1), 1),
    # Phases that no tap reads, whose gradient is 0.
    "stride beyond the kernel": ((1, 8, 9, 8), (8, 8, 2, 2), (4, 3), (0, 0, 0, 0), (1, 1), 1),
    # More pixels in grad_output than in a phase: tiles that only add up the bias gradient.
    "padding beyond the kernel": ((1, 8, 3, 3), (8, 8, 3, 3), (1, 1), (4, 5, 3, 6), (1, 1), 1),
    "1 x 1, padded": ((2, 8, 4, 4), (8, 8, 1, 1), (2, 2), (1, 0, 1, 0), (1, 1), 1),
    "1000 outputs": ((1, 8, 2, 3), (1000, 8, 1, 2), (1, 1), (0, 0, 0, 1), (1, 1), 1),
    # 24 output channels a group: a tile of 32 must not write the next group's first 8, nor their bits.
    "groups of 12 and 24": ((2, 36, 6, 5), (72, 12, 3, 3), (2, 2), (1, 1, 1, 1), (1, 1), 3),
    "groups of 16": ((1, 64, 5, 5), (64, 16, 3, 3), (1, 1), (1, 1, 1, 1), (1, 1), 4),
    "groups, 1 x 1": ((2, 24, 5, 5), (48, 8, 1, 1), (1, 1), (0, 0, 0, 0), (1, 1), 3),
    "empty batch": ((0, 8, 4, 4), (8, 8, 3, 3), (1, 1), (1, 1, 1, 1), (1, 1), 1),
}
DENSE, GROUPED = "3 x 3", "groups of 12 and 24"


@pytest.fixture(autouse=True)
def always_ours(monkeypatch):
    monkeypatch.setenv(choice.ENVIRONMENT_VARIABLE, choice.IMPLICIT_GEMM)


def check(geometry, *args, **kwargs):
    check_convolution(GEOMETRIES[geometry], *args, **kwargs)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_every_geometry(geometry, dtype):
    check(geometry, dtype)


@pytest.mark.parametrize("layout", LAYOUTS[1:])
@pytest.mark.parametrize("geometry", [DENSE, GROUPED])
def test_every_layout(geometry, layout):
    check(geometry, torch.float32, layout, "relu6")
    check(geometry, torch.float32, layout, "silu")  # keeps a value, which has strides, and not a mask


@pytest.mark.parametrize("activation", [None, *ACTIVATIONS])
def test_every_activation(activation):
    check(GROUPED, torch.float32, activation=activation)


@pytest.mark.parametrize("need", [(True, False), (False, True)], ids=["input only", "bias only"])
def test_what_is_not_needed_has_no_elements(need):
    check(GROUPED, torch.float32, need=need)


@pytest.mark.parametrize("geometry", [DENSE, GROUPED])
def test_offsets_of_64_bits_give_the_same_answers(geometry, monkeypatch):
    monkeypatch.setattr(dense, "needs_wide_offsets", lambda *tensors: True)
    check(geometry, torch.float32)
    check(geometry, torch.float32, "contiguous", "hardswish")


def test_a_channels_last_weight_is_read_where_it_lies():
    weight = numbers(20, 12, 3, 3, dtype=torch.float32).contiguous(memory_format=torch.channels_last)
    assert dense.channels_first_in_memory(weight) is weight
    check(DENSE, torch.float32, weight=weight)


def test_an_expanded_gradient_is_read_as_it_is():
    # What an average over the image hands back: strides of 0 over height and width.
    size, weight_size, *shape = GEOMETRIES[GROUPED]
    x, weight = image(size, torch.float32), numbers(*weight_size, dtype=torch.float32)
    output, saved = OPERATORS["frozen_conv"](x, weight, None, *shape, "relu", True)
    grad = torch.randn(*output.shape[:2], 1, 1).expand(output.shape)
    compare("frozen_conv_backward", grad, weight, saved, size, *shape, "relu", True, True, True)


def test_weight_and_bias_of_float32_beside_a_half_input():
    size, weight_size, *shape = GEOMETRIES[DENSE]
    x, weight = image(size, torch.float16), numbers(*weight_size, dtype=torch.float32)
    output, saved = compare(
        "frozen_conv", x, weight, numbers(weight_size[0], dtype=torch.float32), *shape, "relu6", True
    )
    compare("frozen_conv_backward", torch.randn_like(output), weight, saved, size, *shape, "relu6", True, True, True)


def test_infinity_and_nan_stay_in_their_group():
    # Both groups fit one tile of channels: a product over both would meet the other's zeros.
    x = image((1, 16, 3, 3), torch.float32)
    x[0, 0, 1, 1], x[0, 1, 0, 0] = float("inf"), float("nan")
    output, _ = OPERATORS["frozen_conv"](x, torch.ones(16, 8, 3, 3), None, (1, 1), (1, 1, 1, 1), (1, 1), 2, None, False)
    assert output[:, 8:].isfinite().all()
    assert not output[:, :8].isfinite().any()


def test_a_stopped_gradient_is_zero_even_if_it_is_infinite():
    grad = torch.full((1, 8, 2, 2), float("inf"))
    mask = torch.zeros(1, 2, 2, 1, dtype=torch.uint8)
    grad_input, grad_bias = OPERATORS["frozen_conv_backward"](
        grad, torch.ones(8, 8, 3, 3), mask, (1, 8, 2, 2), (1, 1), (1, 1, 1, 1), (1, 1), 1, "relu6", True, True, True
    )
    assert torch.equal(grad_input, torch.zeros_like(grad_input))
    assert torch.equal(grad_bias, torch.zeros(8))


def test_a_group_that_shares_bytes_of_the_mask_is_left_to_the_library():
    assert not dense.can_take(torch.empty(18, 4, 3, 3), 3)
    check_convolution(((2, 12, 6, 5), (18, 4, 3, 3), (1, 1), (1, 1, 1, 1), (1, 1), 3), torch.float32)
