"""Binds ``kernels/cpu/mbconv.h``: a block that computes itself again in backward, which ``autograd.cpp`` calls."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tinytl_kernels.core.layout import memory_format


def mbconv(input: Tensor, tensors: Sequence[Tensor | None], stride, padding, *others) -> Tensor | None:
    if stride[0] != stride[1] or memory_format(input) is not torch.channels_last:
        return None
    return torch.ops.tinytl_cpu.mbconv(input, tensors, stride[0], padding, *others)


FUSED = {"mbconv": mbconv}
