"""``tinytl::upsample_add``: add a small image to a large one, interpolating while adding. Keeps nothing.

    output = main + bilinear(branch, size of main)            TinyTL, section 3.2: how a lite residual joins its block

The upsampled branch never exists at full resolution; backward is the adjoint of the interpolation.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tinytl_kernels.core.layout import format_of, memory_format
from tinytl_kernels.ops.library import define_operator


def upsample_add(main: Tensor, branch: Tensor) -> Tensor:
    """``main + interpolate(branch, main.shape[2:], mode="bilinear", align_corners=False)``.

    Args:
        main: (N, C, H, W), floating point.
        branch: (N, C, h, w) in the dtype of ``main``; (N, C, 1, 1) is broadcast.

    Returns:
        (N, C, H, W) in the dtype and layout of ``main``.

    Raises:
        ValueError: batch, channels, dtype or device differ, or an image is empty.

    Example:
        >>> import torch
        >>> from tinytl_kernels import ops
        >>> ops.upsample_add(torch.zeros(1, 8, 14, 14), torch.ones(1, 8, 7, 7)).mean()
        tensor(1.)
    """
    return _upsample_add(main, branch)


def _check(main, branch) -> None:
    if main.dim() != 4 or branch.dim() != 4 or main.shape[:2] != branch.shape[:2]:
        raise ValueError(
            f"branch: expected (N, C, h, w) with N, C of main {tuple(main.shape)}, got {tuple(branch.shape)}"
        )
    if main.dtype != branch.dtype or not main.is_floating_point() or main.device != branch.device:
        raise ValueError(
            f"branch: expected the floating point dtype and device of main ({main.dtype}, {main.device}), "
            f"got {branch.dtype}, {branch.device}"
        )
    if any(length < 1 for length in (*main.shape[1:], *branch.shape[2:])):
        raise ValueError(f"main, branch: expected images, got {tuple(main.shape)} and {tuple(branch.shape)}")


def _setup_context(ctx, inputs, output) -> None:
    _, branch = inputs
    ctx.branch_size = branch.shape[2:]
    ctx.channels_last = memory_format(branch) is torch.channels_last


def _backward(ctx, grad_output):
    grad_branch = None
    if ctx.needs_input_grad[1]:
        grad_branch = _upsample_add_backward(grad_output, ctx.branch_size, ctx.channels_last)
    return grad_output if ctx.needs_input_grad[0] else None, grad_branch


_upsample_add = define_operator(
    "upsample_add(Tensor main, Tensor branch) -> Tensor",
    check=_check,
    fake=lambda main, branch: torch.empty_like(main, memory_format=memory_format(main)),
    setup_context=_setup_context,
    backward=_backward,
    cast=lambda dtype, args: (args[0], args[1].to(args[0].dtype)),
)


def _fake_backward(grad_output, branch_size, channels_last):
    grad_branch = grad_output.new_empty((grad_output.size(0), grad_output.size(1), *branch_size))
    return grad_branch.to(memory_format=format_of(channels_last))


_upsample_add_backward = define_operator(
    "upsample_add_backward(Tensor grad_output, SymInt[] branch_size, bool channels_last) -> Tensor",
    check=lambda *args: None,
    fake=_fake_backward,
)
