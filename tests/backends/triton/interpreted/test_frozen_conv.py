"""Frozen convolutions: pointwise, depthwise and those that ATen computes between two of our kernels."""

from __future__ import annotations

import pytest
import torch

from tests.backends.triton.interpreted.against import DTYPES, LAYOUTS, check_convolution, compare, image, numbers
from tinytl_kernels.backends.triton import depthwise, frozen_conv, pointwise
from tinytl_kernels.backends.triton.operators import OPERATORS
from tinytl_kernels.core.activations import ACTIVATIONS

NOTHING = torch.empty(0, dtype=torch.uint8)

# (N, C, H, W), (O, C / groups, kH, kW), stride, (top, bottom, left, right), dilation, groups
GEOMETRIES = {
    "pointwise": ((2, 24, 5, 7), (40, 24, 1, 1), (1, 1), (0, 0, 0, 0), (1, 1), 1),
    "pointwise, odd channels": ((1, 13, 3, 3), (19, 13, 1, 1), (1, 1), (0, 0, 0, 0), (1, 1), 1),
    "pointwise, several tiles each way": ((1, 72, 7, 6), (150, 72, 1, 1), (1, 1), (0, 0, 0, 0), (1, 1), 1),
    "pointwise, one column": ((3, 8, 4, 1), (16, 8, 1, 1), (1, 1), (0, 0, 0, 0), (1, 1), 1),
    "pointwise, one pixel": ((2, 16, 1, 1), (10, 16, 1, 1), (1, 1), (0, 0, 0, 0), (1, 1), 1),
    "pointwise, stride 2": ((2, 8, 5, 6), (16, 8, 1, 1), (2, 2), (0, 0, 0, 0), (1, 1), 1),
    "depthwise": ((2, 24, 6, 5), (24, 1, 3, 3), (1, 1), (1, 1, 1, 1), (1, 1), 24),
    "depthwise, several tiles": ((1, 9, 10, 17), (9, 1, 3, 3), (1, 1), (1, 1, 1, 1), (1, 1), 9),
    "depthwise, stride 2, TensorFlow SAME": ((2, 13, 8, 7), (13, 1, 5, 5), (2, 2), (1, 2, 2, 2), (1, 1), 13),
    "depthwise, stride with dilation": ((1, 8, 9, 9), (8, 1, 3, 3), (2, 2), (2, 2, 2, 2), (2, 2), 8),
    "depthwise, all numbers differ": ((1, 8, 9, 11), (8, 1, 3, 2), (2, 3), (2, 1, 0, 2), (3, 1), 8),
    "depthwise, stride beyond the kernel": ((1, 8, 9, 8), (8, 1, 2, 2), (4, 3), (0, 0, 0, 0), (1, 1), 8),
    "depthwise, padding beyond the kernel": ((1, 8, 3, 3), (8, 1, 3, 3), (1, 1), (4, 5, 3, 6), (1, 1), 8),
    "depthwise, 7 x 7": ((1, 8, 5, 5), (8, 1, 7, 7), (1, 1), (3, 3, 3, 3), (1, 1), 8),
    "dense, asymmetric": ((2, 3, 7, 7), (8, 3, 3, 3), (2, 2), (0, 1, 0, 1), (1, 1), 1),
    "grouped": ((2, 12, 6, 5), (18, 4, 3, 3), (1, 1), (1, 1, 1, 1), (1, 1), 3),
    "depthwise with multiplier": ((1, 5, 4, 4), (10, 1, 3, 3), (1, 1), (1, 1, 1, 1), (1, 1), 5),
    "empty batch, pointwise": ((0, 8, 4, 4), (8, 8, 1, 1), (1, 1), (0, 0, 0, 0), (1, 1), 1),
    "empty batch, depthwise": ((0, 8, 4, 4), (8, 1, 3, 3), (1, 1), (1, 1, 1, 1), (1, 1), 8),
    "empty batch, dense": ((0, 8, 4, 4), (8, 8, 3, 3), (1, 1), (1, 1, 1, 1), (1, 1), 1),
}
ONE_OF_EACH = ("pointwise", "depthwise", "grouped")


def check(geometry, dtype, layout, activation, need=(True, True)):
    check_convolution(GEOMETRIES[geometry], dtype, layout, activation, need)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_every_geometry(geometry, dtype):
    check(geometry, dtype, "channels_last", "relu6")


@pytest.mark.parametrize("layout", LAYOUTS[1:])
@pytest.mark.parametrize("geometry", ["pointwise", "pointwise, stride 2", "depthwise", "grouped"])
def test_every_layout(geometry, layout):
    check(geometry, torch.float32, layout, "relu6")
    check(geometry, torch.float32, layout, "silu")  # keeps a value, which has strides, and not a mask


@pytest.mark.parametrize("activation", [None, *ACTIVATIONS])
@pytest.mark.parametrize("geometry", ONE_OF_EACH)
def test_every_activation(geometry, activation):
    check(geometry, torch.float32, "channels_last", activation)


@pytest.mark.parametrize("activation", [None, "relu", "hardsigmoid"])
@pytest.mark.parametrize("geometry", [*ONE_OF_EACH, "pointwise, odd channels", "pointwise, stride 2"])
def test_with_a_shortcut(geometry, activation):
    size, weight_size, *shape = GEOMETRIES[geometry]
    x, weight = image(size, torch.float16), numbers(*weight_size, dtype=torch.float16)
    output, _ = OPERATORS["frozen_conv"](x, weight, None, *shape, None, False)
    compare("frozen_conv_add", x, image(output.shape, torch.float16), weight, None, *shape, activation, True)


@pytest.mark.parametrize("need", [(True, False), (False, True)], ids=["input only", "bias only"])
@pytest.mark.parametrize("geometry", ONE_OF_EACH)
def test_what_is_not_needed_has_no_elements(geometry, need):
    check(geometry, torch.float32, "channels_last", "relu", need)


@pytest.mark.parametrize("geometry", ["pointwise", "depthwise"])
def test_offsets_of_64_bits_give_the_same_answers(geometry, monkeypatch):
    for module in (pointwise, depthwise):
        monkeypatch.setattr(module, "needs_wide_offsets", lambda *tensors: True)
    check(geometry, torch.float32, "channels_last", "relu6")
    check(geometry, torch.float32, "contiguous", "hardswish")


@pytest.mark.parametrize("geometry", ONE_OF_EACH)
def test_an_expanded_gradient_is_read_as_it_is(geometry):
    # What an average over the image hands back: strides of 0 over height and width.
    size, weight_size, *shape = GEOMETRIES[geometry]
    x, weight = image(size, torch.float32), numbers(*weight_size, dtype=torch.float32)
    output, saved = OPERATORS["frozen_conv"](x, weight, None, *shape, "relu", True)
    grad = torch.randn(*output.shape[:2], 1, 1).expand(output.shape)
    compare("frozen_conv_backward", grad, weight, saved, size, *shape, "relu", True, True, True)


@pytest.mark.parametrize("geometry", ONE_OF_EACH)
def test_weight_and_bias_of_float32_beside_a_half_input(geometry):
    size, weight_size, *shape = GEOMETRIES[geometry]
    x, weight = image(size, torch.float16), numbers(*weight_size, dtype=torch.float32)
    bias = numbers(weight_size[0], dtype=torch.float32)
    output, saved = compare("frozen_conv", x, weight, bias, *shape, "relu6", True)
    grad = torch.randn_like(output)
    compare("frozen_conv_backward", grad, weight, saved, size, *shape, "relu6", True, True, True)


@pytest.mark.parametrize("geometry", ONE_OF_EACH)
def test_no_mask_where_none_is_asked_for(geometry):
    size, weight_size, *shape = GEOMETRIES[geometry]
    x, weight = image(size, torch.float32), numbers(*weight_size, dtype=torch.float32)
    for activation in ("relu", "silu"):
        _, saved = compare("frozen_conv", x, weight, None, *shape, activation, False)
        assert saved.numel() == 0


@pytest.mark.parametrize("activation", ["relu", "relu6", "leaky_relu", "hardsigmoid", "hardswish"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")], ids=str)
def test_nan_and_inf_travel_as_in_the_reference(activation, value):
    # Depthwise, so that inf meets no other channel.
    x = image((1, 9, 4, 4), torch.float32)
    x[0, 3, 1, 2] = value
    arguments = (torch.ones(9, 1, 1, 1), None, (1, 1), (0, 0, 0, 0), (1, 1), 9, activation, True)
    output, saved = OPERATORS["frozen_conv"](x, *arguments)
    expected, expected_saved = frozen_conv.reference.frozen_conv(x, *arguments)
    torch.testing.assert_close(output, expected, equal_nan=True)
    torch.testing.assert_close(saved, expected_saved, equal_nan=True)


def test_nan_reaches_every_output_channel_of_a_pointwise():
    x = image((1, 8, 2, 2), torch.float32)
    x[0, 3, 1, 1] = float("nan")
    output, mask = OPERATORS["frozen_conv"](
        x, torch.ones(8, 8, 1, 1), None, (1, 1), (0, 0, 0, 0), (1, 1), 1, "relu", True
    )
    assert output[0, :, 1, 1].isnan().all()
    assert output.isnan().sum() == 8
    assert mask[0, 1, 1, 0] == 255  # PyTorch's ReLU lets the gradient at a NaN pass


@pytest.mark.parametrize("groups", [1, 8], ids=["pointwise", "depthwise"])
def test_a_stopped_gradient_is_zero_even_if_it_is_infinite(groups):
    weight = torch.ones(8, 8 // groups, 1, 1)
    grad = torch.full((1, 8, 2, 2), float("inf"))
    mask = torch.zeros(1, 2, 2, 1, dtype=torch.uint8)
    grad_input, grad_bias = OPERATORS["frozen_conv_backward"](
        grad, weight, mask, (1, 8, 2, 2), (1, 1), (0, 0, 0, 0), (1, 1), groups, "relu6", True, True, True
    )
    assert torch.equal(grad_input, torch.zeros_like(grad_input))
    assert torch.equal(grad_bias, torch.zeros(8))


@pytest.mark.parametrize("geometry", ["dense, asymmetric", "grouped"])
def test_dense_backward_in_several_chunks(geometry, monkeypatch):
    monkeypatch.setattr(frozen_conv, "image_chunks", lambda grad: [slice(0, 1), slice(1, 2)])
    check(geometry, torch.float32, "channels_last", "relu6")
