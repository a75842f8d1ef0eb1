"""Adaptive average pooling on the GPU, both ways in gather form: window i of n spans [i H / n] to [(i + 1) H / n]."""

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
    power_of_two,
    start,
    stride_arguments,
    stride_unit,
)
from tinytl_kernels.backends.triton.tiles import ANY_SIZE, cut, tile_coordinates
from tinytl_kernels.core.layout import format_of, memory_format

# Elements that a program of the forward reads at a time: 16 a thread at 4 warps.
_TILE_ELEMENTS = 2048


@triton.jit
def window_start(window, length, windows):
    """Where window ``window`` of ``windows`` over ``length`` pixels starts."""
    return window * length // windows


@triton.jit
def window_end(window, length, windows):
    """One beyond where it ends."""
    return ((window + 1) * length + windows - 1) // windows


@triton.jit(do_not_specialize=ANY_SIZE)
def adaptive_avg_pool2d_kernel(
    input, output, channels, height, width, out_height, out_width,
    input_n, input_h, input_w, input_c, output_n, output_h, output_w, output_c,
    DTYPE: tl.constexpr, WIDE: tl.constexpr, UNIT: tl.constexpr, ROWS: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """output[h, w, c] = mean of input[., ., c] over window (h, w)

    A program computes one output pixel x BLOCK_C channels, ROWS input pixels at a time. Bytes an output element: itself
    + input * H W / (H' W').
    """
    channels = channels * UNIT
    channel_tiles = tl.cdiv(channels, BLOCK_C)
    program = tl.program_id(0)
    c = program % channel_tiles * BLOCK_C + tl.arange(0, BLOCK_C)
    w = program // channel_tiles % out_width
    h = program // channel_tiles // out_width % out_height
    number = program // channel_tiles // out_width // out_height
    if WIDE:
        number, c, h, w = number.to(tl.int64), c.to(tl.int64), h.to(tl.int64), w.to(tl.int64)
    top, left = window_start(h, height, out_height), window_start(w, width, out_width)
    rows = window_end(h, height, out_height) - top
    columns = window_end(w, width, out_width) - left
    source = input + number * (input_n * UNIT) + c[None, :] * input_c
    total = tl.zeros((BLOCK_C,), dtype=tl.float32)
    for first in range(0, rows * columns, ROWS):
        place = first + tl.arange(0, ROWS)
        offset = (top + place // columns) * (input_h * UNIT) + (left + place % columns) * (input_w * UNIT)
        inside = (place < rows * columns)[:, None] & (c < channels)[None, :]
        total += tl.sum(tl.load(source + offset[:, None], mask=inside, other=0.0).to(tl.float32), axis=0)
    y = total / (rows * columns).to(tl.float32)
    offset = number * (output_n * UNIT) + h * (output_h * UNIT) + w * (output_w * UNIT)
    tl.store(output + offset + c * output_c, y.to(DTYPE), mask=c < channels)


@triton.jit(do_not_specialize=ANY_SIZE)
def adaptive_avg_pool2d_backward_kernel(
    grad_output, grad_input, channels, height, width, out_height, out_width, tiles_h, tiles_w,
    grad_n, grad_h, grad_w, grad_c, input_n, input_h, input_w, input_c,
    DTYPE: tl.constexpr, WIDE: tl.constexpr, UNIT: tl.constexpr, WINDOWS_H: tl.constexpr, WINDOWS_W: tl.constexpr,
    TILE_H: tl.constexpr, TILE_W: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """grad_input[h, w, c] = sum over the windows around (h, w) of grad_output / count

    A pixel lies in at most WINDOWS_H x WINDOWS_W windows. A program computes TILE_H x TILE_W pixels of BLOCK_C
    channels. Bytes a grad_input element: itself + grad_output * H' W' / (H W).
    """
    channels = channels * UNIT
    image, h, w, first_channel = tile_coordinates(
        tl.program_id(0), channels, tiles_h, tiles_w, WIDE, TILE_H, TILE_W, BLOCK_C
    )
    c = first_channel + tl.arange(0, BLOCK_C)
    source = grad_output + image * (grad_n * UNIT) + c[None, :] * grad_c
    total = tl.zeros((TILE_H * TILE_W, BLOCK_C), dtype=tl.float32)
    for a in range(WINDOWS_H):
        row = h * out_height // height + a
        top, bottom = window_start(row, height, out_height), window_end(row, height, out_height)
        row_inside = (row < out_height) & (top <= h) & (h < bottom)
        for b in range(WINDOWS_W):
            column = w * out_width // width + b
            left, right = window_start(column, width, out_width), window_end(column, width, out_width)
            inside = row_inside & (column < out_width) & (left <= w) & (w < right)
            offset = row * (grad_h * UNIT) + column * (grad_w * UNIT)
            g = tl.load(source + offset[:, None], mask=inside[:, None] & (c < channels)[None, :], other=0.0)
            total += g.to(tl.float32) / ((bottom - top) * (right - left)).to(tl.float32)[:, None]
    offset = image * (input_n * UNIT) + h * (input_h * UNIT) + w * (input_w * UNIT)
    valid = ((h < height) & (w < width))[:, None] & (c < channels)[None, :]
    tl.store(grad_input + offset[:, None] + c[None, :] * input_c, total.to(DTYPE), mask=valid)


@on_device
def adaptive_avg_pool2d(input: Tensor, output_size: Sequence[int]) -> Tensor:
    n, channels, height, width = input.shape
    out_height, out_width = output_size
    output = torch.empty(
        (n, channels, out_height, out_width), dtype=input.dtype, device=input.device, memory_format=memory_format(input)
    )
    unit = stride_unit(channels, False, input, output)
    block = power_of_two(channels, 8, 64)
    window = (triton.cdiv(height, out_height) + 1) * (triton.cdiv(width, out_width) + 1)
    start(
        Launch(
            adaptive_avg_pool2d_kernel,
            (n * out_height * out_width * triton.cdiv(channels, block),),
            dict(
                input=input, output=output, channels=channels // unit, height=height, width=width,
                out_height=out_height, out_width=out_width, **stride_arguments("input", input, unit),
                **stride_arguments("output", output, unit),
            ),
            dict(
                DTYPE=TRITON_DTYPE[input.dtype], WIDE=needs_wide_offsets(input, output), UNIT=unit,
                ROWS=power_of_two(window, 1, _TILE_ELEMENTS // block), BLOCK_C=block,
            ),
        )
    )  # fmt: skip
    return output


@on_device
def adaptive_avg_pool2d_backward(grad_output: Tensor, input_size: Sequence[int], channels_last: bool) -> Tensor:
    grad_input = torch.empty(
        input_size, dtype=grad_output.dtype, device=grad_output.device, memory_format=format_of(channels_last)
    )
    n, channels, height, width = input_size
    out_height, out_width = grad_output.shape[2:]
    tiles = cut(height, width, channels, dtype=grad_output.dtype)
    unit = stride_unit(channels, False, grad_output, grad_input)
    start(
        Launch(
            adaptive_avg_pool2d_backward_kernel,
            (tiles.programs(n),),
            dict(
                grad_output=grad_output, grad_input=grad_input, channels=channels // unit, height=height, width=width,
                out_height=out_height, out_width=out_width, **tiles.arguments,
                **stride_arguments("grad", grad_output, unit), **stride_arguments("input", grad_input, unit),
            ),
            dict(
                DTYPE=TRITON_DTYPE[grad_input.dtype], WIDE=needs_wide_offsets(grad_output, grad_input), UNIT=unit,
                # Windows overlap by a pixel where their number does not divide the length.
                WINDOWS_H=triton.cdiv(out_height, height) + (height % out_height != 0),
                WINDOWS_W=triton.cdiv(out_width, width) + (width % out_width != 0), **tiles.constants,
            ),
            num_warps=tiles.num_warps,
        )
    )  # fmt: skip
    return grad_input


OPERATORS = {"adaptive_avg_pool2d": adaptive_avg_pool2d, "adaptive_avg_pool2d_backward": adaptive_avg_pool2d_backward}
