"""``tinytl::frozen_conv_add``: a residual block's last convolution, its shortcut and the activation behind the sum.

    output = activation(conv2d(input, weight) + bias + shortcut)

Kept for backward: as :func:`tinytl_kernels.ops.frozen_conv`, the weight by reference and one bit an output element.
Neither the convolution's result nor the sum exists beside the output. The shortcut's gradient is the output's where the
bit says so, and the convolution's gradients are taken from it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tinytl_kernels.core.activations import BIT_MASK, LEAKY_SLOPE, mask_size
from tinytl_kernels.core.geometry import IntOrPair, four_paddings, pair
from tinytl_kernels.core.layout import memory_format
from tinytl_kernels.ops.activation import activation_backward
from tinytl_kernels.ops.frozen_conv import check_conv, conv_output_size, frozen_conv_backward
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


def _check(
    input, shortcut, weight, bias, stride, padding, dilation, groups, activation, needs_mask, weight_scale=None
) -> None:
    if activation is not None and activation not in BIT_MASK:
        raise ValueError(f"activation: expected None or one of {', '.join(map(repr, BIT_MASK))}, got {activation!r}")
    check_conv(input, weight, bias, stride, padding, dilation, groups, activation, needs_mask, weight_scale)
    size = _output_size(input, weight, stride, padding, dilation)
    if tuple(shortcut.shape) != size:
        raise ValueError(f"shortcut: expected the shape of the output {size}, got {tuple(shortcut.shape)}")
    if shortcut.dtype != input.dtype:
        raise ValueError(f"shortcut: expected the dtype of input, {input.dtype}, got {shortcut.dtype}")


def _output_size(input, weight, stride, padding, dilation) -> tuple[int, ...]:
    sides = conv_output_size(input.shape, weight.shape, stride, padding, dilation)
    return (input.size(0), weight.size(0), *sides)


def _fake(input, shortcut, weight, bias, stride, padding, dilation, groups, activation, needs_mask, weight_scale=None):
    size = _output_size(input, weight, stride, padding, dilation)
    output = input.new_empty(size).to(memory_format=memory_format(input, weight))
    kept = mask_size(size) if activation is not None and needs_mask else 0
    return output, input.new_empty(kept, dtype=torch.uint8)


def _setup_context(ctx, inputs, output) -> None:
    input, _, weight, bias, stride, padding, dilation, groups, activation, needs_mask, weight_scale = inputs
    if weight.requires_grad or (weight_scale is not None and weight_scale.requires_grad):
        raise RuntimeError(
            "weight: a frozen convolution computes no weight gradient, but its weight has requires_grad=True. "
            "Keep it frozen, or train it in the plain PyTorch model that tinytl_kernels.to_torch(model) gives."
        )
    out, mask = output
    ctx.mark_non_differentiable(mask)
    if activation is not None and not needs_mask:
        raise RuntimeError("needs_mask: a gradient can be asked for, so expected True, got False")
    ctx.save_for_backward(weight, mask, weight_scale)
    ctx.input_size = input.shape
    ctx.geometry = (stride, padding, dilation, groups)
    ctx.activation = activation
    ctx.channels_last = memory_format(out) is torch.channels_last
    ctx.bias_dtype = None if bias is None else bias.dtype


def _backward(ctx, grad_output, _grad_mask):
    weight, mask, weight_scale = ctx.saved_tensors
    need_input, need_shortcut, _, need_bias = ctx.needs_input_grad[:4]
    activation = ctx.activation
    if ctx.channels_last:  # an expanded gradient would fall out of it, see ops.activation
        grad_output = grad_output.contiguous(memory_format=torch.channels_last)
    if activation is not None and need_shortcut:
        grad_output = activation_backward(grad_output, mask, activation, LEAKY_SLOPE)
        activation, mask = None, mask.new_empty(0)
    grad_input = grad_bias = None
    if need_input or need_bias:
        grad_input, grad_bias = frozen_conv_backward(
            grad_output, weight, mask, ctx.input_size, *ctx.geometry, activation, ctx.channels_last, need_input,
            need_bias, weight_scale,
        )  # fmt: skip
    return (
        grad_input if need_input else None,
        grad_output if need_shortcut else None,
        None,
        grad_bias.to(ctx.bias_dtype) if need_bias else None,
        *[None] * 7,
    )


def _cast(dtype: torch.dtype, args: tuple) -> tuple:
    # The weight stays in float32, as in every frozen operator; what is added has the dtype of what it is added to.
    input, shortcut, *others = args
    return (autocast_to(dtype, input), autocast_to(dtype, shortcut), *others)


_frozen_conv_add = define_operator(
    "frozen_conv_add(Tensor input, Tensor shortcut, Tensor weight, Tensor? bias, SymInt[] stride, SymInt[] padding,"
    " SymInt[] dilation, SymInt groups, str? activation, bool needs_mask, Tensor? weight_scale=None)"
    " -> (Tensor output, Tensor mask)",
    check=_check,
    fake=_fake,
    setup_context=_setup_context,
    backward=_backward,
    cast=_cast,
)
