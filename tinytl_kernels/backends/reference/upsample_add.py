"""Adding a bilinearly upsampled image, and the adjoint of that, in ATen."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from tinytl_kernels.backends.reference.slabs import image_chunks
from tinytl_kernels.core.layout import format_of, memory_format


def upsample_add(main: Tensor, branch: Tensor) -> Tensor:
    layout = memory_format(main)
    output = torch.empty_like(main, memory_format=layout)
    branch = branch.contiguous(memory_format=layout)
    # Interpolated where the sum is to stand: the upsampled branch has no memory of its own. A few images at a time,
    # because ATen takes small contiguous images through a channels-last copy.
    for images in image_chunks(main):
        torch.ops.aten.upsample_bilinear2d.out(branch[images], main.shape[2:], False, out=output[images])
        output[images].add_(main[images])
    return output


def upsample_add_backward(grad_output: Tensor, branch_size, channels_last: bool) -> Tensor:
    size = (*grad_output.shape[:2], *branch_size)
    grad_branch = torch.empty(
        size, dtype=grad_output.dtype, device=grad_output.device, memory_format=format_of(channels_last)
    )
    for images in image_chunks(grad_output):
        grad_branch[images] = _adjoint(grad_output[images], branch_size)
    return grad_branch


def _adjoint(grad_output: Tensor, branch_size) -> Tensor:
    if grad_output.device.type == "cpu":
        n, c = grad_output.shape[:2]
        return torch.ops.aten.upsample_bilinear2d_backward(
            grad_output, grad_output.shape[2:], (n, c, *branch_size), False
        )
    # ATen's kernels elsewhere scatter with atomics, in no fixed order. Interpolation is separable: two products with
    # small matrices are its adjoint, and deterministic.
    rows = _interpolation_matrix(branch_size[0], grad_output.shape[2], grad_output)
    columns = _interpolation_matrix(branch_size[1], grad_output.shape[3], grad_output)
    return rows.T @ grad_output @ columns


def _interpolation_matrix(length: int, to_length: int, like: Tensor) -> Tensor:
    """(to_length, length): row i holds the weights with which output pixel i reads the input pixels."""
    unit = torch.eye(length, device=like.device, dtype=torch.float32)
    rows = F.interpolate(unit[None], to_length, mode="linear", align_corners=False)[0]
    return rows.T.to(like.dtype)


OPERATORS = {"upsample_add": upsample_add, "upsample_add_backward": upsample_add_backward}
