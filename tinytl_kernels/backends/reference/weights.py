"""Weights as ATen's convolutions take them: floating point, a bounded slice at a time where they are stored in 8 bits.

Forward cuts a weight by output channels, backward by input channels, so that every result is one whole sum: slices
change no rounding, add nothing up, and never make a full floating point copy of a large weight.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from tinytl_kernels.core.quantization import dequantize

# A slice, dequantised: about a core's cache. At least one channel. Elsewhere than on the CPU a layer is one slice.
SLICE_BYTES = 1 << 20
_VECTOR = 16  # channels; slices of whole vectors where they are that large


class WeightSlice(NamedTuple):
    """``weight`` convolves channels ``inputs`` to channels ``outputs`` in ``groups`` groups."""

    weight: Tensor
    outputs: slice
    inputs: slice
    groups: int


def dequantize_if_small(weight: Tensor, scale: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """(weight in ``dtype``, None) if it is floating point or no larger than a slice; else as it is."""
    if scale is None or weight.device.type != "cpu" or weight.numel() * dtype.itemsize <= SLICE_BYTES:
        return dequantize(weight, scale, dtype), None
    return weight, scale


def weight_slices(
    weight: Tensor, scale: Tensor | None, dtype: torch.dtype, groups: int, *, by_input: bool
) -> Iterator[WeightSlice]:
    """A weight (O, C / groups, kH, kW) in ``dtype``, cut by input or by output channels; whole if it is not coded.

    Each slice lies within one group, or is of several whole groups.
    """
    group_outputs, group_inputs = weight.size(0) // groups, weight.size(1)
    if scale is None:
        yield WeightSlice(weight.to(dtype), slice(0, weight.size(0)), slice(0, group_inputs * groups), groups)
        return
    channels = group_inputs if by_input else group_outputs  # of a group, on the side that is cut
    fit = max(1, SLICE_BYTES * channels * groups // max(1, weight.numel() * dtype.itemsize))
    if fit >= channels:
        step = fit // channels
        for first in range(0, groups, step):
            last = min(groups, first + step)
            outputs = slice(first * group_outputs, last * group_outputs)
            inputs = slice(first * group_inputs, last * group_inputs)
            yield WeightSlice(_part(weight, scale, outputs, slice(None), dtype), outputs, inputs, last - first)
        return
    step = fit // _VECTOR * _VECTOR or fit
    for group in range(groups):
        for first in range(0, channels, step):
            part = slice(first, min(channels, first + step))
            outputs = slice(group * group_outputs, (group + 1) * group_outputs)
            inputs = slice(group * group_inputs, (group + 1) * group_inputs)
            columns = slice(None)
            if by_input:
                columns, inputs = part, slice(inputs.start + part.start, inputs.start + part.stop)
            else:
                outputs = slice(outputs.start + part.start, outputs.start + part.stop)
            yield WeightSlice(_part(weight, scale, outputs, columns, dtype), outputs, inputs, 1)


def _part(weight: Tensor, scale: Tensor, outputs: slice, columns: slice, dtype: torch.dtype) -> Tensor:
    # A scale belongs to output channels, a codebook to all of them.
    return dequantize(weight[outputs, columns], scale[outputs] if weight.dtype == torch.int8 else scale, dtype)
