"""``tinytl::dropout``: dropout that keeps one bit an element (PyTorch's keeps a scaled copy of its mask)."""

from __future__ import annotations

import torch
from torch import Tensor

from tinytl_kernels.core.activations import mask_size
from tinytl_kernels.core.dtypes import check_shape
from tinytl_kernels.ops.library import define_operator


def dropout(input: Tensor, p: float = 0.5, training: bool = True) -> Tensor:
    """Zero elements with probability ``p`` and scale the others by ``1 / (1 - p)``; the identity in evaluation.

    Draws from PyTorch's default generator of the device, so ``torch.manual_seed`` governs it; the numbers drawn are
    not those of ``torch.nn.functional.dropout``.

    Args:
        input: any shape, floating point.
        p: from 0 to 1.
        training: ``input`` itself comes back when False.

    Raises:
        ValueError: ``p`` out of range or ``input`` not floating point.

    Example:
        >>> import torch
        >>> from tinytl_kernels import ops
        >>> ops.dropout(torch.ones(4), p=0.0)
        tensor([1., 1., 1., 1.])
    """
    if not 0.0 <= p <= 1.0:
        raise ValueError(f"p: expected a probability from 0 to 1, got {p}")
    if not training:
        return input
    output, _ = _dropout(input, p)
    return output


def _check(input, p) -> None:
    if not 0.0 <= p <= 1.0:
        raise ValueError(f"p: expected a probability from 0 to 1, got {p}")
    if not input.is_floating_point():
        raise ValueError(f"input: expected a floating point dtype, got {input.dtype}")


def _fake(input, p):
    return torch.empty_like(input), input.new_empty(mask_size(input.shape), dtype=torch.uint8)


def _setup_context(ctx, inputs, output) -> None:
    _, ctx.p = inputs
    _, mask = output
    ctx.mark_non_differentiable(mask)
    ctx.save_for_backward(mask)


def _backward(ctx, grad_output, _grad_mask):
    (mask,) = ctx.saved_tensors
    return _dropout_backward(grad_output, mask, ctx.p), None


_dropout = define_operator(
    "dropout(Tensor input, float p) -> (Tensor output, Tensor mask)",
    check=_check,
    fake=_fake,
    setup_context=_setup_context,
    backward=_backward,
    tags=(torch.Tag.nondeterministic_seeded,),
)


def _check_backward(grad_output, mask, p) -> None:
    check_shape("mask", mask, mask_size(grad_output.shape))


_dropout_backward = define_operator(
    "dropout_backward(Tensor grad_output, Tensor mask, float p) -> Tensor",
    check=_check_backward,
    fake=lambda grad_output, mask, p: torch.empty_like(grad_output),
)
