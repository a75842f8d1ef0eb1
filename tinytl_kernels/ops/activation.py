"""``tinytl::activation``: stand-alone activations; the ReLU family keeps one bit an element.

output = f(input)        grad_input = f'(input) * grad_output, where f' of the ReLU family is told by a bit
"""

from __future__ import annotations

import torch
from torch import Tensor

from tinytl_kernels.core.activations import BIT_MASK, LEAKY_SLOPE, check_activation, mask_size
from tinytl_kernels.core.layout import memory_format
from tinytl_kernels.ops.library import define_operator, gradient_needed


def activation(input: Tensor, name: str, negative_slope: float = LEAKY_SLOPE) -> Tensor:
    """Apply an activation, keeping as little as its exact derivative needs.

    Args:
        input: any shape, floating point.
        name: ``"relu"``, ``"relu6"``, ``"leaky_relu"``, ``"hardsigmoid"`` keep a bit mask (for (N, C, H, W) uint8 of
            shape (N, H, W, ceil(C / 8)), else (..., ceil(last / 8))); ``"hardswish"``, ``"silu"``, ``"gelu"``,
            ``"gelu_tanh"`` keep their input, as PyTorch does.
        negative_slope: of ``"leaky_relu"``; at least 0.

    Returns:
        As ``input`` in shape and dtype.

    Raises:
        ValueError: unknown name, not floating point, or a negative slope below 0.

    Example:
        >>> import torch
        >>> from tinytl_kernels import ops
        >>> ops.activation(torch.tensor([-1.0, 3.0, 9.0]), "relu6")
        tensor([0., 3., 6.])
    """
    output, _ = _activation(input, name, negative_slope, gradient_needed(input))
    return output


def _check(input, name, negative_slope, needs_mask) -> None:
    check_activation(name, "name")
    if name is None:
        raise ValueError("name: expected an activation, got None")
    if not input.is_floating_point():
        raise ValueError(f"input: expected a floating point dtype, got {input.dtype}")
    if negative_slope < 0:
        raise ValueError(f"negative_slope: expected at least 0, got {negative_slope}")


def _fake(input, name, negative_slope, needs_mask):
    size = mask_size(input.shape) if needs_mask and name in BIT_MASK else 0
    return torch.empty_like(input), input.new_empty(size, dtype=torch.uint8)


def _setup_context(ctx, inputs, output) -> None:
    input, name, negative_slope, needs_mask = inputs
    _, mask = output
    if name in BIT_MASK and not needs_mask:
        raise RuntimeError("needs_mask: a gradient can be asked for, so expected True, got False")
    ctx.mark_non_differentiable(mask)
    # A smooth derivative needs the input itself: kept by reference, it costs nothing while somebody else holds it.
    ctx.save_for_backward(mask if name in BIT_MASK else input)
    ctx.name, ctx.negative_slope = name, negative_slope
    ctx.channels_last = memory_format(input) is torch.channels_last


def _backward(ctx, grad_output, _grad_mask):
    if ctx.channels_last:
        # A no-op, but for a gradient that was expanded (by the mean over the image behind the last block, mostly): left
        # so, everything below would fall out of channels_last.
        grad_output = grad_output.contiguous(memory_format=torch.channels_last)
    (saved,) = ctx.saved_tensors
    grad_input = _activation_backward(grad_output, saved, ctx.name, ctx.negative_slope)
    return grad_input, None, None, None


_activation = define_operator(
    "activation(Tensor input, str name, float negative_slope, bool needs_mask) -> (Tensor output, Tensor mask)",
    check=_check,
    fake=_fake,
    setup_context=_setup_context,
    backward=_backward,
)


def _check_backward(grad_output, saved, name, negative_slope) -> None:
    check_activation(name, "name")
    expected = mask_size(grad_output.shape) if name in BIT_MASK else tuple(grad_output.shape)
    if tuple(saved.shape) != expected:
        raise ValueError(f"saved: expected shape {expected}, got {tuple(saved.shape)}")


_activation_backward = define_operator(
    # saved: the bit mask, or the input of a smooth activation.
    "activation_backward(Tensor grad_output, Tensor saved, str name, float negative_slope) -> Tensor",
    check=_check_backward,
    fake=lambda grad_output, saved, name, negative_slope: torch.empty_like(grad_output),
)
