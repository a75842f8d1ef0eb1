"""Reflection, replication and circular padding in ATen, and their adjoints strip by strip, in a fixed order."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from tinytl_kernels.backends.reference.slabs import image_chunks
from tinytl_kernels.core.layout import format_of, memory_format


def pad2d(input: Tensor, padding, mode: str) -> Tensor:
    top, bottom, left, right = padding
    layout = memory_format(input)
    if mode != "circular" or layout is torch.contiguous_format:
        return F.pad(input, (left, right, top, bottom), mode=mode).contiguous(memory_format=layout)
    # ATen's circular padding comes back contiguous.
    n, c, height, width = input.shape
    output = torch.empty(
        (n, c, height + top + bottom, width + left + right),
        dtype=input.dtype,
        device=input.device,
        memory_format=layout,
    )
    for images in image_chunks(input):
        output[images] = F.pad(input[images], (left, right, top, bottom), mode=mode)
    return output


def pad2d_backward(grad_output: Tensor, padding, mode: str, channels_last: bool) -> Tensor:
    top, bottom, left, right = padding
    n, c, height, width = grad_output.shape
    grad_input = torch.empty(
        (n, c, height - top - bottom, width - left - right),
        dtype=grad_output.dtype,
        device=grad_output.device,
        memory_format=format_of(channels_last),
    )
    for images in image_chunks(grad_output):
        grad_input[images] = _fold(_fold(grad_output[images], 2, top, bottom, mode), 3, left, right, mode)
    return grad_input


def _fold(grad: Tensor, dim: int, before: int, after: int, mode: str) -> Tensor:
    """Add the gradient of the padding along one dimension to the pixels that it repeats."""
    length = grad.size(dim) - before - after
    inner = grad.narrow(dim, before, length)
    if before == 0 and after == 0:
        return inner
    inner = inner.clone()
    first, last = grad.narrow(dim, 0, before), grad.narrow(dim, before + length, after)
    if mode == "replicate":
        inner.narrow(dim, 0, 1).add_(first.sum(dim, keepdim=True))
        inner.narrow(dim, length - 1, 1).add_(last.sum(dim, keepdim=True))
    elif mode == "reflect":
        inner.narrow(dim, 1, before).add_(first.flip(dim))
        inner.narrow(dim, length - 1 - after, after).add_(last.flip(dim))
    else:
        inner.narrow(dim, length - before, before).add_(first)
        inner.narrow(dim, 0, after).add_(last)
    return inner


OPERATORS = {"pad2d": pad2d, "pad2d_backward": pad2d_backward}
