"""Max pooling on the GPU that keeps the winner's position in its window: 4 bits, or a byte for large windows."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from tinytl_kernels.backends.triton.avg_pool import pooled_size
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
from tinytl_kernels.core.geometry import window_extent
from tinytl_kernels.core.layout import format_of, memory_format
from tinytl_kernels.core.positions import fits_in_4_bits, positions_size


@triton.jit(do_not_specialize=ANY_SIZE)
def max_pool2d_kernel(
    input, output, positions, channels, height, width, out_height, out_width, tiles_h, tiles_w,
    input_n, input_h, input_w, input_c, output_n, output_h, output_w, output_c,
    DTYPE: tl.constexpr, WIDE: tl.constexpr, UNIT: tl.constexpr, PACKED: tl.constexpr,
    KERNEL_H: tl.constexpr, KERNEL_W: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
    DILATION_H: tl.constexpr, DILATION_W: tl.constexpr, PAD_H: tl.constexpr, PAD_W: tl.constexpr,
    TILE_H: tl.constexpr, TILE_W: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """output[h, w, c] = max of input over the window; positions = i * KERNEL_W + j of the winner

    The first of equal values wins and the last NaN does, as in PyTorch. A program computes TILE_H x TILE_W pixels of
    BLOCK_C channels. Bytes an output element: itself + 1/2 + input * S^2.
    """
    channels = channels * UNIT
    image, h, w, first_channel = tile_coordinates(
        tl.program_id(0), channels, tiles_h, tiles_w, WIDE, TILE_H, TILE_W, BLOCK_C
    )
    c = first_channel + tl.arange(0, BLOCK_C)
    source = input + image * (input_n * UNIT) + c[None, :] * input_c
    best = tl.full((TILE_H * TILE_W, BLOCK_C), float("-inf"), dtype=tl.float32)
    # The first pixel of the window that is in the image wins unless another is larger, even if all are -inf.
    first_i = tl.maximum(0, tl.cdiv(PAD_H - h * STRIDE_H, DILATION_H))
    first_j = tl.maximum(0, tl.cdiv(PAD_W - w * STRIDE_W, DILATION_W))
    winner = tl.zeros_like(best).to(tl.int32) + (first_i * KERNEL_W + first_j).to(tl.int32)[:, None]
    for i in range(KERNEL_H):
        row = h * STRIDE_H + (i * DILATION_H - PAD_H)
        for j in range(KERNEL_W):
            column = w * STRIDE_W + (j * DILATION_W - PAD_W)
            reached = (row >= 0) & (row < height) & (column >= 0) & (column < width)
            offset = row * (input_h * UNIT) + column * (input_w * UNIT)
            x = tl.load(
                source + offset[:, None], mask=reached[:, None] & (c < channels)[None, :], other=float("-inf")
            ).to(tl.float32)
            wins = (x > best) | (x != x)
            best = tl.where(wins, x, best)
            winner = tl.where(wins, i * KERNEL_W + j, winner)
    inside = (h < out_height) & (w < out_width)
    offset = image * (output_n * UNIT) + h * (output_h * UNIT) + w * (output_w * UNIT)
    valid = inside[:, None] & (c < channels)[None, :]
    tl.store(output + offset[:, None] + c[None, :] * output_c, best.to(DTYPE), mask=valid)
    if positions is not None:
        pixel = (image * out_height + h) * out_width + w
        if PACKED:
            pairs = tl.reshape(tl.where(valid, winner, 0), (TILE_H * TILE_W, BLOCK_C // 2, 2))
            packed = tl.sum(pairs << (tl.arange(0, 2) * 4)[None, None, :], axis=2).to(tl.uint8)
            bytes_a_pixel = (channels + 1) // 2
            byte = first_channel // 2 + tl.arange(0, BLOCK_C // 2)
            where = inside[:, None] & (byte < bytes_a_pixel)[None, :]
            tl.store(positions + pixel[:, None] * bytes_a_pixel + byte[None, :], packed, mask=where)
        else:
            tl.store(positions + pixel[:, None] * channels + c[None, :], winner.to(tl.uint8), mask=valid)


@triton.jit(do_not_specialize=ANY_SIZE)
def max_pool2d_backward_kernel(
    grad_output, positions, grad_input, channels, height, width, out_height, out_width, tiles_h, tiles_w,
    grad_n, grad_h, grad_w, grad_c, input_n, input_h, input_w, input_c,
    DTYPE: tl.constexpr, WIDE: tl.constexpr, UNIT: tl.constexpr, PACKED: tl.constexpr,
    KERNEL_H: tl.constexpr, KERNEL_W: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
    DILATION_H: tl.constexpr, DILATION_W: tl.constexpr, PAD_H: tl.constexpr, PAD_W: tl.constexpr,
    TILE_H: tl.constexpr, TILE_W: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """grad_input[h, w, c] = sum of grad_output over the windows that (h, w) won

    A program computes TILE_H x TILE_W pixels of BLOCK_C channels; for each place in the window it asks the window
    that has this pixel there, if there is one. Bytes a grad_input element: itself + (grad_output + 1/2) / S^2.
    """
    channels = channels * UNIT
    image, h, w, first_channel = tile_coordinates(
        tl.program_id(0), channels, tiles_h, tiles_w, WIDE, TILE_H, TILE_W, BLOCK_C
    )
    c = first_channel + tl.arange(0, BLOCK_C)
    source = grad_output + image * (grad_n * UNIT) + c[None, :] * grad_c
    total = tl.zeros((TILE_H * TILE_W, BLOCK_C), dtype=tl.float32)
    for i in range(KERNEL_H):
        row = (h + PAD_H - i * DILATION_H) // STRIDE_H
        # Not by the remainder, whose sign differs between compilers.
        row_inside = (row * STRIDE_H == h + PAD_H - i * DILATION_H) & (row >= 0) & (row < out_height)
        for j in range(KERNEL_W):
            column = (w + PAD_W - j * DILATION_W) // STRIDE_W
            inside = row_inside & (column * STRIDE_W == w + PAD_W - j * DILATION_W)
            inside = inside & (column >= 0) & (column < out_width)
            valid = inside[:, None] & (c < channels)[None, :]
            pixel = (image * out_height + row) * out_width + column
            if PACKED:
                bytes_a_pixel = (channels + 1) // 2
                byte = first_channel // 2 + tl.arange(0, BLOCK_C // 2)
                where = inside[:, None] & (byte < bytes_a_pixel)[None, :]
                packed = tl.load(positions + pixel[:, None] * bytes_a_pixel + byte[None, :], mask=where, other=0)
                pairs = (packed.to(tl.int32)[:, :, None] >> (tl.arange(0, 2) * 4)[None, None, :]) & 15
                winner = tl.reshape(pairs, (TILE_H * TILE_W, BLOCK_C))
            else:
                winner = tl.load(positions + pixel[:, None] * channels + c[None, :], mask=valid, other=0).to(tl.int32)
            offset = row * (grad_h * UNIT) + column * (grad_w * UNIT)
            g = tl.load(source + offset[:, None], mask=valid, other=0.0).to(tl.float32)
            total += tl.where(winner == i * KERNEL_W + j, g, 0.0)
    offset = image * (input_n * UNIT) + h * (input_h * UNIT) + w * (input_w * UNIT)
    valid = ((h < height) & (w < width))[:, None] & (c < channels)[None, :]
    tl.store(grad_input + offset[:, None] + c[None, :] * input_c, total.to(DTYPE), mask=valid)


def _window(kernel_size, stride, padding, dilation) -> dict[str, int | bool]:
    return dict(
        KERNEL_H=kernel_size[0], KERNEL_W=kernel_size[1], STRIDE_H=stride[0], STRIDE_W=stride[1],
        DILATION_H=dilation[0], DILATION_W=dilation[1], PAD_H=padding[0], PAD_W=padding[1],
        PACKED=fits_in_4_bits(kernel_size),
    )  # fmt: skip


@on_device
def max_pool2d(
    input: Tensor, kernel_size, stride, padding, dilation, ceil_mode: bool, needs_positions: bool
) -> tuple[Tensor, Tensor]:
    n, channels, height, width = input.shape
    size = (n, channels, *pooled_size(input.shape[2:], kernel_size, stride, padding, dilation, ceil_mode))
    output = torch.empty(size, dtype=input.dtype, device=input.device, memory_format=memory_format(input))
    positions = input.new_empty(positions_size(size, kernel_size) if needs_positions else 0, dtype=torch.uint8)
    extent = [window_extent(k, d) for k, d in zip(kernel_size, dilation, strict=True)]
    tiles = cut(size[2], size[3], channels, tuple(stride), tuple(extent))
    unit = stride_unit(channels, False, input, output)
    start(
        Launch(
            max_pool2d_kernel,
            (tiles.programs(n),),
            dict(
                input=input, output=output, positions=positions if needs_positions else None,
                channels=channels // unit, height=height, width=width, out_height=size[2], out_width=size[3],
                **tiles.arguments, **stride_arguments("input", input, unit),
                **stride_arguments("output", output, unit),
            ),
            dict(
                DTYPE=TRITON_DTYPE[input.dtype], WIDE=needs_wide_offsets(input, output), UNIT=unit,
                **_window(kernel_size, stride, padding, dilation), **tiles.constants,
            ),
            num_warps=tiles.num_warps,
        )
    )  # fmt: skip
    return output, positions


@on_device
def max_pool2d_backward(
    grad_output: Tensor, positions: Tensor, input_size, kernel_size, stride, padding, dilation, channels_last: bool
) -> Tensor:
    n, channels, height, width = input_size
    grad_input = torch.empty(
        input_size, dtype=grad_output.dtype, device=grad_output.device, memory_format=format_of(channels_last)
    )
    tiles = cut(height, width, channels)
    unit = stride_unit(channels, False, grad_output, grad_input)
    start(
        Launch(
            max_pool2d_backward_kernel,
            (tiles.programs(n),),
            dict(
                grad_output=grad_output, positions=positions, grad_input=grad_input, channels=channels // unit,
                height=height, width=width, out_height=grad_output.size(2), out_width=grad_output.size(3),
                **tiles.arguments, **stride_arguments("grad", grad_output, unit),
                **stride_arguments("input", grad_input, unit),
            ),
            dict(
                DTYPE=TRITON_DTYPE[grad_input.dtype], WIDE=needs_wide_offsets(grad_output, grad_input), UNIT=unit,
                **_window(kernel_size, stride, padding, dilation), **tiles.constants,
            ),
            num_warps=tiles.num_warps,
        )
    )  # fmt: skip
    return grad_input


OPERATORS = {"max_pool2d": max_pool2d, "max_pool2d_backward": max_pool2d_backward}
