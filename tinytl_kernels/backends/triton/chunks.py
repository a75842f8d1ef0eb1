"""Chunks of a batch that fit the L2 cache, so that what one kernel leaves there the next one finds."""

from __future__ import annotations

from torch import Tensor

from tinytl_kernels.backends.triton.launch import l2_bytes


def chunk_images(images: int, elements: int, like: Tensor) -> int:
    """Images of a chunk, at least one: so many that ``elements`` of each, of the dtype of ``like``, fit half of L2.

    The other half is for what passes through.
    """
    fit = l2_bytes(like.device) // 2 // max(1, elements * like.element_size())
    return min(max(1, fit), max(1, images))


def chunks(images: int, step: int) -> list[slice]:
    """The batch in slices of ``step`` images."""
    return [slice(start, min(images, start + step)) for start in range(0, images, step)]
