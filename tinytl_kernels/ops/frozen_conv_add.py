"""``tinytl::frozen_conv_add``: a residual block's last convolution, its shortcut and the activation behind the sum.

    output = activation(conv2d(input, weight) + bias + shortcut)

Kept for backward: as :func:`tinytl_kernels.ops.frozen_conv`, the weight by reference and one bit an output element.
Neither the convolution's result nor the sum exists beside the output. The shortcut's gradient is the output's where the
bit says so, and the convolution's gradients are taken from it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tinytl_kernels.core.activations import BIT_MASK, LEAKY_SLOPE
from tinytl_kernels.core.geometry import IntOrPair, four_paddings, pair
from tinytl_kernels.ops.activation import activation_backward
from tinytl_kernels.ops.frozen_conv import (
    check_conv,
    conv_gradients,
    conv_output_size,
    fake_conv,
    keep_for_backward,
)
from tinytl_kernels.ops.library import autocast_to, define_operator, gradient_needed


def frozen_conv_add(
    input: Tensor,
    shortcut: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: IntOrPair = 1,
    padding: IntOrPair = 0,
    dilation: IntOrPair = 1,
    groups: int = 1,
    activation: str | None = None,
    *,
    weight_scale: Tensor | None = None,
) -> Tensor:
    """2-D convolution with a frozen weight and a trainable bias, plus a tensor, and an activation of the sum.

    Differentiable in ``input``, ``shortcut`` and ``bias``.

    Args:
        shortcut: (N, O, H', W'), in the dtype of ``input``.
        activation: None or one that keeps a bit: ``"relu"``, ``"relu6"``, ``"leaky_relu"`` (slope 0.01),
            ``"hardsigmoid"``.
        input, weight, bias, stride, padding, dilation, groups, weight_scale: as
            :func:`tinytl_kernels.ops.frozen_conv`.

    Returns:
        (N, O, H', W') in the dtype of ``input``; ``channels_last`` if ``input`` or ``weight`` is, else contiguous.

    Raises:
        RuntimeError: ``weight`` requires a gradient, or a second derivative is asked for.
        ValueError: shapes, dtypes or numbers do not fit; the message names the argument.

    Example:
        >>> import torch
        >>> from tinytl_kernels import ops
        >>> x, y, w = torch.randn(2, 8, 14, 14), torch.randn(2, 32, 14, 14), torch.randn(32, 8, 1, 1)
        >>> ops.frozen_conv_add(x, y, w, torch.zeros(32), activation="relu").shape
        torch.Size([2, 32, 14, 14])
    """
    output, _ = _frozen_conv_add(
        input,
        shortcut,
        weight,
        bias,
        pair(stride, "stride"),
        four_paddings(padding),
        pair(dilation, "dilation"),
        groups,
        activation,
        gradient_needed(input, shortcut, bias),
        weight_scale,
    )
    return output


def _check(input, shortcut, weight, bias, stride, padding, dilation, groups, activation, *others) -> None:
    if activation is not None and activation not in BIT_MASK:
        raise ValueError(f"activation: expected None or one of {', '.join(map(repr, BIT_MASK))}, got {activation!r}")
    check_conv(input, weight, bias, stride, padding, dilation, groups, activation, *others)
    sides = conv_output_size(input.shape, weight.shape, stride, padding, dilation)
    size = (input.size(0), weight.size(0), *sides)
    if tuple(shortcut.shape) != size:
        raise ValueError(f"shortcut: expected the shape of the output {size}, got {tuple(shortcut.shape)}")
    if shortcut.dtype != input.dtype:
        raise ValueError(f"shortcut: expected the dtype of input, {input.dtype}, got {shortcut.dtype}")


def _fake(input, shortcut, *others):
    return fake_conv(input, *others)


def _setup_context(ctx, inputs, output) -> None:
    input, _, *others = inputs
    keep_for_backward(ctx, (input, *others), output)


def _backward(ctx, grad_output, _grad_saved):
    weight, saved, weight_scale = ctx.saved_tensors
    activation = ctx.activation
    need_input, need_shortcut, _, need_bias = ctx.needs_input_grad[:4]
    if ctx.channels_last:  # an expanded gradient would fall out of it, see ops.activation
        grad_output = grad_output.contiguous(memory_format=torch.channels_last)
    if activation is not None and need_shortcut:
        grad_output = activation_backward(grad_output, saved, activation, LEAKY_SLOPE)
        activation, saved = None, saved.new_empty(0)
    grad_input = grad_bias = None
    if need_input or need_bias:
        kept = (weight, saved, weight_scale)
        grad_input, grad_bias = conv_gradients(ctx, grad_output, kept, activation, need_input, need_bias)
    return (grad_input, grad_output if need_shortcut else None, None, grad_bias, *[None] * 7)


def _cast(dtype: torch.dtype, args: tuple) -> tuple:
    # The weight stays in float32, as in every frozen operator; what is added has the dtype of what it is added to.
    input, shortcut, *others = args
    return (autocast_to(dtype, input), autocast_to(dtype, shortcut), *others)


_frozen_conv_add = define_operator(
    "frozen_conv_add(Tensor input, Tensor shortcut, Tensor weight, Tensor? bias, SymInt[] stride, SymInt[] padding,"
    " SymInt[] dilation, SymInt groups, str? activation, bool needs_saved, Tensor? weight_scale=None)"
    " -> (Tensor output, Tensor saved)",
    check=_check,
    fake=_fake,
    setup_context=_setup_context,
    backward=_backward,
    cast=_cast,
)
