"""How kernels that look at neighbouring pixels cut a (N, C, H, W) tensor: small images of a few channels each."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import triton
import triton.language as tl

from tinytl_kernels.backends.triton.launch import power_of_two

# Pixels of a tile: with 64 channels 16 elements a thread at 8 warps.
_TILE_PIXELS = 64

# Arguments that kernels are not to be specialised on: one compilation serves every image size.
ANY_SIZE = ["height", "width", "out_height", "out_width", "tiles_h", "tiles_w"]


@dataclass(frozen=True)
class Tiles:
    """A cut of images into ``tiles_h`` x ``tiles_w`` x ``channel_tiles`` of ``tile_h`` x ``tile_w`` x ``block_c``."""

    tile_h: int
    tile_w: int
    block_c: int
    tiles_h: int
    tiles_w: int
    channel_tiles: int

    def programs(self, images: int) -> int:
        """Programs for all tiles of ``images``."""
        return images * self.tiles_h * self.tiles_w * self.channel_tiles

    def rows(self, images: int) -> int:
        """Tiles of pixels, whatever the channels: rows of partial sums."""
        return images * self.tiles_h * self.tiles_w

    @property
    def num_warps(self) -> int:
        # At 4 warps a depthwise backward of 64 x 32 spills on sm_80.
        return 8 if self.block_c >= 32 else 4

    @property
    def arguments(self) -> dict[str, int]:
        return dict(tiles_h=self.tiles_h, tiles_w=self.tiles_w)

    @property
    def constants(self) -> dict[str, int]:
        return dict(TILE_H=self.tile_h, TILE_W=self.tile_w, BLOCK_C=self.block_c)


@functools.lru_cache(maxsize=4096)
def cut(
    height: int, width: int, channels: int, stride: tuple[int, int] = (1, 1), extent: tuple[int, int] = (1, 1)
) -> Tiles:
    """The :class:`Tiles` of 64 pixels that read least: whole tiles over (height, width), each with its rim.

    Args:
        stride: pixels read from one pixel of a tile to the next.
        extent: pixels that a window spans.
    """

    def pixels_read(shape: tuple[int, int]) -> int:
        read = 1
        for length, tile, step, span in zip((height, width), shape, stride, extent, strict=True):
            read *= triton.cdiv(length, tile) * ((tile - 1) * step + span)
        return read

    tile_h, tile_w = min(((_TILE_PIXELS >> k, 1 << k) for k in range(7)), key=pixels_read)
    block = channel_block(channels)
    return Tiles(
        tile_h, tile_w, block,
        triton.cdiv(height, tile_h), triton.cdiv(width, tile_w), triton.cdiv(channels, block),
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
