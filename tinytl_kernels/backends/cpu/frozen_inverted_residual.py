"""Binds ``kernels/cpu/inverted_residual*.cpp``: the whole block in one pass, expanded activations in cache only."""

from __future__ import annotations

import torch
from torch import Tensor

from tinytl_kernels.backends.cpu.layout import channels_last, in_layout
from tinytl_kernels.backends.reference import frozen_inverted_residual as reference
from tinytl_kernels.core.layout import format_of, memory_format

# What the C++ computes; other activations are the reference's.
_ACTIVATIONS = {None: "none", "relu": "relu", "relu6": "relu6"}


def frozen_inverted_residual(
    input: Tensor, expand_weight, expand_bias, depthwise_weight, depthwise_bias, project_weight, project_bias,
    stride, padding, activation, residual: bool, needs_masks: bool, want_pooled: bool,
    expand_scale: Tensor | None = None, depthwise_scale: Tensor | None = None, project_scale: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    if not fused(stride, activation):
        return reference.frozen_inverted_residual(
            input, expand_weight, expand_bias, depthwise_weight, depthwise_bias, project_weight, project_bias,
            stride, padding, activation, residual, needs_masks, want_pooled,
            expand_scale, depthwise_scale, project_scale,
        )  # fmt: skip
    layout = memory_format(input)
    output, expand_mask, depthwise_mask, pooled = torch.ops.tinytl_cpu.inverted_residual_forward(
        channels_last(input),
        expand_weight, expand_scale, expand_bias, depthwise_weight, depthwise_scale, depthwise_bias,
        project_weight, project_scale, project_bias,
        stride[0], padding, _ACTIVATIONS[activation], residual, needs_masks, want_pooled,
    )  # fmt: skip
    if layout is not torch.channels_last:
        output = in_layout(output, layout)
        pooled = in_layout(pooled, layout) if want_pooled else pooled
    return output, expand_mask, depthwise_mask, pooled


def frozen_inverted_residual_backward(
    grad_output: Tensor, grad_pooled: Tensor | None, expand_weight, depthwise_weight, project_weight,
    expand_mask: Tensor, depthwise_mask: Tensor, input_size, stride, padding, activation, residual: bool,
    is_channels_last: bool, needed,
    expand_scale: Tensor | None = None, depthwise_scale: Tensor | None = None, project_scale: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    if not fused(stride, activation):
        return reference.frozen_inverted_residual_backward(
            grad_output, grad_pooled, expand_weight, depthwise_weight, project_weight, expand_mask, depthwise_mask,
            input_size, stride, padding, activation, residual, is_channels_last, needed,
            expand_scale, depthwise_scale, project_scale,
        )  # fmt: skip
    if grad_pooled is not None:
        grad_pooled = channels_last(grad_pooled)
    grad_input, *grad_biases = torch.ops.tinytl_cpu.inverted_residual_backward(
        channels_last(grad_output),
        expand_mask, depthwise_mask,
        expand_weight, expand_scale, depthwise_weight, depthwise_scale, project_weight, project_scale,
        input_size, stride[0], padding, _ACTIVATIONS[activation], residual, *needed, grad_pooled,
    )  # fmt: skip
    if needed[0]:
        grad_input = in_layout(grad_input, format_of(is_channels_last))
    return (grad_input, *grad_biases)


def differentiable(input: Tensor, *arguments) -> tuple[Tensor, ...] | None:
    """The operator with its derivative in C++ (``autograd.cpp``)."""
    stride, _, activation = arguments[6:9]
    if not fused(stride, activation) or memory_format(input) is not torch.channels_last:
        return None
    return torch.ops.tinytl_cpu.frozen_inverted_residual(input, *arguments)


def fused(stride, activation: str | None) -> bool:
    return activation in _ACTIVATIONS and stride[0] == stride[1]


OPERATORS = {
    "frozen_inverted_residual": frozen_inverted_residual,
    "frozen_inverted_residual_backward": frozen_inverted_residual_backward,
}
DIFFERENTIABLE = {"frozen_inverted_residual": differentiable}
