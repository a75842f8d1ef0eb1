"""Frozen convolution on the GPU: its operators, put together from kernels.

Pointwise, depthwise and dense kernels of our own, or cuDNN's, between a kernel that applies bias, activation and mask
to its output in place, and one that applies the mask to the gradient before it; ``choice`` says which.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tinytl_kernels.backends.reference import frozen_conv as reference
from tinytl_kernels.backends.reference.slabs import image_chunks
from tinytl_kernels.backends.triton.activation import activate_into, gradient_into, gradient_tiles
from tinytl_kernels.backends.triton.choice import DEPTHWISE, IMPLICIT_GEMM, LIBRARY, POINTWISE, choose
from tinytl_kernels.backends.triton.dense import dense, dense_backward, dense_tiles
from tinytl_kernels.backends.triton.depthwise import backward_tiles, depthwise, depthwise_backward, taps_first
from tinytl_kernels.backends.triton.epilogue import MASK, NOTHING, saved_kind
from tinytl_kernels.backends.triton.launch import on_device
from tinytl_kernels.backends.triton.pointwise import pixel_tiles, pointwise, pointwise_backward
from tinytl_kernels.core.activations import mask_size
from tinytl_kernels.core.geometry import output_length
from tinytl_kernels.core.layout import format_of, memory_format
from tinytl_kernels.core.quantization import dequantize


@on_device
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
    size = _output_size(input.shape, weight, stride, padding, dilation)
    by = choose(weight, stride, padding, groups, size[0] * size[2] * size[3], input.dtype)
    if by == LIBRARY:
        if input.device.type == "cpu":
            # Interpreted: oneDNN adds the bias before it rounds to half precision, cuDNN leaves it to another pass.
            fused_bias, bias = bias, None
        else:
            fused_bias = None
        output, _ = reference.frozen_conv(
            input, weight, fused_bias, stride, padding, dilation, groups, None, False, weight_scale
        )
    else:
        layout = memory_format(input, weight)
        output = torch.empty(size, dtype=input.dtype, device=input.device, memory_format=layout)
    saved = empty_saved(output, saved_kind(activation, needs_saved))
    where = saved if saved_kind(activation, needs_saved) != NOTHING else None
    if by == POINTWISE:
        reached = input[:, :, :: stride[0], :: stride[1]]
        pointwise(reached, weight, bias, activation, output, where, scale=weight_scale)
    elif by == DEPTHWISE:
        taps = taps_first(weight, input.dtype, weight_scale)
        depthwise(input, weight, bias, stride, padding, dilation, activation, output, where, taps)
    elif by == IMPLICIT_GEMM:
        dense(input, weight, bias, stride, padding, dilation, groups, activation, output, where, weight_scale)
    elif bias is not None or activation is not None:
        activate_into(output, bias, activation, output, where)
    return output, saved


@on_device
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
    """The sum is a pass of its own, the activation another, both in place."""
    output, _ = frozen_conv(input, weight, bias, stride, padding, dilation, groups, None, False, weight_scale)
    output.add_(shortcut)
    kind = saved_kind(activation, needs_saved)
    mask = empty_saved(output, kind)
    if activation is not None:
        activate_into(output, None, activation, output, mask if kind != NOTHING else None)
    return output, mask


def _output_size(input_size, weight: Tensor, stride, padding, dilation) -> tuple[int, int, int, int]:
    top, bottom, left, right = padding
    return (
        input_size[0],
        weight.size(0),
        output_length(input_size[2], weight.size(2), stride[0], top, bottom, dilation[0]),
        output_length(input_size[3], weight.size(3), stride[1], left, right, dilation[1]),
    )


def empty_saved(output: Tensor, kind: str) -> Tensor:
    """Room for what the derivative of an activation needs: a mask, a value like ``output``, or nothing."""
    if kind == NOTHING:
        return output.new_empty(0, dtype=torch.uint8)
    if kind == MASK:
        return output.new_empty(mask_size(output.shape), dtype=torch.uint8)
    return torch.empty_like(output)


@on_device
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
    pixels, out_channels = grad_output.numel() // max(1, weight.size(0)), weight.size(0)
    if not need_input:
        sums = partial_sums(gradient_tiles(pixels, out_channels), out_channels, need_bias, grad_output)
        if sums is not None:
            gradient_into(grad_output, saved, activation, None, sums)
        return grad_output.new_empty(0), add_up(sums, grad_output)
    by = choose(weight, stride, padding, groups, pixels, grad_output.dtype, backward=True)
    if by == LIBRARY:
        return _library_backward(
            grad_output, weight, saved, input_size, stride, padding, dilation, groups, activation, channels_last,
            need_bias, weight_scale,
        )  # fmt: skip
    dtype = grad_output.dtype
    grad_input = torch.empty(input_size, dtype=dtype, device=grad_output.device, memory_format=format_of(channels_last))
    if by == POINTWISE:
        reached = grad_input[:, :, :: stride[0], :: stride[1]]
        if reached.numel() < grad_input.numel():
            grad_input.zero_()
        rows = pixel_tiles(pixels, input_size[1], out_channels, dtype)
        sums = partial_sums(rows, out_channels, need_bias, grad_output)
        pointwise_backward(grad_output, weight, saved, activation, reached, sums, scale=weight_scale)
    elif by == DEPTHWISE:
        rows = backward_tiles(input_size, grad_output.shape, weight, stride, dilation, dtype).rows(input_size[0])
        sums = partial_sums(rows, out_channels, need_bias, grad_output)
        taps = taps_first(weight, dtype, weight_scale)
        depthwise_backward(grad_output, weight, saved, stride, padding, dilation, activation, grad_input, sums, taps)
    else:
        rows = dense_tiles(input_size, grad_output.shape, weight, stride, groups, dtype)
        sums = partial_sums(rows, out_channels, need_bias, grad_output)
        dense_backward(
            grad_output, weight, saved, stride, padding, dilation, groups, activation, grad_input, sums, weight_scale
        )
    return grad_input, add_up(sums, grad_output)


def partial_sums(rows: int, channels: int, need: bool, like: Tensor) -> Tensor | None:
    """Room for the partial sums of a bias gradient, (rows, channels) float32; None if it is not needed."""
    return like.new_empty((rows, channels), dtype=torch.float32) if need else None


def add_up(sums: Tensor | None, like: Tensor) -> Tensor:
    """Partial sums -> bias gradient (channels,), in ATen's fixed order; no elements if there are none."""
    return like.new_empty(0, dtype=torch.float32) if sums is None else sums.sum(0)


def _library_backward(
    grad_output, weight, saved, input_size, stride, padding, dilation, groups, activation, channels_last, need_bias,
    weight_scale,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """A few images at a time: the masked gradient is a temporary of a chunk, never a full copy of grad_output."""
    n, out_channels, height, width = grad_output.shape
    chunks = [range(n)[images] for images in image_chunks(grad_output)]
    tiles = [gradient_tiles(len(images) * height * width, out_channels) for images in chunks]
    sums = partial_sums(sum(tiles), out_channels, need_bias, grad_output)
    # A single chunk is the whole gradient.
    grad_input = None
    if len(chunks) != 1:
        grad_input = torch.empty(
            input_size, dtype=grad_output.dtype, device=grad_output.device, memory_format=format_of(channels_last)
        )
    weight = dequantize(weight, weight_scale, grad_output.dtype)
    first_tile = 0
    for images, count in zip(chunks, tiles, strict=True):
        part = slice(images.start, images.stop)
        grad = grad_output[part]
        masked = torch.empty_like(grad) if activation is not None else None
        chunk_sums = None if sums is None else sums[first_tile : first_tile + count]
        if masked is not None or chunk_sums is not None:
            chunk_saved = saved[part] if activation is not None else None
            gradient_into(grad, chunk_saved, activation, masked, chunk_sums)
        first_tile += count
        chunk, _ = reference.frozen_conv_backward(
            grad if masked is None else masked, weight, saved, (len(images), *input_size[1:]),
            stride, padding, dilation, groups, None, channels_last, True, False,
        )  # fmt: skip
        if grad_input is None:
            return chunk, add_up(sums, grad_output)
        grad_input[part] = chunk
    return grad_input, add_up(sums, grad_output)


OPERATORS = {
    "frozen_conv": frozen_conv,
    "frozen_conv_add": frozen_conv_add,
    "frozen_conv_backward": frozen_conv_backward,
}
