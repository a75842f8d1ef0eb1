"""Memory layout: which of (N, C, H, W) tensors are stored channels last, and what an operator's output is stored as.

The rule is PyTorch's own convolution rule: an output is ``channels_last`` where the input (or, for a convolution, the
weight) is, and contiguous NCHW elsewhere.
"""

from __future__ import annotations

import torch


def memory_format(*tensors: torch.Tensor) -> torch.memory_format:
    """``torch.channels_last`` if the strides of any of the (4-D) tensors say so, else ``torch.contiguous_format``."""
    if any(_strides_are_channels_last(t) for t in tensors):
        return torch.channels_last
    return torch.contiguous_format


def _strides_are_channels_last(tensor: torch.Tensor) -> bool:
    # The test of c10's is_channels_last_strides_2d: it also tells (N, C, 1, 1) tensors apart by the strides that an
    # earlier operator gave them, and recognises slices of channels_last tensors.
    sizes, strides = tensor.shape, tensor.stride()  # once: an operator asks for every one of its tensors
    if len(sizes) != 4 or strides[1] == 0:
        return False
    smallest = 0
    for dim in (1, 3, 2, 0):
        size, stride = sizes[dim], strides[dim]
        if size == 0 or stride < smallest or (dim == 0 and smallest == strides[1]):
            return False
        smallest = stride * size if size > 1 else stride
    return True


def format_of(channels_last: bool) -> torch.memory_format:
    """The memory format that the ``channels_last`` flag of a backward operator stands for."""
    return torch.channels_last if channels_last else torch.contiguous_format


def with_strides_of(like: torch.Tensor, tensor: torch.Tensor) -> torch.Tensor:
    """``tensor`` in the strides of ``like``, which is of its shape: itself if it has them, else a copy."""
    if tensor.stride() == like.stride():
        return tensor
    return torch.empty_strided(like.shape, like.stride(), dtype=tensor.dtype, device=tensor.device).copy_(tensor)
