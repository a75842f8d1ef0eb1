"""The lite residual's branch: ``lite_branch.cpp``, with the convolutions of ``trained_conv.cpp``."""

from __future__ import annotations

import torch
from torch import Tensor

from tinytl_kernels.backends.cpu.layout import in_layout
from tinytl_kernels.core.layout import memory_format


def lite_branch(pooled: Tensor, *arguments) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    *arguments, keep_conv = arguments
    output, conv, *statistics = torch.ops.tinytl_cpu.lite_branch_forward(pooled, *arguments)
    return in_layout(output, memory_format(pooled)), conv if keep_conv else pooled.new_empty(0), *statistics


def lite_branch_backward(grad_output: Tensor, pooled: Tensor, *arguments) -> tuple[Tensor, ...]:
    grad_pooled, *grads = torch.ops.tinytl_cpu.lite_branch_backward(grad_output, pooled, *arguments)
    if grad_pooled.dim() == 4:
        grad_pooled = in_layout(grad_pooled, memory_format(pooled))
    return grad_pooled, *grads


def differentiable(pooled: Tensor, *arguments) -> tuple[Tensor, ...] | None:
    """The operator with its derivative in C++ (``autograd.cpp``)."""
    if memory_format(pooled) is not torch.channels_last:
        return None
    return torch.ops.tinytl_cpu.lite_branch(pooled, *arguments)


DIFFERENTIABLE = {"lite_branch": differentiable}
OPERATORS = {"lite_branch": lite_branch, "lite_branch_backward": lite_branch_backward}
