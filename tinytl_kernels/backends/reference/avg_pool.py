"""Average pooling in ATen, whose backward gets the gradient's own memory for an input: it reads only its shape."""

from __future__ import annotations

import torch
from torch import Tensor

from tinytl_kernels.backends.reference.slabs import image_chunks
from tinytl_kernels.core.layout import format_of, memory_format


def avg_pool2d(
    input: Tensor, kernel_size, stride, padding, ceil_mode: bool, count_include_pad: bool, divisor_override
) -> Tensor:
    output = torch.ops.aten.avg_pool2d(
        input, kernel_size, stride, padding, ceil_mode, count_include_pad, divisor_override
    )
    return output.contiguous(memory_format=memory_format(input))


def avg_pool2d_backward(grad_output: Tensor, input_size, *window_and_channels_last) -> Tensor:
    *window, channels_last = window_and_channels_last
    grad_input = _empty(grad_output, input_size, channels_last)
    if grad_input.numel():
        torch.ops.aten.avg_pool2d_backward.grad_input(grad_output, grad_input, *window, grad_input=grad_input)
    return grad_input


def adaptive_avg_pool2d(input: Tensor, output_size) -> Tensor:
    output = torch.nn.functional.adaptive_avg_pool2d(input, output_size)
    return output.contiguous(memory_format=memory_format(input))


def adaptive_avg_pool2d_backward(grad_output: Tensor, input_size, channels_last: bool) -> Tensor:
    grad_input = _empty(grad_output, input_size, channels_last)
    for images in image_chunks(grad_input):
        # This one has no variant that writes in place.
        chunk = grad_input[images]
        chunk.copy_(torch.ops.aten._adaptive_avg_pool2d_backward(grad_output[images], chunk))
    return grad_input


def _empty(like: Tensor, size, channels_last: bool) -> Tensor:
    return torch.empty(size, dtype=like.dtype, device=like.device, memory_format=format_of(channels_last))


OPERATORS = {
    "avg_pool2d": avg_pool2d,
    "avg_pool2d_backward": avg_pool2d_backward,
    "adaptive_avg_pool2d": adaptive_avg_pool2d,
    "adaptive_avg_pool2d_backward": adaptive_avg_pool2d_backward,
}
