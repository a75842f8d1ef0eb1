"""The kernels here are NHWC: what comes in another layout is copied on the way in and on the way out."""

from __future__ import annotations

import torch
from torch import Tensor


def channels_last(tensor: Tensor) -> Tensor:
    """``tensor`` in channels_last: itself if it is already."""
    return in_layout(tensor, torch.channels_last)


def in_layout(tensor: Tensor, layout: torch.memory_format) -> Tensor:
    """``tensor`` in ``layout``: itself if it is already."""
    if tensor.is_contiguous(memory_format=layout):
        return tensor
    return torch.ops.tinytl_cpu.in_layout(tensor, layout is torch.channels_last)
