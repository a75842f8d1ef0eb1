"""Binds ``kernels/cpu/stem.h``: a stem and the block behind it in one call, differentiated in ``autograd.cpp``."""

from __future__ import annotations

import torch
from torch import Tensor

from tinytl_kernels.backends.cpu.frozen_inverted_residual import fused
from tinytl_kernels.core.layout import memory_format


def stem_block(image: Tensor, stem_weight: Tensor, *arguments) -> Tensor | None:
    stride, _, activation = arguments[7:10]
    if not fused(stride, activation) or memory_format(image, stem_weight) is not torch.channels_last:
        return None
    return torch.ops.tinytl_cpu.stem_block(image, stem_weight, *arguments)


FUSED = {"stem_block": stem_block}
