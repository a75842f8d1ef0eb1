"""Means, variances and means of gradients over many pixels, from what each tile of a product knows of its own.

A product leaves one partial result a tile and channel; a second kernel puts them together in a fixed order. A norm's
statistics are of a channel over the whole batch (BatchNorm) or of a group of channels over one image (GroupNorm): tiles
stay within a *span* of pixels, the batch or an image.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from tinytl_kernels.backends.triton.group_norm import BLOCK_SUMS
from tinytl_kernels.backends.triton.launch import Launch, start

# Arguments that kernels are not to be specialised on: one compilation serves every batch and image size.
ANY_SIZE = ["span", "splits", "tiles", "image", "width", "channel_run"]


@dataclass(frozen=True)
class Spans:
    """Pixels cut into ``count`` spans of ``pixels`` each, and these into ``splits`` tiles of ``rows``."""

    count: int
    pixels: int
    rows: int

    @staticmethod
    def of(images: int, image: int, rows: int, per_image: bool) -> Spans:
        """Of ``images`` images of ``image`` pixels: each a span, or all of them one."""
        return Spans(images, image, rows) if per_image else Spans(1, images * image, rows)

    @property
    def splits(self) -> int:
        return triton.cdiv(self.pixels, self.rows)

    @property
    def tiles(self) -> int:
        return self.count * self.splits

    @property
    def arguments(self) -> dict[str, int]:
        return dict(span=self.pixels, splits=self.splits, tiles=self.tiles)

    def partial(self, channels: int, like: Tensor) -> Tensor:
        """Room for two numbers a channel and tile, (2, C, tiles) float32: what is put together lies together."""
        return like.new_empty((2, channels, self.tiles), dtype=torch.float32)


@triton.jit
def tile_pixels(tile, span, splits, ROWS: tl.constexpr, WIDE: tl.constexpr):
    """(span, pixels (ROWS,), which of them are inside) of a tile."""
    number = tile // splits
    place = tile % splits * ROWS + tl.arange(0, ROWS)
    if WIDE:
        number, place = number.to(tl.int64), place.to(tl.int64)
    return number, number * span + place, place < span


@triton.jit
def tile_count(tile, span, splits, ROWS: tl.constexpr):
    """How many pixels of a tile are inside, in float32."""
    return tl.minimum(span - tile % splits * ROWS, ROWS).to(tl.float32)


@triton.jit
def store_partial(first, second, partial, tile, tiles, c, channels, inside):
    """Two numbers a channel of a tile. Each is alone in its sector, and they are few beside the tile's elements."""
    where = partial + c.to(tl.int64) * tiles + tile
    tl.store(where, first, mask=inside)
    tl.store(where + tiles.to(tl.int64) * channels, second, mask=inside)


@triton.jit
def store_statistics(
    x, valid, partial, tile, span, splits, tiles, c, channels, inside, ROWS: tl.constexpr
):  # fmt: skip
    """Mean and squared differences from it of each channel of a float32 tile, which is 0 where not ``valid``.

    What the differences themselves add up to says how far the mean was rounded (Chan, Golub and LeVeque 1983, the
    corrected two-pass algorithm): the distances between the tiles' means count as much as what is within them.
    """
    count = tile_count(tile, span, splits, ROWS)
    mean = tl.sum(x, axis=0) / count
    difference = tl.where(valid, x - mean[None, :], 0.0)
    off = tl.sum(difference, axis=0) / count
    squares = tl.sum(difference * difference, axis=0) - off * off * count
    mean += off
    store_partial(mean, squares, partial, tile, tiles, c, channels, inside)


@triton.jit
def run_start(partial, groups, group_channels, splits, tiles):
    """(first channel, address) of the partial results of this program's channel, or of its group of one image."""
    program = tl.program_id(0)
    first_channel = program % groups * group_channels
    return first_channel, partial + first_channel.to(tl.int64) * tiles + program // groups * splits


@triton.jit(do_not_specialize=ANY_SIZE)
def merge_statistics_kernel(
    partial, statistics, channels, groups, group_channels, span, splits, tiles, channel_run, elements,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Mean and biased variance of one channel, or of one group of channels of one image, from partial results.

    ``channel_run`` results are of each channel. Two passes: the mean of means, then the squares of all tiles about it
    (Chan, Golub and LeVeque 1979), corrected as a tile's are.
    """
    program, programs = tl.program_id(0), tl.num_programs(0)
    _, means = run_start(partial, groups, group_channels, splits, tiles)
    squares = means + tiles.to(tl.int64) * channels
    run = group_channels * channel_run
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for first in range(0, run, BLOCK):
        e = first + tl.arange(0, BLOCK)
        inside = e < run
        where = e // channel_run * tiles + e % channel_run
        # The first tile of an image's run is the first of its image.
        count = tile_count(e % channel_run, span, splits, ROWS)
        total += tl.where(inside, tl.load(means + where, mask=inside, other=0.0) * count, 0.0)
    mean = tl.sum(total, axis=0) / elements
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    off = tl.zeros((BLOCK,), dtype=tl.float32)
    for first in range(0, run, BLOCK):
        e = first + tl.arange(0, BLOCK)
        inside = e < run
        where = e // channel_run * tiles + e % channel_run
        count = tile_count(e % channel_run, span, splits, ROWS)
        away = tl.load(means + where, mask=inside, other=0.0) - mean
        own = tl.load(squares + where, mask=inside, other=0.0)
        total += tl.where(inside, own + away * away * count, 0.0)
        off += tl.where(inside, away * count, 0.0)
    rounding = tl.sum(off, axis=0) / elements
    tl.store(statistics + program, mean + rounding)
    tl.store(statistics + programs + program, tl.sum(total, axis=0) / elements - rounding * rounding)


@triton.jit(do_not_specialize=ANY_SIZE)
def merge_sums_kernel(
    partial, weight, means, sums, channels, groups, group_channels, splits, tiles, channel_run, elements,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """E[weight g] and E[weight g x_hat] of one channel, or of one group of channels of one image, from partial sums.

    Also the sums themselves, ``sums`` (2, C), where a program has all of its channel.
    """
    program, programs = tl.program_id(0), tl.num_programs(0)
    first_channel, of_g = run_start(partial, groups, group_channels, splits, tiles)
    of_product = of_g + tiles.to(tl.int64) * channels
    run = group_channels * channel_run
    g_total = tl.zeros((BLOCK,), dtype=tl.float32)
    product_total = tl.zeros((BLOCK,), dtype=tl.float32)
    g_mean = tl.zeros((BLOCK,), dtype=tl.float32)
    product_mean = tl.zeros((BLOCK,), dtype=tl.float32)
    for first in range(0, run, BLOCK):
        e = first + tl.arange(0, BLOCK)
        inside = e < run
        where = e // channel_run * tiles + e % channel_run
        g = tl.load(of_g + where, mask=inside, other=0.0)
        product = tl.load(of_product + where, mask=inside, other=0.0)
        g_total += g
        product_total += product
        if weight is not None:
            gain = tl.load(weight + first_channel + e // channel_run, mask=inside, other=0.0).to(tl.float32)
            g *= gain
            product *= gain
        g_mean += g
        product_mean += product
    if means is not None:
        tl.store(means + program, tl.sum(g_mean, axis=0) / elements)
        tl.store(means + programs + program, tl.sum(product_mean, axis=0) / elements)
    if sums is not None:
        tl.store(sums + program, tl.sum(g_total, axis=0))
        tl.store(sums + programs + program, tl.sum(product_total, axis=0))


def _run_arguments(partial: Tensor, spans: Spans, groups: int) -> tuple[int, dict[str, int | float]]:
    """Programs, one for each channel or group of an image; and the arguments that say what is a program's."""
    channels, tiles = partial.shape[1:]
    if groups:
        own = dict(groups=groups, group_channels=channels // groups, channel_run=spans.splits)
        elements = spans.pixels * (channels // groups)
    else:
        own, elements = dict(groups=channels, group_channels=1, channel_run=tiles), spans.count * spans.pixels
    return (
        spans.count * groups or channels,
        dict(channels=channels, splits=spans.splits, tiles=tiles, elements=float(elements), **own),
    )


def merge_statistics(partial: Tensor, spans: Spans, groups: int) -> Tensor:
    """Mean and biased variance from what :func:`store_statistics` left in ``partial``.

    Args:
        partial: (2, C, tiles) float32.
        spans: images, where there are groups.
        groups: of a GroupNorm, or 0 for statistics of each channel.

    Returns:
        (2, C), or (2, N * groups), float32.
    """
    programs, own = _run_arguments(partial, spans, groups)
    statistics = partial.new_empty((2, programs))
    start(
        Launch(
            merge_statistics_kernel,
            (programs,),
            dict(partial=partial, statistics=statistics, span=spans.pixels, **own),
            dict(ROWS=spans.rows, BLOCK=BLOCK_SUMS),
        )
    )
    return statistics


def merge_sums(
    partial: Tensor, spans: Spans, weight: Tensor | None, groups: int, need_means: bool, need_sums: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Means of weighted gradients, (2, C) or (2, N * groups), and sums of each channel, (2, C), from partial sums.

    What is not needed is None. Arguments as in :func:`merge_statistics`; ``weight`` (C,) is the norm's.
    """
    programs, own = _run_arguments(partial, spans, groups)
    means = partial.new_empty((2, programs)) if need_means else None
    sums = None
    if need_sums:
        # A GroupNorm's weight and bias are shared by all images, and no program has all of a channel.
        sums = partial.sum(2) if groups else partial.new_empty((2, partial.size(1)))
    if need_means or (need_sums and not groups):
        start(
            Launch(
                merge_sums_kernel,
                (programs,),
                dict(partial=partial, weight=weight, means=means, sums=None if groups else sums, **own),
                dict(BLOCK=BLOCK_SUMS),
            )
        )
    return means, sums
