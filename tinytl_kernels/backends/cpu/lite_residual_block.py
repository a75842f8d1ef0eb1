"""A block and its lite residual in one call: ``autograd.cpp``."""

from __future__ import annotations

import torch
from torch import Tensor

from tinytl_kernels.backends.cpu.frozen_inverted_residual import fused
from tinytl_kernels.core.layout import memory_format


def lite_residual_block(input: Tensor, *arguments) -> Tensor | None:
    stride, _, activation = arguments[6:9]
    if not fused(stride, activation) or memory_format(input) is not torch.channels_last:
        return None
    return torch.ops.tinytl_cpu.lite_residual_block(input, *arguments)


FUSED = {"lite_residual_block": lite_residual_block}
