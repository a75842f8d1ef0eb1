"""A frozen block and its lite residual in one call, where a backend has one. No operator: a chain of three.

    output = frozen_inverted_residual(input) + upsampled lite_branch(pooled input)        TinyTL, section 3.2, figure 3

A small block computes for less time than three operators take to be called, checked and differentiated one by one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from tinytl_kernels.core.geometry import four_paddings, pair
from tinytl_kernels.ops.frozen_inverted_residual import check_block
from tinytl_kernels.ops.library import fused_call, gradient_needed
from tinytl_kernels.ops.lite_branch import Norm, check_branch


class Branch(NamedTuple):
    """The arguments of :func:`lite_branch` after the pooled image."""

    weight1: Tensor
    norm1: Norm
    weight2: Tensor
    norm2: Norm
    stride: int = 1
    groups: int = 1
    activation: str = "relu"
    keep_conv: bool = True


class Running(NamedTuple):
    """The running statistics that a batch is counted in.

    Args:
        buffers: float32 mean and variance, (C,) each, and the int64 number of batches where it is kept; nothing for a
            norm that keeps none.
        momentum: the share of a new batch.
    """

    buffers: Sequence[Tensor] = ()
    momentum: float = 0.0


def lite_residual_block(
    block: tuple, scales: dict[str, Tensor | None], branch: Branch, running1: Running, running2: Running
) -> Tensor | None:
    """What the three operators and the counting of statistics come to, or None: call them one by one.

    Args:
        block, scales: the arguments of :func:`frozen_inverted_residual`, by position and by name.
        branch: its branch, which pools 2 x 2.
        running1, running2: of the branch's two norms.

    Returns:
        (N, O, H', W'), differentiable with respect to all that the three are; None where no backend does it in one
        call: while compiling or under autocast, on another device or in another layout.

    Raises:
        ValueError: as the operators do.
    """
    input, *convs, stride, padding, activation, residual = block
    weight1, norm1, weight2, norm2, branch_stride, groups, branch_activation, keep_conv = branch
    tensors = (input, *convs, *scales.values(), weight1, *norm1[:4], weight2, *norm2[:4])
    fused = fused_call("lite_residual_block", "lite_branch", tensors)
    if fused is None or weight2.size(0) != convs[4].size(0):  # the sum's own error says that channels differ
        return None
    biases = convs[1::2]
    stride, padding = pair(stride, "stride"), four_paddings(padding)
    options = (branch_stride, groups, branch_activation, norm1.groups, norm2.groups, norm1.eps, norm2.eps)
    needs_masks = gradient_needed(input, *biases)
    keep_conv = keep_conv and gradient_needed(*tensors)
    check_branch(input, weight1, *norm1[:4], weight2, *norm2[:4], *options, keep_conv)
    check_block(input, *convs, stride, padding, activation, residual, needs_masks, True, *scales.values())
    return fused(
        input, *convs, stride, padding, activation, residual, needs_masks,
        weight1, *norm1[:4], weight2, *norm2[:4], *options, keep_conv, *scales.values(), *running1, *running2,
    )  # fmt: skip
