"""Bit masks in ATen: eight booleans of neighbouring channels in one byte, channel 8j + k in bit k of byte j.

Both directions treat eight bytes as one little-endian 64-bit integer and are a handful of vectorised passes.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from tinytl_kernels.backends.reference.slabs import channels_last_view, row_slabs
from tinytl_kernels.core.activations import mask_size

# sum over j = 1..8 of 2^(7j): multiplying by it moves bit 0 of byte k to bit 56 + k, without a carry on the way.
_GATHER = 0x0102040810204080
# One in every byte, and bit k alone in byte k (as a signed number).
_EVERY_BYTE = 0x0101010101010101
_BIT_K_OF_BYTE_K = 0x8040201008040201 - (1 << 64)


def pack_bits(bits: Tensor) -> Tensor:
    """Pack (..., C) booleans into (..., ceil(C / 8)) uint8; the missing channels of the last byte are 0."""
    channels = bits.size(-1)
    if channels % 8:
        bits = F.pad(bits, (0, 8 - channels % 8))
    # Flat, because a dimension of size 1 may carry a stride that forbids the view.
    words = bits.reshape(-1).view(torch.uint8).view(torch.int64)
    return ((words * _GATHER) >> 56).to(torch.uint8).view(*bits.shape[:-1], -1)


def unpack_bits(mask: Tensor, channels: int) -> Tensor:
    """Unpack (..., ceil(C / 8)) uint8 into (..., C) booleans."""
    words = mask.reshape(-1).to(torch.int64).mul_(_EVERY_BYTE).bitwise_and_(_BIT_K_OF_BYTE_K)
    return (words.view(torch.uint8) != 0).view(*mask.shape[:-1], -1)[..., :channels]


def pack_where(predicate: Callable[[Tensor], Tensor], values: Tensor) -> Tensor:
    """The bit mask of ``predicate(values)``, slab by slab. ``values`` (N, C, H, W) or (..., C)."""
    mask = values.new_empty(mask_size(values.shape), dtype=torch.uint8)
    if values.dim() == 0:
        return mask.copy_(predicate(values))
    rows = channels_last_view(values)
    for slab in row_slabs(rows):
        mask[slab] = pack_bits(predicate(rows[slab]))
    return mask


def combine_with_bits(combine: Callable[[Tensor, Tensor], Tensor], values: Tensor, mask: Tensor, out: Tensor) -> Tensor:
    """``out = combine(bits, values)`` slab by slab, where ``bits`` are the unpacked booleans of ``mask``.

    ``out`` may be ``values`` itself.
    """
    if values.dim() == 0:
        return out.copy_(combine(mask[0] != 0, values))
    rows, out_rows = channels_last_view(values), channels_last_view(out)
    for slab in row_slabs(rows):
        bits = unpack_bits(mask[slab], rows.size(-1))
        out_rows[slab] = combine(bits, rows[slab])
    return out
