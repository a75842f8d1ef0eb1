"""Facts about shapes and strides that launches rest on."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from tinytl_kernels.backends.triton.launch import (
    Launch,
    alignment,
    dot_precision,
    last_offset,
    needs_wide_offsets,
    pixel_stride,
    record,
    start,
)
from tinytl_kernels.backends.triton.tiles import channel_block, cut


def channels_last(*size):
    return torch.empty(size).contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(
    ("tensor", "expected"),
    [
        (channels_last(2, 5, 4, 3), 5),
        (torch.empty(2, 5, 4, 3), None),  # images do not follow each other pixel by pixel
        (torch.empty(1, 5, 4, 3), 1),
        (channels_last(2, 5, 4, 6)[:, :, ::2, ::2], None),
        (channels_last(2, 5, 4, 1), 5),  # a width of 1: its stride says nothing
        (channels_last(2, 5, 1, 1), 5),
        (torch.empty(2, 5, 1, 1).expand(2, 5, 4, 3), None),
        (torch.empty(1, 5, 1, 1).expand(1, 5, 4, 3), 0),
    ],
)
def test_pixel_stride(tensor, expected):
    step = pixel_stride(tensor)
    assert step == expected
    if step is not None:
        n, _, h, w = tensor.shape
        offsets = [i * tensor.stride(0) + j * tensor.stride(2) + k * tensor.stride(3)
                   for i in range(n) for j in range(h) for k in range(w)]  # fmt: skip
        assert offsets == [p * step for p in range(n * h * w)]


def test_alignment_is_the_largest_power_of_two_up_to_16():
    assert [alignment(n) for n in (1, 24, 40, 144, 1000, 96, 0)] == [1, 8, 8, 16, 8, 16, 16]
    assert alignment(144, 24) == 8


def test_offsets_are_wide_before_the_last_one_overflows():
    small = torch.empty((1, 8, 4, 4), device="meta")
    assert not needs_wide_offsets(small, None)
    large = torch.empty((128, 1024, 128, 128), device="meta")  # 2^31 elements
    assert last_offset(large) == 2**31 - 1
    assert needs_wide_offsets(small, large)
    # A view of few elements that lie far apart.
    assert needs_wide_offsets(torch.empty((2, 8, 4, 4), device="meta").as_strided((2, 8, 4, 4), (2**31, 16, 4, 1)))


def test_tiles_cover_every_pixel_and_channel():
    for height, width, channels in [(1, 1, 3), (7, 7, 960), (14, 14, 24), (112, 112, 32), (3, 200, 8)]:
        tiles = cut(height, width, channels, (2, 2), (3, 3))
        assert tiles.tile_h * tiles.tile_w == 64
        assert tiles.tiles_h * tiles.tile_h >= height
        assert tiles.tiles_w * tiles.tile_w >= width
        assert tiles.channel_tiles * tiles.block_c >= channels
        assert tiles.block_c % 8 == 0  # a byte of a mask belongs to one program


@pytest.mark.parametrize(("channels", "expected"), [(3, 8), (32, 32), (64, 64), (96, 32), (144, 32), (960, 64)])
def test_channel_blocks_are_wide_but_not_mostly_empty(channels, expected):
    assert channel_block(channels) == expected


def test_record_collects_and_starts_nothing():
    launch = Launch(kernel=None, grid=(3,), arguments={}, constants={})
    with record() as launches:
        start(launch)
        start(Launch(kernel=None, grid=(0,), arguments={}, constants={}))
        with pytest.raises(RuntimeError, match="nested"), record():
            pass
    assert launches == [launch]


def test_tf32_only_where_pytorch_allows_it_for_convolutions(monkeypatch):
    monkeypatch.setattr(torch.version, "hip", None)
    before = torch.backends.cudnn.allow_tf32
    try:
        torch.backends.cudnn.allow_tf32 = False
        assert dot_precision(torch.float32) == "ieee"
        torch.backends.cudnn.allow_tf32 = True
        assert dot_precision(torch.float32) == "tf32"
        monkeypatch.setattr(torch.version, "hip", "6.0")
        assert dot_precision(torch.float32) == "ieee"
    finally:
        torch.backends.cudnn.allow_tf32 = before
