"""The backward of GroupNorm and its activation on the GPU: sums of each channel, means of a group, one last pass.

x_hat comes from the kept input, or from its codes in 8 bits: (values - shift) * scale. The activation's derivative is
computed again from it. Both tensors are read twice, in chunks of images that stay in L2 in between.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from tinytl_kernels.backends.triton.chunks import chunk_images, chunks
from tinytl_kernels.backends.triton.epilogue import gradient_by_bits, gradient_by_value, passes, saved_kind
from tinytl_kernels.backends.triton.group_norm import (
    ANY_SIZE,
    BLOCK_SUMS,
    Cut,
    cut_images,
    image_arguments,
    load_affine,
    load_per_group,
)
from tinytl_kernels.backends.triton.launch import (
    TRITON_DTYPE,
    Launch,
    is_flat,
    needs_wide_offsets,
    on_device,
    pixel_offset,
    start,
    stride_arguments,
    stride_unit,
)
from tinytl_kernels.backends.triton.pixels import image_tile
from tinytl_kernels.core.activations import LEAKY_SLOPE
from tinytl_kernels.core.layout import memory_format


@triton.jit
def load_normalised_gradient(
    grad_output, grad_offset, values, values_offset, shift, scale, gain, offset, valid, slope,
    ACTIVATION: tl.constexpr, DERIVATIVE: tl.constexpr,
):  # fmt: skip
    """(f'(z) * grad_output, x_hat), float32 tiles; z = gain * x_hat + offset is computed again."""
    x_hat = (tl.load(values + values_offset, mask=valid, other=0).to(tl.float32) - shift[None, :]) * scale[None, :]
    x_hat = tl.where(valid, x_hat, 0.0)
    grad = tl.load(grad_output + grad_offset, mask=valid, other=0.0).to(tl.float32)
    z = x_hat * gain[None, :] + offset[None, :]
    if DERIVATIVE == "mask":
        grad = gradient_by_bits(grad, passes(z, ACTIVATION), slope, ACTIVATION)
    elif DERIVATIVE == "value":
        grad = gradient_by_value(grad, z, ACTIVATION)
    return grad, x_hat


@triton.jit(do_not_specialize=ANY_SIZE)
def group_norm_sums_kernel(
    grad_output, values, shift, scale, weight, bias, partial, image, width, channels, groups, splits, split_pixels,
    slope, grad_n, grad_h, grad_w, grad_c, values_n, values_h, values_w, values_c,
    ACTIVATION: tl.constexpr, DERIVATIVE: tl.constexpr, FLAT: tl.constexpr, WIDE: tl.constexpr, UNIT: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Sums of g = f'(z) * grad_output and of g x_hat of each channel over ``split_pixels`` of an image.

    A program computes BLOCK_C channels of one split and writes them to ``partial`` (N, splits, 2, C) float32.
    Bytes an element: grad_output + values + 8 / split_pixels.
    """
    group_channels = channels * UNIT // groups
    channels = channels * UNIT
    number, split, c = image_tile(channels, splits, WIDE, BLOCK_C)
    last = tl.minimum((split + 1) * split_pixels, image)
    middle = load_per_group(shift, number, c, channels, group_channels, groups)
    factor = load_per_group(scale, number, c, channels, group_channels, groups)
    gain, offset = load_affine(weight, bias, c, channels, BLOCK_C)
    of_g = tl.zeros((BLOCK_C,), dtype=tl.float32)
    of_product = tl.zeros((BLOCK_C,), dtype=tl.float32)
    for first in range(split * split_pixels, last, ROWS):
        place = first + tl.arange(0, ROWS)
        pixel = number * image + place
        valid = (place < last)[:, None] & (c < channels)[None, :]
        grad_row = pixel_offset(pixel, image, width, grad_n * UNIT, grad_h * UNIT, grad_w * UNIT, FLAT)
        values_row = pixel_offset(pixel, image, width, values_n * UNIT, values_h * UNIT, values_w * UNIT, FLAT)
        g, x_hat = load_normalised_gradient(
            grad_output, grad_row[:, None] + c[None, :] * grad_c, values, values_row[:, None] + c[None, :] * values_c,
            middle, factor, gain, offset, valid, slope, ACTIVATION, DERIVATIVE,
        )  # fmt: skip
        of_g += tl.sum(g, axis=0)
        of_product += tl.sum(g * x_hat, axis=0)
    row = partial + (number * splits + split) * (2 * channels) + c
    tl.store(row, of_g, mask=c < channels)
    tl.store(row + channels, of_product, mask=c < channels)


@triton.jit(do_not_specialize=ANY_SIZE)
def group_norm_means_kernel(
    partial, weight, means, image, channels, groups, splits, BLOCK: tl.constexpr
):  # fmt: skip
    """E[weight g] and E[weight g x_hat] of one group of one image, into ``means`` (N, groups, 2)."""
    group_channels = channels // groups
    program = tl.program_id(0)
    first_channel = program % groups * group_channels
    source = partial + (program // groups).to(tl.int64) * splits * (2 * channels) + first_channel
    of_g = tl.zeros((BLOCK,), dtype=tl.float32)
    of_product = tl.zeros((BLOCK,), dtype=tl.float32)
    for first in range(0, splits * group_channels, BLOCK):
        e = first + tl.arange(0, BLOCK)
        inside = e < splits * group_channels
        row = e // group_channels * (2 * channels) + e % group_channels
        g = tl.load(source + row, mask=inside, other=0.0)
        product = tl.load(source + channels + row, mask=inside, other=0.0)
        if weight is not None:
            gain = tl.load(weight + first_channel + e % group_channels, mask=inside, other=0.0).to(tl.float32)
            g *= gain
            product *= gain
        of_g += g
        of_product += product
    elements = image.to(tl.float32) * group_channels
    tl.store(means + program * 2, tl.sum(of_g, axis=0) / elements)
    tl.store(means + program * 2 + 1, tl.sum(of_product, axis=0) / elements)


@triton.jit(do_not_specialize=ANY_SIZE)
def group_norm_backward_kernel(
    grad_output, values, shift, scale, rstd, weight, bias, means, grad_input, image, width, channels, groups, splits,
    slope, grad_n, grad_h, grad_w, grad_c, values_n, values_h, values_w, values_c, input_n, input_h, input_w, input_c,
    DTYPE: tl.constexpr, ACTIVATION: tl.constexpr, DERIVATIVE: tl.constexpr, FLAT: tl.constexpr, WIDE: tl.constexpr,
    UNIT: tl.constexpr, ROWS: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """grad_input = rstd (weight g - E[weight g] - x_hat E[weight g x_hat])

    A program computes ROWS pixels of one image x BLOCK_C channels. Bytes an element: grad_output + values + grad_input.
    """
    group_channels = channels * UNIT // groups
    channels = channels * UNIT
    number, split, c = image_tile(channels, splits, WIDE, BLOCK_C)
    place = split * ROWS + tl.arange(0, ROWS)
    valid = (place < image)[:, None] & (c < channels)[None, :]
    pixel = number * image + place
    grad_row = pixel_offset(pixel, image, width, grad_n * UNIT, grad_h * UNIT, grad_w * UNIT, FLAT)
    values_row = pixel_offset(pixel, image, width, values_n * UNIT, values_h * UNIT, values_w * UNIT, FLAT)
    gain, offset = load_affine(weight, bias, c, channels, BLOCK_C)
    g, x_hat = load_normalised_gradient(
        grad_output, grad_row[:, None] + c[None, :] * grad_c, values, values_row[:, None] + c[None, :] * values_c,
        load_per_group(shift, number, c, channels, group_channels, groups),
        load_per_group(scale, number, c, channels, group_channels, groups),
        gain, offset, valid, slope, ACTIVATION, DERIVATIVE,
    )  # fmt: skip
    pair = means + (number * groups + c // group_channels) * 2
    of_g = tl.load(pair, mask=c < channels, other=0.0)
    of_product = tl.load(pair + 1, mask=c < channels, other=0.0)
    factor = load_per_group(rstd, number, c, channels, group_channels, groups)
    grad = (g * gain[None, :] - of_g[None, :] - x_hat * of_product[None, :]) * factor[None, :]
    rows = pixel_offset(pixel, image, width, input_n * UNIT, input_h * UNIT, input_w * UNIT, FLAT)
    tl.store(grad_input + rows[:, None] + c[None, :] * input_c, grad.to(DTYPE), mask=valid)


def sums_into(
    grad_output: Tensor, values: Tensor, shift: Tensor, scale: Tensor, weight: Tensor | None, bias: Tensor | None,
    activation: str | None, partial: Tensor, cut: Cut,
) -> None:  # fmt: skip
    """Sums of g and of g x_hat of each channel of each split into ``partial`` (N, splits, 2, C) float32."""
    flat = is_flat(grad_output, values)
    unit = stride_unit(cut.channels, flat, grad_output, values)
    start(
        Launch(
            group_norm_sums_kernel,
            cut.programs(grad_output.size(0), cut.split_pixels),
            dict(
                grad_output=grad_output, values=values, shift=shift, scale=scale, weight=weight, bias=bias,
                partial=partial, **image_arguments(grad_output, unit, shift.size(1)),
                splits=cut.splits, split_pixels=cut.split_pixels, slope=LEAKY_SLOPE,
                **stride_arguments("grad", grad_output, unit, flat), **stride_arguments("values", values, unit, flat),
            ),
            dict(
                ACTIVATION=activation, DERIVATIVE=saved_kind(activation), FLAT=flat,
                WIDE=needs_wide_offsets(grad_output, values, partial), UNIT=unit, ROWS=cut.rows, BLOCK_C=cut.block,
            ),
            cut.num_warps,
        )
    )  # fmt: skip


def gradient_into(
    grad_output: Tensor, values: Tensor, shift: Tensor, scale: Tensor, rstd: Tensor, weight: Tensor | None,
    bias: Tensor | None, activation: str | None, partial: Tensor, grad_input: Tensor, cut: Cut,
) -> None:  # fmt: skip
    """``grad_input`` (N, C, H, W) from what :func:`sums_into` wrote to ``partial``."""
    n, groups = shift.shape
    means = torch.empty((n, groups, 2), dtype=torch.float32, device=shift.device)
    start(
        Launch(
            group_norm_means_kernel,
            (n * groups,),
            dict(
                partial=partial, weight=weight, means=means, image=cut.image, channels=cut.channels, groups=groups,
                splits=cut.splits,
            ),
            dict(BLOCK=BLOCK_SUMS),
        )
    )  # fmt: skip
    flat = is_flat(grad_output, values, grad_input)
    unit = stride_unit(cut.channels, flat, grad_output, values, grad_input)
    start(
        Launch(
            group_norm_backward_kernel,
            cut.programs(n, cut.rows),
            dict(
                grad_output=grad_output, values=values, shift=shift, scale=scale, rstd=rstd, weight=weight, bias=bias,
                means=means, grad_input=grad_input, **image_arguments(grad_output, unit, groups),
                splits=triton.cdiv(cut.image, cut.rows), slope=LEAKY_SLOPE,
                **stride_arguments("grad", grad_output, unit, flat), **stride_arguments("values", values, unit, flat),
                **stride_arguments("input", grad_input, unit, flat),
            ),
            dict(
                DTYPE=TRITON_DTYPE[grad_input.dtype], ACTIVATION=activation, DERIVATIVE=saved_kind(activation),
                FLAT=flat, WIDE=needs_wide_offsets(grad_output, values, grad_input), UNIT=unit,
                ROWS=cut.rows, BLOCK_C=cut.block,
            ),
            cut.num_warps,
        )
    )  # fmt: skip


@on_device
def group_norm_activation_backward(
    grad_output: Tensor, values: Tensor, shift: Tensor, scale: Tensor, rstd: Tensor, weight: Tensor | None,
    bias: Tensor | None, num_groups: int, activation: str | None, needed: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    need_input, need_weight, need_bias = needed
    n, channels, height, width = grad_output.shape
    grad_input = grad_output.new_empty(0)
    if need_input:
        grad_input = torch.empty_like(grad_output, memory_format=memory_format(grad_output))
    step = chunk_images(n, 2 * channels * height * width, grad_output)
    cut = cut_images(min(n, step), height * width, channels, backward=True)
    partial = rstd.new_empty((n, cut.splits, 2, channels))
    for images in chunks(n, step):
        kept = (values[images], shift[images], scale[images])
        sums_into(grad_output[images], *kept, weight, bias, activation, partial[images], cut)
        if need_input:
            gradient_into(
                grad_output[images], *kept, rstd[images], weight, bias, activation, partial[images],
                grad_input[images], cut,
            )  # fmt: skip
    sums = partial.sum((0, 1)) if need_weight or need_bias else partial.new_empty((2, 0))
    nothing = rstd.new_empty(0)
    return grad_input, sums[1] if need_weight else nothing, sums[0] if need_bias else nothing


OPERATORS = {"group_norm_activation_backward": group_norm_activation_backward}
