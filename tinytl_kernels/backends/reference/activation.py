"""Activations and their derivatives in ATen."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from tinytl_kernels.backends.reference.bitmask import combine_with_bits, pack_where
from tinytl_kernels.core.activations import BIT_MASK, LEAKY_SLOPE

# Where the gradient passes, strictly inside, as PyTorch's own derivatives decide it. At a NaN they differ: ReLU asks
# what to stop, and lets it pass; the others ask what to let through, and stop it.
_PASSES = {
    "relu": lambda x: (x <= 0).logical_not_(),
    "relu6": lambda x: (x > 0).logical_and_(x < 6),
    "leaky_relu": lambda x: x > 0,
    "hardsigmoid": lambda x: (x > -3).logical_and_(x < 3),
}


def activation_mask(values: Tensor, name: str) -> Tensor:
    """The bit mask of a ReLU-family activation at ``values``, the numbers before it."""
    return pack_where(_PASSES[name], values)


def apply_activation_(values: Tensor, name: str, negative_slope: float = LEAKY_SLOPE) -> Tensor:
    """A ReLU-family activation in place."""
    if name == "relu":
        return values.relu_()
    if name == "relu6":
        return F.hardtanh_(values, 0.0, 6.0)
    if name == "leaky_relu":
        return F.leaky_relu_(values, negative_slope)
    return F.hardsigmoid(values, inplace=True)


def apply_smooth_activation(values: Tensor, name: str) -> Tensor:
    """A smooth activation, out of place: its backward needs the value before it."""
    if name == "hardswish":
        return F.hardswish(values)
    if name == "silu":
        return F.silu(values)
    return F.gelu(values, approximate="tanh" if name == "gelu_tanh" else "none")


def activation_gradient(
    grad_output: Tensor, saved: Tensor, name: str, negative_slope: float = LEAKY_SLOPE, out: Tensor | None = None
) -> Tensor:
    """``f'(x) * grad_output`` from what was kept of x: the bit mask, or x itself for a smooth activation.

    Where the derivative is 0 the result is 0, whatever ``grad_output`` holds (inf, NaN): a choice, not a product.
    """
    # Not left to ATen, which mixes the strides of both arguments: the fake promises those of grad_output.
    if out is None:
        out = torch.empty_like(grad_output)
    if name not in BIT_MASK:
        return _smooth_gradient(grad_output, saved, name, out)
    if name == "leaky_relu":
        return combine_with_bits(lambda bits, g: torch.where(bits, g, g * negative_slope), grad_output, saved, out)
    if name == "hardsigmoid":
        return combine_with_bits(lambda bits, g: torch.where(bits, g / 6.0, 0.0), grad_output, saved, out)
    return combine_with_bits(lambda bits, g: torch.where(bits, g, 0.0), grad_output, saved, out)


def _smooth_gradient(grad_output: Tensor, values: Tensor, name: str, out: Tensor) -> Tensor:
    if name == "hardswish":
        return torch.ops.aten.hardswish_backward.out(grad_output, values, out=out)
    if name == "silu":
        return torch.ops.aten.silu_backward.grad_input(grad_output, values, grad_input=out)
    approximate = "tanh" if name == "gelu_tanh" else "none"
    return torch.ops.aten.gelu_backward.grad_input(grad_output, values, approximate=approximate, grad_input=out)


def activation(input: Tensor, name: str, negative_slope: float, needs_mask: bool) -> tuple[Tensor, Tensor]:
    nothing = input.new_empty(0, dtype=torch.uint8)
    if name not in BIT_MASK:
        # ATen keeps the strides of a dense input and makes others dense, as torch.empty_like does.
        return apply_smooth_activation(input, name), nothing
    mask = activation_mask(input, name) if needs_mask else nothing
    output = torch.empty_like(input)
    if name == "relu":
        torch.clamp_min(input, 0, out=output)
    elif name == "relu6":
        torch.clamp(input, 0, 6, out=output)
    else:
        apply_activation_(output.copy_(input), name, negative_slope)
    return output, mask


OPERATORS = {"activation": activation, "activation_backward": activation_gradient}
