"""The kernels here are NHWC: what comes in another layout is copied on the way in and on the way out."""

from __future__ import annotations

import torch
from torch import Tensor


def channels_last(tensor: Tensor) -> Tensor:
    """``tensor`` in channels_last: itself if it is already."""
    return tensor.contiguous(memory_format=torch.channels_last)


def in_layout(tensor: Tensor, layout: torch.memory_format) -> Tensor:
    """``tensor`` in ``layout``: itself if it is already."""
    return tensor.contiguous(memory_format=layout)
