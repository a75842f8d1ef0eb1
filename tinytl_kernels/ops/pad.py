"""``tinytl::pad2d``: reflection, replication and circular padding that keep nothing for backward.

PyTorch's reflection and replication padding keep their input, of which the backward reads only the shape.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tinytl_kernels.core.geometry import IntOrPair, four_paddings
from tinytl_kernels.core.layout import format_of, memory_format
from tinytl_kernels.ops.avg_pool import check_image
from tinytl_kernels.ops.library import define_operator

MODES = ("reflect", "replicate", "circular")


def pad2d(input: Tensor, padding: IntOrPair, mode: str) -> Tensor:
    """Pad an image by repeating itself; as ``torch.nn.functional.pad``, with the four numbers of this package.

    Args:
        input: (N, C, H, W), floating point.
        padding: int, (height, width) or (top, bottom, left, right), in pixels.
        mode: ``"reflect"`` (padding below the image's size), ``"replicate"`` or ``"circular"`` (up to its size).

    Returns:
        (N, C, H + top + bottom, W + left + right) in the dtype and layout of ``input``.

    Raises:
        ValueError: unknown mode, or padding that the image cannot supply.

    Example:
        >>> import torch
        >>> from tinytl_kernels import ops
        >>> ops.pad2d(torch.arange(3.0).view(1, 1, 1, 3), (0, 0, 2, 1), "reflect").flatten()
        tensor([2., 1., 0., 1., 2., 1.])
    """
    return _pad2d(input, four_paddings(padding), mode)


def _check(input, padding, mode) -> None:
    check_image(input)
    if mode not in MODES:
        raise ValueError(f"mode: expected one of {', '.join(map(repr, MODES))}, got {mode!r}")
    if len(padding) != 4 or any(p < 0 for p in padding):
        raise ValueError(f"padding: expected four numbers of at least 0, got {tuple(padding)}")
    # A replicated border needs one pixel, a reflected one a pixel more than it is wide, a circular one as many.
    height, width = input.shape[2:]
    most = {"reflect": (height - 1, width - 1), "circular": (height, width)}.get(mode)
    if most is not None and (max(padding[:2]) > most[0] or max(padding[2:]) > most[1]):
        raise ValueError(
            f"padding: expected at most {most} (height, width) in mode {mode!r} for an image of {(height, width)}, "
            f"got {tuple(padding)}"
        )


def _fake(input, padding, mode):
    top, bottom, left, right = padding
    n, c, h, w = input.shape
    return input.new_empty((n, c, h + top + bottom, w + left + right)).to(memory_format=memory_format(input))


def _setup_context(ctx, inputs, output) -> None:
    input, ctx.padding, ctx.mode = inputs
    ctx.channels_last = memory_format(input) is torch.channels_last


def _backward(ctx, grad_output):
    return _pad2d_backward(grad_output, ctx.padding, ctx.mode, ctx.channels_last), None, None


_pad2d = define_operator(
    "pad2d(Tensor input, SymInt[] padding, str mode) -> Tensor",
    check=_check,
    fake=_fake,
    setup_context=_setup_context,
    backward=_backward,
)


def _fake_backward(grad_output, padding, mode, channels_last):
    top, bottom, left, right = padding
    n, c, h, w = grad_output.shape
    return grad_output.new_empty((n, c, h - top - bottom, w - left - right)).to(memory_format=format_of(channels_last))


_pad2d_backward = define_operator(
    "pad2d_backward(Tensor grad_output, SymInt[] padding, str mode, bool channels_last) -> Tensor",
    check=lambda *args: None,
    fake=_fake_backward,
)
