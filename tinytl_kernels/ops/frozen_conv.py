"""``tinytl::frozen_conv``: convolution with a frozen weight, fused bias and activation, that never keeps its input.

    output = activation(conv2d(input, weight) + bias)                   TinyTL, section 3.1: dL/db needs no activation

Kept for backward: the weight (by reference, and in 8 bits where it is) and what the activation needs (a bit mask for
the ReLU family). Never the input, never the output. There is no gradient for the weight.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tinytl_kernels.core.activations import BIT_MASK, FULL_VALUE, check_activation, mask_size
from tinytl_kernels.core.dtypes import accumulation_dtype, check_companion, check_shape
from tinytl_kernels.core.geometry import IntOrPair, four_paddings, output_length, pair
from tinytl_kernels.core.layout import format_of, memory_format
from tinytl_kernels.core.quantization import check_weight
from tinytl_kernels.ops.library import (
    cast_input,
    define_operator,
    gradient_needed,
    no_second_derivative,
)


def frozen_conv(
    input: Tensor,
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
    """2-D convolution with a frozen weight, a trainable bias and an activation.

    Differentiable in ``input`` and ``bias``. The bias gradient and the input gradient come out of one pass over the
    gradient of the output; whichever is not needed is not computed.

    Args:
        input: (N, C, H, W), floating point, any strides.
        weight: (O, C / groups, kH, kW), in the dtype of ``input``, or float32 beside a half-precision input (it is
            rounded on the way in and stays float32 in memory), or in 8 bits with ``weight_scale``. Must not require a
            gradient.
        bias: (O,), in the dtype of ``input`` or float32; its gradient comes in its own dtype.
        stride, dilation: int or (height, width).
        padding: int, (height, width) or (top, bottom, left, right), zeros.
        groups: ``C`` and ``O`` are divided into this many independent groups.
        activation: None, ``"relu"``, ``"relu6"``, ``"leaky_relu"`` (slope 0.01), ``"hardsigmoid"`` (these keep one
            bit an output element), ``"hardswish"``, ``"silu"``, ``"gelu"``, ``"gelu_tanh"`` (these keep the value
            before the activation).
        weight_scale: of a weight in 8 bits, float32. (O,) for int8, which stands for ``weight * weight_scale`` by
            output channel; (256,) for uint8, which are indices into this codebook. The gradients are exact for the
            weight that the 8 bits stand for. It is as frozen as the weight.

    Returns:
        (N, O, H', W') in the dtype of ``input``; ``channels_last`` if ``input`` or ``weight`` is, else contiguous.

    Raises:
        RuntimeError: ``weight`` requires a gradient, or a second derivative is asked for.
        ValueError: shapes, dtypes or numbers do not fit; the message names the argument.

    Example:
        >>> import torch
        >>> from tinytl_kernels import ops
        >>> x, w = torch.randn(2, 8, 14, 14, requires_grad=True), torch.randn(16, 8, 3, 3)
        >>> ops.frozen_conv(x, w, torch.zeros(16), stride=2, padding=1, activation="relu6").shape
        torch.Size([2, 16, 7, 7])
    """
    output, _ = _frozen_conv(
        input,
        weight,
        bias,
        pair(stride, "stride"),
        four_paddings(padding),
        pair(dilation, "dilation"),
        groups,
        activation,
        gradient_needed(input, bias),
        weight_scale,
    )
    return output


def check_conv(
    input, weight, bias, stride, padding, dilation, groups, activation, needs_saved, weight_scale=None
) -> None:
    check_activation(activation)
    # Asked for once: a small convolution takes as long as these checks.
    size, weight_size = input.shape, weight.shape
    if len(size) != 4:
        raise ValueError(f"input: expected (N, C, H, W), got shape {tuple(size)}")
    if len(weight_size) != 4:
        raise ValueError(f"weight: expected (O, C / groups, kH, kW), got shape {tuple(weight_size)}")
    if not input.dtype.is_floating_point:
        raise ValueError(f"input: expected a floating point dtype, got {input.dtype}")
    check_weight("weight", weight, weight_scale, input)
    if groups < 1 or weight_size[0] % groups:
        raise ValueError(f"groups: expected a divisor of the {weight_size[0]} output channels, got {groups}")
    if size[1] != weight_size[1] * groups:
        raise ValueError(
            f"input: expected {weight_size[1] * groups} channels (weight {tuple(weight_size)}, groups {groups}), "
            f"got {size[1]} in shape {tuple(size)}"
        )
    if bias is not None:
        check_companion("bias", bias, input)
        check_shape("bias", bias, weight_size[:1])
    for name, values, least in (("stride", stride, 1), ("dilation", dilation, 1), ("padding", padding, 0)):
        expected = 4 if name == "padding" else 2
        if len(values) != expected or min(values) < least:
            raise ValueError(f"{name}: expected {expected} numbers of at least {least}, got {tuple(values)}")
    height, width = conv_output_size(size, weight_size, stride, padding, dilation)
    if height < 1 or width < 1:
        raise ValueError(
            f"input: {tuple(size[2:])} with padding {tuple(padding)} is smaller than the kernel "
            f"{tuple(weight_size[2:])} with dilation {tuple(dilation)}"
        )


def conv_output_size(input_size, weight_size, stride, padding, dilation) -> tuple[int, int]:
    top, bottom, left, right = padding
    return (
        output_length(input_size[2], weight_size[2], stride[0], top, bottom, dilation[0]),
        output_length(input_size[3], weight_size[3], stride[1], left, right, dilation[1]),
    )


def fake_conv(input, weight, bias, stride, padding, dilation, groups, activation, needs_saved, weight_scale=None):
    size = (input.size(0), weight.size(0), *conv_output_size(input.shape, weight.shape, stride, padding, dilation))
    output = input.new_empty(size).to(memory_format=memory_format(input, weight))
    if activation is None or not needs_saved:
        return output, input.new_empty(0, dtype=torch.uint8)
    if activation in BIT_MASK:
        return output, input.new_empty(mask_size(size), dtype=torch.uint8)
    return output, torch.empty_like(output)


def keep_for_backward(ctx, inputs, output) -> None:
    input, weight, bias, stride, padding, dilation, groups, activation, needs_saved, weight_scale = inputs
    if weight.requires_grad or (weight_scale is not None and weight_scale.requires_grad):
        raise RuntimeError(
            "weight: a frozen convolution computes no weight gradient, but its weight has requires_grad=True. "
            "Keep it frozen, or train it in the plain PyTorch model that tinytl_kernels.to_torch(model) gives."
        )
    out, saved = output
    ctx.mark_non_differentiable(saved)
    if activation is not None and not needs_saved:
        raise RuntimeError("needs_saved: a gradient can be asked for, so expected True, got False")
    # The weight is only read for the input gradient.
    ctx.save_for_backward(weight, saved, weight_scale)
    ctx.input_size = input.shape
    ctx.geometry = (stride, padding, dilation, groups)
    ctx.activation = activation
    ctx.channels_last = memory_format(out) is torch.channels_last
    ctx.bias_dtype = None if bias is None else bias.dtype


def _backward(ctx, grad_output, _grad_saved):
    if torch.is_grad_enabled() and ctx.activation in FULL_VALUE:
        # create_graph=True. The value before a smooth activation is kept as a number without history, so its part of a
        # second derivative could only be lost in silence.
        raise no_second_derivative("frozen_conv")
    need_input, need_bias = ctx.needs_input_grad[0], ctx.needs_input_grad[2]
    grad_input, grad_bias = conv_gradients(ctx, grad_output, ctx.saved_tensors, ctx.activation, need_input, need_bias)
    return (grad_input, None, grad_bias, *[None] * 7)


def conv_gradients(
    ctx, grad_output, kept, activation, need_input: bool, need_bias: bool
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of input and bias; None for what is not needed.

    Args:
        kept: The tensors of :func:`keep_for_backward`. Not read from ``ctx`` here: checkpointing allows that once.
    """
    weight, saved, weight_scale = kept
    grad_input, grad_bias = frozen_conv_backward(
        grad_output, weight, saved, ctx.input_size, *ctx.geometry, activation, ctx.channels_last, need_input, need_bias,
        weight_scale,
    )  # fmt: skip
    return grad_input if need_input else None, grad_bias.to(ctx.bias_dtype) if need_bias else None


_frozen_conv = define_operator(
    "frozen_conv(Tensor input, Tensor weight, Tensor? bias, SymInt[] stride, SymInt[] padding, SymInt[] dilation,"
    " SymInt groups, str? activation, bool needs_saved, Tensor? weight_scale=None) -> (Tensor, Tensor)",
    check=check_conv,
    fake=fake_conv,
    setup_context=keep_for_backward,
    backward=_backward,
    cast=cast_input,
)


def _check_backward(
    grad_output,
    weight,
    saved,
    input_size,
    stride,
    padding,
    dilation,
    groups,
    activation,
    channels_last,
    need_input,
    need_bias,
    weight_scale=None,
) -> None:
    check_activation(activation)
    check_weight("weight", weight, weight_scale, grad_output)
    size = (input_size[0], weight.size(0), *conv_output_size(input_size, weight.shape, stride, padding, dilation))
    check_shape("grad_output", grad_output, size)
    if saved.dtype == torch.uint8 and activation is not None and tuple(saved.shape) != mask_size(size):
        raise ValueError(f"saved: expected a bit mask of shape {mask_size(size)}, got {tuple(saved.shape)}")


def _fake_backward(
    grad_output,
    weight,
    saved,
    input_size,
    stride,
    padding,
    dilation,
    groups,
    activation,
    channels_last,
    need_input,
    need_bias,
    weight_scale=None,
):
    accumulate = accumulation_dtype(grad_output.dtype)
    grad_input = grad_output.new_empty(input_size if need_input else 0)
    if need_input:
        grad_input = grad_input.to(memory_format=format_of(channels_last))
    return grad_input, grad_output.new_empty(weight.size(0) if need_bias else 0, dtype=accumulate)


frozen_conv_backward = define_operator(
    # grad_bias is accumulated, and returned, in float32 (float64 for float64); what is not needed has no elements.
    "frozen_conv_backward(Tensor grad_output, Tensor weight, Tensor saved, SymInt[] input_size, SymInt[] stride,"
    " SymInt[] padding, SymInt[] dilation, SymInt groups, str? activation, bool channels_last, bool need_input,"
    " bool need_bias, Tensor? weight_scale=None) -> (Tensor grad_input, Tensor grad_bias)",
    check=_check_backward,
    fake=_fake_backward,
)
