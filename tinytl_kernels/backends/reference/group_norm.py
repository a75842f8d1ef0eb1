"""GroupNorm and activation in ATen, a few images at a time, in the dtype that sums are accumulated in."""

from __future__ import annotations

import torch
from torch import Tensor

from tinytl_kernels.backends.reference.activation import (
    activation_gradient,
    activation_mask,
    apply_activation_,
    apply_smooth_activation,
)
from tinytl_kernels.backends.reference.slabs import image_chunks
from tinytl_kernels.core.activations import BIT_MASK
from tinytl_kernels.core.dtypes import accumulation_dtype
from tinytl_kernels.core.layout import memory_format

# Largest int8 code on either side of zero.
_MOST = 127


def group_norm_activation(
    input: Tensor, weight: Tensor | None, bias: Tensor | None, num_groups: int, eps: float, activation: str | None,
    needs_codes: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    layout = memory_format(input)
    dtype = accumulation_dtype(input.dtype)
    n = input.size(0)
    output = torch.empty_like(input, memory_format=layout)
    mean = torch.empty((n, num_groups), dtype=dtype, device=input.device)
    rstd = torch.empty_like(mean)
    codes = torch.empty_like(output, dtype=torch.int8) if needs_codes else input.new_empty(0, dtype=torch.int8)
    step = torch.empty_like(mean) if needs_codes else mean.new_empty(0)
    for images in image_chunks(input):
        values = input[images].to(dtype)
        grouped = _grouped(values, num_groups)
        variance, mean[images] = torch.var_mean(grouped, (2, 3, 4), correction=0)
        rstd[images] = (variance + eps).rsqrt()
        x_hat = _normalised(values, mean[images], rstd[images])
        if needs_codes:
            largest = _grouped(x_hat, num_groups).abs().amax((2, 3, 4)) if x_hat.numel() else mean[images]
            # Of a constant group x_hat is 0 whatever the step.
            step[images] = largest.div_(_MOST).clamp_min_(torch.finfo(dtype).tiny)
            codes[images] = (x_hat / _per_channel(step[images], x_hat)).round_().to(torch.int8)
        z = _affine(x_hat, weight, bias)
        if activation in BIT_MASK:
            z = apply_activation_(z, activation)
        elif activation is not None:
            z = apply_smooth_activation(z, activation)
        output[images] = z
    return output, mean, rstd, codes, step


def group_norm_activation_backward(
    grad_output: Tensor, values: Tensor, shift: Tensor, scale: Tensor, rstd: Tensor, weight: Tensor | None,
    bias: Tensor | None, num_groups: int, activation: str | None, needed,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    need_input, need_weight, need_bias = needed
    dtype, channels = rstd.dtype, grad_output.size(1)
    grad_input = torch.empty_like(grad_output, memory_format=memory_format(grad_output))
    if not need_input:
        grad_input = grad_output.new_empty(0)
    grad_weight = rstd.new_zeros(channels if need_weight else 0)
    grad_bias = rstd.new_zeros(channels if need_bias else 0)
    for images in image_chunks(grad_output):
        x_hat = _normalised(values[images].to(dtype), shift[images], scale[images])
        g = grad_output[images].to(dtype)
        if activation is not None:
            z = _affine(x_hat, weight, bias)
            g = activation_gradient(g, activation_mask(z, activation) if activation in BIT_MASK else z, activation)
        if need_bias:
            grad_bias += g.sum((0, 2, 3))
        if need_weight:
            grad_weight += (g * x_hat).sum((0, 2, 3))
        if need_input:
            if weight is not None:
                g = g * weight.to(dtype).view(1, -1, 1, 1)
            means = (_grouped(t, num_groups).mean((2, 3, 4)) for t in (g, g * x_hat))
            of_g, of_product = (_per_channel(m, g) for m in means)
            grad_input[images] = (g - of_g - x_hat * of_product) * _per_channel(rstd[images], g)
    return grad_input, grad_weight, grad_bias


def _grouped(values: Tensor, num_groups: int) -> Tensor:
    """(N, C, H, W) seen as (N, groups, C / groups, H, W)."""
    return values.unflatten(1, (num_groups, -1))


def _per_channel(statistics: Tensor, like: Tensor) -> Tensor:
    """(N, groups) as (N, C, 1, 1)."""
    return statistics.repeat_interleave(like.size(1) // statistics.size(1), 1)[:, :, None, None]


def _normalised(values: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return (values - _per_channel(shift, values)) * _per_channel(scale, values)


def _affine(x_hat: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    z = x_hat.clone() if weight is None else x_hat * weight.to(x_hat.dtype).view(1, -1, 1, 1)
    return z if bias is None else z.add_(bias.to(x_hat.dtype).view(1, -1, 1, 1))


OPERATORS = {
    "group_norm_activation": group_norm_activation,
    "group_norm_activation_backward": group_norm_activation_backward,
}
