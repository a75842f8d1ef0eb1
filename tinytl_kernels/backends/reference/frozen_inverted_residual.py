"""The inverted residual block in ATen: three frozen convolutions, a few images at a time.

The expanded activations exist for one chunk of images only, forward and backward.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from tinytl_kernels.backends.reference.avg_pool import avg_pool2d_backward
from tinytl_kernels.backends.reference.frozen_conv import frozen_conv, frozen_conv_backward
from tinytl_kernels.backends.reference.slabs import image_chunks
from tinytl_kernels.core.activations import mask_size
from tinytl_kernels.core.dtypes import accumulation_dtype
from tinytl_kernels.core.geometry import output_length
from tinytl_kernels.core.layout import format_of, memory_format

_ONE, _NO_PADDING = (1, 1), (0, 0, 0, 0)


def frozen_inverted_residual(
    input: Tensor, expand_weight, expand_bias, depthwise_weight, depthwise_bias, project_weight, project_bias,
    stride, padding, activation, residual: bool, needs_masks: bool, want_pooled: bool,
    expand_scale: Tensor | None = None, depthwise_scale: Tensor | None = None, project_scale: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    n, _, h, w = input.shape
    layout = memory_format(input)
    hidden = depthwise_weight.size(0)
    height, width = _filtered_size(input.shape, depthwise_weight, stride, padding)
    masks = needs_masks and activation is not None
    output = torch.empty(
        (n, project_weight.size(0), height, width), dtype=input.dtype, device=input.device, memory_format=layout
    )
    expand_mask = input.new_empty(
        mask_size((n, hidden, h, w)) if masks and expand_weight is not None else 0, dtype=torch.uint8
    )
    depthwise_mask = input.new_empty(mask_size((n, hidden, height, width)) if masks else 0, dtype=torch.uint8)
    for images in image_chunks(input.new_empty((n, hidden, h, w), device="meta"), input.device):
        x = hidden_x = input[images]
        if expand_weight is not None:
            hidden_x, mask = frozen_conv(
                x, expand_weight, expand_bias, _ONE, _NO_PADDING, _ONE, 1, activation, needs_masks, expand_scale
            )
            if masks:
                expand_mask[images] = mask
        hidden_x, mask = frozen_conv(
            hidden_x, depthwise_weight, depthwise_bias, stride, padding, _ONE, hidden, activation, needs_masks,
            depthwise_scale,
        )  # fmt: skip
        if masks:
            depthwise_mask[images] = mask
        y, _ = frozen_conv(
            hidden_x, project_weight, project_bias, _ONE, _NO_PADDING, _ONE, 1, None, False, project_scale
        )
        output[images] = y.add_(x) if residual else y
    if not want_pooled:
        return output, expand_mask, depthwise_mask, input.new_empty(0)
    return output, expand_mask, depthwise_mask, F.avg_pool2d(input, 2).contiguous(memory_format=layout)


def _filtered_size(input_size, depthwise_weight: Tensor, stride, padding) -> tuple[int, int]:
    top, bottom, left, right = padding
    return (
        output_length(input_size[2], depthwise_weight.size(2), stride[0], top, bottom, 1),
        output_length(input_size[3], depthwise_weight.size(3), stride[1], left, right, 1),
    )


def frozen_inverted_residual_backward(
    grad_output: Tensor, grad_pooled: Tensor | None, expand_weight, depthwise_weight, project_weight,
    expand_mask: Tensor, depthwise_mask: Tensor, input_size, stride, padding, activation, residual: bool,
    channels_last: bool, needed,
    expand_scale: Tensor | None = None, depthwise_scale: Tensor | None = None, project_scale: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    need_input, need_expand, need_depthwise, need_project = needed
    n, channels, h, w = input_size
    hidden = depthwise_weight.size(0)
    height, width = grad_output.shape[2:]
    dtype = grad_output.dtype
    grad_input = torch.empty(
        input_size if need_input else (0, 1, 1, 1),
        dtype=dtype,
        device=grad_output.device,
        memory_format=format_of(channels_last),
    )
    if not need_input:
        grad_input = grad_input.view(0)

    def sums(length: int, need: bool) -> Tensor:
        return torch.zeros(length if need else 0, dtype=accumulation_dtype(dtype), device=grad_output.device)

    grad_expand, grad_depthwise = sums(hidden, need_expand), sums(hidden, need_depthwise)
    grad_project = sums(project_weight.size(0), need_project)
    below_project = need_input or need_expand or need_depthwise
    below_depthwise = need_input or need_expand
    for images in image_chunks(grad_output.new_empty((n, hidden, h, w), device="meta"), grad_output.device):
        count = grad_output[images].size(0)
        grad, bias = frozen_conv_backward(
            grad_output[images], project_weight, depthwise_mask, (count, hidden, height, width),
            _ONE, _NO_PADDING, _ONE, 1, None, channels_last, below_project, need_project,
            project_scale,
        )  # fmt: skip
        grad_project += bias
        if not below_project:
            continue
        grad, bias = frozen_conv_backward(
            grad, depthwise_weight, depthwise_mask[images], (count, hidden, h, w),
            stride, padding, _ONE, hidden, activation, channels_last, below_depthwise, need_depthwise,
            depthwise_scale,
        )  # fmt: skip
        grad_depthwise += bias
        if expand_weight is not None and below_depthwise:
            grad, bias = frozen_conv_backward(
                grad, expand_weight, expand_mask[images], (count, channels, h, w),
                _ONE, _NO_PADDING, _ONE, 1, activation, channels_last, need_input, need_expand,
                expand_scale,
            )  # fmt: skip
            grad_expand += bias
        if need_input:
            grad_input[images] = grad
            if residual:
                grad_input[images] += grad_output[images]
            if grad_pooled is not None:
                grad_input[images] += avg_pool2d_backward(
                    grad_pooled[images], (count, channels, h, w), (2, 2), (2, 2), (0, 0), False, True, None,
                    channels_last,
                )  # fmt: skip
    return grad_input, grad_expand, grad_depthwise, grad_project


OPERATORS = {
    "frozen_inverted_residual": frozen_inverted_residual,
    "frozen_inverted_residual_backward": frozen_inverted_residual_backward,
}
