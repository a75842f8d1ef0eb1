"""Bit masks: which bit is whose, and that packing and unpacking are inverse for any shape and slab."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tinytl_kernels.backends.reference import bitmask, slabs
from tinytl_kernels.core.activations import mask_size

SIZES = st.lists(st.integers(1, 10), min_size=1, max_size=5).map(tuple)


@given(size=SIZES, seed=st.integers(0, 2**31))
@settings(max_examples=60, deadline=None)
def test_unpacking_gives_back_what_was_packed(size, seed):
    bits = torch.rand(size, generator=torch.Generator().manual_seed(seed)) < 0.5
    packed = bitmask.pack_bits(bits)
    assert packed.dtype == torch.uint8
    assert packed.shape == (*size[:-1], (size[-1] + 7) // 8)
    assert torch.equal(bitmask.unpack_bits(packed, size[-1]), bits)


@given(size=SIZES, slab=st.integers(1, 200), channels_last=st.booleans(), seed=st.integers(0, 2**31))
@settings(max_examples=60, deadline=None)
def test_slabs_of_any_size_cover_everything_once(size, slab, channels_last, seed):
    values = torch.randn(size, generator=torch.Generator().manual_seed(seed))
    if len(size) == 4 and channels_last:
        values = values.contiguous(memory_format=torch.channels_last)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(slabs, "SLAB_ELEMENTS", slab)
        mask = bitmask.pack_where(lambda x: x > 0, values)
        seen = torch.zeros_like(values)
        bitmask.combine_with_bits(lambda bits, x: torch.where(bits, x, 0.0), values, mask, out=seen)
    assert mask.shape == mask_size(size)
    assert torch.equal(seen, values.clamp_min(0))


@pytest.mark.parametrize("channels", [1, 7, 8, 9, 64, 65])
def test_bit_k_of_byte_j_is_channel_8j_plus_k(channels):
    for channel in range(channels):
        bits = torch.zeros(channels, dtype=torch.bool)
        bits[channel] = True
        expected = [0] * ((channels + 7) // 8)
        expected[channel // 8] = 1 << (channel % 8)
        assert bitmask.pack_bits(bits).tolist() == expected


def test_bits_beyond_the_last_channel_are_zero():
    assert bitmask.pack_bits(torch.ones(2, 11, dtype=torch.bool)).tolist() == [[255, 7], [255, 7]]


def test_every_byte_unpacks():
    every = torch.arange(256, dtype=torch.uint8).view(256, 1)
    unpacked = bitmask.unpack_bits(every, 8)
    assert torch.equal(unpacked, torch.tensor([[bool(b >> k & 1) for k in range(8)] for b in range(256)]))


def test_images_are_packed_channels_last_whatever_their_layout():
    values = torch.randn(2, 13, 5, 4)
    a = bitmask.pack_where(lambda x: x > 0, values)
    b = bitmask.pack_where(lambda x: x > 0, values.contiguous(memory_format=torch.channels_last))
    assert torch.equal(a, b)
    assert torch.equal(bitmask.unpack_bits(a, 13), (values > 0).permute(0, 2, 3, 1))


@given(size=st.tuples(*[st.integers(0, 9)] * 4), elements=st.integers(1, 400))
@settings(max_examples=60, deadline=None)
def test_row_bands_cover_every_row_of_every_image_once(size, elements):
    seen = torch.zeros(size[0], size[2], dtype=torch.int64)
    for images, rows in slabs.row_bands(size, elements):
        seen[images, rows] += 1
    assert bool((seen == (1 if size[1] * size[3] else 0)).all())
