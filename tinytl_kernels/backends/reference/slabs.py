"""Work on a large tensor piece by piece, so that no temporary is as large as the tensor."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

# Elements in one slab of a bit mask's packing or unpacking: its temporaries take a few bytes an element, so about
# 1 MB, which stays in a core's cache.
SLAB_ELEMENTS = 1 << 18

# Bytes of activations in one chunk of images: large enough to keep the cores (or the GPU) busy.
CHUNK_BYTES = {"cpu": 4 << 20}
CHUNK_BYTES_ELSEWHERE = 64 << 20


def channels_last_view(tensor: Tensor) -> Tensor:
    """(N, C, H, W) seen as (N, H, W, C); other shapes as they are. Never a copy."""
    return tensor.permute(0, 2, 3, 1) if tensor.dim() == 4 else tensor


def row_slabs(tensor: Tensor) -> Iterator[tuple[slice, ...]]:
    """Indices that cut a channels-last view into slabs of at most about ``SLAB_ELEMENTS``, along all dims but the last.

    The last dimension, the channels that share bytes, is never cut.
    """
    if tensor.numel() == 0:
        return
    if tensor.dim() < 2 or tensor.numel() <= SLAB_ELEMENTS:
        yield (slice(None),) * min(1, tensor.dim())
        return
    row_elements = tensor.numel() // tensor.size(0)
    if row_elements <= SLAB_ELEMENTS or tensor.dim() == 2:
        step = max(1, SLAB_ELEMENTS // row_elements)
        for start in range(0, tensor.size(0), step):
            yield (slice(start, start + step),)
        return
    for row in range(tensor.size(0)):
        for slab in row_slabs(tensor[row]):
            yield (slice(row, row + 1), *slab)


def row_bands(size, elements: int) -> Iterator[tuple[slice, slice]]:
    """(images, rows) that cut an (N, C, H, W) of ``size`` into bands of whole rows, about ``elements`` each."""
    n, c, height, width = size
    if n * c * height * width == 0:
        return
    images = max(1, elements // (c * height * width))
    rows = height if images > 1 else max(1, elements // (c * width))
    for image in range(0, n, images):
        for row in range(0, height, rows):
            yield slice(image, min(n, image + images)), slice(row, min(height, row + rows))


def image_chunks(tensor: Tensor, device: torch.device | None = None) -> Iterator[slice]:
    """Slices of the batch of ``tensor``, each of whole images and about ``CHUNK_BYTES``, at least one image.

    ``device`` is where the work is done, for a ``tensor`` that only stands for its size (on the meta device).
    """
    images = tensor.size(0)
    if images == 0:
        return
    image_bytes = max(1, tensor.numel() // images * tensor.element_size())
    step = max(1, CHUNK_BYTES.get((device or tensor.device).type, CHUNK_BYTES_ELSEWHERE) // image_bytes)
    for start in range(0, images, step):
        yield slice(start, start + step)
