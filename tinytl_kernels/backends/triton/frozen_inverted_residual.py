"""The inverted residual block on the GPU: its three kernels over chunks of the batch, expanded activations in L2.

A chunk is as many images as fit, expanded, into half of the L2 cache; its buffers are used again by the next chunk. So
what one kernel writes the next one finds in L2, and the peak is bounded by the chunk, not by the batch. The forward
can be one kernel instead, where ``whole_block`` says so.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tinytl_kernels.backends.triton import whole_block
from tinytl_kernels.backends.triton.activation import gradient_into, gradient_tiles
from tinytl_kernels.backends.triton.avg_pool import average_into, avg_pool2d_backward
from tinytl_kernels.backends.triton.chunks import chunk_images, chunks
from tinytl_kernels.backends.triton.depthwise import backward_tiles, depthwise, depthwise_backward, taps_first
from tinytl_kernels.backends.triton.frozen_conv import add_up, partial_sums
from tinytl_kernels.backends.triton.launch import on_device
from tinytl_kernels.backends.triton.pointwise import pixel_tiles, pointwise, pointwise_backward
from tinytl_kernels.core.activations import mask_size
from tinytl_kernels.core.geometry import output_length
from tinytl_kernels.core.layout import format_of, memory_format

_UNDILATED = (1, 1)


def _buffer(like: Tensor, size: Sequence[int]) -> Tensor:
    return torch.empty(size, dtype=like.dtype, device=like.device, memory_format=torch.channels_last)


class _Sums:
    """Partial sums of one bias gradient: a row range for every chunk, added up once."""

    def __init__(self, need: bool, rows: Sequence[int], channels: int, like: Tensor) -> None:
        self._rows = rows
        self._like = like
        self._sums = partial_sums(sum(rows), channels, need, like)

    def chunk(self, index: int) -> Tensor | None:
        """The rows of chunk ``index``, or None if the gradient is not needed."""
        if self._sums is None:
            return None
        first = sum(self._rows[:index])
        return self._sums[first : first + self._rows[index]]

    def total(self) -> Tensor:
        """The gradient (channels,); no elements if it is not needed."""
        return add_up(self._sums, self._like)


@on_device
def frozen_inverted_residual(
    input: Tensor, expand_weight, expand_bias, depthwise_weight, depthwise_bias, project_weight, project_bias,
    stride, padding, activation, residual: bool, needs_masks: bool, want_pooled: bool,
    expand_scale: Tensor | None = None, depthwise_scale: Tensor | None = None, project_scale: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    n, channels, h, w = input.shape
    layout = memory_format(input)
    hidden = depthwise_weight.size(0)
    top, bottom, left, right = padding
    height = output_length(h, depthwise_weight.size(2), stride[0], top, bottom, 1)
    width = output_length(w, depthwise_weight.size(3), stride[1], left, right, 1)
    masks = needs_masks and activation is not None
    expand_masks = masks and expand_weight is not None
    output = torch.empty(
        (n, project_weight.size(0), height, width), dtype=input.dtype, device=input.device, memory_format=layout
    )
    expand_mask = input.new_empty(mask_size((n, hidden, h, w)) if expand_masks else 0, dtype=torch.uint8)
    depthwise_mask = input.new_empty(mask_size((n, hidden, height, width)) if masks else 0, dtype=torch.uint8)
    pooled = input.new_empty(0)
    if want_pooled:
        pooled = torch.empty(
            (n, channels, h // 2, w // 2), dtype=input.dtype, device=input.device, memory_format=layout
        )
    if _as_one_kernel(input, (expand_weight, depthwise_weight, project_weight), output, stride, padding, activation):
        if want_pooled:
            average_into(input, (2, 2), (2, 2), (0, 0), True, None, pooled)
        taps = taps_first(depthwise_weight, input.dtype, depthwise_scale)
        whole_block.whole_block(
            input, expand_weight, expand_bias, depthwise_weight, taps, depthwise_bias, project_weight, project_bias,
            stride, padding, activation, residual, output, expand_mask if masks else None,
            depthwise_mask if masks else None, expand_scale, project_scale,
        )  # fmt: skip
        return output, expand_mask, depthwise_mask, pooled
    expanded_elements = hidden * h * w if expand_weight is not None else 0
    step = chunk_images(n, expanded_elements + hidden * height * width, input)
    expanded = None if expand_weight is None else _buffer(input, (step, hidden, h, w))
    filtered = _buffer(input, (step, hidden, height, width))
    taps = taps_first(depthwise_weight, input.dtype, depthwise_scale)
    for images in chunks(n, step):
        count = images.stop - images.start
        x = hidden_x = input[images]
        if expanded is not None:
            hidden_x = expanded[:count]
            mask = expand_mask[images] if masks else None
            pointwise(x, expand_weight, expand_bias, activation, hidden_x, mask, scale=expand_scale)
        if want_pooled:
            average_into(x, (2, 2), (2, 2), (0, 0), True, None, pooled[images])
        depthwise(
            hidden_x, depthwise_weight, depthwise_bias, stride, padding, _UNDILATED, activation, filtered[:count],
            depthwise_mask[images] if masks else None, taps,
        )  # fmt: skip
        shortcut = x if residual else None
        pointwise(filtered[:count], project_weight, project_bias, None, output[images], None, shortcut, project_scale)
    return output, expand_mask, depthwise_mask, pooled


def _as_one_kernel(input: Tensor, weights, output: Tensor, stride, padding, activation: str | None) -> bool:
    channels, size, out_size = input.size(1), input.shape[2:], output.shape[2:]
    if not whole_block.can_take(channels, weights, size, out_size, stride, padding, activation):
        return False
    hidden, out_channels = weights[1].size(0), output.size(1)
    by = whole_block.choose(input.size(0), channels, hidden, out_channels, out_size, stride, input.dtype)
    return by == whole_block.ONE_KERNEL


@on_device
def frozen_inverted_residual_backward(
    grad_output: Tensor, grad_pooled: Tensor | None, expand_weight, depthwise_weight, project_weight,
    expand_mask: Tensor, depthwise_mask: Tensor, input_size, stride, padding, activation, residual: bool,
    channels_last: bool, needed,
    expand_scale: Tensor | None = None, depthwise_scale: Tensor | None = None, project_scale: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    need_input, need_expand, need_depthwise, need_project = needed
    n, channels, h, w = input_size
    hidden, out_channels = depthwise_weight.size(0), project_weight.size(0)
    height, width = grad_output.shape[2:]
    dtype = grad_output.dtype
    below_depthwise = need_input or (need_expand and expand_weight is not None)
    below_project = below_depthwise or need_depthwise
    grad_input = grad_output.new_empty(0)
    if need_input:
        grad_input = torch.empty(
            input_size, dtype=dtype, device=grad_output.device, memory_format=format_of(channels_last)
        )
    step = chunk_images(n, hidden * (h * w + height * width), grad_output)
    parts = chunks(n, step)
    counts = [images.stop - images.start for images in parts]
    tiles = backward_tiles((n, hidden, h, w), (n, hidden, height, width), depthwise_weight, stride, _UNDILATED, dtype)

    def project_rows(count: int) -> int:
        pixels = count * height * width
        if below_project:
            return pixel_tiles(pixels, hidden, out_channels, dtype)
        return gradient_tiles(pixels, out_channels)

    def depthwise_rows(count: int) -> int:
        return tiles.rows(count) if below_depthwise else gradient_tiles(count * height * width, hidden)

    def expand_rows(count: int) -> int:
        if expand_weight is None:
            return 0
        pixels = count * h * w
        return pixel_tiles(pixels, channels, hidden, dtype) if need_input else gradient_tiles(pixels, hidden)

    project_sums = _Sums(need_project, [project_rows(c) for c in counts], out_channels, grad_output)
    depthwise_sums = _Sums(need_depthwise, [depthwise_rows(c) for c in counts], hidden, grad_output)
    expand_sums = _Sums(need_expand, [expand_rows(c) for c in counts], hidden, grad_output)
    filtered = _buffer(grad_output, (step, hidden, height, width)) if below_project else None
    expanded = None
    if below_depthwise and expand_weight is not None:
        expanded = _buffer(grad_output, (step, hidden, h, w))
    taps = taps_first(depthwise_weight, dtype, depthwise_scale) if below_depthwise else None
    for index, (images, count) in enumerate(zip(parts, counts, strict=True)):
        grad = grad_output[images]
        if filtered is None:
            if need_project:
                gradient_into(grad, None, None, None, project_sums.chunk(index))
            continue
        pointwise_backward(
            grad, project_weight, None, None, filtered[:count], project_sums.chunk(index), scale=project_scale
        )
        mask = depthwise_mask[images] if activation is not None else None
        if not below_depthwise:
            gradient_into(filtered[:count], mask, activation, None, depthwise_sums.chunk(index))
            continue
        target = grad_input[images] if expanded is None else expanded[:count]
        depthwise_backward(
            filtered[:count], depthwise_weight, mask, stride, padding, _UNDILATED, activation, target,
            depthwise_sums.chunk(index), taps,
        )  # fmt: skip
        shortcut = grad if residual else None
        pooled = None if grad_pooled is None else grad_pooled[images]
        if expanded is None:
            _add_ports(target, shortcut, pooled, channels_last)
            continue
        mask = expand_mask[images] if activation is not None else None
        if need_input:
            pointwise_backward(
                target, expand_weight, mask, activation, grad_input[images], expand_sums.chunk(index), shortcut, pooled,
                expand_scale,
            )  # fmt: skip
        else:
            gradient_into(target, mask, activation, None, expand_sums.chunk(index))
    return grad_input, expand_sums.total(), depthwise_sums.total(), project_sums.total()


def _add_ports(grad_input: Tensor, shortcut: Tensor | None, grad_pooled: Tensor | None, channels_last: bool) -> None:
    """What the epilogue of the expand does, for a block without one (the first of a network)."""
    if shortcut is not None:
        grad_input += shortcut
    if grad_pooled is not None:
        grad_input += avg_pool2d_backward(
            grad_pooled, grad_input.shape, (2, 2), (2, 2), (0, 0), False, True, None, channels_last
        )


OPERATORS = {
    "frozen_inverted_residual": frozen_inverted_residual,
    "frozen_inverted_residual_backward": frozen_inverted_residual_backward,
}
