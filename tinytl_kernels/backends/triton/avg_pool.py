"""Average pooling on the GPU, both ways in gather form.

No kernel fuses it with the grouped convolution of a lite residual: that convolution's weight is trained, so backward
needs the pooled image, and it has to be written anyway. A product that averaged as it loads would save one read of a
quarter of the block's input, and pay with four loads and three additions for each of its 25 taps. Where the image is in
L2 already, in the fused block, this kernel writes the ``pooled`` port from there.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from tinytl_kernels.backends.triton.launch import (
    TRITON_DTYPE,
    Launch,
    needs_wide_offsets,
    on_device,
    start,
    stride_arguments,
    stride_unit,
)
from tinytl_kernels.backends.triton.tiles import ANY_SIZE, cut, tile_coordinates
from tinytl_kernels.core.geometry import output_length
from tinytl_kernels.core.layout import format_of, memory_format


@triton.jit
def window_length(
    position, length, KERNEL: tl.constexpr, STRIDE: tl.constexpr, PAD: tl.constexpr, COUNT_PADDING: tl.constexpr
):
    """How many pixels of an axis ATen counts in the window of output ``position``."""
    first = position * STRIDE - PAD
    # ceil_mode lets a window hang over the padding; what hangs there never counts.
    last = tl.minimum(first + KERNEL, length + PAD)
    if not COUNT_PADDING:
        first, last = tl.maximum(first, 0), tl.minimum(last, length)
    return last - first


@triton.jit
def reading_window(
    pixel, number, length, windows, KERNEL: tl.constexpr, STRIDE: tl.constexpr, PAD: tl.constexpr,
    COUNT_PADDING: tl.constexpr, ADAPTIVE: tl.constexpr,
):  # fmt: skip
    """(position, whether it is there and reads ``pixel``, its pixels that count) of the ``number``-th window around it.

    Of one axis of ``length`` pixels and ``windows`` windows.
    """
    if ADAPTIVE:
        position = pixel * windows // length + number
        first, last = adaptive_window(position, length, windows)
        reads = (position < windows) & (first <= pixel) & (pixel < last)
        count = last - first
    else:
        position = (pixel + PAD) // STRIDE - number
        reads = (position >= 0) & (position < windows) & (pixel + PAD - position * STRIDE < KERNEL)
        count = window_length(position, length, KERNEL, STRIDE, PAD, COUNT_PADDING)
    return position, reads, count


@triton.jit
def adaptive_window(position, length, windows):
    """(first, one beyond the last) pixel of window ``position`` of ``windows`` over ``length`` pixels."""
    return position * length // windows, ((position + 1) * length + windows - 1) // windows


@triton.jit(do_not_specialize=ANY_SIZE)
def avg_pool2d_kernel(
    input, output, channels, height, width, out_height, out_width, tiles_h, tiles_w,
    input_n, input_h, input_w, input_c, output_n, output_h, output_w, output_c,
    DTYPE: tl.constexpr, WIDE: tl.constexpr, UNIT: tl.constexpr,
    KERNEL_H: tl.constexpr, KERNEL_W: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
    PAD_H: tl.constexpr, PAD_W: tl.constexpr, COUNT_PADDING: tl.constexpr, DIVISOR: tl.constexpr,
    TILE_H: tl.constexpr, TILE_W: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """output[h, w, c] = sum of input over the window / count

    A program computes TILE_H x TILE_W pixels of BLOCK_C channels. Bytes an output element: itself + input * S^2.
    """
    channels = channels * UNIT
    image, h, w, first_channel = tile_coordinates(
        tl.program_id(0), channels, tiles_h, tiles_w, WIDE, TILE_H, TILE_W, BLOCK_C
    )
    c = first_channel + tl.arange(0, BLOCK_C)
    source = input + image * (input_n * UNIT) + c[None, :] * input_c
    total = tl.zeros((TILE_H * TILE_W, BLOCK_C), dtype=tl.float32)
    for i in range(KERNEL_H):
        row = h * STRIDE_H + (i - PAD_H)
        for j in range(KERNEL_W):
            column = w * STRIDE_W + (j - PAD_W)
            reached = (row >= 0) & (row < height) & (column >= 0) & (column < width)
            offset = row * (input_h * UNIT) + column * (input_w * UNIT)
            x = tl.load(source + offset[:, None], mask=reached[:, None] & (c < channels)[None, :], other=0.0)
            total += x.to(tl.float32)
    if DIVISOR != 0:
        total = total / DIVISOR
    else:
        rows = window_length(h, height, KERNEL_H, STRIDE_H, PAD_H, COUNT_PADDING)
        columns = window_length(w, width, KERNEL_W, STRIDE_W, PAD_W, COUNT_PADDING)
        total = total / (rows * columns).to(tl.float32)[:, None]
    offset = image * (output_n * UNIT) + h * (output_h * UNIT) + w * (output_w * UNIT)
    valid = ((h < out_height) & (w < out_width))[:, None] & (c < channels)[None, :]
    tl.store(output + offset[:, None] + c[None, :] * output_c, total.to(DTYPE), mask=valid)


@triton.jit(do_not_specialize=ANY_SIZE)
def avg_pool2d_backward_kernel(
    grad_output, grad_input, channels, height, width, out_height, out_width, tiles_h, tiles_w,
    grad_n, grad_h, grad_w, grad_c, input_n, input_h, input_w, input_c,
    DTYPE: tl.constexpr, WIDE: tl.constexpr, UNIT: tl.constexpr,
    KERNEL_H: tl.constexpr, KERNEL_W: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
    PAD_H: tl.constexpr, PAD_W: tl.constexpr, COUNT_PADDING: tl.constexpr, DIVISOR: tl.constexpr,
    ADAPTIVE: tl.constexpr, WINDOWS_H: tl.constexpr, WINDOWS_W: tl.constexpr,
    TILE_H: tl.constexpr, TILE_W: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """grad_input[h, w, c] = sum over the windows around (h, w) of grad_output / count

    A pixel lies in up to WINDOWS_H x WINDOWS_W windows, of KERNEL, STRIDE and PAD or, if ADAPTIVE, of equal parts of
    the image. A program computes TILE_H x TILE_W pixels of BLOCK_C channels.
    Bytes a grad_input element: itself + grad_output * H' W' / (H W).
    """
    channels = channels * UNIT
    image, h, w, first_channel = tile_coordinates(
        tl.program_id(0), channels, tiles_h, tiles_w, WIDE, TILE_H, TILE_W, BLOCK_C
    )
    c = first_channel + tl.arange(0, BLOCK_C)
    source = grad_output + image * (grad_n * UNIT) + c[None, :] * grad_c
    total = tl.zeros((TILE_H * TILE_W, BLOCK_C), dtype=tl.float32)
    for a in range(WINDOWS_H):
        row, row_reads, rows = reading_window(
            h, a, height, out_height, KERNEL_H, STRIDE_H, PAD_H, COUNT_PADDING, ADAPTIVE
        )
        for b in range(WINDOWS_W):
            column, reads, columns = reading_window(
                w, b, width, out_width, KERNEL_W, STRIDE_W, PAD_W, COUNT_PADDING, ADAPTIVE
            )
            reads = reads & row_reads
            offset = row * (grad_h * UNIT) + column * (grad_w * UNIT)
            g = tl.load(source + offset[:, None], mask=reads[:, None] & (c < channels)[None, :], other=0.0)
            count = rows * columns
            if DIVISOR != 0:
                count = tl.full((TILE_H * TILE_W,), DIVISOR, dtype=tl.int32)
            # A window that is not there may have a count of 0.
            total += g.to(tl.float32) / tl.where(reads, count, 1).to(tl.float32)[:, None]
    offset = image * (input_n * UNIT) + h * (input_h * UNIT) + w * (input_w * UNIT)
    valid = ((h < height) & (w < width))[:, None] & (c < channels)[None, :]
    tl.store(grad_input + offset[:, None] + c[None, :] * input_c, total.to(DTYPE), mask=valid)


def _window(kernel_size, stride, padding, count_include_pad: bool, divisor_override: int | None) -> dict:
    return dict(
        KERNEL_H=kernel_size[0], KERNEL_W=kernel_size[1], STRIDE_H=stride[0], STRIDE_W=stride[1],
        PAD_H=padding[0], PAD_W=padding[1], COUNT_PADDING=count_include_pad, DIVISOR=divisor_override or 0,
    )  # fmt: skip


def average_into(
    input: Tensor, kernel_size, stride, padding, count_include_pad: bool, divisor_override: int | None, output: Tensor
) -> None:
    """Average pooling of ``input`` (N, C, H, W) into ``output`` (N, C, H', W'), any strides."""
    n, channels, height, width = input.shape
    out_height, out_width = output.shape[2:]
    tiles = cut(out_height, out_width, channels, tuple(stride), tuple(kernel_size))
    unit = stride_unit(channels, False, input, output)
    start(
        Launch(
            avg_pool2d_kernel,
            (tiles.programs(n),),
            dict(
                input=input, output=output, channels=channels // unit, height=height, width=width,
                out_height=out_height, out_width=out_width, **tiles.arguments,
                **stride_arguments("input", input, unit), **stride_arguments("output", output, unit),
            ),
            dict(
                DTYPE=TRITON_DTYPE[input.dtype], WIDE=needs_wide_offsets(input, output), UNIT=unit,
                **_window(kernel_size, stride, padding, count_include_pad, divisor_override), **tiles.constants,
            ),
            num_warps=tiles.num_warps,
        )
    )  # fmt: skip


@on_device
def avg_pool2d(
    input: Tensor, kernel_size, stride, padding, ceil_mode: bool, count_include_pad: bool, divisor_override
) -> Tensor:
    size = pooled_size(input.shape[2:], kernel_size, stride, padding, (1, 1), ceil_mode)
    output = torch.empty(
        (*input.shape[:2], *size), dtype=input.dtype, device=input.device, memory_format=memory_format(input)
    )
    average_into(input, kernel_size, stride, padding, count_include_pad, divisor_override, output)
    return output


def pooled_size(size, kernel_size, stride, padding, dilation, ceil_mode: bool) -> list[int]:
    """Positions (height, width) of a pooling window over an image of ``size``, as ATen counts them."""
    positions = []
    for length, kernel, step, pad, spread in zip(size, kernel_size, stride, padding, dilation, strict=True):
        count = output_length(length, kernel, step, pad, pad + (step - 1 if ceil_mode else 0), spread)
        # A window that would start beyond the image and its left padding is dropped.
        positions.append(count - 1 if ceil_mode and (count - 1) * step >= length + pad else count)
    return positions


@on_device
def avg_pool2d_backward(
    grad_output: Tensor, input_size, kernel_size, stride, padding, ceil_mode: bool, count_include_pad: bool,
    divisor_override, channels_last: bool,
) -> Tensor:  # fmt: skip
    windows = [triton.cdiv(k, s) for k, s in zip(kernel_size, stride, strict=True)]
    window = _window(kernel_size, stride, padding, count_include_pad, divisor_override)
    return average_backward(grad_output, input_size, channels_last, windows, ADAPTIVE=False, **window)


def average_backward(
    grad_output: Tensor, input_size: Sequence[int], channels_last: bool, windows: Sequence[int], **window: int
) -> Tensor:
    """The gradient of an average's input.

    Args:
        windows: how many windows read a pixel at most, along height and width.
        window: constants of the kernel that say which.
    """
    grad_input = torch.empty(
        input_size, dtype=grad_output.dtype, device=grad_output.device, memory_format=format_of(channels_last)
    )
    n, channels, height, width = input_size
    tiles = cut(height, width, channels, dtype=grad_output.dtype)
    unit = stride_unit(channels, False, grad_output, grad_input)
    start(
        Launch(
            avg_pool2d_backward_kernel,
            (tiles.programs(n),),
            dict(
                grad_output=grad_output, grad_input=grad_input, channels=channels // unit,
                height=height, width=width, out_height=grad_output.size(2), out_width=grad_output.size(3),
                **tiles.arguments, **stride_arguments("grad", grad_output, unit),
                **stride_arguments("input", grad_input, unit),
            ),
            dict(
                DTYPE=TRITON_DTYPE[grad_input.dtype], WIDE=needs_wide_offsets(grad_output, grad_input), UNIT=unit,
                WINDOWS_H=windows[0], WINDOWS_W=windows[1], **window, **tiles.constants,
            ),
            num_warps=tiles.num_warps,
        )
    )  # fmt: skip
    return grad_input


OPERATORS = {"avg_pool2d": avg_pool2d, "avg_pool2d_backward": avg_pool2d_backward}
