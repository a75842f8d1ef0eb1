"""Blocks in a row, with or without lite residuals, in one call: ``kernels/cpu/block_chain.cpp``."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tinytl_kernels.backends.cpu.frozen_inverted_residual import fused
from tinytl_kernels.core.layout import memory_format


def block_chain(input: Tensor, links: Sequence, last, last_needs_saved: bool) -> Tensor | None:
    stem = links[0].stem
    if memory_format(input, *(() if stem is None else (stem.weight,))) is not torch.channels_last:
        return None
    if not all(fused(link.stride, link.activation) for link in links):
        return None
    tensors, numbers, reals, activations, running = [], [stem is not None, last is not None], [], [], []
    for link in links:
        tensors += (*link.convs, *link.scales)
        if link.stem is not None:
            numbers += (*link.stem.stride, *link.stem.padding)
        numbers += (*link.stride, *link.padding, link.residual, link.needs_masks, link.branch is not None)
        activations.append(link.activation or "none")
        if link.branch is None:
            continue
        weight1, norm1, weight2, norm2, stride, groups, activation, keep_conv, *counted = link.branch
        tensors += (weight1, *norm1[:4], weight2, *norm2[:4])
        numbers += (stride, groups, norm1.groups, norm2.groups, keep_conv)
        reals += (norm1.eps, norm2.eps)
        activations.append(activation)
        for buffers, momentum in counted:
            numbers.append(len(buffers))
            reals.append(momentum)
            running += buffers
    if last is not None:
        tensors += (last.weight, last.bias, last.scale)
        numbers.append(last_needs_saved)
        activations.append(last.activation or "none")
    return torch.ops.tinytl_cpu.block_chain(input, tensors, numbers, reals, activations, running)


FUSED = {"block_chain": block_chain}
