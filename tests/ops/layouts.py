"""Inputs in every layout that users bring."""

from __future__ import annotations

import torch
from torch import Tensor

LAYOUTS = ("contiguous", "channels_last", "sliced")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def images(size, dtype: torch.dtype = torch.float32, layout: str = "contiguous") -> Tensor:
    """Random (N, C, H, W), scaled so that ReLU6 cuts on both sides; ``"sliced"`` is dense in no layout."""
    if layout == "sliced":
        n, c, h, w = size
        return torch.randn(n, c + 2, 2 * h, w + 1).mul(3).to(dtype)[:, 1:-1, ::2, 1:]
    tensor = torch.randn(size).mul(3).to(dtype)
    return tensor.contiguous(memory_format=torch.channels_last) if layout == "channels_last" else tensor


def has_layout(tensor: Tensor, layout: str) -> bool:
    """Whether a result for an input of this layout is stored as documented."""
    wanted = torch.channels_last if layout == "channels_last" else torch.contiguous_format
    return tensor.is_contiguous(memory_format=wanted)
