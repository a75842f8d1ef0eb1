"""Dtypes: what sums are accumulated in, and which weights and biases go with an input."""

from __future__ import annotations

import torch
from torch import Tensor


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """What sums of ``dtype`` are accumulated in: float64 for float64, float32 for everything else."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def check_companion(name: str, tensor: Tensor, input: Tensor) -> None:
    """Raise ``ValueError`` unless a weight or bias fits ``input``: its device, and its dtype or float32 beside half.

    Args:
        name: of ``tensor``, for the message.
    """
    if tensor.device != input.device:
        raise ValueError(f"{name}: expected on {input.device} as the input, got {tensor.device}")
    if tensor.dtype != input.dtype and not (tensor.dtype == torch.float32 and input.dtype in _HALF):
        raise ValueError(f"{name}: expected dtype {input.dtype} as the input, got {tensor.dtype}")


_HALF = (torch.float16, torch.bfloat16)


def check_shape(name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    """Raise ``ValueError`` unless ``tensor``, called ``name``, is of that shape."""
    if tensor.shape != shape:
        raise ValueError(f"{name}: expected shape {tuple(shape)}, got {tuple(tensor.shape)}")
