"""The branch of a lite residual on the GPU: trained convolutions between norms, in few launches.

Forward: the first convolution leaves partial statistics of its result, which a small kernel puts together; the 1x1
convolution normalises and activates what it loads, and leaves statistics of its own; a last pass normalises. Backward
is the mirror: each of two products leaves the sums that the backward of a norm needs.

ATen computes two things. The gradient of the first weight is cuDNN's (MIOpen's): a product over all pixels for each of
25 taps has nothing to be fused with, and is then as deterministic as PyTorch's switch says. So is the gradient of
``pooled`` where ``choice`` leaves a convolution to cuDNN. And a depthwise first convolution is left to the reference as
a whole: a matrix product of single channels would be empty but for one column.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tinytl_kernels.backends.reference import lite_branch as reference
from tinytl_kernels.backends.triton.choice import LIBRARY, choose
from tinytl_kernels.backends.triton.dense import dense, dense_backward
from tinytl_kernels.backends.triton.launch import on_device
from tinytl_kernels.backends.triton.lite_branch_backward import (
    gradient_of_activation,
    norm_backward,
    second_weight_gradient,
)
from tinytl_kernels.backends.triton.lite_branch_forward import normalise, product
from tinytl_kernels.backends.triton.lite_branch_norm import AppliedNorm, running_statistics
from tinytl_kernels.backends.triton.partial_statistics import merge_statistics, merge_sums
from tinytl_kernels.core.layout import memory_format


@on_device
def lite_branch(
    pooled: Tensor, weight1: Tensor, norm_weight1: Tensor | None, norm_bias1: Tensor | None,
    running_mean1: Tensor | None, running_var1: Tensor | None, weight2: Tensor, norm_weight2: Tensor | None,
    norm_bias2: Tensor | None, running_mean2: Tensor | None, running_var2: Tensor | None, stride: int, groups: int,
    activation: str, norm_groups1: int, norm_groups2: int, eps1: float, eps2: float, keep_conv: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    if _is_depthwise(weight1, groups):
        return reference.lite_branch(
            pooled, weight1, norm_weight1, norm_bias1, running_mean1, running_var1, weight2, norm_weight2, norm_bias2,
            running_mean2, running_var2, stride, groups, activation, norm_groups1, norm_groups2, eps1, eps2, keep_conv,
        )  # fmt: skip
    kept, conv = _room_for_conv(pooled, weight1, stride, keep_conv)
    of_batch = running_mean1 is None
    statistics1 = _convolve(pooled, weight1, stride, groups, conv, norm_groups1 if of_batch else None)
    if statistics1 is None:
        statistics1 = running_statistics(running_mean1, running_var1)
    norm1 = AppliedNorm(statistics1, norm_weight1, norm_bias1, norm_groups1, eps1)
    second = _channels_last(conv, weight2.size(0))
    partial, spans = product(conv, norm1, activation, weight2, norm_groups2, second, need_partial=running_mean2 is None)
    if partial is None:
        statistics2 = running_statistics(running_mean2, running_var2)
    else:
        statistics2 = merge_statistics(partial, spans, norm_groups2)
    output = second
    if memory_format(pooled) != torch.channels_last:
        output = torch.empty_like(second, memory_format=torch.contiguous_format)
    normalise(second, AppliedNorm(statistics2, norm_weight2, norm_bias2, norm_groups2, eps2), output)
    return output, kept, statistics1, statistics2


def _is_depthwise(weight1: Tensor, groups: int) -> bool:
    return groups > 1 and weight1.size(1) == 1


def _room_for_conv(pooled: Tensor, weight1: Tensor, stride: int, keep: bool) -> tuple[Tensor, Tensor]:
    """What is kept for backward, (H', W', N, M) or empty, and the (N, M, H', W') that the first convolution writes."""
    n, _, h, w = pooled.shape
    height, width = (h - 1) // stride + 1, (w - 1) // stride + 1
    if keep:
        kept = pooled.new_empty((height, width, n, weight1.size(0)))
        return kept, kept.permute(2, 3, 0, 1)
    nothing = pooled.new_empty(0)
    return nothing, nothing.new_empty((n, height, width, weight1.size(0))).permute(0, 3, 1, 2)


def _channels_last(like: Tensor, channels: int) -> Tensor:
    """Room for (N, ``channels``, H, W), channels_last."""
    n, _, h, w = like.shape
    return like.new_empty((n, h, w, channels)).permute(0, 3, 1, 2)


def _as_dense_takes(weight1: Tensor, pooled: Tensor) -> Tensor:
    """Layout and dtype in one copy, where one is needed: tiles of float32 beside half images would take twice the room
    that ``dense`` reckons with."""
    return weight1.to(
        pooled.dtype, memory_format=torch.channels_last if weight1.stride(1) != 1 else torch.preserve_format
    )


def _convolve(
    pooled: Tensor, weight1: Tensor, stride: int, groups: int, conv: Tensor, statistics_groups: int | None
) -> Tensor | None:
    padding = [weight1.size(2) // 2] * 4
    return dense(
        pooled, _as_dense_takes(weight1, pooled), None, (stride, stride), padding, (1, 1), groups, None, conv, None,
        statistics_groups=statistics_groups,
    )  # fmt: skip


@on_device
def lite_branch_backward(
    grad_output: Tensor, pooled: Tensor, conv: Tensor, statistics1: Tensor, statistics2: Tensor, weight1: Tensor,
    norm_weight1: Tensor | None, norm_bias1: Tensor | None, weight2: Tensor, norm_weight2: Tensor | None, stride: int,
    groups: int, activation: str, norm_groups1: int, norm_groups2: int, eps1: float, eps2: float, of_batch1: bool,
    of_batch2: bool, needed: Sequence[bool],
) -> tuple[Tensor, ...]:  # fmt: skip
    if _is_depthwise(weight1, groups):
        return reference.lite_branch_backward(
            grad_output, pooled, conv, statistics1, statistics2, weight1, norm_weight1, norm_bias1, weight2,
            norm_weight2, stride, groups, activation, norm_groups1, norm_groups2, eps1, eps2, of_batch1, of_batch2,
            needed,
        )  # fmt: skip
    need_pooled, need_weight1, need_scale1, need_bias1, need_weight2, need_scale2, need_bias2 = needed
    if conv.numel():
        conv = conv.permute(2, 3, 0, 1)
    else:
        _, conv = _room_for_conv(pooled, weight1, stride, False)
        _convolve(pooled, weight1, stride, groups, conv, None)
    norm1 = AppliedNorm(statistics1, norm_weight1, norm_bias1, norm_groups1, eps1)
    norm2 = AppliedNorm(statistics2, norm_weight2, None, norm_groups2, eps2)

    second = _channels_last(conv, weight2.size(0))
    need_below, need_affine2 = any(needed[:5]), need_scale2 or need_bias2
    partial, spans = product(
        conv, norm1, activation, weight2, norm_groups2, second, need_affine2 or of_batch2, norm2, grad_output
    )
    means2 = affine2 = None
    if partial is not None:
        means2, affine2 = merge_sums(
            partial, spans, norm_weight2, norm_groups2, of_batch2 and need_below, need_affine2
        )  # fmt: skip
    rest = (grad_output, second, norm2, means2, weight2, conv, norm1, activation)
    grad_weight2 = second_weight_gradient(*rest) if need_weight2 else None

    grad_pooled = grad_weight1 = affine1 = None
    if any(needed[:4]):
        need_conv, need_affine1 = need_pooled or need_weight1, need_scale1 or need_bias1
        grad_conv = _channels_last(conv, conv.size(1)) if need_conv else None
        partial, spans = gradient_of_activation(*rest, grad_conv, need_affine1 or (of_batch1 and need_conv))
        means1 = None
        if partial is not None:
            means1, affine1 = merge_sums(
                partial, spans, norm_weight1, norm_groups1, of_batch1 and need_conv, need_affine1
            )  # fmt: skip
        if grad_conv is not None:
            norm_backward(grad_conv, conv, norm1, means1)
            grad_pooled, grad_weight1 = _convolution_backward(
                grad_conv, pooled, weight1, stride, groups, need_pooled, need_weight1
            )
    grads = (grad_pooled, grad_weight1, *_affine(affine1), grad_weight2, *_affine(affine2))
    likes = (pooled, weight1, statistics1, statistics1, weight2, statistics2, statistics2)
    return tuple(g if need else like.new_empty(0) for g, like, need in zip(grads, likes, needed, strict=True))


def _affine(sums: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of a norm's weight and bias from the sums of g and of g x_hat."""
    return (None, None) if sums is None else (sums[1], sums[0])


def _convolution_backward(
    grad_conv: Tensor, pooled: Tensor, weight1: Tensor, stride: int, groups: int, need_pooled: bool, need_weight1: bool
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of the first convolution's input and weight."""
    window, layout = ((stride, stride), [weight1.size(2) // 2] * 4), memory_format(pooled)
    pixels = grad_conv.numel() // grad_conv.size(1)
    by_library = need_pooled and choose(weight1, *window, groups, pixels, pooled.dtype, backward=True) == LIBRARY
    grad_pooled = grad_weight1 = None
    if need_weight1 or by_library:
        grad_pooled, grad_weight1 = reference.convolution_backward(
            grad_conv, pooled, weight1, stride, groups, by_library, need_weight1
        )
    if by_library:
        grad_pooled = grad_pooled.contiguous(memory_format=layout)
    elif need_pooled:
        grad_pooled = torch.empty_like(pooled, memory_format=layout)
        dense_backward(
            grad_conv, _as_dense_takes(weight1, pooled), None, *window, (1, 1), groups, None, grad_pooled, None
        )
    return grad_pooled, grad_weight1


OPERATORS = {"lite_branch": lite_branch, "lite_branch_backward": lite_branch_backward}
