"""Bit masks inside kernels: eight booleans of neighbouring channels in one byte, channel 8j + k in bit k of byte j."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def pack_bits(bits, ROWS: tl.constexpr, CHANNELS: tl.constexpr):
    """(ROWS, CHANNELS) booleans -> (ROWS, CHANNELS / 8) uint8. The eight lie in one thread's registers."""
    octets = tl.reshape(bits.to(tl.int32), (ROWS, CHANNELS // 8, 8))
    place = tl.arange(0, 8)[None, None, :]
    return tl.sum(octets << place, axis=2).to(tl.uint8)


@triton.jit
def unpack_bits(packed, ROWS: tl.constexpr, CHANNELS: tl.constexpr):
    """(ROWS, CHANNELS / 8) uint8 -> (ROWS, CHANNELS) booleans. A byte is loaded once for its eight channels."""
    place = tl.arange(0, 8)[None, None, :]
    octets = (packed.to(tl.int32)[:, :, None] >> place) & 1
    return tl.reshape(octets, (ROWS, CHANNELS)) != 0


@triton.jit
def mask_place(pixel, inside, first_channel, channels, mask_channels, CHANNELS: tl.constexpr):
    """(offsets, where they are valid), both (ROWS, CHANNELS / 8), of a tile's bytes in a mask.

    ``channels`` is where the tile's channels end at the latest; ``mask_channels``, how many a pixel of the mask has if
    that is more: a tile of one group of several. ``first_channel`` is a multiple of 8.
    """
    end = (channels + 7) // 8
    if mask_channels is None:
        row_bytes = end
    else:
        row_bytes = (mask_channels + 7) // 8
    byte = first_channel // 8 + tl.arange(0, CHANNELS // 8)
    return pixel[:, None] * row_bytes + byte[None, :], inside[:, None] & (byte < end)[None, :]


@triton.jit
def load_bits(
    mask, pixel, inside, first_channel, channels, ROWS: tl.constexpr, CHANNELS: tl.constexpr, mask_channels=None
):
    """Booleans (ROWS, CHANNELS) of ``mask`` at the flat indices ``pixel`` (ROWS,), where ``inside``; 0 elsewhere.

    ``mask`` is uint8 (pixels, ceil(channels / 8)); see :func:`mask_place`.
    """
    offset, valid = mask_place(pixel, inside, first_channel, channels, mask_channels, CHANNELS)
    return unpack_bits(tl.load(mask + offset, mask=valid, other=0), ROWS, CHANNELS)


@triton.jit
def store_bits(
    mask, bits, pixel, inside, first_channel, channels, ROWS: tl.constexpr, CHANNELS: tl.constexpr, mask_channels=None
):
    """The opposite of :func:`load_bits`. ``bits`` beyond the last channel must be 0."""
    offset, valid = mask_place(pixel, inside, first_channel, channels, mask_channels, CHANNELS)
    tl.store(mask + offset, pack_bits(bits, ROWS, CHANNELS), mask=valid)
