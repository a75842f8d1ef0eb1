"""Chunks of a batch."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from tinytl_kernels.backends.triton import chunks


def test_a_chunk_is_bounded_by_half_of_the_cache(monkeypatch):
    monkeypatch.setattr(chunks, "l2_bytes", lambda device: 1000)
    like = torch.empty(0, dtype=torch.float16)
    assert chunks.chunk_images(128, 50, like) == 5  # 500 bytes, 100 an image
    assert chunks.chunk_images(3, 50, like) == 3
    assert chunks.chunk_images(128, 1000, like) == 1
    assert chunks.chunk_images(0, 50, like) == 1


def test_chunks_are_the_batch():
    assert chunks.chunks(5, 2) == [slice(0, 2), slice(2, 4), slice(4, 5)]
    assert chunks.chunks(0, 2) == []
