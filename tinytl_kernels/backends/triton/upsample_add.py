"""Adding a bilinearly upsampled image on the GPU, and the adjoint of that in gather form: no atomics, a fixed order."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from tinytl_kernels.backends.reference import upsample_add as reference
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
from tinytl_kernels.core.layout import format_of, memory_format

# Beyond eight times the size few programs would add up many pixels each; the reference's matrix products share better.
_MOST_READERS = 17

_ANY_SIZE = [*ANY_SIZE, "scale_h", "scale_w", "span_h"]


@triton.jit
def bilinear_source(position, scale, length):
    """(first, second, weight of the second) pixel that output ``position`` interpolates, as ATen computes them."""
    source = tl.maximum((position.to(tl.float32) + 0.5) * scale - 0.5, 0.0)
    first = tl.minimum(source.to(position.dtype), length - 1)
    return first, tl.minimum(first + 1, length - 1), source - first.to(tl.float32)


@triton.jit
def bilinear_weight(pixel, position, scale, length):
    """The weight with which output ``position`` reads ``pixel``; at an edge both neighbours are one pixel."""
    first, second, fraction = bilinear_source(position, scale, length)
    return tl.where(first == pixel, 1.0 - fraction, 0.0) + tl.where(second == pixel, fraction, 0.0)


@triton.jit(do_not_specialize=_ANY_SIZE)
def upsample_add_kernel(
    main, branch, output, channels, height, width, out_height, out_width, tiles_h, tiles_w, scale_h, scale_w,
    main_n, main_h, main_w, main_c, branch_n, branch_h, branch_w, branch_c, output_n, output_h, output_w, output_c,
    DTYPE: tl.constexpr, WIDE: tl.constexpr, UNIT: tl.constexpr,
    TILE_H: tl.constexpr, TILE_W: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """output[h, w, c] = main[h, w, c] + sum over four neighbours of weight * branch

    ``height``, ``width`` are the branch's. A program computes TILE_H x TILE_W pixels of BLOCK_C channels.
    Bytes an output element: itself + main + branch * (its pixels / output pixels).
    """
    channels = channels * UNIT
    image, h, w, first_channel = tile_coordinates(
        tl.program_id(0), channels, tiles_h, tiles_w, WIDE, TILE_H, TILE_W, BLOCK_C
    )
    c = first_channel + tl.arange(0, BLOCK_C)
    valid = ((h < out_height) & (w < out_width))[:, None] & (c < channels)[None, :]
    top, bottom, weight_h = bilinear_source(h, scale_h, height)
    left, right, weight_w = bilinear_source(w, scale_w, width)
    source = branch + image * (branch_n * UNIT) + c[None, :] * branch_c
    top, bottom = top * (branch_h * UNIT), bottom * (branch_h * UNIT)
    left, right = left * (branch_w * UNIT), right * (branch_w * UNIT)
    top_left = tl.load(source + (top + left)[:, None], mask=valid, other=0.0).to(tl.float32)
    top_right = tl.load(source + (top + right)[:, None], mask=valid, other=0.0).to(tl.float32)
    bottom_left = tl.load(source + (bottom + left)[:, None], mask=valid, other=0.0).to(tl.float32)
    bottom_right = tl.load(source + (bottom + right)[:, None], mask=valid, other=0.0).to(tl.float32)
    weight_h, weight_w = weight_h[:, None], weight_w[:, None]
    upper = top_left * (1.0 - weight_w) + top_right * weight_w
    lower = bottom_left * (1.0 - weight_w) + bottom_right * weight_w
    offset = image * (main_n * UNIT) + h * (main_h * UNIT) + w * (main_w * UNIT)
    y = tl.load(main + offset[:, None] + c[None, :] * main_c, mask=valid, other=0.0).to(tl.float32)
    y += upper * (1.0 - weight_h) + lower * weight_h
    offset = image * (output_n * UNIT) + h * (output_h * UNIT) + w * (output_w * UNIT)
    tl.store(output + offset[:, None] + c[None, :] * output_c, y.to(DTYPE), mask=valid)


@triton.jit(do_not_specialize=_ANY_SIZE)
def upsample_add_backward_kernel(
    grad_output, grad_branch, channels, height, width, out_height, out_width, tiles_h, tiles_w, scale_h, scale_w,
    span_h, grad_n, grad_h, grad_w, grad_c, branch_n, branch_h, branch_w, branch_c,
    DTYPE: tl.constexpr, WIDE: tl.constexpr, UNIT: tl.constexpr, SPAN_W: tl.constexpr,
    TILE_H: tl.constexpr, TILE_W: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """grad_branch[i, j, c] = sum over output pixels (h, w) that read (i, j) of weight * grad_output[h, w, c]

    At most span_h x SPAN_W output pixels read one of the branch. A program computes TILE_H x TILE_W pixels of BLOCK_C
    channels. Bytes a grad_branch element: itself + grad_output * (its pixels / branch pixels).
    """
    channels = channels * UNIT
    image, i, j, first_channel = tile_coordinates(
        tl.program_id(0), channels, tiles_h, tiles_w, WIDE, TILE_H, TILE_W, BLOCK_C
    )
    c = first_channel + tl.arange(0, BLOCK_C)
    source = grad_output + image * (grad_n * UNIT) + c[None, :] * grad_c
    # The last output position whose source lies a pixel or more before this one: it reads nothing, but for rounding.
    first_h = tl.floor((i.to(tl.float32) - 0.5) / scale_h - 0.5).to(i.dtype)
    first_w = tl.floor((j.to(tl.float32) - 0.5) / scale_w - 0.5).to(j.dtype)
    total = tl.zeros((TILE_H * TILE_W, BLOCK_C), dtype=tl.float32)
    # Of a length known at run time: unrolled as well, a compiler that issues all loads first runs out of registers.
    for a in range(span_h):
        h = first_h + a
        weight_h = bilinear_weight(i, h, scale_h, height)
        row_inside = (h >= 0) & (h < out_height) & (weight_h > 0)
        for b in tl.static_range(SPAN_W):
            w = first_w + b
            weight = weight_h * bilinear_weight(j, w, scale_w, width)
            inside = row_inside & (w >= 0) & (w < out_width) & (weight > 0)
            offset = h * (grad_h * UNIT) + w * (grad_w * UNIT)
            g = tl.load(source + offset[:, None], mask=inside[:, None] & (c < channels)[None, :], other=0.0)
            total += g.to(tl.float32) * weight[:, None]
    offset = image * (branch_n * UNIT) + i * (branch_h * UNIT) + j * (branch_w * UNIT)
    valid = ((i < height) & (j < width))[:, None] & (c < channels)[None, :]
    tl.store(grad_branch + offset[:, None] + c[None, :] * branch_c, total.to(DTYPE), mask=valid)


@on_device
def upsample_add(main: Tensor, branch: Tensor) -> Tensor:
    n, channels, out_height, out_width = main.shape
    height, width = branch.shape[2:]
    output = torch.empty_like(main, memory_format=memory_format(main))
    tiles = cut(out_height, out_width, channels)
    unit = stride_unit(channels, False, main, branch, output)
    start(
        Launch(
            upsample_add_kernel,
            (tiles.programs(n),),
            dict(
                main=main, branch=branch, output=output, channels=channels // unit, height=height, width=width,
                out_height=out_height, out_width=out_width, **tiles.arguments,
                scale_h=height / out_height, scale_w=width / out_width,
                **stride_arguments("main", main, unit), **stride_arguments("branch", branch, unit),
                **stride_arguments("output", output, unit),
            ),
            dict(
                DTYPE=TRITON_DTYPE[main.dtype], WIDE=needs_wide_offsets(main, branch, output), UNIT=unit,
                **tiles.constants,
            ),
            num_warps=tiles.num_warps,
        )
    )  # fmt: skip
    return output


@on_device
def upsample_add_backward(grad_output: Tensor, branch_size, channels_last: bool) -> Tensor:
    n, channels, out_height, out_width = grad_output.shape
    height, width = branch_size
    if max(readers(height, out_height), readers(width, out_width)) > _MOST_READERS:
        return reference.upsample_add_backward(grad_output, branch_size, channels_last)
    grad_branch = torch.empty(
        (n, channels, height, width), dtype=grad_output.dtype, device=grad_output.device,
        memory_format=format_of(channels_last),
    )  # fmt: skip
    tiles = cut(height, width, channels)
    unit = stride_unit(channels, False, grad_output, grad_branch)
    start(
        Launch(
            upsample_add_backward_kernel,
            (tiles.programs(n),),
            dict(
                grad_output=grad_output, grad_branch=grad_branch, channels=channels // unit, height=height,
                width=width, out_height=out_height, out_width=out_width, **tiles.arguments,
                scale_h=height / out_height, scale_w=width / out_width, span_h=readers(height, out_height),
                **stride_arguments("grad", grad_output, unit), **stride_arguments("branch", grad_branch, unit),
            ),
            dict(
                DTYPE=TRITON_DTYPE[grad_output.dtype], WIDE=needs_wide_offsets(grad_output, grad_branch), UNIT=unit,
                SPAN_W=readers(width, out_width), **tiles.constants,
            ),
            num_warps=tiles.num_warps,
        )
    )  # fmt: skip
    return grad_branch


def readers(length: int, to_length: int) -> int:
    """How many output positions from the first candidate on may read one pixel: two pixels' worth, and the candidate.

    Where rounding makes the candidate one too early or too late, what falls out is of a weight that rounds to 0.
    """
    return triton.cdiv(2 * to_length, length) + 1


OPERATORS = {"upsample_add": upsample_add, "upsample_add_backward": upsample_add_backward}
