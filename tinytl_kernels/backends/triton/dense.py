"""Frozen dense and grouped k x k convolution on the GPU: an implicit matrix product over pixels, taps and channels.

No patch matrix is ever built: each step of the product loads the pixels that one tap sees. A tile lies within one
group, so that no group's infinity or NaN meets another group's zeros.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from tinytl_kernels.backends.triton.configurations import tunable
from tinytl_kernels.backends.triton.epilogue import load_gradient, save_and_activate, saved_kind, sum_over_pixels
from tinytl_kernels.backends.triton.launch import (
    TRITON_DTYPE,
    Launch,
    alignment,
    dot_precision,
    needs_wide_offsets,
    pixel_offset,
    power_of_two,
    start,
    stride_arguments,
    stride_unit,
)
from tinytl_kernels.backends.triton.partial_statistics import (
    ANY_SIZE,
    Spans,
    merge_statistics,
    store_statistics,
    tile_pixels,
)
from tinytl_kernels.backends.triton.phases import first_tap, grad_shift, phase_steps, window_constants
from tinytl_kernels.backends.triton.weights import load_weight
from tinytl_kernels.core.activations import LEAKY_SLOPE

_ANY_SIZE = ["pixels", "image", "height", "width", "out_height", "out_width", "phase_height", "phase_width"]
_ANY_SIZE_OF_FORWARD = ["out_width", "height", *ANY_SIZE]


@triton.jit(do_not_specialize=_ANY_SIZE_OF_FORWARD)
def dense_kernel(
    input, weight, scale, bias, output, saved, partial, span, splits, tiles, image, out_width, height, width,
    groups, group_channels, group_out, slope,
    input_n, input_h, input_w, input_c, output_n, output_h, output_w, output_c, weight_o, weight_h, weight_w, weight_c,
    DTYPE: tl.constexpr, ACTIVATION: tl.constexpr, SAVE: tl.constexpr, WIDE: tl.constexpr,
    IN_UNIT: tl.constexpr, OUT_UNIT: tl.constexpr, PRECISION: tl.constexpr,
    KERNEL_H: tl.constexpr, KERNEL_W: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
    DILATION_H: tl.constexpr, DILATION_W: tl.constexpr, PAD_TOP: tl.constexpr, PAD_LEFT: tl.constexpr,
    BLOCK_PIXELS: tl.constexpr, BLOCK_OUT: tl.constexpr, BLOCK_IN: tl.constexpr,
):  # fmt: skip
    """output[p, o] = f(sum over taps (i, j) and c of input[pixel that tap (i, j) sees at p, c] weight[o, c, i, j] + b)

    A program computes BLOCK_PIXELS x BLOCK_OUT of one group, in KERNEL_H KERNEL_W ceil(group_channels / BLOCK_IN)
    products. The taps after the first find most of their pixels in L2, and so do the programs of the other channels
    and groups of these pixels, which follow. Writes the output and one bit (or the value before f) an element, and to
    ``partial``, if there is one, mean and squared differences of each channel of its tile (see ``partial_statistics``).
    Bytes an output element: itself + 1/8 + input * S^2 C / O.
    """
    group_channels = group_channels * IN_UNIT
    group_out = group_out * OUT_UNIT
    columns = tl.cdiv(group_out, BLOCK_OUT)
    program = tl.program_id(0)
    group = program // columns % groups
    tile = program // columns // groups
    _, pixel, inside = tile_pixels(tile, span, splits, BLOCK_PIXELS, WIDE)
    first_out = group * group_out + program % columns * BLOCK_OUT
    last_out = (group + 1) * group_out
    step = tl.arange(0, BLOCK_IN)
    out = first_out + tl.arange(0, BLOCK_OUT)
    if WIDE:
        group, out, step = group.to(tl.int64), out.to(tl.int64), step.to(tl.int64)
    place = pixel % image
    h = place // out_width * STRIDE_H - PAD_TOP
    w = place % out_width * STRIDE_W - PAD_LEFT
    source = pixel // image * (input_n * IN_UNIT)
    first_in = group * group_channels
    steps = tl.cdiv(group_channels, BLOCK_IN)
    total = tl.zeros((BLOCK_PIXELS, BLOCK_OUT), dtype=tl.float32)
    # One loop over taps and channels, so that loads of the next tap are under way during the products of this one.
    for k in range(KERNEL_H * KERNEL_W * steps):
        i = k // steps // KERNEL_W
        j = k // steps % KERNEL_W
        c = k % steps * BLOCK_IN + step
        row = h + i * DILATION_H
        column = w + j * DILATION_W
        reached = inside & (row >= 0) & (row < height) & (column >= 0) & (column < width)
        offset = source + row * (input_h * IN_UNIT) + column * (input_w * IN_UNIT)
        x = tl.load(
            input + offset[:, None] + (first_in + c)[None, :] * input_c,
            mask=reached[:, None] & (c < group_channels)[None, :],
            other=0.0,
        )
        tap = out[None, :] * (weight_o * IN_UNIT) + (i * (weight_h * IN_UNIT) + j * (weight_w * IN_UNIT))
        y = load_weight(
            weight, scale, tap + c[:, None] * weight_c, out[None, :], (out < last_out)[None, :],
            (c < group_channels)[:, None] & (out < last_out)[None, :], x.dtype,
        )  # fmt: skip
        total = tl.dot(x, y, total, input_precision=PRECISION)
    if bias is not None:
        total += tl.load(bias + out, mask=out < last_out, other=0.0).to(tl.float32)[None, :]
    rows = pixel_offset(pixel, image, out_width, output_n * OUT_UNIT, output_h * OUT_UNIT, output_w * OUT_UNIT, False)
    offset = rows[:, None] + out[None, :] * output_c
    y = save_and_activate(
        total, saved, offset, pixel, inside, first_out, last_out, slope,
        DTYPE, ACTIVATION, SAVE, BLOCK_PIXELS, BLOCK_OUT, groups * group_out,
    )  # fmt: skip
    valid = inside[:, None] & (out < last_out)[None, :]
    tl.store(output + offset, y.to(DTYPE), mask=valid)
    if partial is not None:
        # Of the numbers as they are stored.
        store_statistics(
            tl.where(valid, y.to(DTYPE).to(tl.float32), 0.0), valid, partial, tile, span, splits, tiles, out,
            groups * group_out, out < last_out, BLOCK_PIXELS,
        )  # fmt: skip


@triton.jit(do_not_specialize=_ANY_SIZE)
def dense_backward_kernel(
    grad_output, weight, scale, saved, grad_input, grad_bias, pixels, image, phase_height, phase_width, height, width,
    out_height, out_width, groups, group_channels, group_out, slope,
    grad_n, grad_h, grad_w, grad_c, saved_n, saved_h, saved_w, saved_c, input_n, input_h, input_w, input_c,
    weight_o, weight_h, weight_w, weight_c,
    DTYPE: tl.constexpr, ACTIVATION: tl.constexpr, SAVE: tl.constexpr, WIDE: tl.constexpr,
    IN_UNIT: tl.constexpr, OUT_UNIT: tl.constexpr, PRECISION: tl.constexpr,
    KERNEL_H: tl.constexpr, KERNEL_W: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
    DILATION_H: tl.constexpr, DILATION_W: tl.constexpr, PAD_TOP: tl.constexpr, PAD_LEFT: tl.constexpr,
    STEP_H: tl.constexpr, STEP_W: tl.constexpr,
    BLOCK_PIXELS: tl.constexpr, BLOCK_OUT: tl.constexpr, BLOCK_IN: tl.constexpr,
):  # fmt: skip
    """g = f' * grad_output;  grad_input[h, w, c] = sum over taps (i, j) and o of g[(h + P - i D) / S, ..., o]
    weight[o, c, i, j]

    A program computes BLOCK_PIXELS positions of one phase of the input (see ``phases``) x BLOCK_IN channels of one
    group: a product over the taps that read this phase, and no others. Tile t of phase 0 also owns BLOCK_PIXELS pixels
    of grad_output, whose sums it writes to row t of ``grad_bias`` (pixel tiles, O) float32, to be added up in a fixed
    order; the programs of its column tiles share the channels.
    Bytes a grad_input element: itself + (grad_output + 1/8) O / (S^2 C).
    """
    group_channels = group_channels * IN_UNIT
    group_out = group_out * OUT_UNIT
    out_channels = groups * group_out
    columns = tl.cdiv(group_channels, BLOCK_IN)
    program = tl.program_id(0)
    group = program // columns % groups
    phase = program // columns // groups % (STRIDE_H * STRIDE_W)
    tile = program // columns // groups // (STRIDE_H * STRIDE_W)
    pixel = tile * BLOCK_PIXELS + tl.arange(0, BLOCK_PIXELS)
    c = program % columns * BLOCK_IN + tl.arange(0, BLOCK_IN)
    step = tl.arange(0, BLOCK_OUT)
    if WIDE:
        tile, group, pixel = tile.to(tl.int64), group.to(tl.int64), pixel.to(tl.int64)
        c, step = c.to(tl.int64), step.to(tl.int64)
    first_out = group * group_out
    last_out = first_out + group_out
    if grad_bias is not None:  # noqa: SIM102 - decided at compile time, the next one at run time
        if phase == 0:
            grad_row = pixel_offset(
                pixel, out_height * out_width, out_width,
                grad_n * OUT_UNIT, grad_h * OUT_UNIT, grad_w * OUT_UNIT, False,
            )  # fmt: skip
            saved_row = pixel_offset(
                pixel, out_height * out_width, out_width,
                saved_n * OUT_UNIT, saved_h * OUT_UNIT, saved_w * OUT_UNIT, False,
            )  # fmt: skip
            owned = pixel < pixels // image * (out_height * out_width)
            for first in range(program % columns * BLOCK_OUT, group_out, columns * BLOCK_OUT):
                out = first_out + first + step
                g = load_gradient(
                    grad_output, grad_row[:, None] + out[None, :] * grad_c,
                    saved, saved_row[:, None] + out[None, :] * saved_c, pixel, owned, first_out + first, last_out,
                    slope, ACTIVATION, SAVE, BLOCK_PIXELS, BLOCK_OUT, out_channels,
                )  # fmt: skip
                tl.store(grad_bias + tile * out_channels + out, sum_over_pixels(g), mask=out < last_out)
    phase_h = phase // STRIDE_W
    phase_w = phase % STRIDE_W
    first_i = first_tap(phase_h, PAD_TOP, STRIDE_H, DILATION_H, KERNEL_H, STEP_H)
    first_j = first_tap(phase_w, PAD_LEFT, STRIDE_W, DILATION_W, KERNEL_W, STEP_W)
    taps_h = tl.cdiv(KERNEL_H - first_i, STEP_H)
    taps_w = tl.cdiv(KERNEL_W - first_j, STEP_W)
    inside = pixel < pixels
    place = pixel % image
    phase_row = place // phase_width
    phase_column = place % phase_width
    number = pixel // image
    steps = tl.cdiv(group_out, BLOCK_OUT)
    total = tl.zeros((BLOCK_PIXELS, BLOCK_IN), dtype=tl.float32)
    for k in range(taps_h * taps_w * steps):
        i = first_i + k // steps // taps_w * STEP_H
        j = first_j + k // steps % taps_w * STEP_W
        first = k % steps * BLOCK_OUT
        out = first_out + first + step
        row = phase_row + grad_shift(i, phase_h, PAD_TOP, STRIDE_H, DILATION_H, KERNEL_H)
        column = phase_column + grad_shift(j, phase_w, PAD_LEFT, STRIDE_W, DILATION_W, KERNEL_W)
        reached = inside & (row >= 0) & (row < out_height) & (column >= 0) & (column < out_width)
        grad_row = number * (grad_n * OUT_UNIT) + row * (grad_h * OUT_UNIT) + column * (grad_w * OUT_UNIT)
        saved_row = number * (saved_n * OUT_UNIT) + row * (saved_h * OUT_UNIT) + column * (saved_w * OUT_UNIT)
        g = load_gradient(
            grad_output, grad_row[:, None] + out[None, :] * grad_c,
            saved, saved_row[:, None] + out[None, :] * saved_c,
            (number * out_height + row) * out_width + column, reached, first_out + first, last_out, slope,
            ACTIVATION, SAVE, BLOCK_PIXELS, BLOCK_OUT, out_channels,
        )  # fmt: skip
        tap = out[:, None] * (weight_o * IN_UNIT) + (i * (weight_h * IN_UNIT) + j * (weight_w * IN_UNIT))
        y = load_weight(
            weight, scale, tap + c[None, :] * weight_c, out[:, None], (out < last_out)[:, None],
            (out < last_out)[:, None] & (c < group_channels)[None, :], DTYPE,
        )  # fmt: skip
        total = tl.dot(g.to(DTYPE), y, total, input_precision=PRECISION)
    h = phase_row * STRIDE_H + phase_h
    w = phase_column * STRIDE_W + phase_w
    offset = number * (input_n * IN_UNIT) + h * (input_h * IN_UNIT) + w * (input_w * IN_UNIT)
    valid = (inside & (h < height) & (w < width))[:, None] & (c < group_channels)[None, :]
    channel = (group * group_channels + c)[None, :] * input_c
    tl.store(grad_input + offset[:, None] + channel, total.to(DTYPE), mask=valid)


def can_take(weight: Tensor, groups: int) -> bool:
    """Whether these kernels compute it: a byte of a mask must not be shared by two groups."""
    return groups == 1 or weight.size(0) // groups % 8 == 0


def _sizes(pixels: int, columns: int, depth: int, groups: int, dtype: torch.dtype, backward: bool = False):
    """What ``tinytl tune`` tries: :func:`tile_sizes` with other pixels, columns, depths, warps and stages."""
    room = 128 * (128 if dtype != torch.float32 else 64)
    widest, deepest = power_of_two(columns, 16, 128), power_of_two(depth, 16, 64 if dtype != torch.float32 else 32)
    return [
        (block_pixels, block_columns, block_depth, num_warps, num_stages)
        for block_pixels in (32, 64, 128, 256)
        for block_columns in dict.fromkeys((widest, max(16, widest // 2)))
        if block_pixels * block_columns <= room
        for num_warps in ((8,) if block_pixels * block_columns > room // 2 else (4,))
        for block_depth, num_stages in dict.fromkeys(((deepest, 2), (deepest, 3), (max(16, deepest // 2), 4)))
    ]


@tunable(_sizes)
def tile_sizes(
    pixels: int, columns: int, depth: int, groups: int, dtype: torch.dtype, backward: bool = False
) -> tuple[int, int, int, int, int]:
    """(BLOCK_PIXELS, columns of a tile, depth of a step, num_warps, num_stages) by columns and depth within a group.

    Tiles as wide as a group, up to 128 columns; few pixels get small tiles, to have programs for all multiprocessors.
    Float32 takes twice the room.
    """
    half = dtype != torch.float32
    block_columns = power_of_two(columns, 16, 128 if half else 64)
    block_depth = power_of_two(depth, 16, 64 if half else 32)
    block_pixels = 128
    while block_pixels > 32 and pixels * columns * groups < 132 * block_pixels * block_columns:
        block_pixels //= 2
    num_warps = 8 if block_pixels == 128 and block_columns >= 64 else 4
    # With 3 stages the backward of 128 x 64 spills on sm_80, where ptxas stops at 128 registers.
    return block_pixels, block_columns, block_depth, num_warps, 4 if backward and num_warps == 8 else 3


def channels_first_in_memory(weight: Tensor) -> Tensor:
    """``weight`` (O, C, kH, kW) where neighbouring channels are neighbours in memory; a copy if it is not so already.

    A channels_last model has such weights. For others this is the copy that cuDNN makes too, and without it every
    element of a tap would be a load of its own.
    """
    return weight if weight.stride(1) == 1 else weight.contiguous(memory_format=torch.channels_last)


def _weight_arguments(weight: Tensor, unit: int) -> dict[str, int]:
    return dict(
        weight_o=weight.stride(0) // unit, weight_h=weight.stride(2) // unit, weight_w=weight.stride(3) // unit,
        weight_c=weight.stride(1),
    )  # fmt: skip


def dense(
    input: Tensor, weight: Tensor, bias: Tensor | None, stride: Sequence[int], padding: Sequence[int],
    dilation: Sequence[int], groups: int, activation: str | None, output: Tensor, saved: Tensor | None,
    scale: Tensor | None = None, statistics_groups: int | None = None,
) -> Tensor | None:  # fmt: skip
    """``output = f(conv2d(input, weight) + bias)``.

    Args:
        input: (N, C, H, W), any strides.
        weight: (O, C / groups, kH, kW); :func:`can_take` it.
        padding: (top, bottom, left, right).
        output: (N, O, H', W'), written.
        saved: mask (N, H', W', ceil(O / 8)) uint8, or value like ``output`` with its strides, written; or None.
        scale: of a weight in 8 bits, else None.
        statistics_groups: of the norm behind it, 0 for a BatchNorm, or None where no statistics are needed.

    Returns:
        Mean and biased variance of ``output`` (see ``partial_statistics.merge_statistics``) if they are needed.
    """
    weight = channels_first_in_memory(weight)
    n, _, height, width = input.shape
    out_height, out_width = output.shape[2:]
    group_channels, group_out, image = weight.size(1), weight.size(0) // groups, out_height * out_width
    block_pixels, block_out, block_in, num_warps, num_stages = tile_sizes(
        n * image, group_out, group_channels, groups, input.dtype
    )
    if statistics_groups:  # a tile beyond its image would be computed in vain
        block_pixels = power_of_two(image, 32, block_pixels)
    spans = Spans.of(n, image, block_pixels, per_image=bool(statistics_groups))
    partial = None
    if statistics_groups is not None:
        partial = spans.partial(output.size(1), output)
    # With 4 warps these spill somewhere: statistics of 128 x 16 float32; 32 or 64 x 64 of a 5 x 5 in half precision.
    if (partial is not None and block_pixels >= 128) or (
        block_out >= 64 and input.element_size() == 2 and max(weight.shape[2:]) > 3
    ):
        num_warps = 8
    in_unit = min(stride_unit(group_channels, False, input), alignment(*weight.stride()[:1], *weight.stride()[2:]))
    out_unit = stride_unit(group_out, False, output)
    start(
        Launch(
            dense_kernel,
            (spans.tiles * groups * triton.cdiv(group_out, block_out),),
            dict(
                input=input, weight=weight, scale=scale, bias=bias, output=output, saved=saved, partial=partial,
                **spans.arguments, image=image, out_width=out_width, height=height, width=width, groups=groups,
                group_channels=group_channels // in_unit, group_out=group_out // out_unit, slope=LEAKY_SLOPE,
                **stride_arguments("input", input, in_unit), **stride_arguments("output", output, out_unit),
                **_weight_arguments(weight, in_unit),
            ),
            dict(
                DTYPE=TRITON_DTYPE[output.dtype], ACTIVATION=activation,
                SAVE=saved_kind(activation, saved is not None), WIDE=needs_wide_offsets(input, weight, output),
                IN_UNIT=in_unit, OUT_UNIT=out_unit, PRECISION=dot_precision(input.dtype),
                **window_constants(weight, stride, padding, dilation),
                BLOCK_PIXELS=block_pixels, BLOCK_OUT=block_out, BLOCK_IN=block_in,
            ),
            num_warps, num_stages,
        )
    )  # fmt: skip
    return None if partial is None else merge_statistics(partial, spans, statistics_groups)


def _phases(input_size: Sequence[int], stride: Sequence[int]) -> tuple[int, int]:
    """Height and width of the largest phase of an image."""
    return triton.cdiv(input_size[2], stride[0]), triton.cdiv(input_size[3], stride[1])


def dense_tiles(input_size, grad_size, weight: Tensor, stride, groups: int, dtype: torch.dtype) -> int:
    """Rows of the bias gradient's partial sums that :func:`dense_backward` writes."""
    phase_height, phase_width = _phases(input_size, stride)
    pixels = input_size[0] * phase_height * phase_width
    block_pixels = tile_sizes(pixels, weight.size(1), weight.size(0) // groups, groups, dtype, backward=True)[0]
    # A phase may have fewer pixels than grad_output, by its padding.
    return triton.cdiv(max(pixels, input_size[0] * grad_size[2] * grad_size[3]), block_pixels)


def dense_backward(
    grad_output: Tensor, weight: Tensor, saved: Tensor | None, stride: Sequence[int], padding: Sequence[int],
    dilation: Sequence[int], groups: int, activation: str | None, grad_input: Tensor, grad_bias: Tensor | None,
    scale: Tensor | None = None,
) -> None:  # fmt: skip
    """Input gradient and partial sums of the bias gradient of :func:`dense`, in one pass.

    Args:
        grad_output: (N, O, H', W'), any strides.
        weight: (O, C / groups, kH, kW); :func:`can_take` it.
        saved: what the forward saved; None if there is no activation.
        grad_input: (N, C, H, W), written.
        grad_bias: (``dense_tiles``, O) float32, written; or None.
        scale: of a weight in 8 bits, else None.
    """
    weight = channels_first_in_memory(weight)
    n, _, height, width = grad_input.shape
    out_height, out_width = grad_output.shape[2:]
    group_channels, group_out = weight.size(1), weight.size(0) // groups
    phase_height, phase_width = _phases(grad_input.shape, stride)
    pixels = n * phase_height * phase_width
    block_pixels, block_in, block_out, num_warps, num_stages = tile_sizes(
        pixels, group_channels, group_out, groups, grad_input.dtype, backward=True
    )
    tiles = dense_tiles(grad_input.shape, grad_output.shape, weight, stride, groups, grad_input.dtype)
    step_h, step_w = phase_steps(stride, dilation)
    save = saved_kind(activation)
    value = saved if save == "value" else None
    in_unit = min(stride_unit(group_channels, False, grad_input), alignment(*weight.stride()[:1], *weight.stride()[2:]))
    out_unit = stride_unit(group_out, False, grad_output, value)
    start(
        Launch(
            dense_backward_kernel,
            (tiles * stride[0] * stride[1] * groups * triton.cdiv(group_channels, block_in),),
            dict(
                grad_output=grad_output, weight=weight, scale=scale, saved=None if save == "nothing" else saved,
                grad_input=grad_input, grad_bias=grad_bias, pixels=pixels, image=phase_height * phase_width,
                phase_height=phase_height, phase_width=phase_width, height=height, width=width,
                out_height=out_height, out_width=out_width, groups=groups,
                group_channels=group_channels // in_unit, group_out=group_out // out_unit, slope=LEAKY_SLOPE,
                **stride_arguments("grad", grad_output, out_unit), **stride_arguments("saved", value, out_unit),
                **stride_arguments("input", grad_input, in_unit), **_weight_arguments(weight, in_unit),
            ),
            dict(
                DTYPE=TRITON_DTYPE[grad_input.dtype], ACTIVATION=activation, SAVE=save,
                WIDE=needs_wide_offsets(grad_output, value, weight, grad_input, grad_bias),
                IN_UNIT=in_unit, OUT_UNIT=out_unit, PRECISION=dot_precision(grad_input.dtype),
                **window_constants(weight, stride, padding, dilation), STEP_H=step_h, STEP_W=step_w,
                BLOCK_PIXELS=block_pixels, BLOCK_OUT=block_out, BLOCK_IN=block_in,
            ),
            num_warps, num_stages,
        )
    )  # fmt: skip
