"""The forward of a lite residual's branch behind its first convolution: a product between two norms, and the last norm.

The first convolution is ``dense``'s, which leaves partial statistics of its result. Backward computes the product again
with the same kernel, whose epilogue then sums gradients instead.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from tinytl_kernels.backends.triton.configurations import tunable
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
from tinytl_kernels.backends.triton.lite_branch_norm import (
    AppliedNorm,
    load_activated,
    load_norm,
    norm_arguments,
)
from tinytl_kernels.backends.triton.partial_statistics import (
    ANY_SIZE,
    Spans,
    store_partial,
    store_statistics,
    tile_pixels,
)
from tinytl_kernels.backends.triton.pixels import TILE_ELEMENTS, channel_block
from tinytl_kernels.backends.triton.weights import load_weight


@triton.jit(do_not_specialize=ANY_SIZE)
def lite_branch_product_kernel(
    conv, weight, statistics1, gain1, shift1, second, grad_output, statistics2, partial,
    span, splits, tiles, image, width, channels, out_channels,
    norm_size1, norm_image1, norm_group1, eps1, norm_size2, norm_image2, norm_group2, eps2,
    conv_n, conv_h, conv_w, grad_n, grad_h, grad_w, grad_c, weight_o, weight_c,
    DTYPE: tl.constexpr, ACTIVATION: tl.constexpr, WIDE: tl.constexpr, IN_UNIT: tl.constexpr, OUT_UNIT: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_PIXELS: tl.constexpr, BLOCK_OUT: tl.constexpr, BLOCK_IN: tl.constexpr,
):  # fmt: skip
    """second[p, o] = sum over c of f(norm1(conv[p, c])) weight[o, c], (pixels, O) in memory

    A program computes BLOCK_PIXELS x BLOCK_OUT and reads its pixels of ``conv`` in steps of BLOCK_IN channels. It
    writes to ``partial``, if there is one, what each channel of its tile has: mean and squared differences for norm2;
    or, with ``grad_output``, the sums of it and of its product with norm2's x_hat, for norm2's backward.
    Bytes an element of second: itself + conv M / O (+ grad_output) + 8 / BLOCK_PIXELS.
    """
    channels = channels * IN_UNIT
    out_channels = out_channels * OUT_UNIT
    columns = tl.cdiv(out_channels, BLOCK_OUT)
    program = tl.program_id(0)
    tile = program // columns
    number, pixel, inside = tile_pixels(tile, span, splits, BLOCK_PIXELS, WIDE)
    o = program % columns * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    rows = pixel_offset(pixel, image, width, conv_n * IN_UNIT, conv_h * IN_UNIT, conv_w * IN_UNIT, False)
    total = tl.zeros((BLOCK_PIXELS, BLOCK_OUT), dtype=tl.float32)
    for first in range(0, channels, BLOCK_IN):
        c = first + tl.arange(0, BLOCK_IN)
        a = load_activated(
            conv, rows[:, None] + c[None, :], inside[:, None] & (c < channels)[None, :], statistics1, gain1, shift1,
            norm_size1, number * norm_image1 + c // norm_group1, eps1, c, channels, DTYPE, ACTIVATION, BLOCK_IN,
        )  # fmt: skip
        w = load_weight(
            weight, None, o[None, :] * (weight_o * IN_UNIT) + c[:, None] * weight_c, o[None, :],
            (o < out_channels)[None, :], (c < channels)[:, None] & (o < out_channels)[None, :], DTYPE,
        )  # fmt: skip
        total = tl.dot(a, w, total, input_precision=PRECISION)
    valid = inside[:, None] & (o < out_channels)[None, :]
    y = total.to(DTYPE)
    tl.store(second + (pixel * out_channels)[:, None] + o[None, :], y, mask=valid)
    if partial is not None:
        y = tl.where(valid, y.to(tl.float32), 0.0)
        if grad_output is None:
            store_statistics(
                y, valid, partial, tile, span, splits, tiles, o, out_channels, o < out_channels, BLOCK_PIXELS
            )
        else:
            mean, rstd, _, _ = load_norm(
                statistics2, None, None, norm_size2, number * norm_image2 + o // norm_group2, eps2, o, out_channels,
                BLOCK_OUT,
            )  # fmt: skip
            rows = pixel_offset(pixel, image, width, grad_n * OUT_UNIT, grad_h * OUT_UNIT, grad_w * OUT_UNIT, False)
            g = tl.load(grad_output + rows[:, None] + o[None, :] * grad_c, mask=valid, other=0.0).to(tl.float32)
            product = tl.where(valid, g * (y - mean[None, :]) * rstd[None, :], 0.0)
            store_partial(
                tl.sum(g, axis=0), tl.sum(product, axis=0), partial, tile, tiles, o, out_channels, o < out_channels
            )


@triton.jit(do_not_specialize=ANY_SIZE)
def lite_branch_norm_kernel(
    second, statistics, gain, shift, output, span, splits, tiles, image, width, channels,
    norm_size, norm_image, norm_group, eps, output_n, output_h, output_w, output_c,
    DTYPE: tl.constexpr, WIDE: tl.constexpr, UNIT: tl.constexpr, ROWS: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """output = weight * x_hat + bias, x_hat = (second - mean) * rstd; second is (pixels, O) in memory

    A program computes ROWS pixels x BLOCK_C channels. Bytes an element: second + output.
    """
    channels = channels * UNIT
    columns = tl.cdiv(channels, BLOCK_C)
    program = tl.program_id(0)
    number, pixel, inside = tile_pixels(program // columns, span, splits, ROWS, WIDE)
    c = program % columns * BLOCK_C + tl.arange(0, BLOCK_C)
    mean, rstd, weight, bias = load_norm(
        statistics, gain, shift, norm_size, number * norm_image + c // norm_group, eps, c, channels, BLOCK_C
    )
    valid = inside[:, None] & (c < channels)[None, :]
    y = tl.load(second + (pixel * channels)[:, None] + c[None, :], mask=valid, other=0.0).to(tl.float32)
    y = (y - mean[None, :]) * rstd[None, :] * weight[None, :] + bias[None, :]
    rows = pixel_offset(pixel, image, width, output_n * UNIT, output_h * UNIT, output_w * UNIT, False)
    tl.store(output + rows[:, None] + c[None, :] * output_c, y.to(DTYPE), mask=valid)


def _sizes(pixels: int, columns: int, depth: int, dtype: torch.dtype, backward: bool = False):
    """What ``tinytl tune`` tries: other pixels, columns, depths, warps and stages."""
    widest, deepest = power_of_two(columns, 16, 64), power_of_two(depth, 16, 64 if dtype != torch.float32 else 32)
    return [
        (block_pixels, block_columns, block_depth, num_warps, num_stages)
        for block_pixels in (32, 64, 128)
        for block_columns in dict.fromkeys((widest, max(16, widest // 2)))
        if block_pixels * block_columns <= 64 * 64
        for block_depth in dict.fromkeys((deepest, max(16, deepest // 2)))
        for num_warps in (4, 8)
        for num_stages in (2, 3)
    ]


@tunable(_sizes)
def tile_sizes(
    pixels: int, columns: int, depth: int, dtype: torch.dtype, backward: bool = False
) -> tuple[int, int, int, int, int]:
    """(BLOCK_PIXELS, columns of a tile, depth of a step, num_warps, num_stages) of the branch's products.

    ``pixels`` are of a span (see ``partial_statistics``). Small tiles: a quarter of the block's pixels have to make
    programs for all multiprocessors, and norms are applied to what is loaded in registers.
    """
    block_columns = power_of_two(columns, 16, 64)
    block_depth = power_of_two(depth, 16, 32)
    block_pixels = power_of_two(pixels, 16, 64)
    while block_pixels > 32 and pixels * columns < 132 * block_pixels * block_columns:
        block_pixels //= 2
    # With 4 warps 64 pixels spill here and there: what a norm needs of a tile lies in registers beside the sums.
    return block_pixels, block_columns, block_depth, 8 if block_pixels == 64 else 4, 2


def product(
    conv: Tensor, norm1: AppliedNorm, activation: str, weight: Tensor, norm2_groups: int, second: Tensor,
    need_partial: bool, norm2: AppliedNorm | None = None, grad_output: Tensor | None = None,
) -> tuple[Tensor | None, Spans]:  # fmt: skip
    """``second = conv2d(f(norm1(conv)), weight)`` and, if needed, partial results for the second norm.

    Args:
        conv: (N, M, H', W'), its channels side by side in memory.
        weight: (O, M, 1, 1).
        norm2_groups: of the norm that follows.
        second: (N, O, H', W') channels_last, written.
        norm2, grad_output: given in backward, where the partial results are sums of gradients.

    Returns:
        The partial results as ``partial_statistics`` puts them together, or None; and the tiles that they are of.
    """
    n, channels, height, width = conv.shape
    out_channels, per_image = weight.size(0), bool(norm1.groups or norm2_groups)
    span = height * width if per_image else n * height * width
    block_pixels, block_out, block_in, num_warps, num_stages = tile_sizes(span, out_channels, channels, conv.dtype)
    spans = Spans.of(n, height * width, block_pixels, per_image)
    partial = spans.partial(out_channels, conv) if need_partial else None
    in_unit = min(stride_unit(channels, False, conv), alignment(weight.stride(0)))
    if partial is None:
        norm2 = grad_output = None
    out_unit = stride_unit(out_channels, False, grad_output)
    start(
        Launch(
            lite_branch_product_kernel,
            (spans.tiles * triton.cdiv(out_channels, block_out),),
            dict(
                conv=conv, weight=weight, **norm_arguments(norm1, "1", channels), second=second,
                grad_output=grad_output, **norm_arguments(norm2, "2", out_channels, affine=False),
                partial=partial, **spans.arguments, image=height * width, width=width,
                channels=channels // in_unit, out_channels=out_channels // out_unit,
                **row_arguments("conv", conv, in_unit), **stride_arguments("grad", grad_output, out_unit),
                weight_o=weight.stride(0) // in_unit, weight_c=weight.stride(1),
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
    return partial, spans


def row_arguments(name: str, tensor: Tensor, unit: int) -> dict[str, int]:
    """Kernel arguments ``name_n, name_h, name_w`` of a tensor whose channels lie side by side."""
    arguments = stride_arguments(name, tensor, unit)
    del arguments[f"{name}_c"]
    return arguments


def normalise(second: Tensor, norm: AppliedNorm, output: Tensor) -> None:
    """``output = norm(second)``.

    Args:
        second: (N, O, H', W') channels_last.
        output: (N, O, H', W'), any strides, written.
    """
    n, channels, height, width = output.shape
    block = channel_block(channels)
    rows = power_of_two(height * width if norm.groups else n * height * width, 1, TILE_ELEMENTS // block)
    spans = Spans.of(n, height * width, rows, bool(norm.groups))
    unit = stride_unit(channels, False, output)
    start(
        Launch(
            lite_branch_norm_kernel,
            (spans.tiles * triton.cdiv(channels, block),),
            dict(
                second=second, **norm_arguments(norm, "", channels), output=output, **spans.arguments,
                image=height * width, width=width, channels=channels // unit,
                **stride_arguments("output", output, unit),
            ),
            dict(
                DTYPE=TRITON_DTYPE[output.dtype], WIDE=needs_wide_offsets(second, output), UNIT=unit, ROWS=rows,
                BLOCK_C=block,
            ),
        )
    )  # fmt: skip
