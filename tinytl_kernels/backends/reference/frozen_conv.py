"""Frozen convolution in ATen. The input gradient of a convolution is a transposed convolution of grad_output.

A weight in 8 bits is dequantised for the call and dropped after it, a slice at a time where it is large (``weights``).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tinytl_kernels.backends.reference.activation import (
    activation_gradient,
    activation_mask,
    apply_activation_,
    apply_smooth_activation,
)
from tinytl_kernels.backends.reference.slabs import image_chunks
from tinytl_kernels.backends.reference.weights import dequantize_if_small, weight_slices
from tinytl_kernels.core.activations import BIT_MASK
from tinytl_kernels.core.dtypes import accumulation_dtype
from tinytl_kernels.core.geometry import output_length, window_extent, window_reaches
from tinytl_kernels.core.layout import format_of, memory_format


def frozen_conv(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    activation: str | None,
    needs_saved: bool,
    weight_scale: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    layout = memory_format(input, weight)
    output = convolve(input, weight, bias, stride, padding, dilation, groups, layout, weight_scale)
    return _activated(output, activation, needs_saved)


def frozen_conv_add(
    input: Tensor,
    shortcut: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    activation: str | None,
    needs_saved: bool,
    weight_scale: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    layout = memory_format(input, weight)
    output = convolve(input, weight, bias, stride, padding, dilation, groups, layout, weight_scale)
    return _activated(output.add_(shortcut), activation, needs_saved)


def _activated(output: Tensor, activation: str | None, needs_saved: bool) -> tuple[Tensor, Tensor]:
    """The activation of ``output``, in place if it keeps bits, and what its derivative needs."""
    nothing = output.new_empty(0, dtype=torch.uint8)
    if activation is None:
        return output, nothing
    if activation not in BIT_MASK:
        return apply_smooth_activation(output, activation), output if needs_saved else nothing
    saved = activation_mask(output, activation) if needs_saved else nothing
    return apply_activation_(output, activation), saved


def convolve(input, weight, bias, stride, padding, dilation, groups, layout, weight_scale=None) -> Tensor:
    """Convolution and bias, in ``layout``; weight and bias are rounded to the dtype of ``input``."""
    bias = None if bias is None else bias.to(input.dtype)
    weight, weight_scale = dequantize_if_small(weight, weight_scale, input.dtype)
    if weight_scale is None:
        return _convolve(input, weight, bias, stride, padding, dilation, groups, layout)
    top, bottom, left, right = padding
    height = output_length(input.size(2), weight.size(2), stride[0], top, bottom, dilation[0])
    width = output_length(input.size(3), weight.size(3), stride[1], left, right, dilation[1])
    output = torch.empty(
        (input.size(0), weight.size(0), height, width), dtype=input.dtype, device=input.device, memory_format=layout
    )
    for part in weight_slices(weight, weight_scale, input.dtype, groups, by_input=False):
        own_bias = None if bias is None else bias[part.outputs]
        output[:, part.outputs] = _convolve(
            input[:, part.inputs], part.weight, own_bias, stride, padding, dilation, part.groups, layout
        )
    return output


def _convolve(input, weight, bias, stride, padding, dilation, groups, layout) -> Tensor:
    top, bottom, left, right = padding
    even = top == bottom and left == right
    # oneDNN computes in a blocked layout and copies the result into NCHW: image by image, so that there are not two
    # outputs at a time (measured: not slower, as a chunk stays in cache).
    if even and (layout is torch.channels_last or input.device.type != "cpu" or input.size(0) == 1):
        output = _conv2d(input, weight, bias, stride, (top, left), dilation, groups)
        return output.contiguous(memory_format=layout)
    # ATen pads both sides alike. A padded copy of the input is avoided by padding both sides by as much as covers
    # both, in whole strides, and dropping the positions that this adds before the first.
    rows_before, pad_height = _cover(top, bottom, stride[0])
    columns_before, pad_width = _cover(left, right, stride[1])
    height = output_length(input.size(2), weight.size(2), stride[0], top, bottom, dilation[0])
    width = output_length(input.size(3), weight.size(3), stride[1], left, right, dilation[1])
    output = torch.empty(
        (input.size(0), weight.size(0), height, width), dtype=input.dtype, device=input.device, memory_format=layout
    )
    for images in image_chunks(input):
        wide = _conv2d(input[images], weight, bias, stride, (pad_height, pad_width), dilation, groups)
        output[images] = wide[:, :, rows_before : rows_before + height, columns_before : columns_before + width]
    return output


def _conv2d(input, weight, bias, stride, padding, dilation, groups) -> Tensor:
    sides = [(input.size(2 + i), weight.size(2 + i), stride[i], padding[i], padding[i], dilation[i]) for i in range(2)]
    if all(window_reaches(*side) for side in sides):
        return torch.conv2d(input, weight, bias, stride, padding, dilation, groups)
    # A dilated or strided window that lies beside a tiny image wherever it stands: there oneDNN crashes on the bias.
    output = input.new_zeros((input.size(0), weight.size(0), *(output_length(*side) for side in sides)))
    return output if bias is None else output + bias[:, None, None]


def _cover(before: int, after: int, stride: int) -> tuple[int, int]:
    """(surplus positions, symmetric padding) such that the padding is ``before`` plus whole strides, >= ``after``."""
    surplus = max(0, -((before - after) // stride))
    return surplus, before + surplus * stride


def frozen_conv_backward(
    grad_output: Tensor,
    weight: Tensor,
    saved: Tensor,
    input_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    activation: str | None,
    channels_last: bool,
    need_input: bool,
    need_bias: bool,
    weight_scale: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    dtype = grad_output.dtype
    grad_input = torch.empty(
        input_size if need_input else (0, 1, 1, 1),
        dtype=dtype,
        device=grad_output.device,
        memory_format=format_of(channels_last),
    )
    if not need_input:
        grad_input = grad_input.view(0)
    grad_bias = torch.zeros(
        weight.size(0) if need_bias else 0, dtype=accumulation_dtype(dtype), device=grad_output.device
    )
    if need_input:
        weight, weight_scale = dequantize_if_small(weight, weight_scale, dtype)
    # A few images at a time: the masked gradient is a temporary of a chunk, never a full copy of grad_output.
    for images in image_chunks(grad_output):
        grad = grad_output[images]
        if activation is not None:
            grad = activation_gradient(grad, saved[images], activation)
        if need_bias:
            grad_bias += grad.sum((0, 2, 3), dtype=grad_bias.dtype)
        if need_input:
            transposed_convolution(grad, weight, stride, padding, dilation, groups, grad_input[images], weight_scale)
    return grad_input, grad_bias


def transposed_convolution(
    grad, weight, stride, padding, dilation, groups, out: Tensor, weight_scale: Tensor | None = None
) -> None:
    """The input gradient of a convolution, into ``out``; see :func:`convolve`."""
    for part in weight_slices(weight, weight_scale, grad.dtype, groups, by_input=True):
        own = grad if part.groups == groups else grad[:, part.outputs]
        _transposed_convolution(own, part.weight, stride, padding, dilation, part.groups, out[:, part.inputs])


def _transposed_convolution(grad, weight, stride, padding, dilation, groups, out: Tensor) -> None:
    top, bottom, left, right = padding
    # Pixels at the far edge that no window reached; ATen crops both sides alike, so crop by the smaller padding and
    # cut the rest off the result.
    rows = _output_padding(out.size(2), grad.size(2), weight.size(2), stride[0], top, bottom, dilation[0])
    columns = _output_padding(out.size(3), grad.size(3), weight.size(3), stride[1], left, right, dilation[1])
    crop_height, crop_width = min(top, bottom), min(left, right)
    full = torch.conv_transpose2d(
        grad, weight, None, stride, (crop_height, crop_width), (rows, columns), groups, dilation
    )
    first_row, first_column = top - crop_height, left - crop_width
    out.copy_(full[:, :, first_row : first_row + out.size(2), first_column : first_column + out.size(3)])


def _output_padding(length, positions, kernel, stride, before, after, dilation) -> int:
    unreached = length + before + after - (positions - 1) * stride - window_extent(kernel, dilation)
    return max(0, unreached - max(0, after - before))


OPERATORS = {
    "frozen_conv": frozen_conv,
    "frozen_conv_add": frozen_conv_add,
    "frozen_conv_backward": frozen_conv_backward,
}
