"""The two norms of a lite residual's branch as its kernels see them: applied to a tile as it is loaded, both ways."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from tinytl_kernels.backends.triton.epilogue import activate
from tinytl_kernels.backends.triton.group_norm import load_affine


@dataclass(frozen=True)
class AppliedNorm:
    """A BatchNorm or GroupNorm whose statistics are known.

    Args:
        statistics: mean and biased variance, (2, C), or (2, N * groups) of a GroupNorm; float32.
        weight, bias: (C,) or None.
        groups: 0 for a BatchNorm.
        eps: added to the variance.
    """

    statistics: Tensor
    weight: Tensor | None
    bias: Tensor | None
    groups: int
    eps: float


def norm_arguments(
    norm: AppliedNorm | None, suffix: str, channels: int, affine: bool = True
) -> dict[str, Tensor | int | float | None]:
    """Kernel arguments, their names ending in ``suffix``: statistics, weight and bias where ``affine``, and where the
    statistics of channel c of image n are, ``n * norm_image + c // norm_group``."""
    groups = 0 if norm is None else norm.groups
    arguments = {
        "statistics": None if norm is None else norm.statistics,
        "norm_size": 0 if norm is None else norm.statistics.size(1),
        "norm_image": groups,
        "norm_group": channels // groups if groups else 1,
        "eps": 0.0 if norm is None else float(norm.eps),
    }
    if affine:
        arguments |= {"gain": None if norm is None else norm.weight, "shift": None if norm is None else norm.bias}
    return {f"{name}{suffix}": value for name, value in arguments.items()}


def running_statistics(mean: Tensor, var: Tensor) -> Tensor:
    """(2, C) float32, as the statistics of a batch are."""
    return torch.stack([mean.float(), var.float()])


@triton.jit
def load_norm(statistics, gain, shift, norm_size, index, eps, c, channels, BLOCK: tl.constexpr):
    """(mean, 1 / sqrt(variance + eps), weight, bias) of channels ``c``, whose statistics are at ``index``."""
    mean = tl.load(statistics + index, mask=c < channels, other=0.0)
    var = tl.load(statistics + norm_size + index, mask=c < channels, other=1.0)
    weight, bias = load_affine(gain, shift, c, channels, BLOCK)
    return mean, tl.rsqrt(var + eps), weight, bias


@triton.jit
def load_before_activation(
    conv, where, valid, statistics, gain, shift, norm_size, index, eps, c, channels,
    DTYPE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """(x_hat, z) of a tile of the first convolution, float32; x_hat is 0 where not ``valid``.

    z = weight x_hat + bias is rounded to DTYPE: it decides where the gradient passes, and PyTorch would have stored it.
    """
    mean, rstd, weight, bias = load_norm(statistics, gain, shift, norm_size, index, eps, c, channels, BLOCK)
    x = tl.load(conv + where, mask=valid, other=0.0).to(tl.float32)
    x_hat = tl.where(valid, (x - mean[None, :]) * rstd[None, :], 0.0)
    z = (x_hat * weight[None, :] + bias[None, :]).to(DTYPE).to(tl.float32)
    return x_hat, z


@triton.jit
def load_activated(
    conv, where, valid, statistics, gain, shift, norm_size, index, eps, c, channels,
    DTYPE: tl.constexpr, ACTIVATION: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """f(norm(conv)) of a tile in DTYPE, as the 1x1 convolution takes it; 0 where not ``valid``."""
    _, z = load_before_activation(
        conv, where, valid, statistics, gain, shift, norm_size, index, eps, c, channels, DTYPE, BLOCK
    )
    return tl.where(valid, activate(z, 0.0, ACTIVATION), 0.0).to(DTYPE)


@triton.jit
def norm_gradient(
    g, input, where, valid, statistics, gain, norm_size, index, eps, means, c, channels, BLOCK: tl.constexpr
):  # fmt: skip
    """rstd (weight g - E[weight g] - x_hat E[weight g x_hat]), float32: what a norm makes of a gradient g.

    Where the statistics are constants there are no ``means``, and the norm's input is not looked at.
    """
    mean, rstd, weight, _ = load_norm(statistics, gain, None, norm_size, index, eps, c, channels, BLOCK)
    grad = g * weight[None, :]
    if means is not None:
        of_g = tl.load(means + index, mask=c < channels, other=0.0)
        of_product = tl.load(means + norm_size + index, mask=c < channels, other=0.0)
        x_hat = (tl.load(input + where, mask=valid, other=0.0).to(tl.float32) - mean[None, :]) * rstd[None, :]
        grad = grad - of_g[None, :] - x_hat * of_product[None, :]
    return grad * rstd[None, :]


@triton.jit
def load_second_gradient(
    grad_output, grad_where, second, where, valid, statistics, gain, norm_size, index, eps, means, o, channels,
    DTYPE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The gradient of a tile of the 1x1 convolution's result in DTYPE, from that of its norm; 0 where not ``valid``."""
    g = tl.load(grad_output + grad_where, mask=valid, other=0.0).to(tl.float32)
    grad = norm_gradient(g, second, where, valid, statistics, gain, norm_size, index, eps, means, o, channels, BLOCK)
    return tl.where(valid, grad, 0.0).to(DTYPE)
