"""The forward of an inverted residual block as one kernel, whose expanded values never leave the chip.

It loops over chunks of hidden channels as attention kernels loop over keys: expand, filter, accumulate the projection.
The filter needs the expanded values around a pixel, and they are computed again for every tap: nine times the expand's
arithmetic, on tensor cores that would idle, instead of its traffic. Which of the two is dearer no GPU has said yet, so
the block runs chunk by chunk (``frozen_inverted_residual``) unless a table or the environment picks this one.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from tinytl_kernels.backends.triton.bitmask import store_bits
from tinytl_kernels.backends.triton.configurations import Configuration, tunable
from tinytl_kernels.backends.triton.epilogue import activate, passes, save_and_activate, saved_kind
from tinytl_kernels.backends.triton.launch import (
    TRITON_DTYPE,
    Launch,
    alignment,
    dot_precision,
    needs_wide_offsets,
    power_of_two,
    start,
    stride_arguments,
    stride_unit,
)
from tinytl_kernels.backends.triton.tiles import ANY_SIZE, tile_coordinates
from tinytl_kernels.backends.triton.weights import load_weight
from tinytl_kernels.core.activations import BIT_MASK, LEAKY_SLOPE

# Forces one of FORWARDS for every block that it can compute, for benchmarks.
ENVIRONMENT_VARIABLE = "TINYTL_TRITON_BLOCK"

CHUNKED, ONE_KERNEL = "chunked", "one_kernel"
FORWARDS = (CHUNKED, ONE_KERNEL)

# A program holds all output channels of its pixels in registers, and all input channels in one step.
_MOST_CHANNELS, _MOST_OUT_CHANNELS = 64, 64


@triton.jit(do_not_specialize=ANY_SIZE)
def whole_block_kernel(
    input, expand_weight, expand_scale, expand_bias, taps, depthwise_bias, project_weight, project_scale, project_bias,
    residual, output, expand_mask, depthwise_mask, channels, hidden, out_channels, height, width, out_height, out_width,
    tiles_h, tiles_w, slope, input_n, input_h, input_w, input_c, residual_n, residual_h, residual_w, residual_c,
    output_n, output_h, output_w, output_c,
    DTYPE: tl.constexpr, ACTIVATION: tl.constexpr, SAVE: tl.constexpr, WIDE: tl.constexpr,
    IN_UNIT: tl.constexpr, HIDDEN_UNIT: tl.constexpr, OUT_UNIT: tl.constexpr, PRECISION: tl.constexpr,
    KERNEL_H: tl.constexpr, KERNEL_W: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
    PAD_TOP: tl.constexpr, PAD_LEFT: tl.constexpr, TILE_H: tl.constexpr, TILE_W: tl.constexpr,
    BLOCK_IN: tl.constexpr, BLOCK_HIDDEN: tl.constexpr, BLOCK_OUT: tl.constexpr,
):  # fmt: skip
    """output = project(f(filter(f(expand(input))))) + residual

    A program computes TILE_H x TILE_W pixels of all output channels, in chunks of BLOCK_HIDDEN hidden channels. The
    input pixels that a tile steps over first, STRIDE_H x STRIDE_W for each of its pixels, are its own: it writes their
    expand mask. Bytes an output element: itself + residual + (input * C + hidden / 8) S^2 / O + hidden / 8 / O.
    """
    channels = channels * IN_UNIT
    hidden = hidden * HIDDEN_UNIT
    out_channels = out_channels * OUT_UNIT
    PIXELS: tl.constexpr = TILE_H * TILE_W
    image, h, w, _ = tile_coordinates(tl.program_id(0), BLOCK_OUT, tiles_h, tiles_w, WIDE, TILE_H, TILE_W, BLOCK_OUT)
    c = tl.arange(0, BLOCK_IN)
    out = tl.arange(0, BLOCK_OUT)
    inside = (h < out_height) & (w < out_width)
    source = input + image * (input_n * IN_UNIT) + c[None, :] * input_c
    total = tl.zeros((PIXELS, BLOCK_OUT), dtype=tl.float32)
    for first in range(0, hidden, BLOCK_HIDDEN):
        e = first + tl.arange(0, BLOCK_HIDDEN)
        expand = load_weight(
            expand_weight, expand_scale, e[None, :] * channels + c[:, None], e[None, :], (e < hidden)[None, :],
            (c < channels)[:, None] & (e < hidden)[None, :], DTYPE,
        )  # fmt: skip
        filtered = tl.zeros((PIXELS, BLOCK_HIDDEN), dtype=tl.float32)
        for tap in range(KERNEL_H * KERNEL_W):
            i = tap // KERNEL_W - PAD_TOP
            j = tap % KERNEL_W - PAD_LEFT
            row = h * STRIDE_H + i
            column = w * STRIDE_W + j
            reached = (row >= 0) & (row < height) & (column >= 0) & (column < width)
            offset = row * (input_h * IN_UNIT) + column * (input_w * IN_UNIT)
            x = tl.load(source + offset[:, None], mask=reached[:, None] & (c < channels)[None, :], other=0.0)
            expanded = tl.dot(x, expand, input_precision=PRECISION)
            if expand_bias is not None:
                expanded += tl.load(expand_bias + e, mask=e < hidden, other=0.0).to(tl.float32)[None, :]
            # Rounded as the tensors between three kernels are.
            expanded = expanded.to(DTYPE).to(tl.float32)
            if SAVE == "mask":  # noqa: SIM102 - decided at compile time, the next one at run time
                if (i >= 0) & (i < STRIDE_H) & (j >= 0) & (j < STRIDE_W):
                    store_bits(
                        expand_mask, passes(expanded, ACTIVATION) & (e < hidden)[None, :],
                        (image * height + row) * width + column, reached & inside, first, hidden, PIXELS, BLOCK_HIDDEN,
                    )  # fmt: skip
            expanded = activate(expanded, slope, ACTIVATION).to(DTYPE).to(tl.float32)
            weight = tl.load(taps + tap * hidden + e, mask=e < hidden, other=0.0).to(tl.float32)
            # The padding is of expanded zeros, not of what the bias makes of zeros.
            filtered += tl.where(reached[:, None], expanded, 0.0) * weight[None, :]
        if depthwise_bias is not None:
            filtered += tl.load(depthwise_bias + e, mask=e < hidden, other=0.0).to(tl.float32)[None, :]
        filtered = save_and_activate(
            filtered, depthwise_mask, 0, (image * out_height + h) * out_width + w, inside, first, hidden, slope,
            DTYPE, ACTIVATION, SAVE, PIXELS, BLOCK_HIDDEN,
        )  # fmt: skip
        project = load_weight(
            project_weight, project_scale, out[None, :] * hidden + e[:, None], out[None, :],
            (out < out_channels)[None, :], (e < hidden)[:, None] & (out < out_channels)[None, :], DTYPE,
        )  # fmt: skip
        total = tl.dot(filtered.to(DTYPE), project, total, input_precision=PRECISION)
    if project_bias is not None:
        total += tl.load(project_bias + out, mask=out < out_channels, other=0.0).to(tl.float32)[None, :]
    valid = inside[:, None] & (out < out_channels)[None, :]
    if residual is not None:
        offset = image * (residual_n * OUT_UNIT) + h * (residual_h * OUT_UNIT) + w * (residual_w * OUT_UNIT)
        shortcut = tl.load(residual + offset[:, None] + out[None, :] * residual_c, mask=valid, other=0.0)
        total = total.to(DTYPE).to(tl.float32) + shortcut.to(tl.float32)
    offset = image * (output_n * OUT_UNIT) + h * (output_h * OUT_UNIT) + w * (output_w * OUT_UNIT)
    tl.store(output + offset[:, None] + out[None, :] * output_c, total.to(DTYPE), mask=valid)


def can_take(
    channels: int, weights: Sequence[Tensor | None], size: Sequence[int], out_size: Sequence[int],
    stride: Sequence[int], padding: Sequence[int], activation: str | None,
) -> bool:  # fmt: skip
    """Whether the kernel computes a block of ``weights`` (expand, depthwise, project), by its sizes (height, width).

    It needs an expansion, an activation with a mask, at most 64 channels on either side, and windows whose first
    positions step over every input pixel, the expand mask of which somebody has to write.
    """
    expand, depthwise, project = weights
    steps = zip(size, out_size, stride, depthwise.shape[2:], (padding[0], padding[2]), strict=True)
    return (
        expand is not None
        and (activation is None or activation in BIT_MASK)
        and channels <= _MOST_CHANNELS
        and project.size(0) <= _MOST_OUT_CHANNELS
        and all(step * positions >= length and step + pad <= kernel for length, positions, step, kernel, pad in steps)
    )


def choose(
    images: int, channels: int, hidden: int, out_channels: int, out_size: Sequence[int], stride: Sequence[int],
    dtype: torch.dtype,
) -> str:  # fmt: skip
    """Who computes the forward of a block that :func:`can_take`: ``"chunked"`` or ``"one_kernel"``.

    As :func:`forward_by` says, or a table that ``tinytl tune`` measured, or ``TINYTL_TRITON_BLOCK``.

    Raises:
        ValueError: the environment variable is set to something else.
    """
    forced = os.environ.get(ENVIRONMENT_VARIABLE)
    if forced and forced not in FORWARDS:
        raise ValueError(f"{ENVIRONMENT_VARIABLE}: expected {' or '.join(map(repr, FORWARDS))}, got {forced!r}")
    if forced:
        return forced
    (by,) = forward_by(images, channels, hidden, out_channels, tuple(out_size), tuple(stride), dtype)
    return FORWARDS[by]


def _either(*shape: object) -> list[Configuration]:
    """What ``tinytl tune`` tries."""
    return [(by,) for by in range(len(FORWARDS))]


@tunable(_either)
def forward_by(
    images: int, channels: int, hidden: int, out_channels: int, out_size: tuple[int, ...], stride: tuple[int, ...],
    dtype: torch.dtype,
) -> Configuration:  # fmt: skip
    """Index into ``FORWARDS``: chunk by chunk, until a GPU has measured the other."""
    return (FORWARDS.index(CHUNKED),)


def whole_block(
    input: Tensor, expand_weight: Tensor, expand_bias: Tensor | None, depthwise_weight: Tensor, taps: Tensor,
    depthwise_bias: Tensor | None, project_weight: Tensor, project_bias: Tensor | None, stride: Sequence[int],
    padding: Sequence[int], activation: str | None, residual: bool, output: Tensor, expand_mask: Tensor | None,
    depthwise_mask: Tensor | None, expand_scale: Tensor | None = None, project_scale: Tensor | None = None,
) -> None:  # fmt: skip
    """The forward of a block that :func:`can_take`.

    Args:
        input: (N, C, H, W), any strides.
        expand_weight: (M, C, 1, 1); project_weight: (O, M, 1, 1); their scales if they are in 8 bits.
        taps: the depthwise weight (M, 1, kH, kW) as ``depthwise.taps_first`` gives it.
        residual: add ``input``.
        output: (N, O, H', W'), written.
        expand_mask, depthwise_mask: (N, H, W, ceil(M / 8)) and (N, H', W', ceil(M / 8)) uint8, written; or None.
    """
    n, channels, height, width = input.shape
    hidden, out_channels = depthwise_weight.size(0), project_weight.size(0)
    out_height, out_width = output.shape[2:]
    tile_h, tile_w = (8, 8) if input.dtype != torch.float32 else (8, 4)
    tiles = dict(tiles_h=triton.cdiv(out_height, tile_h), tiles_w=triton.cdiv(out_width, tile_w))
    shortcut = input if residual else None
    in_unit, out_unit = stride_unit(channels, False, input), stride_unit(out_channels, False, output, shortcut)
    hidden_unit = alignment(hidden)
    start(
        Launch(
            whole_block_kernel,
            (n * tiles["tiles_h"] * tiles["tiles_w"],),
            dict(
                input=input, expand_weight=expand_weight.contiguous(), expand_scale=expand_scale,
                expand_bias=expand_bias, taps=taps, depthwise_bias=depthwise_bias,
                project_weight=project_weight.contiguous(), project_scale=project_scale, project_bias=project_bias,
                residual=shortcut, output=output, expand_mask=expand_mask, depthwise_mask=depthwise_mask,
                channels=channels // in_unit, hidden=hidden // hidden_unit, out_channels=out_channels // out_unit,
                height=height, width=width, out_height=out_height, out_width=out_width, **tiles, slope=LEAKY_SLOPE,
                **stride_arguments("input", input, in_unit), **stride_arguments("residual", shortcut, out_unit),
                **stride_arguments("output", output, out_unit),
            ),
            dict(
                DTYPE=TRITON_DTYPE[output.dtype], ACTIVATION=activation,
                SAVE=saved_kind(activation, expand_mask is not None), WIDE=needs_wide_offsets(input, output),
                IN_UNIT=in_unit, HIDDEN_UNIT=hidden_unit, OUT_UNIT=out_unit, PRECISION=dot_precision(input.dtype),
                KERNEL_H=depthwise_weight.size(2), KERNEL_W=depthwise_weight.size(3), STRIDE_H=stride[0],
                STRIDE_W=stride[1], PAD_TOP=padding[0], PAD_LEFT=padding[2], TILE_H=tile_h, TILE_W=tile_w,
                BLOCK_IN=power_of_two(channels, 16, _MOST_CHANNELS), BLOCK_HIDDEN=32,
                BLOCK_OUT=power_of_two(out_channels, 16, _MOST_OUT_CHANNELS),
            ),
            # With others ptxas stops at 128 registers on some target, to fit one more program, and spills a few.
            num_warps=4, num_stages=3 if input.dtype == torch.float16 else 4,
        )
    )  # fmt: skip
