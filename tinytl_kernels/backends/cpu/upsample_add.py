"""Adding a bilinearly upsampled image, and its adjoint in gather form: ``upsample_add.cpp``."""

from __future__ import annotations

import torch
from torch import Tensor

from tinytl_kernels.backends.cpu.layout import channels_last, in_layout
from tinytl_kernels.core.layout import format_of, memory_format


def upsample_add(main: Tensor, branch: Tensor) -> Tensor:
    output = torch.ops.tinytl_cpu.upsample_add_forward(channels_last(main), channels_last(branch))
    return in_layout(output, memory_format(main))


def upsample_add_backward(grad_output: Tensor, branch_size, is_channels_last: bool) -> Tensor:
    grad_branch = torch.ops.tinytl_cpu.upsample_add_backward(
        channels_last(grad_output), (*grad_output.shape[:2], *branch_size)
    )
    return in_layout(grad_branch, format_of(is_channels_last))


def differentiable(main: Tensor, branch: Tensor) -> Tensor | None:
    """The operator with its derivative in C++ (``autograd.cpp``)."""
    if not (memory_format(main) is memory_format(branch) is torch.channels_last):
        return None
    return torch.ops.tinytl_cpu.upsample_add(main, branch)


DIFFERENTIABLE = {"upsample_add": differentiable}
OPERATORS = {"upsample_add": upsample_add, "upsample_add_backward": upsample_add_backward}
