"""The backward of a lite residual's branch down to the gradient of its first convolution, and its second weight's.

Tiles of the two products' operands are made as they are loaded, from what the forward kept or computed again: neither
the activated values nor the gradient between second norm and product is ever in memory.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from tinytl_kernels.backends.triton.configurations import tunable
from tinytl_kernels.backends.triton.epilogue import gradient_by_bits, passes
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
from tinytl_kernels.backends.triton.lite_branch_forward import row_arguments, tile_sizes
from tinytl_kernels.backends.triton.lite_branch_norm import (
    AppliedNorm,
    load_activated,
    load_before_activation,
    load_second_gradient,
    norm_arguments,
    norm_gradient,
)
from tinytl_kernels.backends.triton.partial_statistics import ANY_SIZE, Spans, store_partial, tile_pixels
from tinytl_kernels.backends.triton.pixels import TILE_ELEMENTS, channel_block
from tinytl_kernels.backends.triton.weights import load_weight

# Programs of a weight gradient: more would only make more partial sums of its size.
_ENOUGH_PROGRAMS = 264


@triton.jit(do_not_specialize=ANY_SIZE)
def lite_branch_gradient_kernel(
    grad_output, second, conv, weight, statistics1, gain1, shift1, statistics2, gain2, means2, grad_conv, partial,
    span, splits, tiles, image, width, channels, out_channels,
    norm_size1, norm_image1, norm_group1, eps1, norm_size2, norm_image2, norm_group2, eps2,
    conv_n, conv_h, conv_w, grad_n, grad_h, grad_w, grad_c, weight_o, weight_c,
    DTYPE: tl.constexpr, ACTIVATION: tl.constexpr, WIDE: tl.constexpr, IN_UNIT: tl.constexpr, OUT_UNIT: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_PIXELS: tl.constexpr, BLOCK_OUT: tl.constexpr, BLOCK_IN: tl.constexpr,
):  # fmt: skip
    """g[p, c] = f'(norm1(conv[p, c])) * (sum over o of grad_second[p, o] weight[o, c]), into ``grad_conv`` (pixels, M)

    grad_second, of the 1x1 convolution's result, is made from grad_output and ``second`` (pixels, O) as they are
    loaded. A program computes BLOCK_PIXELS x BLOCK_IN in steps of BLOCK_OUT, and writes to ``partial``, if there is
    one, the sums of g and of g x_hat over its pixels.
    Bytes an element of g: itself + conv + (grad_output + second) O / M + 8 / BLOCK_PIXELS.
    """
    channels = channels * IN_UNIT
    out_channels = out_channels * OUT_UNIT
    columns = tl.cdiv(channels, BLOCK_IN)
    program = tl.program_id(0)
    tile = program // columns
    number, pixel, inside = tile_pixels(tile, span, splits, BLOCK_PIXELS, WIDE)
    c = program % columns * BLOCK_IN + tl.arange(0, BLOCK_IN)
    grad_rows = pixel_offset(pixel, image, width, grad_n * OUT_UNIT, grad_h * OUT_UNIT, grad_w * OUT_UNIT, False)
    total = tl.zeros((BLOCK_PIXELS, BLOCK_IN), dtype=tl.float32)
    for first in range(0, out_channels, BLOCK_OUT):
        o = first + tl.arange(0, BLOCK_OUT)
        g = load_second_gradient(
            grad_output, grad_rows[:, None] + o[None, :] * grad_c, second, (pixel * out_channels)[:, None] + o[None, :],
            inside[:, None] & (o < out_channels)[None, :], statistics2, gain2, norm_size2,
            number * norm_image2 + o // norm_group2, eps2, means2, o, out_channels, DTYPE, BLOCK_OUT,
        )  # fmt: skip
        w = load_weight(
            weight, None, o[:, None] * (weight_o * IN_UNIT) + c[None, :] * weight_c, o[:, None],
            (o < out_channels)[:, None], (o < out_channels)[:, None] & (c < channels)[None, :], DTYPE,
        )  # fmt: skip
        total = tl.dot(g, w, total, input_precision=PRECISION)
    valid = inside[:, None] & (c < channels)[None, :]
    rows = pixel_offset(pixel, image, width, conv_n * IN_UNIT, conv_h * IN_UNIT, conv_w * IN_UNIT, False)
    x_hat, z = load_before_activation(
        conv, rows[:, None] + c[None, :], valid, statistics1, gain1, shift1, norm_size1,
        number * norm_image1 + c // norm_group1, eps1, c, channels, DTYPE, BLOCK_IN,
    )  # fmt: skip
    grad = gradient_by_bits(total.to(DTYPE).to(tl.float32), passes(z, ACTIVATION) & valid, 0.0, ACTIVATION)
    if grad_conv is not None:
        tl.store(grad_conv + (pixel * channels)[:, None] + c[None, :], grad.to(DTYPE), mask=valid)
    if partial is not None:
        store_partial(
            tl.sum(grad, axis=0), tl.sum(grad * x_hat, axis=0), partial, tile, tiles, c, channels, c < channels
        )


@triton.jit(do_not_specialize=ANY_SIZE)
def lite_branch_norm_backward_kernel(
    grad_conv, conv, statistics, gain, means, span, splits, tiles, image, width, channels,
    norm_size, norm_image, norm_group, eps, conv_n, conv_h, conv_w,
    DTYPE: tl.constexpr, WIDE: tl.constexpr, UNIT: tl.constexpr, ROWS: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """grad_conv = rstd (weight g - E[weight g] - x_hat E[weight g x_hat]), in place of g; (pixels, M) in memory

    A program computes ROWS pixels x BLOCK_C channels. Bytes an element: conv + 2 grad_conv.
    """
    channels = channels * UNIT
    columns = tl.cdiv(channels, BLOCK_C)
    program = tl.program_id(0)
    number, pixel, inside = tile_pixels(program // columns, span, splits, ROWS, WIDE)
    c = program % columns * BLOCK_C + tl.arange(0, BLOCK_C)
    index = number * norm_image + c // norm_group
    valid = inside[:, None] & (c < channels)[None, :]
    where = (pixel * channels)[:, None] + c[None, :]
    rows = pixel_offset(pixel, image, width, conv_n * UNIT, conv_h * UNIT, conv_w * UNIT, False)
    g = tl.load(grad_conv + where, mask=valid, other=0.0).to(tl.float32)
    grad = norm_gradient(
        g, conv, rows[:, None] + c[None, :], valid, statistics, gain, norm_size, index, eps, means, c, channels, BLOCK_C
    )
    tl.store(grad_conv + where, grad.to(DTYPE), mask=valid)


@triton.jit(do_not_specialize=[*ANY_SIZE, "share"])
def lite_branch_weight_kernel(
    grad_output, second, conv, statistics1, gain1, shift1, statistics2, gain2, means2, grad_weight,
    span, splits, tiles, image, width, channels, out_channels, share,
    norm_size1, norm_image1, norm_group1, eps1, norm_size2, norm_image2, norm_group2, eps2,
    conv_n, conv_h, conv_w, grad_n, grad_h, grad_w, grad_c,
    DTYPE: tl.constexpr, ACTIVATION: tl.constexpr, WIDE: tl.constexpr, IN_UNIT: tl.constexpr, OUT_UNIT: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_PIXELS: tl.constexpr, BLOCK_OUT: tl.constexpr, BLOCK_IN: tl.constexpr,
):  # fmt: skip
    """grad_weight[s, o, c] = sum over pixels p of share s of grad_second[p, o] f(norm1(conv[p, c])), float32

    A program computes BLOCK_OUT x BLOCK_IN over ``share`` tiles of BLOCK_PIXELS. Both operands are made from what is
    loaded, as in the other two products. Bytes a pixel: (conv M + (grad_output + second) O) elements.
    """
    channels = channels * IN_UNIT
    out_channels = out_channels * OUT_UNIT
    out_columns = tl.cdiv(out_channels, BLOCK_OUT)
    columns = tl.cdiv(channels, BLOCK_IN)
    program = tl.program_id(0)
    part = program // columns // out_columns
    o = program // columns % out_columns * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    c = program % columns * BLOCK_IN + tl.arange(0, BLOCK_IN)
    total = tl.zeros((BLOCK_OUT, BLOCK_IN), dtype=tl.float32)
    for tile in range(part * share, tl.minimum((part + 1) * share, tiles)):
        number, pixel, inside = tile_pixels(tile, span, splits, BLOCK_PIXELS, WIDE)
        rows = pixel_offset(pixel, image, width, grad_n * OUT_UNIT, grad_h * OUT_UNIT, grad_w * OUT_UNIT, False)
        g = load_second_gradient(
            grad_output, rows[:, None] + o[None, :] * grad_c, second, (pixel * out_channels)[:, None] + o[None, :],
            inside[:, None] & (o < out_channels)[None, :], statistics2, gain2, norm_size2,
            number * norm_image2 + o // norm_group2, eps2, means2, o, out_channels, DTYPE, BLOCK_OUT,
        )  # fmt: skip
        rows = pixel_offset(pixel, image, width, conv_n * IN_UNIT, conv_h * IN_UNIT, conv_w * IN_UNIT, False)
        a = load_activated(
            conv, rows[:, None] + c[None, :], inside[:, None] & (c < channels)[None, :], statistics1, gain1, shift1,
            norm_size1, number * norm_image1 + c // norm_group1, eps1, c, channels, DTYPE, ACTIVATION, BLOCK_IN,
        )  # fmt: skip
        total = tl.dot(tl.trans(g), a, total, input_precision=PRECISION)
    row = part.to(tl.int64) * out_channels + o
    tl.store(
        grad_weight + row[:, None] * channels + c[None, :],
        total,
        mask=(o < out_channels)[:, None] & (c < channels)[None, :],
    )


def gradient_of_activation(
    grad_output: Tensor, second: Tensor, norm2: AppliedNorm, means2: Tensor | None, weight: Tensor, conv: Tensor,
    norm1: AppliedNorm, activation: str, grad_conv: Tensor | None, need_partial: bool,
) -> tuple[Tensor | None, Spans]:  # fmt: skip
    """Gradient of the first norm's result, through the second norm, the product and the activation.

    Args:
        grad_output: (N, O, H', W'), any strides.
        second: (N, O, H', W') channels_last.
        means2: of ``partial_statistics.merge_sums``; None where norm2's statistics are constants.
        weight: (O, M, 1, 1).
        conv: (N, M, H', W'), its channels side by side in memory.
        grad_conv: (N, M, H', W') channels_last, written; or None.

    Returns:
        Partial sums for the first norm's backward, or None; and the tiles that they are of.
    """
    n, channels, height, width = conv.shape
    out_channels, per_image = weight.size(0), bool(norm1.groups or norm2.groups)
    span = height * width if per_image else n * height * width
    block_pixels, block_in, block_out, num_warps, num_stages = tile_sizes(
        span, channels, out_channels, conv.dtype, backward=True
    )
    spans = Spans.of(n, height * width, block_pixels, per_image)
    partial = spans.partial(channels, conv) if need_partial else None
    in_unit = min(stride_unit(channels, False, conv), alignment(weight.stride(0)))
    out_unit = stride_unit(out_channels, False, grad_output)
    second_norm = norm_arguments(norm2, "2", out_channels)
    del second_norm["shift2"]
    start(
        Launch(
            lite_branch_gradient_kernel,
            (spans.tiles * triton.cdiv(channels, block_in),),
            dict(
                grad_output=grad_output, second=second, conv=conv, weight=weight,
                **norm_arguments(norm1, "1", channels), **second_norm, means2=means2, grad_conv=grad_conv,
                partial=partial, **spans.arguments, image=height * width, width=width,
                channels=channels // in_unit, out_channels=out_channels // out_unit,
                **row_arguments("conv", conv, in_unit), **stride_arguments("grad", grad_output, out_unit),
                weight_o=weight.stride(0) // in_unit, weight_c=weight.stride(1),
            ),
            dict(
                DTYPE=TRITON_DTYPE[conv.dtype], ACTIVATION=activation,
                WIDE=needs_wide_offsets(conv, second, grad_output, grad_conv), IN_UNIT=in_unit, OUT_UNIT=out_unit,
                PRECISION=dot_precision(conv.dtype),
                BLOCK_PIXELS=block_pixels, BLOCK_OUT=block_out, BLOCK_IN=block_in,
            ),
            num_warps, num_stages,
        )
    )  # fmt: skip
    return partial, spans


def norm_backward(grad_conv: Tensor, conv: Tensor, norm: AppliedNorm, means: Tensor | None) -> None:
    """The gradient of ``conv`` from that of its norm, in place.

    Args:
        grad_conv: (N, M, H', W') channels_last, read and written.
        conv: (N, M, H', W'), its channels side by side in memory.
        means: of ``partial_statistics.merge_sums``; None where the statistics are constants.
    """
    n, channels, height, width = conv.shape
    block = channel_block(channels)
    rows = power_of_two(height * width if norm.groups else n * height * width, 1, TILE_ELEMENTS // block)
    spans = Spans.of(n, height * width, rows, bool(norm.groups))
    unit = stride_unit(channels, False, conv)
    arguments = norm_arguments(norm, "", channels)
    del arguments["shift"]
    start(
        Launch(
            lite_branch_norm_backward_kernel,
            (spans.tiles * triton.cdiv(channels, block),),
            dict(
                grad_conv=grad_conv, conv=conv, **arguments, means=means, **spans.arguments, image=height * width,
                width=width, channels=channels // unit, **row_arguments("conv", conv, unit),
            ),
            dict(
                DTYPE=TRITON_DTYPE[conv.dtype], WIDE=needs_wide_offsets(conv, grad_conv), UNIT=unit, ROWS=rows,
                BLOCK_C=block,
            ),
        )
    )  # fmt: skip


def _weight_sizes(pixels: int, out_channels: int, channels: int, dtype: torch.dtype):
    """What ``tinytl tune`` tries: other tiles and shares of the pixels."""
    return [
        (power_of_two(pixels, 16, block_pixels), power_of_two(out_channels, 16, block),
         power_of_two(channels, 16, block), programs, 4, num_stages)
        for block_pixels in (32, 64)
        for block in (32, 64)
        for programs in (_ENOUGH_PROGRAMS // 2, _ENOUGH_PROGRAMS, 2 * _ENOUGH_PROGRAMS)
        for num_stages in (2, 3)
    ]  # fmt: skip


@tunable(_weight_sizes)
def weight_tile_sizes(
    pixels: int, out_channels: int, channels: int, dtype: torch.dtype
) -> tuple[int, int, int, int, int, int]:
    """(BLOCK_PIXELS, BLOCK_OUT, BLOCK_IN, programs, num_warps, num_stages) of the second weight's gradient.

    ``pixels`` are of a span (see ``partial_statistics``).
    """
    # 64 pixels would spill on sm_100, where both operands are made in registers beside 64 x 64 sums.
    block_pixels = power_of_two(pixels, 16, 32)
    block_out, block_in = power_of_two(out_channels, 16, 64), power_of_two(channels, 16, 64)
    return block_pixels, block_out, block_in, _ENOUGH_PROGRAMS, 4, 2


def second_weight_gradient(
    grad_output: Tensor, second: Tensor, norm2: AppliedNorm, means2: Tensor | None, weight: Tensor, conv: Tensor,
    norm1: AppliedNorm, activation: str,
) -> Tensor:  # fmt: skip
    """The gradient of ``weight`` (O, M, 1, 1), like it. Arguments as in :func:`gradient_of_activation`."""
    n, channels, height, width = conv.shape
    out_channels, per_image = weight.size(0), bool(norm1.groups or norm2.groups)
    span = height * width if per_image else n * height * width
    block_pixels, block_out, block_in, programs, num_warps, num_stages = weight_tile_sizes(
        span, out_channels, channels, conv.dtype
    )
    spans = Spans.of(n, height * width, block_pixels, per_image)
    columns = triton.cdiv(out_channels, block_out) * triton.cdiv(channels, block_in)
    share = triton.cdiv(spans.tiles, max(1, programs // columns))
    parts = triton.cdiv(spans.tiles, share)
    partial = conv.new_empty((parts, out_channels, channels), dtype=torch.float32)
    in_unit, out_unit = stride_unit(channels, False, conv), stride_unit(out_channels, False, grad_output)
    second_norm = norm_arguments(norm2, "2", out_channels)
    del second_norm["shift2"]
    start(
        Launch(
            lite_branch_weight_kernel,
            (parts * columns,),
            dict(
                grad_output=grad_output, second=second, conv=conv, **norm_arguments(norm1, "1", channels),
                **second_norm, means2=means2, grad_weight=partial, **spans.arguments, image=height * width,
                width=width, channels=channels // in_unit, out_channels=out_channels // out_unit,
                share=share,
                **row_arguments("conv", conv, in_unit), **stride_arguments("grad", grad_output, out_unit),
            ),
            dict(
                DTYPE=TRITON_DTYPE[conv.dtype], ACTIVATION=activation,
                WIDE=needs_wide_offsets(conv, second, grad_output), IN_UNIT=in_unit, OUT_UNIT=out_unit,
                PRECISION=dot_precision(conv.dtype),
                BLOCK_PIXELS=block_pixels, BLOCK_OUT=block_out, BLOCK_IN=block_in,
            ),
            num_warps, num_stages,
        )
    )  # fmt: skip
    return torch.empty_like(weight).copy_(partial.sum(0).view(weight.shape))
