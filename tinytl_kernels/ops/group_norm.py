"""``tinytl::group_norm_activation``: GroupNorm and the activation behind it in one operator, keeping one tensor.

    x_hat = (input - mean) * rstd          mean, rstd: over one group of channels of one image
    output = f(z),  z = weight * x_hat + bias

    g = f'(z) * grad_output                grad_bias = sum g,  grad_weight = sum g x_hat
    grad_input = rstd (weight g - E[weight g] - x_hat E[weight g x_hat])      E: mean over one group of one image

Kept for backward: the input by reference, mean and rstd; z and with it f'(z) are computed again, so that the activation
costs nothing, smooth or not. Not even a frozen GroupNorm can keep less: its input gradient needs the normalised input
(TinyTL's formula counts 0 for it). Inside a recomputed block (``tinytl_kernels.nn.recompute``) that input lives for
a few images at a time. ``code_bits=8`` keeps x_hat in 8 bits instead, a quarter of float32, and is not exact.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tinytl_kernels.core.activations import check_activation
from tinytl_kernels.core.derivative_code import check_code_bits
from tinytl_kernels.core.dtypes import accumulation_dtype, check_companion, check_shape
from tinytl_kernels.core.layout import format_of, memory_format
from tinytl_kernels.ops.library import define_operator, gradient_needed


def group_norm_activation(
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    activation: str | None = None,
    code_bits: int | None = None,
) -> Tensor:
    """Group normalisation followed by an activation. Differentiable in ``input``, ``weight`` and ``bias``.

    Args:
        input: (N, C, H, W), floating point, any strides.
        num_groups: a divisor of ``C``.
        weight, bias: (C,), in the dtype of ``input`` or float32; gradients come in their own dtype.
        eps: added to the variance.
        activation: None or one of the names of :func:`tinytl_kernels.ops.activation`.
        code_bits: None keeps the input by reference: gradients are exact. 8 keeps the normalised input as int8, one
            byte an element, in steps of ``max |x_hat| / 127`` of each group of each image. A kept value is off by at
            most half a step, about 0.016 where ``max |x_hat|`` is 4. Gradients come out about 1 % off (RMS-relative)
            with a smooth activation or none, and 5 % with a kinked one, whose derivative flips where z is nearer to
            the kink than that.

    Returns:
        (N, C, H, W) in the dtype and layout of ``input``. Sums are accumulated in float32 (float64 for float64).

    Raises:
        ValueError: shapes, dtypes or numbers do not fit; the message names the argument.
        RuntimeError: a second derivative is asked for.

    Example:
        >>> import torch
        >>> from tinytl_kernels import ops
        >>> ops.group_norm_activation(torch.randn(2, 16, 7, 7), 2, activation="relu6").shape
        torch.Size([2, 16, 7, 7])
    """
    check_code_bits(code_bits)
    needs_codes = code_bits is not None and gradient_needed(input, weight, bias)
    return _group_norm_activation(input, weight, bias, num_groups, eps, activation, needs_codes)[0]


def _check(input, weight, bias, num_groups, eps, activation, needs_codes) -> None:
    check_activation(activation)
    if input.dim() != 4:
        raise ValueError(f"input: expected (N, C, H, W), got shape {tuple(input.shape)}")
    if not input.is_floating_point():
        raise ValueError(f"input: expected a floating point dtype, got {input.dtype}")
    channels = input.size(1)
    if num_groups < 1 or channels % num_groups:
        raise ValueError(f"num_groups: expected a divisor of the {channels} channels, got {num_groups}")
    if eps < 0:
        raise ValueError(f"eps: expected at least 0, got {eps}")
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None:
            check_companion(name, tensor, input)
            check_shape(name, tensor, (channels,))


def _fake(input, weight, bias, num_groups, eps, activation, needs_codes):
    statistics = input.new_empty((input.size(0), num_groups), dtype=accumulation_dtype(input.dtype))
    output = input.new_empty(input.shape).to(memory_format=memory_format(input))
    codes = torch.empty_like(output, dtype=torch.int8) if needs_codes else input.new_empty(0, dtype=torch.int8)
    step = torch.empty_like(statistics) if needs_codes else statistics.new_empty(0)
    return output, statistics, torch.empty_like(statistics), codes, step


def _setup_context(ctx, inputs, output) -> None:
    input, weight, bias, num_groups, _eps, activation, needs_codes = inputs
    _, mean, rstd, codes, step = output
    ctx.mark_non_differentiable(mean, rstd, codes, step)
    ctx.set_materialize_grads(False)
    # With codes: x_hat = (codes - 0) * step.
    kept = (codes, torch.zeros_like(step), step) if needs_codes else (input, mean, rstd)
    ctx.save_for_backward(*kept, rstd, weight, bias)
    ctx.options = (num_groups, activation)
    ctx.channels_last = memory_format(input) is torch.channels_last
    ctx.dtypes = [None if t is None else t.dtype for t in (weight, bias)]


def _backward(ctx, grad_output, *_):
    if grad_output is None:
        return (None,) * 7
    # A no-op, but for a gradient that was expanded (by the mean over the image behind the last block, mostly).
    grad_output = grad_output.contiguous(memory_format=format_of(ctx.channels_last))
    needed = list(ctx.needs_input_grad[:3])
    grads = _group_norm_activation_backward(grad_output, *ctx.saved_tensors, *ctx.options, needed)
    dtypes = (grad_output.dtype, *ctx.dtypes)
    grads = (grad.to(dtype) if need else None for grad, dtype, need in zip(grads, dtypes, needed, strict=True))
    return (*grads, None, None, None, None)


_group_norm_activation = define_operator(
    # mean, rstd: (N, num_groups), float32 (float64 for float64). codes: int8, like input, and step: (N, num_groups), of
    # which x_hat = codes * step; without elements where not needed.
    "group_norm_activation(Tensor input, Tensor? weight, Tensor? bias, SymInt num_groups, float eps, str? activation,"
    " bool needs_codes) -> (Tensor output, Tensor mean, Tensor rstd, Tensor codes, Tensor step)",
    check=_check,
    fake=_fake,
    setup_context=_setup_context,
    backward=_backward,
)


def _check_backward(
    grad_output, values, shift, scale, rstd, weight, bias, num_groups, activation, needed
) -> None:  # fmt: skip
    check_activation(activation)
    if values.shape != grad_output.shape:
        raise ValueError(f"values: expected the shape {tuple(grad_output.shape)} of grad_output, got {values.shape}")
    statistics = (grad_output.size(0), num_groups)
    for name, tensor in (("shift", shift), ("scale", scale), ("rstd", rstd)):
        check_shape(name, tensor, statistics)


def _fake_backward(grad_output, values, shift, scale, rstd, weight, bias, num_groups, activation, needed):
    grad_input = grad_output.new_empty(grad_output.shape if needed[0] else 0)
    if needed[0]:
        grad_input = grad_input.to(memory_format=memory_format(grad_output))
    sizes = [grad_output.size(1) if need else 0 for need in needed[1:]]
    return grad_input, *(grad_output.new_empty(size, dtype=rstd.dtype) for size in sizes)


_group_norm_activation_backward = define_operator(
    # values: the input, or int8 codes; x_hat = (values - shift) * scale. needed: input, weight, bias. Gradients of
    # weight and bias are accumulated, and returned, in the dtype of rstd; what is not needed has no elements.
    "group_norm_activation_backward(Tensor grad_output, Tensor values, Tensor shift, Tensor scale, Tensor rstd,"
    " Tensor? weight, Tensor? bias, SymInt num_groups, str? activation, bool[] needed)"
    " -> (Tensor grad_input, Tensor grad_weight, Tensor grad_bias)",
    check=_check_backward,
    fake=_fake_backward,
)
