"""GroupNorm and its activation on the GPU: statistics of each channel, what they make of a group, one last pass.

The input is read twice, in chunks of images that stay in L2 in between, so that memory sees it once. Statistics are cut
by pixels and put together in a fixed order: one large image has as many programs as a batch of small ones.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from tinytl_kernels.backends.triton.chunks import chunk_images, chunks
from tinytl_kernels.backends.triton.configurations import tunable
from tinytl_kernels.backends.triton.epilogue import activate
from tinytl_kernels.backends.triton.launch import (
    TRITON_DTYPE,
    Launch,
    is_flat,
    needs_wide_offsets,
    on_device,
    pixel_offset,
    power_of_two,
    start,
    stride_arguments,
    stride_unit,
)
from tinytl_kernels.backends.triton.pixels import TILE_ELEMENTS, channel_block, image_tile, tile_candidates
from tinytl_kernels.core.activations import LEAKY_SLOPE
from tinytl_kernels.core.layout import memory_format

ANY_SIZE = ["image", "width", "splits", "split_pixels"]

# Programs that keep every multiprocessor of a large GPU busy.
_ENOUGH_PROGRAMS = 512

# Partial sums that a program of the second step reads at a time.
BLOCK_SUMS = 256


@triton.jit
def channel_statistics(x, valid, count, BLOCK_C: tl.constexpr):
    """(mean, sum of squared differences from it) over the ``count`` rows of a float32 tile that are ``valid``."""
    mean = tl.sum(x, axis=0) / tl.maximum(count, 1)
    difference = tl.where(valid, x - mean[None, :], 0.0)
    return mean, tl.sum(difference * difference, axis=0)


@triton.jit(do_not_specialize=ANY_SIZE)
def group_norm_statistics_kernel(
    input, partial, image, width, channels, splits, split_pixels, input_n, input_h, input_w, input_c,
    FLAT: tl.constexpr, WIDE: tl.constexpr, UNIT: tl.constexpr, RANGE: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Mean, squared differences and, if RANGE, smallest and largest of each channel over ``split_pixels`` of an image.

    A program computes BLOCK_C channels of one split, ROWS pixels at a time, and writes them to ``partial`` (N, splits,
    2 or 4, C) float32. Differences from the mean of their own, never a sum of squares: those would cancel where the
    mean is large. Bytes an element: input + 8 / split_pixels.
    """
    channels = channels * UNIT
    number, split, c = image_tile(channels, splits, WIDE, BLOCK_C)
    last = tl.minimum((split + 1) * split_pixels, image)
    mean = tl.zeros((BLOCK_C,), dtype=tl.float32)
    squares = tl.zeros((BLOCK_C,), dtype=tl.float32)
    smallest = tl.full((BLOCK_C,), float("inf"), dtype=tl.float32)
    largest = tl.full((BLOCK_C,), -float("inf"), dtype=tl.float32)
    seen = 0.0
    for first in range(split * split_pixels, last, ROWS):
        place = first + tl.arange(0, ROWS)
        valid = (place < last)[:, None] & (c < channels)[None, :]
        rows = pixel_offset(number * image + place, image, width, input_n * UNIT, input_h * UNIT, input_w * UNIT, FLAT)
        x = tl.load(input + rows[:, None] + c[None, :] * input_c, mask=valid, other=0.0).to(tl.float32)
        count = tl.minimum(last - first, ROWS).to(tl.float32)
        tile_mean, tile_squares = channel_statistics(x, valid, count, BLOCK_C)
        # Chan, Golub and LeVeque 1979: statistics of two sets from those of each.
        away = tile_mean - mean
        together = seen + count
        mean += away * (count / together)
        squares += tile_squares + away * away * (seen * count / together)
        seen = together
        if RANGE:
            smallest = tl.minimum(smallest, tl.min(tl.where(valid, x, float("inf")), axis=0))
            largest = tl.maximum(largest, tl.max(tl.where(valid, x, -float("inf")), axis=0))
    KINDS: tl.constexpr = 4 if RANGE else 2
    row = partial + (number * splits + split) * (KINDS * channels) + c
    tl.store(row, mean, mask=c < channels)
    tl.store(row + channels, squares, mask=c < channels)
    if RANGE:
        tl.store(row + 2 * channels, smallest, mask=c < channels)
        tl.store(row + 3 * channels, largest, mask=c < channels)


@triton.jit(do_not_specialize=ANY_SIZE)
def group_norm_groups_kernel(
    partial, mean, rstd, step, image, channels, groups, splits, split_pixels, eps, most,
    RANGE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """mean, 1 / sqrt(variance + eps) and, if RANGE, max |x_hat| / ``most`` of one group of one image, from ``partial``.

    A program computes one group, in two passes over its partial sums.
    """
    KINDS: tl.constexpr = 4 if RANGE else 2
    group_channels = channels // groups
    program = tl.program_id(0)
    source = (
        partial + (program // groups).to(tl.int64) * splits * (KINDS * channels) + program % groups * group_channels
    )
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for first in range(0, splits * group_channels, BLOCK):
        e = first + tl.arange(0, BLOCK)
        row = e // group_channels * (KINDS * channels) + e % group_channels
        inside = e < splits * group_channels
        count = tl.minimum(image - e // group_channels * split_pixels, split_pixels).to(tl.float32)
        total += tl.where(inside, tl.load(source + row, mask=inside, other=0.0) * count, 0.0)
    elements = image.to(tl.float32) * group_channels
    middle = tl.sum(total, axis=0) / elements
    squares = tl.zeros((BLOCK,), dtype=tl.float32)
    furthest = tl.zeros((BLOCK,), dtype=tl.float32)
    for first in range(0, splits * group_channels, BLOCK):
        e = first + tl.arange(0, BLOCK)
        row = e // group_channels * (KINDS * channels) + e % group_channels
        inside = e < splits * group_channels
        count = tl.minimum(image - e // group_channels * split_pixels, split_pixels).to(tl.float32)
        away = tl.load(source + row, mask=inside, other=0.0) - middle
        own = tl.load(source + channels + row, mask=inside, other=0.0)
        squares += tl.where(inside, own + away * away * count, 0.0)
        if RANGE:
            smallest = tl.load(source + 2 * channels + row, mask=inside, other=0.0)
            largest = tl.load(source + 3 * channels + row, mask=inside, other=0.0)
            furthest = tl.maximum(furthest, tl.where(inside, tl.maximum(middle - smallest, largest - middle), 0.0))
    scale = tl.rsqrt(tl.sum(squares, axis=0) / elements + eps)
    tl.store(mean + program, middle)
    tl.store(rstd + program, scale)
    if RANGE:
        # Of a constant group x_hat is 0 whatever the step: float32's smallest normal number.
        tl.store(step + program, tl.maximum(tl.div_rn(tl.max(furthest, axis=0) * scale, most), 1.1754943508222875e-38))


@triton.jit
def load_per_group(statistics, number, c, channels, group_channels, groups):
    """The statistics (N, groups) of image ``number`` for each channel of ``c``."""
    return tl.load(statistics + number * groups + c // group_channels, mask=c < channels, other=0.0)


@triton.jit
def load_affine(weight, bias, c, channels, BLOCK_C: tl.constexpr):
    """Weight and bias (C,) of channels ``c`` in float32; ones and zeros for None."""
    gain = tl.full((BLOCK_C,), 1.0, dtype=tl.float32)
    offset = tl.zeros((BLOCK_C,), dtype=tl.float32)
    if weight is not None:
        gain = tl.load(weight + c, mask=c < channels, other=0.0).to(tl.float32)
    if bias is not None:
        offset = tl.load(bias + c, mask=c < channels, other=0.0).to(tl.float32)
    return gain, offset


@triton.jit(do_not_specialize=ANY_SIZE)
def group_norm_kernel(
    input, weight, bias, mean, rstd, step, output, codes, image, width, channels, groups, splits, slope,
    input_n, input_h, input_w, input_c, output_n, output_h, output_w, output_c,
    DTYPE: tl.constexpr, ACTIVATION: tl.constexpr, FLAT: tl.constexpr, WIDE: tl.constexpr, UNIT: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """output = f(weight * x_hat + bias), x_hat = (input - mean) * rstd; and ``codes`` = round(x_hat / step), if any.

    A program computes ROWS pixels of one image x BLOCK_C channels. Bytes an element: input + output + a code.
    """
    group_channels = channels * UNIT // groups
    channels = channels * UNIT
    number, split, c = image_tile(channels, splits, WIDE, BLOCK_C)
    place = split * ROWS + tl.arange(0, ROWS)
    valid = (place < image)[:, None] & (c < channels)[None, :]
    pixel = number * image + place
    rows = pixel_offset(pixel, image, width, input_n * UNIT, input_h * UNIT, input_w * UNIT, FLAT)
    x = tl.load(input + rows[:, None] + c[None, :] * input_c, mask=valid, other=0.0).to(tl.float32)
    middle = load_per_group(mean, number, c, channels, group_channels, groups)
    scale = load_per_group(rstd, number, c, channels, group_channels, groups)
    x_hat = (x - middle[None, :]) * scale[None, :]
    rows = pixel_offset(pixel, image, width, output_n * UNIT, output_h * UNIT, output_w * UNIT, FLAT)
    where = rows[:, None] + c[None, :] * output_c
    if codes is not None:
        unit = tl.load(step + number * groups + c // group_channels, mask=c < channels, other=1.0)
        # Adding and taking away 1.5 * 2^23 rounds to the nearest whole number, ties to even, as torch.round does.
        code = tl.div_rn(x_hat, unit[None, :] + tl.zeros_like(x_hat)) + 12582912.0 - 12582912.0
        tl.store(codes + where, code.to(tl.int8), mask=valid)
    gain, offset = load_affine(weight, bias, c, channels, BLOCK_C)
    y = activate(x_hat * gain[None, :] + offset[None, :], slope, ACTIVATION)
    tl.store(output + where, y.to(DTYPE), mask=valid)


@dataclass(frozen=True)
class Cut:
    """How images of ``image`` pixels are cut: tiles of ``rows`` x ``block``, sums over ``split_pixels``.

    Each tile, and each split of a tile's channels, is a program of ``num_warps`` warps.
    """

    image: int
    channels: int
    rows: int
    block: int
    split_pixels: int
    num_warps: int

    @property
    def splits(self) -> int:
        return triton.cdiv(self.image, self.split_pixels)

    def programs(self, images: int, pixels: int) -> tuple[int]:
        """The grid of programs of ``pixels`` pixels of one image and one tile of channels each."""
        return (images * triton.cdiv(self.image, pixels) * triton.cdiv(self.channels, self.block),)


def _shapes(images: int, image: int, channels: int, backward: bool = False) -> Iterator[tuple[int, int, int, int]]:
    """What ``tinytl tune`` tries: other tiles, and sums over as many, twice and half as many pixels."""
    for rows, block, num_warps in tile_candidates(channels):
        rows = power_of_two(image, 1, rows)
        usual = _split_pixels(images, image, channels, rows, block)
        for pixels in (usual, 2 * usual, usual // 2):
            yield rows, block, max(rows, pixels), num_warps


@tunable(_shapes)
def cut_shape(images: int, image: int, channels: int, backward: bool = False) -> tuple[int, int, int, int]:
    """(ROWS, BLOCK_C, pixels of a sum, num_warps) for ``images`` images of ``image`` pixels."""
    block = channel_block(channels)
    rows = power_of_two(image, 1, TILE_ELEMENTS // block)
    return rows, block, _split_pixels(images, image, channels, rows, block), 4


def _split_pixels(images: int, image: int, channels: int, rows: int, block: int) -> int:
    """A large image alone needs many programs; for a batch the fewer partial sums the better."""
    pixels = 512
    while pixels > rows and images * triton.cdiv(image, pixels) * triton.cdiv(channels, block) < _ENOUGH_PROGRAMS:
        pixels //= 2
    return max(rows, pixels)


def cut_images(images: int, image: int, channels: int, backward: bool = False) -> Cut:
    """The :class:`Cut` of ``images`` images of ``image`` pixels."""
    return Cut(image, channels, *cut_shape(images, image, channels, backward))


def image_arguments(tensor: Tensor, unit: int, groups: int) -> dict[str, int]:
    """Kernel arguments ``image``, ``width``, ``channels`` (in units) and ``groups`` of (N, C, H, W)."""
    return dict(
        image=tensor.size(2) * tensor.size(3), width=tensor.size(3), channels=tensor.size(1) // unit, groups=groups
    )


def statistics_into(
    input: Tensor, num_groups: int, eps: float, mean: Tensor, rstd: Tensor, step: Tensor | None
) -> None:
    """mean, rstd and, if asked for, step (N, num_groups) of ``input`` (N, C, H, W), any strides."""
    n, channels, height, width = input.shape
    cut = cut_images(n, height * width, channels)
    flat = is_flat(input)
    unit = stride_unit(channels, flat, input)
    partial = input.new_empty((n, cut.splits, 2 if step is None else 4, channels), dtype=torch.float32)
    sizes = dict(splits=cut.splits, split_pixels=cut.split_pixels)
    start(
        Launch(
            group_norm_statistics_kernel,
            cut.programs(n, cut.split_pixels),
            dict(
                input=input, partial=partial, image=cut.image, width=width, channels=channels // unit, **sizes,
                **stride_arguments("input", input, unit, flat),
            ),
            dict(
                FLAT=flat, WIDE=needs_wide_offsets(input, partial), UNIT=unit, RANGE=step is not None,
                ROWS=cut.rows, BLOCK_C=cut.block,
            ),
            cut.num_warps,
        )
    )  # fmt: skip
    start(
        Launch(
            group_norm_groups_kernel,
            (n * num_groups,),
            dict(
                partial=partial, mean=mean, rstd=rstd, step=step, image=cut.image, channels=channels,
                groups=num_groups, **sizes, eps=float(eps), most=127.0,
            ),
            dict(RANGE=step is not None, BLOCK=BLOCK_SUMS),
        )
    )  # fmt: skip


def normalise_into(
    input: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor, rstd: Tensor, activation: str | None,
    output: Tensor, codes: Tensor | None, step: Tensor | None,
) -> None:  # fmt: skip
    """``output = f(weight * (input - mean) * rstd + bias)`` and, if asked for, ``codes`` in units of ``step``.

    Args:
        input: (N, C, H, W), any strides.
        mean, rstd, step: (N, groups).
        output: like ``input``, written.
        codes: int8 like ``output`` with its strides, written; or None, and ``step`` too.
    """
    n, channels, height, width = input.shape
    cut = cut_images(n, height * width, channels)
    flat = is_flat(input, output)
    unit = stride_unit(channels, flat, input, output)
    start(
        Launch(
            group_norm_kernel,
            cut.programs(n, cut.rows),
            dict(
                input=input, weight=weight, bias=bias, mean=mean, rstd=rstd, step=step, output=output, codes=codes,
                **image_arguments(input, unit, mean.size(1)), splits=triton.cdiv(cut.image, cut.rows),
                slope=LEAKY_SLOPE, **stride_arguments("input", input, unit, flat),
                **stride_arguments("output", output, unit, flat),
            ),
            dict(
                DTYPE=TRITON_DTYPE[output.dtype], ACTIVATION=activation, FLAT=flat,
                WIDE=needs_wide_offsets(input, output), UNIT=unit, ROWS=cut.rows, BLOCK_C=cut.block,
            ),
            cut.num_warps,
        )
    )  # fmt: skip


@on_device
def group_norm_activation(
    input: Tensor, weight: Tensor | None, bias: Tensor | None, num_groups: int, eps: float, activation: str | None,
    needs_codes: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    n, channels, height, width = input.shape
    output = torch.empty_like(input, memory_format=memory_format(input))
    mean, rstd = (input.new_empty((n, num_groups), dtype=torch.float32) for _ in range(2))
    codes = torch.empty_like(output, dtype=torch.int8) if needs_codes else input.new_empty(0, dtype=torch.int8)
    step = torch.empty_like(mean) if needs_codes else mean.new_empty(0)
    for images in chunks(n, chunk_images(n, channels * height * width, input)):
        where = (codes[images], step[images]) if needs_codes else (None, None)
        statistics_into(input[images], num_groups, eps, mean[images], rstd[images], where[1])
        normalise_into(input[images], weight, bias, mean[images], rstd[images], activation, output[images], *where)
    return output, mean, rstd, codes, step


OPERATORS = {"group_norm_activation": group_norm_activation}
