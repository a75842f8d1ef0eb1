"""GroupNorm and activation: ``group_norm.cpp``. The 8-bit codes of the normalised input are ATen's, as in reference."""

from __future__ import annotations

import torch
from torch import Tensor

from tinytl_kernels.backends.cpu.layout import in_layout
from tinytl_kernels.backends.reference import group_norm as reference
from tinytl_kernels.core.layout import memory_format


def group_norm_activation(
    input: Tensor, weight: Tensor | None, bias: Tensor | None, num_groups: int, eps: float, activation: str | None,
    needs_codes: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    if needs_codes:
        return reference.group_norm_activation(input, weight, bias, num_groups, eps, activation, needs_codes)
    output, mean, rstd = torch.ops.tinytl_cpu.group_norm_forward(
        input, weight, bias, num_groups, eps, activation or "none"
    )
    nothing = input.new_empty(0, dtype=torch.int8)
    return in_layout(output, memory_format(input)), mean, rstd, nothing, mean.new_empty(0)


def group_norm_activation_backward(
    grad_output: Tensor, values: Tensor, shift: Tensor, scale: Tensor, rstd: Tensor, weight: Tensor | None,
    bias: Tensor | None, num_groups: int, activation: str | None, needed,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    if values.dtype == torch.int8:
        return reference.group_norm_activation_backward(
            grad_output, values, shift, scale, rstd, weight, bias, num_groups, activation, needed
        )
    # Of a tensor, and not of codes, the scale is rstd.
    grad_input, grad_weight, grad_bias = torch.ops.tinytl_cpu.group_norm_backward(
        grad_output, values, shift, scale, weight, bias, num_groups, activation or "none", *needed
    )
    return in_layout(grad_input, memory_format(grad_output)) if needed[0] else grad_input, grad_weight, grad_bias


OPERATORS = {
    "group_norm_activation": group_norm_activation,
    "group_norm_activation_backward": group_norm_activation_backward,
}
