"""How kernels that look at neighbouring pixels cut a (N, C, H, W) tensor: small images of a few channels each."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from tinytl_kernels.backends.triton.configurations import tunable
from tinytl_kernels.backends.triton.launch import power_of_two

# Pixels of a tile: with 64 channels 16 elements a thread at 8 warps.
_TILE_PIXELS = 64

# Arguments that kernels are not to be specialised on: one compilation serves every image size.
ANY_SIZE = ["height", "width", "out_height", "out_width", "tiles_h", "tiles_w"]


@dataclass(frozen=True)
class Tiles:
    """A cut of images into ``tiles_h`` x ``tiles_w`` x ``channel_tiles`` of ``tile_h`` x ``tile_w`` x ``block_c``.

    Each tile is a program of ``num_warps`` warps.
    """

    tile_h: int
    tile_w: int
    block_c: int
    tiles_h: int
    tiles_w: int
    channel_tiles: int
    num_warps: int

    def programs(self, images: int) -> int:
        """Programs for all tiles of ``images``."""
        return images * self.tiles_h * self.tiles_w * self.channel_tiles

    def rows(self, images: int) -> int:
        """Tiles of pixels, whatever the channels: rows of partial sums."""
        return images * self.tiles_h * self.tiles_w

    @property
    def arguments(self) -> dict[str, int]:
        return dict(tiles_h=self.tiles_h, tiles_w=self.tiles_w)

    @property
    def constants(self) -> dict[str, int]:
        return dict(TILE_H=self.tile_h, TILE_W=self.tile_w, BLOCK_C=self.block_c)


def _shapes(
    height: int, width: int, channels: int, stride: tuple[int, int], extent: tuple[int, int], dtype: torch.dtype | None
) -> list[tuple[int, int, int, int]]:
    """What ``tinytl tune`` tries: the best shapes of 32, 64 and 128 pixels, fewer and more channels, 4 and 8 warps."""
    widest = power_of_two(channels, 8, 128)
    blocks = [widest >> k for k in range(3) if widest >> k >= min(16, widest)]
    return [
        (*shape, block, num_warps)
        for pixels in (_TILE_PIXELS // 2, _TILE_PIXELS, 2 * _TILE_PIXELS)
        for shape in _by_pixels_read(pixels, height, width, stride, extent)[: 2 if pixels == _TILE_PIXELS else 1]
        for block in blocks
        for num_warps in (4, 8)
        # 8 to 64 elements a thread: fewer are all addresses, more are spilled.
        if 8 <= pixels * block // (32 * num_warps) <= 64
    ]


@tunable(_shapes)
def tile_shape(
    height: int, width: int, channels: int, stride: tuple[int, int], extent: tuple[int, int], dtype: torch.dtype | None
) -> tuple[int, int, int, int]:
    """(tile_h, tile_w, block_c, num_warps): 64 pixels that read least, channels by :func:`channel_block`."""
    block = channel_block(channels)
    # At 4 warps a depthwise backward of 64 x 32 spills on sm_80.
    return (*_by_pixels_read(_TILE_PIXELS, height, width, stride, extent)[0], block, 8 if block >= 32 else 4)


def _by_pixels_read(
    pixels: int, height: int, width: int, stride: tuple[int, int], extent: tuple[int, int]
) -> list[tuple[int, int]]:
    """All (tile_h, tile_w) of so many pixels; first those that read least: whole tiles, each with its rim."""

    def pixels_read(shape: tuple[int, int]) -> int:
        read = 1
        for length, tile, step, span in zip((height, width), shape, stride, extent, strict=True):
            read *= triton.cdiv(length, tile) * ((tile - 1) * step + span)
        return read

    return sorted(((pixels >> k, 1 << k) for k in range(pixels.bit_length())), key=pixels_read)


def cut(
    height: int, width: int, channels: int, stride: tuple[int, int] = (1, 1), extent: tuple[int, int] = (1, 1),
    dtype: torch.dtype | None = None,
) -> Tiles:  # fmt: skip
    """The :class:`Tiles` of a (height, width, channels) image.

    Args:
        stride: pixels read from one pixel of a tile to the next.
        extent: pixels that a window spans.
        dtype: of the tensors, where it makes a difference to what is fastest.
    """
    tile_h, tile_w, block, num_warps = tile_shape(height, width, channels, stride, extent, dtype)
    return Tiles(
        tile_h, tile_w, block,
        triton.cdiv(height, tile_h), triton.cdiv(width, tile_w), triton.cdiv(channels, block), num_warps,
    )  # fmt: skip


def channel_block(channels: int) -> int:
    """Channels of a tile: up to 64, fewer where the last tile would be mostly empty."""
    widest = power_of_two(channels, 8, 64)

    def cost(block: int) -> tuple[float, int]:
        # A narrow tile has to save an eighth of the work to make up for its shorter rows.
        return triton.cdiv(channels, block) * block * (1 + 0.125 * (block < 64) + 0.125 * (block < 32)), -block

    return min((widest >> k for k in range(3) if widest >> k >= min(16, widest)), key=cost)


@triton.jit
def tile_place(program, channel_tiles, tiles_h, tiles_w):
    """(channel tile, tile column, tile row, image) of a program; channels of a tile of pixels follow each other."""
    channel_tile = program % channel_tiles
    pixel_tile = program // channel_tiles
    return channel_tile, pixel_tile % tiles_w, pixel_tile // tiles_w % tiles_h, pixel_tile // tiles_w // tiles_h


@triton.jit
def tile_coordinates(
    program, channels, tiles_h, tiles_w,
    WIDE: tl.constexpr, TILE_H: tl.constexpr, TILE_W: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """(image, rows, columns, first channel): where a program's tile lies; rows and columns are (TILE_H * TILE_W,).

    All in 64 bits if WIDE, and so is every offset computed from them.
    """
    channel_tile, tile_w, tile_h, image = tile_place(program, tl.cdiv(channels, BLOCK_C), tiles_h, tiles_w)
    place = tl.arange(0, TILE_H * TILE_W)
    if WIDE:  # one image may exceed 32 bits too, by its rows or by its channels
        image = image.to(tl.int64)
        channel_tile = channel_tile.to(tl.int64)
        place = place.to(tl.int64)
    return image, tile_h * TILE_H + place // TILE_W, tile_w * TILE_W + place % TILE_W, channel_tile * BLOCK_C
