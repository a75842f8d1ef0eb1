"""Frozen depthwise convolution on the GPU: any window, stride, dilation and padding, taps unrolled."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from tinytl_kernels.backends.triton.epilogue import load_gradient, save_and_activate, saved_kind, sum_over_pixels
from tinytl_kernels.backends.triton.launch import (
    TRITON_DTYPE,
    Launch,
    needs_wide_offsets,
    start,
    stride_arguments,
    stride_unit,
)
from tinytl_kernels.backends.triton.phases import first_tap, grad_shift, phase_steps, window_constants
from tinytl_kernels.backends.triton.tiles import ANY_SIZE, Tiles, cut, tile_coordinates
from tinytl_kernels.core.activations import LEAKY_SLOPE
from tinytl_kernels.core.quantization import dequantize


@triton.jit(do_not_specialize=ANY_SIZE)
def depthwise_kernel(
    input, taps, bias, output, saved, channels, height, width, out_height, out_width, tiles_h, tiles_w, slope,
    input_n, input_h, input_w, input_c, output_n, output_h, output_w, output_c,
    DTYPE: tl.constexpr, ACTIVATION: tl.constexpr, SAVE: tl.constexpr, WIDE: tl.constexpr, UNIT: tl.constexpr,
    KERNEL_H: tl.constexpr, KERNEL_W: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
    DILATION_H: tl.constexpr, DILATION_W: tl.constexpr, PAD_TOP: tl.constexpr, PAD_LEFT: tl.constexpr,
    TILE_H: tl.constexpr, TILE_W: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """output[h, w, c] = f(sum over taps (i, j) of input[h S + i D - P, w S + j D - P, c] taps[i, j, c] + bias[c])

    ``taps`` is (KERNEL_H * KERNEL_W, C). A program computes TILE_H x TILE_W pixels of BLOCK_C channels. Each tap reads
    a shifted tile, all but the first from L1; the rim that tiles share comes from L2. Writes the output and one bit (or
    the value before f) an element.
    Bytes an output element: itself + 1/8 + input * S^2.
    """
    channels = channels * UNIT
    image, h, w, first_channel = tile_coordinates(
        tl.program_id(0), channels, tiles_h, tiles_w, WIDE, TILE_H, TILE_W, BLOCK_C
    )
    c = first_channel + tl.arange(0, BLOCK_C)
    total = tl.zeros((TILE_H * TILE_W, BLOCK_C), dtype=tl.float32)
    source = input + image * (input_n * UNIT) + c[None, :] * input_c
    for i in range(KERNEL_H):
        row = h * STRIDE_H + (i * DILATION_H - PAD_TOP)
        row_inside = (row >= 0) & (row < height)
        for j in tl.static_range(KERNEL_W):
            column = w * STRIDE_W + (j * DILATION_W - PAD_LEFT)
            reached = row_inside & (column >= 0) & (column < width)
            offset = row * (input_h * UNIT) + column * (input_w * UNIT)
            x = tl.load(source + offset[:, None], mask=reached[:, None] & (c < channels)[None, :], other=0.0)
            tap = tl.load(taps + (i * KERNEL_W + j) * channels + c, mask=c < channels, other=0.0)
            total += x.to(tl.float32) * tap.to(tl.float32)[None, :]
    if bias is not None:
        total += tl.load(bias + c, mask=c < channels, other=0.0).to(tl.float32)[None, :]
    inside = (h < out_height) & (w < out_width)
    pixel = (image * out_height + h) * out_width + w
    offset = image * (output_n * UNIT) + h * (output_h * UNIT) + w * (output_w * UNIT)
    offset = offset[:, None] + c[None, :] * output_c
    y = save_and_activate(
        total, saved, offset, pixel, inside, first_channel, channels, slope,
        DTYPE, ACTIVATION, SAVE, TILE_H * TILE_W, BLOCK_C,
    )  # fmt: skip
    tl.store(output + offset, y.to(DTYPE), mask=inside[:, None] & (c < channels)[None, :])


@triton.jit(do_not_specialize=ANY_SIZE)
def depthwise_backward_kernel(
    grad_output, taps, saved, grad_input, grad_bias, channels, height, width, out_height, out_width,
    tiles_h, tiles_w, slope, grad_n, grad_h, grad_w, grad_c, saved_n, saved_h, saved_w, saved_c,
    input_n, input_h, input_w, input_c,
    DTYPE: tl.constexpr, ACTIVATION: tl.constexpr, SAVE: tl.constexpr, WIDE: tl.constexpr, UNIT: tl.constexpr,
    KERNEL_H: tl.constexpr, KERNEL_W: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
    DILATION_H: tl.constexpr, DILATION_W: tl.constexpr, PAD_TOP: tl.constexpr, PAD_LEFT: tl.constexpr,
    STEP_H: tl.constexpr, STEP_W: tl.constexpr, TAPS_H: tl.constexpr, TAPS_W: tl.constexpr,
    TILE_H: tl.constexpr, TILE_W: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """g = f' * grad_output;  grad_input[h, w] = sum over taps (i, j) of g[(h + P - i D) / S, ...] taps[i, j]

    Gathers, so no two programs write one element. Positions of equal remainder modulo the stride (a phase) were read
    through the same taps: a program computes one phase of TILE_H S x TILE_W S pixels of BLOCK_C channels. Those of
    phase 0 also own TILE_H x TILE_W pixels of grad_output, whose sums they write to a row of ``grad_bias``
    (images * tiles_h * tiles_w, C) float32, to be added up in a fixed order.
    Bytes a grad_input element: itself + (grad_output + 1/8) / S^2.
    """
    channels = channels * UNIT
    program = tl.program_id(0)
    channel_tiles = tl.cdiv(channels, BLOCK_C)
    phase = program // channel_tiles % (STRIDE_H * STRIDE_W)
    pixel_tile = program // channel_tiles // (STRIDE_H * STRIDE_W)
    image, tile_row, tile_column, first_channel = tile_coordinates(
        pixel_tile * channel_tiles + program % channel_tiles, channels, tiles_h, tiles_w, WIDE, TILE_H, TILE_W, BLOCK_C
    )
    if WIDE:
        pixel_tile = pixel_tile.to(tl.int64)
    c = first_channel + tl.arange(0, BLOCK_C)
    grad_image = grad_output + image * (grad_n * UNIT) + c[None, :] * grad_c
    saved_channel = image * (saved_n * UNIT) + c[None, :] * saved_c
    if grad_bias is not None:  # noqa: SIM102 - decided at compile time, the next one at run time
        if phase == 0:
            inside = (tile_row < out_height) & (tile_column < out_width)
            g = load_gradient(
                grad_image, (tile_row * (grad_h * UNIT) + tile_column * (grad_w * UNIT))[:, None],
                saved, saved_channel + (tile_row * (saved_h * UNIT) + tile_column * (saved_w * UNIT))[:, None],
                (image * out_height + tile_row) * out_width + tile_column, inside, first_channel, channels, slope,
                ACTIVATION, SAVE, TILE_H * TILE_W, BLOCK_C,
            )  # fmt: skip
            tl.store(grad_bias + pixel_tile * channels + c, sum_over_pixels(g), mask=c < channels)
    phase_h = phase // STRIDE_W
    phase_w = phase % STRIDE_W
    first_i = first_tap(phase_h, PAD_TOP, STRIDE_H, DILATION_H, KERNEL_H, STEP_H)
    first_j = first_tap(phase_w, PAD_LEFT, STRIDE_W, DILATION_W, KERNEL_W, STEP_W)
    total = tl.zeros((TILE_H * TILE_W, BLOCK_C), dtype=tl.float32)
    for a in range(TAPS_H):
        i = first_i + a * STEP_H
        row = tile_row + grad_shift(i, phase_h, PAD_TOP, STRIDE_H, DILATION_H, KERNEL_H)
        row_inside = (row >= 0) & (row < out_height)
        for b in tl.static_range(TAPS_W):
            j = first_j + b * STEP_W
            column = tile_column + grad_shift(j, phase_w, PAD_LEFT, STRIDE_W, DILATION_W, KERNEL_W)
            reached = row_inside & (column >= 0) & (column < out_width)
            g = load_gradient(
                grad_image, (row * (grad_h * UNIT) + column * (grad_w * UNIT))[:, None],
                saved, saved_channel + (row * (saved_h * UNIT) + column * (saved_w * UNIT))[:, None],
                (image * out_height + row) * out_width + column, reached, first_channel, channels, slope,
                ACTIVATION, SAVE, TILE_H * TILE_W, BLOCK_C,
            )  # fmt: skip
            # Beyond the window g is 0 and any tap will do.
            number = tl.minimum(i, KERNEL_H - 1) * KERNEL_W + tl.minimum(j, KERNEL_W - 1)
            tap = tl.load(taps + number * channels + c, mask=c < channels, other=0.0)
            # Rounded as grad_output times f' is where it is a tensor of its own.
            total += g.to(DTYPE).to(tl.float32) * tap.to(tl.float32)[None, :]
    h = tile_row * STRIDE_H + phase_h
    w = tile_column * STRIDE_W + phase_w
    offset = image * (input_n * UNIT) + h * (input_h * UNIT) + w * (input_w * UNIT)
    valid = ((h < height) & (w < width))[:, None] & (c < channels)[None, :]
    tl.store(grad_input + offset[:, None] + c[None, :] * input_c, total.to(DTYPE), mask=valid)


def taps_first(weight: Tensor, dtype: torch.dtype, scale: Tensor | None = None) -> Tensor:
    """(C, 1, kH, kW) -> (kH kW, C) in ``dtype``: a copy of a few kilobytes that makes every tap one wide load.

    As it is, neighbouring channels lie a window apart, and loading them one by one takes as long as the data does.
    ``scale`` is that of a weight in 8 bits, else None.
    """
    return dequantize(weight, scale, dtype).flatten(1).t().contiguous()


def _extent(weight: Tensor, dilation) -> tuple[int, int]:
    return (weight.size(2) - 1) * dilation[0] + 1, (weight.size(3) - 1) * dilation[1] + 1


def depthwise(
    input: Tensor, weight: Tensor, bias: Tensor | None, stride, padding, dilation, activation: str | None,
    output: Tensor, saved: Tensor | None, taps: Tensor | None = None,
) -> None:  # fmt: skip
    """``output = f(conv2d(input, weight, groups=C) + bias)``.

    Args:
        input: (N, C, H, W), any strides.
        weight: (C, 1, kH, kW).
        padding: (top, bottom, left, right).
        output: (N, C, H', W'), written.
        saved: mask (N, H', W', ceil(C / 8)) uint8, or value like ``output`` with its strides, written; or None.
        taps: ``taps_first(weight, input.dtype)`` if it is at hand.
    """
    taps = taps_first(weight, input.dtype) if taps is None else taps
    n, channels, height, width = input.shape
    out_height, out_width = output.shape[2:]
    tiles = cut(out_height, out_width, channels, tuple(stride), _extent(weight, dilation), input.dtype)
    unit = stride_unit(channels, False, input, output)
    start(
        Launch(
            depthwise_kernel,
            (tiles.programs(n),),
            dict(
                input=input, taps=taps, bias=bias, output=output, saved=saved, channels=channels // unit,
                height=height, width=width, out_height=out_height, out_width=out_width,
                **tiles.arguments, slope=LEAKY_SLOPE,
                **stride_arguments("input", input, unit), **stride_arguments("output", output, unit),
            ),
            dict(
                DTYPE=TRITON_DTYPE[output.dtype], ACTIVATION=activation,
                SAVE=saved_kind(activation, saved is not None), WIDE=needs_wide_offsets(input, output), UNIT=unit,
                **window_constants(weight, stride, padding, dilation), **tiles.constants,
            ),
            num_warps=tiles.num_warps,
        )
    )  # fmt: skip


def backward_tiles(input_size, grad_size, weight: Tensor, stride, dilation, dtype: torch.dtype) -> Tiles:
    """Tiles of the backward, which cover one phase of the input and grad_output; bias sums have ``rows(N)`` rows."""
    height = max(triton.cdiv(input_size[2], stride[0]), grad_size[2])
    width = max(triton.cdiv(input_size[3], stride[1]), grad_size[3])
    span_h, span_w = (triton.cdiv(span, step) for span, step in zip(_extent(weight, dilation), stride, strict=True))
    return cut(height, width, input_size[1], (1, 1), (span_h, span_w), dtype)


def depthwise_backward(
    grad_output: Tensor, weight: Tensor, saved: Tensor | None, stride, padding, dilation, activation: str | None,
    grad_input: Tensor, grad_bias: Tensor | None, taps: Tensor | None = None,
) -> None:  # fmt: skip
    """Input gradient and partial sums of the bias gradient of :func:`depthwise`, in one pass.

    Args:
        grad_output: (N, C, H', W'), any strides.
        weight: (C, 1, kH, kW).
        saved: what the forward saved; None if there is no activation.
        grad_input: (N, C, H, W), written.
        grad_bias: (``backward_tiles(...).rows(N)``, C) float32, written; or None.
    """
    taps = taps_first(weight, grad_input.dtype) if taps is None else taps
    n, channels, height, width = grad_input.shape
    out_height, out_width = grad_output.shape[2:]
    tiles = backward_tiles(grad_input.shape, grad_output.shape, weight, stride, dilation, grad_input.dtype)
    step_h, step_w = phase_steps(stride, dilation)
    save = saved_kind(activation)
    value = saved if save == "value" else None
    unit = stride_unit(channels, False, grad_output, value, grad_input)
    start(
        Launch(
            depthwise_backward_kernel,
            (tiles.programs(n) * stride[0] * stride[1],),
            dict(
                grad_output=grad_output, taps=taps, saved=None if save == "nothing" else saved,
                grad_input=grad_input, grad_bias=grad_bias, channels=channels // unit, height=height, width=width,
                out_height=out_height, out_width=out_width, **tiles.arguments, slope=LEAKY_SLOPE,
                **stride_arguments("grad", grad_output, unit), **stride_arguments("saved", value, unit),
                **stride_arguments("input", grad_input, unit),
            ),
            dict(
                DTYPE=TRITON_DTYPE[grad_input.dtype], ACTIVATION=activation, SAVE=save,
                WIDE=needs_wide_offsets(grad_output, value, grad_input, grad_bias), UNIT=unit,
                **window_constants(weight, stride, padding, dilation), STEP_H=step_h, STEP_W=step_w,
                TAPS_H=triton.cdiv(weight.size(2), step_h), TAPS_W=triton.cdiv(weight.size(3), step_w),
                **tiles.constants,
            ),
            num_warps=tiles.num_warps,
        )
    )  # fmt: skip
