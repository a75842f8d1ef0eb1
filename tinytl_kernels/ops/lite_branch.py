"""``tinytl::lite_branch``: what follows the pooling of a lite residual, all of it trained, as one operator.

    conv   = pooled *kxk weight1                    (grouped)
    output = norm2(f(norm1(conv)) *1x1 weight2)     TinyTL, section 3.2, figure 3

Kept for backward: the pooled input and the weights by reference, the statistics of the norms, and, with ``keep_conv``,
``conv``: its computation is nine tenths of the branch's. The rest is computed again.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from tinytl_kernels.core.dtypes import accumulation_dtype, check_companion, check_shape
from tinytl_kernels.core.layout import format_of, memory_format
from tinytl_kernels.ops.avg_pool import check_image
from tinytl_kernels.ops.library import autocast_to, define_operator, gradient_needed

ACTIVATIONS = ("relu", "relu6")


class Norm(NamedTuple):
    """A normalisation layer, as :func:`lite_branch` takes it.

    Args:
        weight, bias: (C,) or None.
        running_mean, running_var: (C,) statistics to use, or both None: those of this batch.
        groups: 0 for a BatchNorm, else the groups of a GroupNorm.
        eps: added to the variance.
    """

    weight: Tensor | None
    bias: Tensor | None
    running_mean: Tensor | None = None
    running_var: Tensor | None = None
    groups: int = 0
    eps: float = 1e-5


def lite_branch(
    pooled: Tensor,
    weight1: Tensor,
    norm1: Norm,
    weight2: Tensor,
    norm2: Norm,
    stride: int = 1,
    groups: int = 1,
    activation: str = "relu",
    keep_conv: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """Grouped k x k convolution, norm, activation, 1x1 convolution, norm. All differentiable but statistics.

    Args:
        pooled: (N, C, H, W), floating point.
        weight1: (M, C / groups, k, k), k odd; padded by ``k // 2``.
        norm1: of M channels.
        weight2: (O, M, 1, 1). Weights and norms have the dtype of ``pooled``, or float32 beside a half one.
        norm2: of O channels.
        stride, groups: of the first convolution.
        activation: ``"relu"`` or ``"relu6"``.
        keep_conv: keep the first convolution's result for backward, N * M * H' * W' elements; False computes it again.

    Returns:
        The output, (N, O, ceil(H / stride), ceil(W / stride)) in the dtype of ``pooled``, ``channels_last`` where
        ``pooled`` is; and the statistics of the two norms, (2, C) or (2, N * norm groups): mean and biased variance,
        float32 (float64 for float64).

    Raises:
        ValueError: shapes, dtypes or numbers do not fit; the message names the argument.
        RuntimeError: a second derivative is asked for.

    Example:
        >>> import torch
        >>> from tinytl_kernels.ops.lite_branch import Norm, lite_branch
        >>> x, w1, w2 = torch.randn(2, 16, 7, 7), torch.randn(16, 8, 5, 5), torch.randn(24, 16, 1, 1)
        >>> output, _, _ = lite_branch(x, w1, Norm(None, None), w2, Norm(None, None), groups=2)
        >>> output.shape
        torch.Size([2, 24, 7, 7])
    """
    tensors = (pooled, weight1, norm1.weight, norm1.bias, weight2, norm2.weight, norm2.bias)
    output, _, *statistics = _lite_branch(
        pooled, weight1, *norm1[:4], weight2, *norm2[:4], stride, groups, activation,
        norm1.groups, norm2.groups, norm1.eps, norm2.eps, keep_conv and gradient_needed(*tensors),
    )  # fmt: skip
    return output, *statistics


def check_branch(
    pooled, weight1, norm_weight1, norm_bias1, running_mean1, running_var1,
    weight2, norm_weight2, norm_bias2, running_mean2, running_var2,
    stride, groups, activation, norm_groups1, norm_groups2, eps1, eps2, keep_conv,
) -> None:  # fmt: skip
    check_image(pooled)
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation: expected one of {', '.join(map(repr, ACTIVATIONS))}, got {activation!r}")
    if stride < 1 or groups < 1:
        raise ValueError(f"stride, groups: expected at least 1, got {stride}, {groups}")
    inner, outer, k, channels = weight1.shape[0], weight2.shape[0], weight1.shape[-1], pooled.shape[1]
    if channels % groups or inner % groups or k % 2 == 0:
        raise ValueError(
            f"weight1: expected an odd kernel and {groups} groups that divide its {inner} channels and the {channels} "
            f"of pooled, got {tuple(weight1.shape)}"
        )
    if 0 in pooled.shape:
        raise ValueError(f"pooled: expected at least one value to normalise, got {tuple(pooled.shape)}")
    for name, tensor, shape in (
        ("weight1", weight1, (inner, channels // groups, k, k)),
        ("norm1.weight", norm_weight1, (inner,)),
        ("norm1.bias", norm_bias1, (inner,)),
        ("norm1.running_mean", running_mean1, (inner,)),
        ("norm1.running_var", running_var1, (inner,)),
        ("weight2", weight2, (outer, inner, 1, 1)),
        ("norm2.weight", norm_weight2, (outer,)),
        ("norm2.bias", norm_bias2, (outer,)),
        ("norm2.running_mean", running_mean2, (outer,)),
        ("norm2.running_var", running_var2, (outer,)),
    ):
        if tensor is not None:
            check_shape(name, tensor, shape)
            check_companion(name, tensor, pooled)
    _check_norm("norm1", inner, norm_groups1, running_mean1, running_var1)
    _check_norm("norm2", outer, norm_groups2, running_mean2, running_var2)


def _check_norm(name, channels, groups, running_mean, running_var) -> None:
    if groups < 0 or (groups and channels % groups):
        raise ValueError(f"{name}.groups: expected 0 or a divisor of its {channels} channels, got {groups}")
    if (running_mean is None) != (running_var is None) or (groups and running_mean is not None):
        raise ValueError(f"{name}: expected both running statistics or neither, and none for a GroupNorm")


def _fake(
    pooled, weight1, norm_weight1, norm_bias1, running_mean1, running_var1,
    weight2, norm_weight2, norm_bias2, running_mean2, running_var2,
    stride, groups, activation, norm_groups1, norm_groups2, eps1, eps2, keep_conv,
):  # fmt: skip
    n, _, h, w = pooled.shape
    inner, outer = weight1.size(0), weight2.size(0)
    height, width = (h - 1) // stride + 1, (w - 1) // stride + 1
    output = pooled.new_empty((n, outer, height, width)).to(memory_format=memory_format(pooled))
    conv = pooled.new_empty((height, width, n, inner) if keep_conv else 0)
    dtype = accumulation_dtype(pooled.dtype)
    sizes = (n * norm_groups1 or inner, n * norm_groups2 or outer)
    return output, conv, *(pooled.new_empty((2, size), dtype=dtype) for size in sizes)


def _setup_context(ctx, inputs, output) -> None:
    pooled, weight1, norm_weight1, norm_bias1, running_mean1, _, weight2, norm_weight2, norm_bias2, running_mean2 = (
        inputs[:10]
    )
    *_, stride, groups, activation, norm_groups1, norm_groups2, eps1, eps2, _ = inputs
    _, conv, statistics1, statistics2 = output
    ctx.mark_non_differentiable(conv, statistics1, statistics2)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(
        pooled, conv, statistics1, statistics2, weight1, norm_weight1, norm_bias1, weight2, norm_weight2
    )
    of_batch = (running_mean1 is None, running_mean2 is None)
    ctx.options = (stride, groups, activation, norm_groups1, norm_groups2, eps1, eps2, *of_batch)
    trained = (norm_weight1, norm_bias1, norm_weight2, norm_bias2)
    ctx.dtypes = [None if t is None else t.dtype for t in trained]


def _backward(ctx, grad_output, *_):
    nothing = [None] * 19
    if grad_output is None:
        return tuple(nothing)
    needed = [ctx.needs_input_grad[i] for i in _DIFFERENTIABLE]
    grads = _lite_branch_backward(grad_output, *ctx.saved_tensors, *ctx.options, needed)
    scale1, bias1, scale2, bias2 = ctx.dtypes
    dtypes = (None, None, scale1, bias1, None, scale2, bias2)
    for i, grad, dtype, need in zip(_DIFFERENTIABLE, grads, dtypes, needed, strict=True):
        if need:
            nothing[i] = grad if dtype is None else grad.to(dtype)
    return tuple(nothing)


# Where pooled, weight1, norm_weight1, norm_bias1, weight2, norm_weight2, norm_bias2 stand in the schema.
_DIFFERENTIABLE = (0, 1, 2, 3, 6, 7, 8)


def _cast(dtype: torch.dtype, args: tuple) -> tuple:
    pooled, weight1, *norm1 = args[:6]
    weight2, *rest = args[6:]
    cast = (autocast_to(dtype, tensor) for tensor in (pooled, weight1, weight2))
    pooled, weight1, weight2 = cast
    return (pooled, weight1, *norm1, weight2, *rest)


_lite_branch = define_operator(
    # conv: (H', W', N, M), empty without keep_conv; statistics: mean and biased variance.
    "lite_branch(Tensor pooled, Tensor weight1, Tensor? norm_weight1, Tensor? norm_bias1, Tensor? running_mean1,"
    " Tensor? running_var1, Tensor weight2, Tensor? norm_weight2, Tensor? norm_bias2, Tensor? running_mean2,"
    " Tensor? running_var2, int stride, int groups, str activation, int norm_groups1, int norm_groups2, float eps1,"
    " float eps2, bool keep_conv) -> (Tensor output, Tensor conv, Tensor statistics1, Tensor statistics2)",
    check=check_branch,
    fake=_fake,
    setup_context=_setup_context,
    backward=_backward,
    cast=_cast,
)


def _fake_backward(
    grad_output, pooled, conv, statistics1, statistics2, weight1, norm_weight1, norm_bias1, weight2, norm_weight2,
    stride, groups, activation, norm_groups1, norm_groups2, eps1, eps2, of_batch1, of_batch2, needed,
):  # fmt: skip
    layout = format_of(memory_format(pooled) is torch.channels_last)
    inner, outer = weight1.size(0), weight2.size(0)
    images = (pooled.new_empty(pooled.shape).to(memory_format=layout), weight1, weight2)
    grad_pooled, grad_weight1, grad_weight2 = (
        torch.empty_like(like) if need else like.new_empty(0)
        for like, need in zip(images, (needed[0], needed[1], needed[4]), strict=True)
    )
    sizes = (inner * needed[2], inner * needed[3], outer * needed[5], outer * needed[6])
    scale1, bias1, scale2, bias2 = (statistics1.new_empty(size) for size in sizes)
    return grad_pooled, grad_weight1, scale1, bias1, grad_weight2, scale2, bias2


_lite_branch_backward = define_operator(
    # The gradients of norms are float32 (float64 for float64).
    "lite_branch_backward(Tensor grad_output, Tensor pooled, Tensor conv, Tensor statistics1, Tensor statistics2,"
    " Tensor weight1, Tensor? norm_weight1, Tensor? norm_bias1, Tensor weight2, Tensor? norm_weight2, int stride,"
    " int groups, str activation, int norm_groups1, int norm_groups2, float eps1, float eps2, bool of_batch1,"
    " bool of_batch2, bool[] needed) -> (Tensor grad_pooled, Tensor grad_weight1, Tensor grad_norm_weight1,"
    " Tensor grad_norm_bias1, Tensor grad_weight2, Tensor grad_norm_weight2, Tensor grad_norm_bias2)",
    check=lambda *args: None,
    fake=_fake_backward,
)
