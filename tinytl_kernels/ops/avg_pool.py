"""``tinytl::avg_pool2d`` and ``tinytl::adaptive_avg_pool2d``: average pooling that keeps nothing for backward.

PyTorch's keep their input, of which the backward reads only the shape.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tinytl_kernels.core.geometry import IntOrPair, output_length, pair, window_extent
from tinytl_kernels.core.layout import format_of, memory_format
from tinytl_kernels.ops.library import define_operator


def avg_pool2d(
    input: Tensor,
    kernel_size: IntOrPair,
    stride: IntOrPair | None = None,
    padding: IntOrPair = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> Tensor:
    """Average over windows; arguments and result as ``torch.nn.functional.avg_pool2d``. Keeps nothing.

    Args:
        input: (N, C, H, W), floating point.

    Returns:
        (N, C, H', W') in the dtype and layout of ``input``.

    Raises:
        ValueError: ``input`` is not a floating point (N, C, H, W), or a number does not fit.

    Example:
        >>> import torch
        >>> from tinytl_kernels import ops
        >>> ops.avg_pool2d(torch.ones(1, 3, 8, 8), 2).shape
        torch.Size([1, 3, 4, 4])
    """
    kernel_size = pair(kernel_size, "kernel_size")
    stride = kernel_size if stride is None or stride == [] else pair(stride, "stride")
    return _avg_pool2d(
        input, kernel_size, stride, pair(padding, "padding"), ceil_mode, count_include_pad, divisor_override
    )


def adaptive_avg_pool2d(input: Tensor, output_size) -> Tensor:
    """Average over windows that divide the image evenly; as ``torch.nn.functional.adaptive_avg_pool2d``. Keeps nothing.

    Args:
        input: (N, C, H, W), floating point.
        output_size: int or (height, width); None in place of a number keeps the input's.

    Returns:
        (N, C, height, width) in the dtype and layout of ``input``.

    Raises:
        ValueError: ``input`` is not a floating point (N, C, H, W), or the size is not positive.

    Example:
        >>> import torch
        >>> from tinytl_kernels import ops
        >>> ops.adaptive_avg_pool2d(torch.ones(1, 3, 7, 5), (2, None)).shape
        torch.Size([1, 3, 2, 5])
    """
    check_image(input)
    size = [
        input.size(2 + i) if length is None else length
        for i, length in enumerate(output_size if isinstance(output_size, (tuple, list)) else (output_size,) * 2)
    ]
    return _adaptive_avg_pool2d(input, size)


def check_image(input: Tensor) -> None:
    """Raise ``ValueError`` unless ``input`` is (N, C, H, W) in a floating point dtype."""
    if len(input.shape) != 4 or not input.dtype.is_floating_point:
        raise ValueError(f"input: expected (N, C, H, W), floating point, got {tuple(input.shape)}, {input.dtype}")


def check_window(input: Tensor, kernel_size, stride, padding, dilation, ceil_mode: bool) -> None:
    """Raise ``ValueError`` unless a pooling window of these numbers fits ``input`` (N, C, H, W)."""
    for name, values in (("kernel_size", kernel_size), ("stride", stride), ("dilation", dilation)):
        if any(value < 1 for value in values):
            raise ValueError(f"{name}: expected at least 1, got {tuple(values)}")
    if any(p < 0 or 2 * p > k for p, k in zip(padding, kernel_size, strict=True)):
        raise ValueError(f"padding: expected 0 to half the kernel {tuple(kernel_size)}, got {tuple(padding)}")
    for i, name in enumerate(("height", "width")):
        # ceil_mode lets the last window hang over the edge by all but a stride.
        hang = stride[i] - 1 if ceil_mode else 0
        if output_length(input.size(2 + i), kernel_size[i], stride[i], padding[i], padding[i] + hang, dilation[i]) < 1:
            raise ValueError(
                f"input: its {name} {input.size(2 + i)} with padding {padding[i]} is smaller than the window of "
                f"{window_extent(kernel_size[i], dilation[i])}"
            )


def _check(input, kernel_size, stride, padding, ceil_mode, count_include_pad, divisor_override) -> None:
    check_image(input)
    if divisor_override == 0:
        raise ValueError("divisor_override: expected a number other than 0, got 0")
    check_window(input, kernel_size, stride, padding, (1, 1), ceil_mode)


def _fake(input, kernel_size, stride, padding, ceil_mode, count_include_pad, divisor_override):
    output = torch.ops.aten.avg_pool2d(
        input, kernel_size, stride, padding, ceil_mode, count_include_pad, divisor_override
    )
    return output.contiguous(memory_format=memory_format(input))


def _setup_context(ctx, inputs, output) -> None:
    input, *ctx.window = inputs
    ctx.input_size = input.shape
    ctx.channels_last = memory_format(input) is torch.channels_last


def _backward(ctx, grad_output):
    grad_input = _avg_pool2d_backward(grad_output, ctx.input_size, *ctx.window, ctx.channels_last)
    return grad_input, *[None] * 6


_avg_pool2d = define_operator(
    "avg_pool2d(Tensor input, SymInt[] kernel_size, SymInt[] stride, SymInt[] padding, bool ceil_mode,"
    " bool count_include_pad, int? divisor_override) -> Tensor",
    check=_check,
    fake=_fake,
    setup_context=_setup_context,
    backward=_backward,
)


def _fake_backward(grad_output, input_size, *window_and_channels_last):
    return grad_output.new_empty(input_size).to(memory_format=format_of(window_and_channels_last[-1]))


_avg_pool2d_backward = define_operator(
    "avg_pool2d_backward(Tensor grad_output, SymInt[] input_size, SymInt[] kernel_size, SymInt[] stride,"
    " SymInt[] padding, bool ceil_mode, bool count_include_pad, int? divisor_override, bool channels_last) -> Tensor",
    check=lambda *args: None,
    fake=_fake_backward,
)


def _check_adaptive(input, output_size) -> None:
    check_image(input)
    if len(output_size) != 2 or any(length < 1 for length in output_size):
        raise ValueError(f"output_size: expected two positive numbers, got {tuple(output_size)}")


def _fake_adaptive(input, output_size):
    output = input.new_empty((input.size(0), input.size(1), *output_size))
    return output.to(memory_format=memory_format(input))


def _setup_context_adaptive(ctx, inputs, output) -> None:
    input, _ = inputs
    ctx.input_size = input.shape
    ctx.channels_last = memory_format(input) is torch.channels_last


def _backward_adaptive(ctx, grad_output):
    return _adaptive_avg_pool2d_backward(grad_output, ctx.input_size, ctx.channels_last), None


_adaptive_avg_pool2d = define_operator(
    "adaptive_avg_pool2d(Tensor input, SymInt[] output_size) -> Tensor",
    check=_check_adaptive,
    fake=_fake_adaptive,
    setup_context=_setup_context_adaptive,
    backward=_backward_adaptive,
)

_adaptive_avg_pool2d_backward = define_operator(
    "adaptive_avg_pool2d_backward(Tensor grad_output, SymInt[] input_size, bool channels_last) -> Tensor",
    check=lambda *args: None,
    fake=_fake_backward,
)
