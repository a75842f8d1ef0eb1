"""Stand-alone activations of the ReLU family, and smooth ones with their derivative in 8 bits: ``activation.cpp``.

Other smooth ones are ATen's, as in the reference.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tinytl_kernels.backends.cpu.layout import channels_last, in_layout
from tinytl_kernels.backends.reference import activation as reference
from tinytl_kernels.core.activations import BIT_MASK
from tinytl_kernels.core.derivative_code import DERIVATIVE_CODES
from tinytl_kernels.core.layout import memory_format, with_strides_of


def activation(
    input: Tensor, name: str, negative_slope: float, needs_mask: bool, needs_codes: bool = False
) -> tuple[Tensor, Tensor]:
    if needs_codes:
        code = DERIVATIVE_CODES[name]
        return torch.ops.tinytl_cpu.coded_activation_forward(_dense(input), name, code.zero, code.steps)
    if name not in BIT_MASK or _is_trivial(input):
        return reference.activation(input, name, negative_slope, needs_mask)
    output, mask = torch.ops.tinytl_cpu.activation_forward(
        channels_last(_as_images(input)), name, negative_slope, needs_mask
    )
    if input.dim() == 4:
        return in_layout(output, memory_format(input)), mask
    return output.view(input.shape), mask.view(*input.shape[:-1], -1) if needs_mask and mask.numel() else mask


def activation_backward(grad_output: Tensor, saved: Tensor, name: str, negative_slope: float) -> Tensor:
    if name not in BIT_MASK and saved.dtype == torch.uint8:
        code = DERIVATIVE_CODES[name]
        grad_output = _dense(grad_output)
        return torch.ops.tinytl_cpu.coded_activation_backward(
            grad_output, with_strides_of(grad_output, saved), code.zero, code.steps
        )
    if name not in BIT_MASK or _is_trivial(grad_output):
        return reference.activation_gradient(grad_output, saved, name, negative_slope)
    images = _as_images(grad_output)
    n, c, h, w = images.shape
    grad_input, _ = torch.ops.tinytl_cpu.activation_backward(
        channels_last(images), saved.view(n, h, w, -1) if saved.numel() else saved.new_empty((n, h, w, (c + 7) // 8)),
        name, negative_slope, True, False,
    )  # fmt: skip
    if grad_output.dim() == 4:
        return in_layout(grad_input, memory_format(grad_output))
    return grad_input.view(grad_output.shape)


def _is_trivial(tensor: Tensor) -> bool:
    """A single number or none: shapes that have no rows of channels."""
    return tensor.dim() == 0 or tensor.numel() == 0


def _dense(tensor: Tensor) -> Tensor:
    """``tensor`` in the strides of ``torch.empty_like(tensor)``: itself if it is dense, in whatever order."""
    return with_strides_of(torch.empty_like(tensor, device="meta"), tensor)


def _as_images(tensor: Tensor) -> Tensor:
    """(..., C) as (rows, C, 1, 1): the last dimension of anything but images counts as channels."""
    return tensor if tensor.dim() == 4 else tensor.reshape(-1, tensor.size(-1), 1, 1)


OPERATORS = {"activation": activation, "activation_backward": activation_backward}
