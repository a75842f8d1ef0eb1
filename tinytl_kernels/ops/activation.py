"""``tinytl::activation``: stand-alone activations; the ReLU family keeps one bit an element.

output = f(input)        grad_input = f'(input) * grad_output, where f' of the ReLU family is told by a bit
"""

from __future__ import annotations

import torch
from torch import Tensor

from tinytl_kernels.core.activations import (
    BIT_MASK,
    FULL_RESULT,
    LEAKY_SLOPE,
    STAND_ALONE,
    check_activation,
    mask_size,
)
from tinytl_kernels.core.derivative_code import check_code_bits
from tinytl_kernels.core.dtypes import check_shape
from tinytl_kernels.core.layout import memory_format
from tinytl_kernels.ops.library import define_operator, gradient_needed, no_second_derivative


def activation(input: Tensor, name: str, negative_slope: float = LEAKY_SLOPE, code_bits: int | None = None) -> Tensor:
    """Apply an activation, keeping as little as its exact derivative needs, or less.

    Args:
        input: any shape, floating point.
        name: ``"relu"``, ``"relu6"``, ``"leaky_relu"``, ``"hardsigmoid"`` keep a bit mask (for (N, C, H, W) uint8 of
            shape (N, H, W, ceil(C / 8)), else (..., ceil(last / 8))); ``"hardswish"``, ``"silu"``, ``"gelu"``,
            ``"gelu_tanh"`` keep their input and ``"sigmoid"`` its output, as PyTorch does.
        negative_slope: of ``"leaky_relu"``; at least 0.
        code_bits: None keeps what the exact gradient needs. 8 keeps the derivative of a smooth activation as uint8, one
            byte an element, in uniform steps: an element of the gradient is off by at most 0.0024 (``"silu"``),
            0.0025 (``"gelu"``, ``"gelu_tanh"``), 0.0040 (``"hardswish"``) or 0.0005 (``"sigmoid"``) of grad_output, and
            by nothing where the derivative is 0 or 1. Where the input or PyTorch's derivative is NaN (a code of its
            own), so is the gradient. The ReLU family's bits are exact and less, and stay.

    Returns:
        As ``input`` in shape and dtype.

    Raises:
        ValueError: unknown name, not floating point, a negative slope below 0, or ``code_bits`` other than None and 8.
        RuntimeError: a second derivative is asked for.

    Example:
        >>> import torch
        >>> from tinytl_kernels import ops
        >>> ops.activation(torch.tensor([-1.0, 3.0, 9.0]), "relu6")
        tensor([0., 3., 6.])
    """
    check_code_bits(code_bits)
    needs_saved = gradient_needed(input)
    needs_codes = needs_saved and code_bits is not None and name not in BIT_MASK
    return _activation(input, name, negative_slope, needs_saved, needs_codes)[0]


def _check(input, name, negative_slope, needs_mask, needs_codes=False) -> None:
    check_activation(name, "name", STAND_ALONE)
    if name is None:
        raise ValueError("name: expected an activation, got None")
    if not input.is_floating_point():
        raise ValueError(f"input: expected a floating point dtype, got {input.dtype}")
    if negative_slope < 0:
        raise ValueError(f"negative_slope: expected at least 0, got {negative_slope}")
    if needs_codes and name in BIT_MASK:
        raise ValueError(f"needs_codes: expected False, for {name!r} keeps bits, got True")


def _fake(input, name, negative_slope, needs_mask, needs_codes=False):
    if needs_codes:
        return torch.empty_like(input), torch.empty_like(input, dtype=torch.uint8)
    size = mask_size(input.shape) if needs_mask and name in BIT_MASK else 0
    return torch.empty_like(input), input.new_empty(size, dtype=torch.uint8)


def _setup_context(ctx, inputs, output) -> None:
    input, name, negative_slope, needs_mask, needs_codes = inputs
    result, saved = output
    if name in BIT_MASK and not needs_mask:
        raise RuntimeError("needs_mask: a gradient can be asked for, so expected True, got False")
    ctx.mark_non_differentiable(saved)
    if name not in BIT_MASK and not needs_codes:
        # By reference: it costs nothing while somebody else holds it.
        saved = result if name in FULL_RESULT else input
    ctx.save_for_backward(saved)
    ctx.name, ctx.negative_slope, ctx.coded = name, negative_slope, needs_codes
    ctx.channels_last = memory_format(input) is torch.channels_last


def _backward(ctx, grad_output, _grad_saved):
    if torch.is_grad_enabled() and ctx.coded:
        # create_graph=True. Codes have no history, so their part of a second derivative could only be lost in silence.
        raise no_second_derivative("activation")
    if ctx.channels_last:
        # A no-op, but for a gradient that was expanded (by the mean over the image behind the last block, mostly): left
        # so, everything below would fall out of channels_last.
        grad_output = grad_output.contiguous(memory_format=torch.channels_last)
    (saved,) = ctx.saved_tensors
    grad_input = activation_backward(grad_output, saved, ctx.name, ctx.negative_slope)
    return grad_input, None, None, None, None


_activation = define_operator(
    # saved: the bit mask, or uint8 codes like input; without elements where neither is needed.
    "activation(Tensor input, str name, float negative_slope, bool needs_mask, bool needs_codes=False)"
    " -> (Tensor output, Tensor saved)",
    check=_check,
    fake=_fake,
    setup_context=_setup_context,
    backward=_backward,
)


def _check_backward(grad_output, saved, name, negative_slope) -> None:
    check_activation(name, "name", STAND_ALONE)
    expected = mask_size(grad_output.shape) if name in BIT_MASK else tuple(grad_output.shape)
    check_shape("saved", saved, expected)


activation_backward = define_operator(
    # saved: the bit mask, or of a smooth activation uint8 codes, the input or (sigmoid) the output.
    "activation_backward(Tensor grad_output, Tensor saved, str name, float negative_slope) -> Tensor",
    check=_check_backward,
    fake=lambda grad_output, saved, name, negative_slope: torch.empty_like(grad_output),
)
