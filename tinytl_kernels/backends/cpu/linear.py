"""A trained linear layer of few rows, and of many PyTorch's: ``kernels/cpu/linear.cpp``."""

from __future__ import annotations

import torch
from torch import Tensor


def linear(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.ops.tinytl_cpu.linear(input, weight, bias)


FUSED = {"linear": linear}
