"""Average and max pooling: ``max_pool.cpp``, ``avg_pool.cpp``. Adaptive pooling is ATen's, as in the reference."""

from __future__ import annotations

import torch
from torch import Tensor

from tinytl_kernels.backends.cpu.layout import channels_last, in_layout
from tinytl_kernels.core.geometry import output_length
from tinytl_kernels.core.layout import format_of, memory_format


def avg_pool2d(
    input: Tensor, kernel_size, stride, padding, ceil_mode: bool, count_include_pad: bool, divisor_override: int | None
) -> Tensor:
    output = torch.ops.tinytl_cpu.avg_pool2d_forward(
        channels_last(input), kernel_size, stride, padding, ceil_mode, count_include_pad, divisor_override or 0
    )
    return in_layout(output, memory_format(input))


def avg_pool2d_backward(
    grad_output: Tensor, input_size, kernel_size, stride, padding, ceil_mode: bool, count_include_pad: bool,
    divisor_override: int | None, is_channels_last: bool,
) -> Tensor:  # fmt: skip
    grad_input = torch.ops.tinytl_cpu.avg_pool2d_backward(
        channels_last(grad_output), input_size, kernel_size, stride, padding, ceil_mode, count_include_pad,
        divisor_override or 0,
    )  # fmt: skip
    return in_layout(grad_input, format_of(is_channels_last))


def max_pool2d(
    input: Tensor, kernel_size, stride, padding, dilation, ceil_mode: bool, needs_positions: bool
) -> tuple[Tensor, Tensor]:
    output, positions = torch.ops.tinytl_cpu.max_pool2d_forward(
        channels_last(input), kernel_size, stride, padding, dilation, ceil_mode, needs_positions
    )
    return in_layout(output, memory_format(input)), positions


def max_pool2d_backward(
    grad_output: Tensor, positions: Tensor, input_size, kernel_size, stride, padding, dilation, is_channels_last: bool
) -> Tensor:
    # More windows than fit whole: the forward had ceil_mode.
    whole = [
        output_length(input_size[2 + i], kernel_size[i], stride[i], padding[i], padding[i], dilation[i])
        for i in range(2)
    ]
    grad_input = torch.ops.tinytl_cpu.max_pool2d_backward(
        channels_last(grad_output), positions, input_size, kernel_size, stride, padding, dilation,
        list(grad_output.shape[2:]) != whole,
    )  # fmt: skip
    return in_layout(grad_input, format_of(is_channels_last))


OPERATORS = {
    "avg_pool2d": avg_pool2d,
    "avg_pool2d_backward": avg_pool2d_backward,
    "max_pool2d": max_pool2d,
    "max_pool2d_backward": max_pool2d_backward,
}
