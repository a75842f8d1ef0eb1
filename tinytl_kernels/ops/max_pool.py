"""``tinytl::max_pool2d``: max pooling that keeps the winner's position in its window, 4 bits an output element.

PyTorch's keeps its input and an int64 index an output element.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tinytl_kernels.core.geometry import IntOrPair, pair
from tinytl_kernels.core.layout import format_of, memory_format
from tinytl_kernels.core.positions import positions_size
from tinytl_kernels.ops.avg_pool import check_image, check_window
from tinytl_kernels.ops.library import define_operator, gradient_needed


def max_pool2d(
    input: Tensor,
    kernel_size: IntOrPair,
    stride: IntOrPair | None = None,
    padding: IntOrPair = 0,
    dilation: IntOrPair = 1,
    ceil_mode: bool = False,
) -> Tensor:
    """Maximum over windows; arguments and result as ``torch.nn.functional.max_pool2d``, ties and NaN included.

    Keeps the position of the winner in its window (row * kernel width + column) for backward: windows of up to 16
    elements in 4 bits, two channels a byte, (N, H', W', ceil(C / 2)), the even channel in the low half; of up to 256
    in a byte, (N, H', W', C).

    Args:
        input: (N, C, H, W), floating point.

    Returns:
        (N, C, H', W') in the dtype and layout of ``input``.

    Raises:
        ValueError: ``input`` is not a floating point (N, C, H, W), the window has more than 256 elements, or another
            number does not fit.

    Example:
        >>> import torch
        >>> from tinytl_kernels import ops
        >>> ops.max_pool2d(torch.ones(1, 64, 112, 112), 3, stride=2, padding=1).shape
        torch.Size([1, 64, 56, 56])
    """
    kernel_size = pair(kernel_size, "kernel_size")
    output, _ = _max_pool2d(
        input,
        kernel_size,
        kernel_size if stride is None or stride == [] else pair(stride, "stride"),
        pair(padding, "padding"),
        pair(dilation, "dilation"),
        ceil_mode,
        gradient_needed(input),
    )
    return output


def _check(input, kernel_size, stride, padding, dilation, ceil_mode, needs_positions) -> None:
    check_image(input)
    check_window(input, kernel_size, stride, padding, dilation, ceil_mode)
    if kernel_size[0] * kernel_size[1] > 256:
        raise ValueError(f"kernel_size: expected at most 256 elements a window, got {tuple(kernel_size)}")


def _fake(input, kernel_size, stride, padding, dilation, ceil_mode, needs_positions):
    output = torch.ops.aten.max_pool2d_with_indices(input, kernel_size, stride, padding, dilation, ceil_mode)[0]
    output = output.contiguous(memory_format=memory_format(input))
    size = positions_size(output.shape, kernel_size) if needs_positions else 0
    return output, input.new_empty(size, dtype=torch.uint8)


def _setup_context(ctx, inputs, output) -> None:
    input, *window, needs_positions = inputs
    _, positions = output
    if not needs_positions:
        raise RuntimeError("needs_positions: a gradient can be asked for, so expected True, got False")
    ctx.mark_non_differentiable(positions)
    ctx.save_for_backward(positions)
    ctx.window = window[:4]
    ctx.input_size = input.shape
    ctx.channels_last = memory_format(input) is torch.channels_last


def _backward(ctx, grad_output, _grad_positions):
    (positions,) = ctx.saved_tensors
    grad_input = _max_pool2d_backward(grad_output, positions, ctx.input_size, *ctx.window, ctx.channels_last)
    return grad_input, *[None] * 6


_max_pool2d = define_operator(
    "max_pool2d(Tensor input, SymInt[] kernel_size, SymInt[] stride, SymInt[] padding, SymInt[] dilation,"
    " bool ceil_mode, bool needs_positions) -> (Tensor output, Tensor positions)",
    check=_check,
    fake=_fake,
    setup_context=_setup_context,
    backward=_backward,
)


def _check_backward(grad_output, positions, input_size, kernel_size, stride, padding, dilation, channels_last) -> None:
    expected = positions_size(grad_output.shape, kernel_size)
    if tuple(positions.shape) != expected or positions.dtype != torch.uint8:
        raise ValueError(
            f"positions: expected uint8 of shape {expected}, got {positions.dtype} of shape {tuple(positions.shape)}"
        )


def _fake_backward(grad_output, positions, input_size, kernel_size, stride, padding, dilation, channels_last):
    return grad_output.new_empty(input_size).to(memory_format=format_of(channels_last))


_max_pool2d_backward = define_operator(
    "max_pool2d_backward(Tensor grad_output, Tensor positions, SymInt[] input_size, SymInt[] kernel_size,"
    " SymInt[] stride, SymInt[] padding, SymInt[] dilation, bool channels_last) -> Tensor",
    check=_check_backward,
    fake=_fake_backward,
)
