"""Dropout in ATen, with its mask packed to bits slab by slab."""

from __future__ import annotations

import torch
from torch import Tensor

from tinytl_kernels.backends.reference.bitmask import combine_with_bits, pack_where


def dropout(input: Tensor, p: float) -> tuple[Tensor, Tensor]:
    def draw(values: Tensor) -> Tensor:
        return torch.empty(values.shape, dtype=torch.bool, device=values.device).bernoulli_(1.0 - p)

    mask = pack_where(draw, input)
    return _scale(input, mask, p), mask


def _scale(values: Tensor, mask: Tensor, p: float) -> Tensor:
    scale = 0.0 if p == 1.0 else 1.0 / (1.0 - p)
    # A product, as in PyTorch: a dropped NaN stays a NaN.
    return combine_with_bits(lambda bits, v: v * bits * scale, values, mask, out=torch.empty_like(values))


OPERATORS = {"dropout": dropout, "dropout_backward": _scale}
