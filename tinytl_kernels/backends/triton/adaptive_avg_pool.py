"""Adaptive average pooling on the GPU, both ways in gather form: window i of n spans [i H / n] to [(i + 1) H / n]."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from tinytl_kernels.backends.triton.avg_pool import adaptive_window, average_backward
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
from tinytl_kernels.backends.triton.tiles import ANY_SIZE
from tinytl_kernels.core.layout import memory_format

# Elements that a program of the forward reads at a time: 16 a thread at 4 warps.
_TILE_ELEMENTS = 2048


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
    top, bottom = adaptive_window(h, height, out_height)
    left, right = adaptive_window(w, width, out_width)
    rows, columns = bottom - top, right - left
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
    # Windows overlap by a pixel where their number does not divide the length.
    windows = [
        triton.cdiv(count, length) + (length % count != 0)
        for length, count in zip(input_size[2:], grad_output.shape[2:], strict=True)
    ]
    no_window = dict.fromkeys(("KERNEL_H", "KERNEL_W", "STRIDE_H", "STRIDE_W"), 1) | dict(PAD_H=0, PAD_W=0)
    return average_backward(
        grad_output, input_size, channels_last, windows, ADAPTIVE=True, COUNT_PADDING=False, DIVISOR=0, **no_window
    )


OPERATORS = {"adaptive_avg_pool2d": adaptive_avg_pool2d, "adaptive_avg_pool2d_backward": adaptive_avg_pool2d_backward}
