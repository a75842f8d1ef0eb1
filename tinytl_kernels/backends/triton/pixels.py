"""How kernels that look at no neighbours cut a (N, C, H, W) tensor: pixels of the batch or of one image, x channels."""

from __future__ import annotations

from collections.abc import Iterator

import triton
import triton.language as tl
from torch import Tensor

from tinytl_kernels.backends.triton.configurations import tunable
from tinytl_kernels.backends.triton.launch import power_of_two

# Elements of a tile: 32 a thread at 4 warps.
TILE_ELEMENTS = 4096

# Arguments that kernels are not to be specialised on: one compilation serves every batch and image size.
ANY_SIZE = ["pixels", "image", "width"]


def channel_block(channels: int) -> int:
    """Channels of a tile: up to 128, half as many where the last tile would be emptier."""
    block = power_of_two(channels, 8, 128)
    if channels % block:  # 144 channels in three tiles of 64 rather than two of 128
        block = min((block, max(8, block // 2)), key=lambda b: (triton.cdiv(channels, b) * b, -b))
    return block


def tile_candidates(channels: int) -> Iterator[tuple[int, int, int]]:
    """(ROWS, BLOCK_C, num_warps) of every tile that ``tinytl tune`` may try: 8 to 32 elements a thread."""
    widest = power_of_two(channels, 8, 256)
    for elements in (TILE_ELEMENTS // 2, TILE_ELEMENTS, 2 * TILE_ELEMENTS):
        for block in dict.fromkeys((widest, max(8, widest // 2), max(8, widest // 4))):
            for num_warps in (4, 8):
                if 8 <= elements // (32 * num_warps) <= 32:
                    yield elements // block, block, num_warps


def _sizes(channels: int, backward: bool = False) -> Iterator[tuple[int, int, int]]:
    """What ``tinytl tune`` tries."""
    return tile_candidates(channels)


@tunable(_sizes)
def tile_sizes(channels: int, backward: bool = False) -> tuple[int, int, int]:
    """(ROWS, BLOCK_C, num_warps) of a tile of any pixels, by the number of channels.

    Not by pixels: who makes room for partial sums knows them before the last chunk of a batch is cut.
    """
    block = channel_block(channels)
    return TILE_ELEMENTS // block, block, 4


def pixel_arguments(tensor: Tensor, unit: int) -> dict[str, int]:
    """Kernel arguments ``pixels``, ``image``, ``width`` and ``channels`` (in units) of (N, C, H, W)."""
    n, channels, height, width = tensor.shape
    return dict(pixels=n * height * width, image=height * width, width=width, channels=channels // unit)


@triton.jit
def pixel_tile(channels, WIDE: tl.constexpr, ROWS: tl.constexpr, BLOCK_C: tl.constexpr):
    """(tile of pixels, its pixels (ROWS,), first channel, channels (BLOCK_C,)) of this program.

    Channels of a tile of pixels follow each other. All but the first channel are in 64 bits if WIDE, and so is every
    offset computed from them.
    """
    channel_tiles = tl.cdiv(channels, BLOCK_C)
    first_channel = tl.program_id(0) % channel_tiles * BLOCK_C
    tile = tl.program_id(0) // channel_tiles
    pixel = tile * ROWS + tl.arange(0, ROWS)
    c = first_channel + tl.arange(0, BLOCK_C)
    if WIDE:
        tile, pixel, c = tile.to(tl.int64), pixel.to(tl.int64), c.to(tl.int64)
    return tile, pixel, first_channel, c


@triton.jit
def image_tile(channels, splits, WIDE: tl.constexpr, BLOCK_C: tl.constexpr):
    """(image, which of the ``splits`` of its pixels, channels (BLOCK_C,)) of this program.

    Image and channels are in 64 bits if WIDE.
    """
    channel_tiles = tl.cdiv(channels, BLOCK_C)
    program = tl.program_id(0)
    image = program // channel_tiles // splits
    c = program % channel_tiles * BLOCK_C + tl.arange(0, BLOCK_C)
    if WIDE:
        image, c = image.to(tl.int64), c.to(tl.int64)
    return image, program // channel_tiles % splits, c
