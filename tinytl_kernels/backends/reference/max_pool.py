"""Max pooling in ATen: indices are turned into window positions for a few rows at a time."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from tinytl_kernels.backends.reference.slabs import SLAB_ELEMENTS, image_chunks, row_bands
from tinytl_kernels.core.geometry import window_extent
from tinytl_kernels.core.layout import format_of, memory_format
from tinytl_kernels.core.positions import fits_in_4_bits, positions_size


def max_pool2d(
    input: Tensor, kernel_size, stride, padding, dilation, ceil_mode: bool, needs_positions: bool
) -> tuple[Tensor, Tensor]:
    layout = memory_format(input)
    if not needs_positions:
        output = F.max_pool2d(input, kernel_size, stride, padding, dilation, ceil_mode)
        return output.contiguous(memory_format=layout), input.new_empty(0, dtype=torch.uint8)
    size = torch.ops.aten.max_pool2d_with_indices(
        input.new_empty(input.shape, device="meta"), kernel_size, stride, padding, dilation, ceil_mode
    )[0].shape
    output = torch.empty(size, dtype=input.dtype, device=input.device, memory_format=layout)
    positions = input.new_empty(positions_size(size, kernel_size), dtype=torch.uint8)
    # The int64 indices of a whole image would take twice the bytes of the output itself. ATen also makes a dense copy
    # of the rows that it is given, about stride^2 elements for each of the output.
    elements = SLAB_ELEMENTS // 8
    above = -(-padding[0] // stride[0])
    for images, rows in row_bands(size, elements):
        # ATen pads both sides: start early enough that its padding reaches no window of these rows.
        skip = min(above, rows.start)
        first = (rows.start - skip) * stride[0]
        end = (rows.stop - 1) * stride[0] - padding[0] + window_extent(kernel_size[0], dilation[0])
        values, indices = torch.ops.aten.max_pool2d_with_indices(
            input[images, :, first : max(end, first + 1)], kernel_size, stride, padding, dilation, ceil_mode
        )
        kept = slice(skip, skip + rows.stop - rows.start)
        output[images, :, rows] = values[:, :, kept]
        in_window = _to_positions(indices, input.size(3), kernel_size, stride, padding, dilation)
        positions[images, rows] = _pack(in_window[:, :, kept].permute(0, 2, 3, 1), kernel_size)
    return output, positions


def _to_positions(indices: Tensor, input_width: int, kernel_size, stride, padding, dilation) -> Tensor:
    """Flat indices into the input plane -> row * kernel width + column within the window, uint8."""
    rows = torch.arange(indices.size(2), device=indices.device).mul_(stride[0]).sub_(padding[0])
    columns = torch.arange(indices.size(3), device=indices.device).mul_(stride[1]).sub_(padding[1])
    row = indices.div(input_width, rounding_mode="floor")
    column = indices.sub_(row * input_width).sub_(columns).div_(dilation[1], rounding_mode="floor")
    row = row.sub_(rows[:, None]).div_(dilation[0], rounding_mode="floor")
    return row.mul_(kernel_size[1]).add_(column).to(torch.uint8)


def _pack(positions: Tensor, kernel_size) -> Tensor:
    """(N, H, W, C) positions -> two channels a byte, the even one in the low half; or as they are."""
    if not fits_in_4_bits(kernel_size):
        return positions
    if positions.size(-1) % 2:
        positions = F.pad(positions, (0, 1))
    return positions[..., 0::2] | (positions[..., 1::2] << 4)


def _unpack(packed: Tensor, channels: int, kernel_size) -> Tensor:
    if not fits_in_4_bits(kernel_size):
        return packed
    return torch.stack((packed & 15, packed >> 4), dim=-1).flatten(-2)[..., :channels]


def max_pool2d_backward(
    grad_output: Tensor, positions: Tensor, input_size, kernel_size, stride, padding, dilation, channels_last: bool
) -> Tensor:
    # In gather form: each place in the window adds its own strided slice, in a fixed order and without atomics.
    grad_input = torch.empty(
        input_size, dtype=grad_output.dtype, device=grad_output.device, memory_format=format_of(channels_last)
    ).zero_()
    out_height, out_width = grad_output.shape[2:]
    for images in image_chunks(grad_input):
        winners = _unpack(positions[images], grad_output.size(1), kernel_size).permute(0, 3, 1, 2)
        for row in range(kernel_size[0]):
            to_rows, rows = _places(row * dilation[0] - padding[0], stride[0], out_height, input_size[2])
            for column in range(kernel_size[1]):
                to_columns, columns = _places(column * dilation[1] - padding[1], stride[1], out_width, input_size[3])
                won = winners[:, :, rows, columns] == row * kernel_size[1] + column
                grad_input[images][:, :, to_rows, to_columns] += torch.where(
                    won, grad_output[images][:, :, rows, columns], 0.0
                )
    return grad_input


def _places(offset: int, stride: int, positions: int, length: int) -> tuple[slice, slice]:
    """Where one place in the window falls: (slice of the input, slice of the windows for which it is inside)."""
    first = max(0, -(offset // stride))
    last = min(positions, (length - 1 - offset) // stride + 1)
    last = max(first, last)
    start = offset + first * stride
    return slice(start, start + (last - first) * stride, stride), slice(first, last)


OPERATORS = {"max_pool2d": max_pool2d, "max_pool2d_backward": max_pool2d_backward}
