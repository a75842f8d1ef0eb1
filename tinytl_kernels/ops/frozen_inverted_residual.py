"""``tinytl::frozen_inverted_residual``: a whole MobileNet block as one operator.

    expanded  = f(input  *1x1  expand_weight  + expand_bias)           (or the input itself: expand ratio 1)
    filtered  = f(expanded *kxk depthwise_weight + depthwise_bias)
    output    = filtered *1x1 project_weight + project_bias  (+ input)

Kept for backward: the weights (by reference) and the two bit masks. A backend may compute it without the expanded
activations ever reaching memory; the reference makes them for a few images at a time.

Two ports join a lite residual (TinyTL, section 3.2) without a second pass over the input: ``pooled``, the 2x2 average
of the input, comes out beside the output, and its gradient goes in with the output's.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tinytl_kernels.core.activations import BIT_MASK, mask_size
from tinytl_kernels.core.dtypes import accumulation_dtype, check_companion, check_shape
from tinytl_kernels.core.geometry import IntOrPair, four_paddings, output_length, pair
from tinytl_kernels.core.layout import format_of, memory_format
from tinytl_kernels.core.quantization import check_weight
from tinytl_kernels.ops.avg_pool import check_image
from tinytl_kernels.ops.library import cast_input, define_operator, gradient_needed


def frozen_inverted_residual(
    input: Tensor,
    expand_weight: Tensor | None,
    expand_bias: Tensor | None,
    depthwise_weight: Tensor,
    depthwise_bias: Tensor | None,
    project_weight: Tensor,
    project_bias: Tensor | None,
    stride: IntOrPair = 1,
    padding: IntOrPair = 1,
    activation: str | None = "relu6",
    residual: bool = False,
    *,
    expand_scale: Tensor | None = None,
    depthwise_scale: Tensor | None = None,
    project_scale: Tensor | None = None,
) -> Tensor:
    """Expand, filter depthwise, project; with frozen weights and trainable biases.

    Args:
        input: (N, C, H, W), floating point.
        expand_weight: (M, C, 1, 1), or None for a block without expansion (M = C).
        expand_bias: (M,) or None.
        depthwise_weight: (M, 1, kH, kW).
        depthwise_bias: (M,) or None.
        project_weight: (O, M, 1, 1).
        project_bias: (O,) or None. Weights and biases have the input's dtype, or float32 beside a half one; weights may
            also be in 8 bits.
        stride, padding: of the depthwise convolution; padding int, pair or (top, bottom, left, right).
        activation: None, ``"relu"``, ``"relu6"``, ``"leaky_relu"`` or ``"hardsigmoid"``, after the first two.
        residual: add the input to the output (needs stride 1, O = C and a size that stays).
        expand_scale, depthwise_scale, project_scale: of a weight in 8 bits, float32: (output channels,) for int8, the
            codebook (256,) for uint8; see :func:`frozen_conv`.

    Returns:
        (N, O, H', W') in the dtype of ``input``; ``channels_last`` if ``input`` is.

    Raises:
        ValueError: shapes, dtypes or numbers do not fit; the message names the argument.
        RuntimeError: a weight requires a gradient, or a second derivative is asked for.

    Example:
        >>> import torch
        >>> from tinytl_kernels import ops
        >>> x, w1, w2, w3 = (torch.randn(s) for s in [(2, 8, 9, 9), (48, 8, 1, 1), (48, 1, 3, 3), (8, 48, 1, 1)])
        >>> ops.frozen_inverted_residual(x, w1, None, w2, None, w3, None, residual=True).shape
        torch.Size([2, 8, 9, 9])
    """
    return _call(
        input, expand_weight, expand_bias, depthwise_weight, depthwise_bias, project_weight, project_bias,
        stride, padding, activation, residual, False, expand_scale, depthwise_scale, project_scale,
    )[0]  # fmt: skip


def frozen_inverted_residual_pooled(
    input: Tensor,
    expand_weight: Tensor | None,
    expand_bias: Tensor | None,
    depthwise_weight: Tensor,
    depthwise_bias: Tensor | None,
    project_weight: Tensor,
    project_bias: Tensor | None,
    stride: IntOrPair = 1,
    padding: IntOrPair = 1,
    activation: str | None = "relu6",
    residual: bool = False,
    *,
    expand_scale: Tensor | None = None,
    depthwise_scale: Tensor | None = None,
    project_scale: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """As :func:`frozen_inverted_residual`; returns (output, the 2x2 average pooling of ``input``).

    The pooled image is (N, C, floor(H / 2), floor(W / 2)); H and W must be at least 2.
    """
    return _call(
        input, expand_weight, expand_bias, depthwise_weight, depthwise_bias, project_weight, project_bias,
        stride, padding, activation, residual, True, expand_scale, depthwise_scale, project_scale,
    )  # fmt: skip


def _call(
    input, expand_weight, expand_bias, depthwise_weight, depthwise_bias, project_weight, project_bias,
    stride, padding, activation, residual, want_pooled, expand_scale, depthwise_scale, project_scale,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    output, _, _, pooled = _frozen_inverted_residual(
        input, expand_weight, expand_bias, depthwise_weight, depthwise_bias, project_weight, project_bias,
        pair(stride, "stride"), four_paddings(padding), activation, residual,
        gradient_needed(input, expand_bias, depthwise_bias, project_bias), want_pooled,
        expand_scale, depthwise_scale, project_scale,
    )  # fmt: skip
    return output, pooled


def check_block(
    input, expand_weight, expand_bias, depthwise_weight, depthwise_bias, project_weight, project_bias,
    stride, padding, activation, residual, needs_masks, want_pooled,
    expand_scale=None, depthwise_scale=None, project_scale=None,
) -> None:  # fmt: skip
    check_image(input)
    if activation is not None and activation not in BIT_MASK:
        raise ValueError(f"activation: expected None or one of {', '.join(map(repr, BIT_MASK))}, got {activation!r}")
    channels, hidden, out = input.shape[1], depthwise_weight.shape[0], project_weight.shape[0]
    if expand_weight is None:
        if channels != hidden:
            raise ValueError(f"depthwise_weight: without expand_weight expected {channels} channels, got {hidden}")
        if expand_bias is not None or expand_scale is not None:
            name = "expand_bias" if expand_bias is not None else "expand_scale"
            raise ValueError(f"{name}: expected None as there is no expand_weight")
    for name, weight, shape, scale in (
        ("depthwise_weight", depthwise_weight, (hidden, 1, *depthwise_weight.shape[2:]), depthwise_scale),
        ("project_weight", project_weight, (out, hidden, 1, 1), project_scale),
        ("expand_weight", expand_weight, (hidden, channels, 1, 1), expand_scale),
    ):
        if weight is not None:
            check_shape(name, weight, shape)
            check_weight(name, weight, scale, input)
    for name, bias, size in (
        ("expand_bias", expand_bias, hidden),
        ("depthwise_bias", depthwise_bias, hidden),
        ("project_bias", project_bias, out),
    ):
        if bias is not None:
            check_shape(name, bias, (size,))
            check_companion(name, bias, input)
    if len(stride) != 2 or len(padding) != 4 or min(stride) < 1 or min(padding) < 0:
        raise ValueError(f"stride, padding: expected 2 and 4 numbers, got {tuple(stride)}, {tuple(padding)}")
    height, width = block_output_size(input.shape, depthwise_weight.shape, stride, padding)
    if height < 1 or width < 1:
        raise ValueError(f"input: {tuple(input.shape[2:])} is smaller than the kernel")
    if residual and input.shape[1:] != (out, height, width):
        raise ValueError(
            f"residual: the input {tuple(input.shape[1:])} cannot be added to the output {(out, height, width)}"
        )
    if want_pooled and (input.shape[2] < 2 or input.shape[3] < 2):
        raise ValueError(f"input: expected at least 2 x 2 pixels to pool, got {tuple(input.shape[2:])}")


def block_output_size(input_size, depthwise_size, stride, padding) -> tuple[int, int]:
    """Height and width of the output."""
    top, bottom, left, right = padding
    return (
        output_length(input_size[2], depthwise_size[2], stride[0], top, bottom, 1),
        output_length(input_size[3], depthwise_size[3], stride[1], left, right, 1),
    )


def _fake(
    input, expand_weight, expand_bias, depthwise_weight, depthwise_bias, project_weight, project_bias,
    stride, padding, activation, residual, needs_masks, want_pooled,
    expand_scale=None, depthwise_scale=None, project_scale=None,
):  # fmt: skip
    n, c, h, w = input.shape
    layout = memory_format(input)
    height, width = block_output_size(input.shape, depthwise_weight.shape, stride, padding)
    hidden = depthwise_weight.size(0)
    masks = needs_masks and activation is not None
    output = input.new_empty((n, project_weight.size(0), height, width)).to(memory_format=layout)
    expand_size = mask_size((n, hidden, h, w)) if masks and expand_weight is not None else 0
    depthwise_size = mask_size((n, hidden, height, width)) if masks else 0
    pooled = input.new_empty((n, c, h // 2, w // 2)).to(memory_format=layout) if want_pooled else input.new_empty(0)
    return (
        output,
        input.new_empty(expand_size, dtype=torch.uint8),
        input.new_empty(depthwise_size, dtype=torch.uint8),
        pooled,
    )


def _setup_context(ctx, inputs, output) -> None:
    (
        input, expand_weight, _expand_bias, depthwise_weight, _depthwise_bias, project_weight, _project_bias,
        stride, padding, activation, residual, needs_masks, want_pooled, *scales,
    ) = inputs  # fmt: skip
    _, expand_mask, depthwise_mask, pooled = output
    weights = (expand_weight, depthwise_weight, project_weight)
    for name, *frozen in zip(("expand", "depthwise", "project"), weights, scales, strict=True):
        if any(tensor is not None and tensor.requires_grad for tensor in frozen):
            raise RuntimeError(
                f"{name}_weight: a frozen block computes no weight gradient, but this has requires_grad=True. Keep it "
                "frozen, or train it in the plain PyTorch model that tinytl_kernels.to_torch(model) gives."
            )
    if activation is not None and not needs_masks:
        raise RuntimeError("needs_masks: a gradient can be asked for, so expected True, got False")
    ctx.mark_non_differentiable(expand_mask, depthwise_mask)
    if not want_pooled:
        ctx.mark_non_differentiable(pooled)
    # The pooled image is often not used: no zeros are made for its gradient then.
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*weights, expand_mask, depthwise_mask, *scales)
    ctx.input_size = input.shape
    ctx.geometry = (stride, padding, activation, residual, memory_format(input) is torch.channels_last)
    ctx.bias_dtypes = [None if b is None else b.dtype for b in (inputs[2], inputs[4], inputs[6])]


def _backward(ctx, grad_output, _grad_expand_mask, _grad_depthwise_mask, grad_pooled):
    expand_weight, depthwise_weight, project_weight, expand_mask, depthwise_mask, *scales = ctx.saved_tensors
    if grad_output is None:
        n = ctx.input_size[0]
        stride, padding = ctx.geometry[:2]
        size = (n, project_weight.size(0), *block_output_size(ctx.input_size, depthwise_weight.shape, stride, padding))
        grad_output = grad_pooled.new_zeros(size)
    needed = [ctx.needs_input_grad[i] for i in (0, 2, 4, 6)]
    grad_input, *grad_biases = _frozen_inverted_residual_backward(
        grad_output, grad_pooled, expand_weight, depthwise_weight, project_weight, expand_mask, depthwise_mask,
        ctx.input_size, *ctx.geometry, needed, *scales,
    )  # fmt: skip
    expand, depthwise, project = (
        grad.to(dtype) if need else None
        for grad, dtype, need in zip(grad_biases, ctx.bias_dtypes, needed[1:], strict=True)
    )
    return (grad_input if needed[0] else None, None, expand, None, depthwise, None, project, *[None] * 9)


_frozen_inverted_residual = define_operator(
    "frozen_inverted_residual(Tensor input, Tensor? expand_weight, Tensor? expand_bias, Tensor depthwise_weight,"
    " Tensor? depthwise_bias, Tensor project_weight, Tensor? project_bias, SymInt[] stride, SymInt[] padding,"
    " str? activation, bool residual, bool needs_masks, bool want_pooled, Tensor? expand_scale=None,"
    " Tensor? depthwise_scale=None, Tensor? project_scale=None)"
    " -> (Tensor output, Tensor expand_mask, Tensor depthwise_mask, Tensor pooled)",
    check=check_block,
    fake=_fake,
    setup_context=_setup_context,
    backward=_backward,
    cast=cast_input,
)


def _fake_backward(
    grad_output, grad_pooled, expand_weight, depthwise_weight, project_weight, expand_mask, depthwise_mask,
    input_size, stride, padding, activation, residual, channels_last, needed,
    expand_scale=None, depthwise_scale=None, project_scale=None,
):  # fmt: skip
    accumulate = accumulation_dtype(grad_output.dtype)
    grad_input = grad_output.new_empty(input_size if needed[0] else 0)
    if needed[0]:
        grad_input = grad_input.to(memory_format=format_of(channels_last))
    hidden, out = depthwise_weight.size(0), project_weight.size(0)
    sizes = [size if need else 0 for size, need in zip((hidden, hidden, out), needed[1:], strict=True)]
    return (grad_input, *(grad_output.new_empty(size, dtype=accumulate) for size in sizes))


_frozen_inverted_residual_backward = define_operator(
    # needed: input, expand_bias, depthwise_bias, project_bias. Bias gradients are accumulated, and returned, in
    # float32 (float64 for float64); what is not needed has no elements.
    "frozen_inverted_residual_backward(Tensor grad_output, Tensor? grad_pooled, Tensor? expand_weight,"
    " Tensor depthwise_weight, Tensor project_weight, Tensor expand_mask, Tensor depthwise_mask, SymInt[] input_size,"
    " SymInt[] stride, SymInt[] padding, str? activation, bool residual, bool channels_last, bool[] needed,"
    " Tensor? expand_scale=None, Tensor? depthwise_scale=None, Tensor? project_scale=None)"
    " -> (Tensor grad_input, Tensor grad_expand_bias, Tensor grad_depthwise_bias, Tensor grad_project_bias)",
    check=lambda *args: None,
    fake=_fake_backward,
)
