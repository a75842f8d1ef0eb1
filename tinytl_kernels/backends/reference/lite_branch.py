"""The lite residual's branch in ATen, its gradients written out: convolutions are ATen's, norms their formulas."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tinytl_kernels.core.dtypes import accumulation_dtype
from tinytl_kernels.core.layout import memory_format


def lite_branch(
    pooled: Tensor, weight1: Tensor, norm_weight1: Tensor | None, norm_bias1: Tensor | None,
    running_mean1: Tensor | None, running_var1: Tensor | None, weight2: Tensor, norm_weight2: Tensor | None,
    norm_bias2: Tensor | None, running_mean2: Tensor | None, running_var2: Tensor | None, stride: int, groups: int,
    activation: str, norm_groups1: int, norm_groups2: int, eps1: float, eps2: float, keep_conv: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    conv = _convolve(pooled, weight1, stride, groups)
    statistics1 = _statistics(conv, running_mean1, running_var1, norm_groups1)
    z = _normalise(conv, statistics1, norm_weight1, norm_bias1, norm_groups1, eps1)
    second = _convolve(_activate(z, activation), weight2, 1, 1)
    statistics2 = _statistics(second, running_mean2, running_var2, norm_groups2)
    output = _normalise(second, statistics2, norm_weight2, norm_bias2, norm_groups2, eps2)
    kept = conv.permute(2, 3, 0, 1).contiguous() if keep_conv else pooled.new_empty(0)
    return output.contiguous(memory_format=memory_format(pooled)), kept, statistics1, statistics2


def lite_branch_backward(
    grad_output: Tensor, pooled: Tensor, conv: Tensor, statistics1: Tensor, statistics2: Tensor, weight1: Tensor,
    norm_weight1: Tensor | None, norm_bias1: Tensor | None, weight2: Tensor, norm_weight2: Tensor | None, stride: int,
    groups: int, activation: str, norm_groups1: int, norm_groups2: int, eps1: float, eps2: float, of_batch1: bool,
    of_batch2: bool, needed: Sequence[bool],
) -> tuple[Tensor, ...]:  # fmt: skip
    conv = conv.permute(2, 3, 0, 1) if conv.numel() else _convolve(pooled, weight1, stride, groups)
    z = _normalise(conv, statistics1, norm_weight1, norm_bias1, norm_groups1, eps1)
    activated = _activate(z, activation)
    second = _convolve(activated, weight2, 1, 1)
    grad, scale2, bias2 = _norm_backward(
        grad_output, second, statistics2, norm_weight2, norm_groups2, eps2, of_batch2
    )  # fmt: skip
    grad, grad_weight2 = convolution_backward(grad, activated, weight2, 1, 1, any(needed[:4]), needed[4])
    scale1 = bias1 = grad_pooled = grad_weight1 = None
    if any(needed[:4]):
        passes = z > 0 if activation == "relu" else (z > 0) & (z < 6)
        if activation == "relu":
            passes |= z.isnan()
        grad = grad.where(passes, 0)
        grad, scale1, bias1 = _norm_backward(grad, conv, statistics1, norm_weight1, norm_groups1, eps1, of_batch1)
        grad_pooled, grad_weight1 = convolution_backward(grad, pooled, weight1, stride, groups, *needed[:2])
    if grad_pooled is not None:
        grad_pooled = grad_pooled.contiguous(memory_format=memory_format(pooled))
    grads = (grad_pooled, grad_weight1, scale1, bias1, grad_weight2, scale2, bias2)
    likes = (pooled, weight1, statistics1, statistics1, weight2, statistics2, statistics2)
    return tuple(g if need else like.new_empty(0) for g, like, need in zip(grads, likes, needed, strict=True))


def _convolve(input: Tensor, weight: Tensor, stride: int, groups: int) -> Tensor:
    return torch.conv2d(input, weight.to(input.dtype), None, stride, weight.size(2) // 2, 1, groups)


def convolution_backward(
    grad: Tensor, input: Tensor, weight: Tensor, stride: int, groups: int, need_input: bool, need_weight: bool
) -> tuple[Tensor | None, Tensor | None]:
    grad_input, grad_weight, _ = torch.ops.aten.convolution_backward(
        grad, input, weight.to(input.dtype), None, [stride] * 2, [weight.size(2) // 2] * 2, [1, 1], False, [0, 0],
        groups, [need_input, need_weight, False],
    )  # fmt: skip
    if need_weight:  # in the weight's own layout, whichever ATen chose
        grad_weight = torch.empty_like(weight).copy_(grad_weight)
    return grad_input, grad_weight


def _activate(z: Tensor, activation: str) -> Tensor:
    return z.clamp(min=0) if activation == "relu" else z.clamp(0, 6)


def _statistics(x: Tensor, running_mean: Tensor | None, running_var: Tensor | None, groups: int) -> Tensor:
    """(2, C) or (2, N * groups): mean and biased variance."""
    dtype = accumulation_dtype(x.dtype)
    if running_mean is not None:
        return torch.stack([running_mean.to(dtype), running_var.to(dtype)])
    x = x.to(dtype)
    if groups:
        x = x.reshape(x.size(0) * groups, -1)
    var, mean = torch.var_mean(x, 1 if groups else (0, 2, 3), correction=0)
    return torch.stack([mean, var])


def _by_channel(statistics: Tensor, x: Tensor, groups: int) -> Tensor:
    """(2, N or 1, C, 1, 1) of ``statistics``."""
    if groups:
        statistics = statistics.view(2, x.size(0), groups).repeat_interleave(x.size(1) // groups, 2)
    return statistics.view(2, -1, x.size(1), 1, 1)


def _normalise(x, statistics, weight, bias, groups: int, eps: float) -> Tensor:
    mean, var = _by_channel(statistics, x, groups)
    scale = (var + eps).rsqrt()
    if weight is not None:
        scale = scale * weight.view(-1, 1, 1)
    shift = -mean * scale
    if bias is not None:
        shift = shift + bias.view(-1, 1, 1)
    return torch.addcmul(shift, x.to(scale.dtype), scale).to(x.dtype)


def _norm_backward(
    grad_output, x, statistics, weight, groups: int, eps: float, of_batch: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of x, weight and bias; the statistics depend on x where they are ``of_batch``."""
    mean, var = _by_channel(statistics, x, groups)
    rstd = (var + eps).rsqrt()
    grad, normalised = grad_output.to(rstd.dtype), (x.to(rstd.dtype) - mean) * rstd
    grad_weight, grad_bias = (grad * normalised).sum((0, 2, 3)), grad.sum((0, 2, 3))
    if weight is not None:
        grad = grad * weight.view(-1, 1, 1)
    if of_batch:
        grad = grad - _mean_within(grad, groups) - normalised * _mean_within(grad * normalised, groups)
    return (grad * rstd).to(x.dtype), grad_weight, grad_bias


def _mean_within(x: Tensor, groups: int) -> Tensor:
    """The mean over what shares statistics, to be broadcast."""
    if not groups:
        return x.mean((0, 2, 3), keepdim=True)
    means = x.reshape(x.size(0), groups, -1).mean(2)
    return means.repeat_interleave(x.size(1) // groups, 1)[:, :, None, None]


OPERATORS = {"lite_branch": lite_branch, "lite_branch_backward": lite_branch_backward}
