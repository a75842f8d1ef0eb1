"""Frozen convolutions on the CPU: ``pointwise.cpp``, ``depthwise_conv.cpp``, and oneDNN for the dense ones.

A dense or grouped k x k convolution is oneDNN's through ATen; bias, activation and bit mask are one pass over its
output (``activation.cpp``), and in backward the masked gradient and the bias gradient are one pass over a few images
at a time, which oneDNN then takes to the input gradient. Weights in 8 bits are unpacked by the C++ kernels while they
pack their operands, and a slice of channels at a time for oneDNN.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tinytl_kernels.backends.cpu.layout import channels_last, in_layout
from tinytl_kernels.backends.reference import frozen_conv as reference
from tinytl_kernels.backends.reference.slabs import image_chunks
from tinytl_kernels.backends.reference.weights import dequantize_if_small
from tinytl_kernels.core.activations import FULL_VALUE, LEAKY_SLOPE
from tinytl_kernels.core.layout import format_of, memory_format

# What the pointwise and depthwise kernels apply themselves.
_IN_KERNEL = {None: "none", "relu": "relu", "relu6": "relu6"}


def frozen_conv(
    input: Tensor, weight: Tensor, bias: Tensor | None, stride, padding, dilation, groups: int,
    activation: str | None, needs_saved: bool, weight_scale: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    if activation in FULL_VALUE:
        return reference.frozen_conv(
            input, weight, bias, stride, padding, dilation, groups, activation, needs_saved, weight_scale
        )
    layout = memory_format(input, weight)
    needs_mask = needs_saved and activation is not None
    kernel = _kernel(weight, groups, padding, activation)
    if kernel == "pointwise":
        output, mask = torch.ops.tinytl_cpu.pointwise_forward(
            channels_last(input), weight, weight_scale, bias, stride, _IN_KERNEL[activation], needs_mask
        )
    elif kernel == "depthwise":
        output, mask = torch.ops.tinytl_cpu.depthwise_forward(
            channels_last(input), weight, weight_scale, bias, stride, padding, dilation, _IN_KERNEL[activation],
            needs_mask,
        )  # fmt: skip
    else:
        # The bias goes to oneDNN too: added after its output was rounded, it would turn signs, and mask bits, around.
        output = reference.convolve(
            channels_last(input), weight, bias, stride, padding, dilation, groups, torch.channels_last, weight_scale
        )
        mask = input.new_empty(0, dtype=torch.uint8)
        if activation is not None:
            mask = torch.ops.tinytl_cpu.bias_activation_(output, None, activation, LEAKY_SLOPE, needs_mask)
    return in_layout(output, layout), mask


def frozen_conv_backward(
    grad_output: Tensor, weight: Tensor, saved: Tensor, input_size, stride, padding, dilation, groups: int,
    activation: str | None, is_channels_last: bool, need_input: bool, need_bias: bool,
    weight_scale: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    if activation in FULL_VALUE:
        return reference.frozen_conv_backward(
            grad_output, weight, saved, input_size, stride, padding, dilation, groups, activation, is_channels_last,
            need_input, need_bias, weight_scale,
        )  # fmt: skip
    kernel = _kernel(weight, groups, padding, activation)
    grad_output = channels_last(grad_output)
    if kernel == "pointwise":
        grad_input, grad_bias = torch.ops.tinytl_cpu.pointwise_backward(
            grad_output, saved, weight, weight_scale, input_size, stride, _IN_KERNEL[activation], need_input, need_bias
        )
    elif kernel == "depthwise":
        grad_input, grad_bias = torch.ops.tinytl_cpu.depthwise_backward(
            grad_output, saved, weight, weight_scale, input_size, stride, padding, dilation, _IN_KERNEL[activation],
            need_input, need_bias,
        )  # fmt: skip
    else:
        grad_input, grad_bias = _dense_backward(
            grad_output, weight, saved, input_size, stride, padding, dilation, groups, activation, need_input,
            need_bias, weight_scale,
        )  # fmt: skip
    return in_layout(grad_input, format_of(is_channels_last)) if need_input else grad_input, grad_bias


def _dense_backward(
    grad_output, weight, saved, input_size, stride, padding, dilation, groups, activation, need_input, need_bias,
    weight_scale,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    if activation is None:
        return reference.frozen_conv_backward(
            grad_output, weight, saved, input_size, stride, padding, dilation, groups, None, True, need_input,
            need_bias, weight_scale,
        )  # fmt: skip
    if not need_input:
        return torch.ops.tinytl_cpu.activation_backward(grad_output, saved, activation, LEAKY_SLOPE, False, need_bias)
    grad_input = torch.empty(input_size, dtype=grad_output.dtype, memory_format=torch.channels_last)
    grad_bias = torch.zeros(weight.size(0) if need_bias else 0)
    weight, weight_scale = dequantize_if_small(weight, weight_scale, grad_output.dtype)
    for images in image_chunks(grad_output):
        grad, bias = torch.ops.tinytl_cpu.activation_backward(
            grad_output[images], saved[images], activation, LEAKY_SLOPE, True, need_bias
        )
        grad_bias += bias
        reference.transposed_convolution(
            grad, weight, stride, padding, dilation, groups, grad_input[images], weight_scale
        )
    return grad_input, grad_bias


def _kernel(weight: Tensor, groups: int, padding, activation: str | None) -> str:
    if activation not in _IN_KERNEL:
        return "dense"
    if groups == 1 and weight.shape[2:] == (1, 1) and not any(padding):
        return "pointwise"
    if groups == weight.size(0) and weight.size(1) == 1:
        return "depthwise"
    return "dense"


OPERATORS = {"frozen_conv": frozen_conv, "frozen_conv_backward": frozen_conv_backward}
