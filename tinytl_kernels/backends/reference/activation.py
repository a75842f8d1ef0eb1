"""Activations and their derivatives in ATen."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from tinytl_kernels.backends.reference.bitmask import combine_with_bits, pack_where
from tinytl_kernels.backends.reference.slabs import channels_last_view, row_slabs
from tinytl_kernels.core.activations import BIT_MASK, LEAKY_SLOPE
from tinytl_kernels.core.derivative_code import DERIVATIVE_CODES, NAN_CODE, DerivativeCode
from tinytl_kernels.core.dtypes import accumulation_dtype

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
    if name == "sigmoid":
        return torch.sigmoid(values)
    return F.gelu(values, approximate="tanh" if name == "gelu_tanh" else "none")


def activation_gradient(
    grad_output: Tensor, saved: Tensor, name: str, negative_slope: float = LEAKY_SLOPE, out: Tensor | None = None
) -> Tensor:
    """``f'(x) * grad_output`` from what was kept: the bit mask; or x (sigmoid: f(x)), or uint8 codes, if f is smooth.

    Where a bit says that the derivative is 0 the result is 0, whatever ``grad_output`` holds (inf, NaN): a choice, not
    a product.
    """
    # Not left to ATen, which mixes the strides of both arguments: the fake promises those of grad_output.
    if out is None:
        out = torch.empty_like(grad_output)
    if name not in BIT_MASK:
        coded = saved.dtype == torch.uint8
        return (
            _coded_gradient(grad_output, saved, name, out) if coded else _smooth_gradient(grad_output, saved, name, out)
        )
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
    if name == "sigmoid":
        return torch.ops.aten.sigmoid_backward.grad_input(grad_output, values, grad_input=out)
    approximate = "tanh" if name == "gelu_tanh" else "none"
    return torch.ops.aten.gelu_backward.grad_input(grad_output, values, approximate=approximate, grad_input=out)


def derivative_codes(values: Tensor, name: str) -> Tensor:
    """The derivative of a smooth activation at ``values`` in 8 bits: uint8, in their shape and dense strides."""
    codes = torch.empty_like(values, dtype=torch.uint8)
    rows, code_rows = channels_last_view(values), channels_last_view(codes)
    for slab in row_slabs(rows) if values.dim() else [()]:
        # Not in half precision: a derivative rounded to bfloat16 may be off by more than half a step.
        x = rows[slab].to(accumulation_dtype(values.dtype))
        known = x.sigmoid() if name == "sigmoid" else x
        derivative = _smooth_gradient(torch.ones_like(x), known, name, torch.empty_like(x))
        # ATen's hardswish lets a gradient pass at a NaN, or not, by its place in the tensor.
        derivative.masked_fill_(x.isnan(), float("nan"))
        code_rows[slab] = _encode(derivative, DERIVATIVE_CODES[name])
    return codes


def _encode(derivative: Tensor, code: DerivativeCode) -> Tensor:
    return derivative.mul_(code.steps).add_(code.zero).round_().nan_to_num_(nan=NAN_CODE).to(torch.uint8)


def _decode(codes: Tensor, code: DerivativeCode, dtype: torch.dtype) -> Tensor:
    return codes.to(dtype).sub_(code.zero).div_(code.steps).masked_fill_(codes == NAN_CODE, float("nan"))


def _coded_gradient(grad_output: Tensor, codes: Tensor, name: str, out: Tensor) -> Tensor:
    rows, code_rows, out_rows = (channels_last_view(t) for t in (grad_output, codes, out))
    for slab in row_slabs(rows) if rows.dim() else [()]:
        derivative = _decode(code_rows[slab], DERIVATIVE_CODES[name], accumulation_dtype(grad_output.dtype))
        out_rows[slab] = derivative.mul_(rows[slab])
    return out


def activation(
    input: Tensor, name: str, negative_slope: float, needs_mask: bool, needs_codes: bool = False
) -> tuple[Tensor, Tensor]:
    nothing = input.new_empty(0, dtype=torch.uint8)
    if name not in BIT_MASK:
        # ATen keeps the strides of a dense input and makes others dense, as torch.empty_like does.
        output = apply_smooth_activation(input, name)
        return output, derivative_codes(input, name) if needs_codes else nothing
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
