"""The backward of a strided window, split in phases.

Input positions of equal remainder modulo the stride (a phase) were read through the same taps: every STEP-th one from
a first on. So the gradient of each phase is a convolution of grad_output with stride 1, and no zero is multiplied.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def first_tap(phase, PAD: tl.constexpr, STRIDE: tl.constexpr, DILATION: tl.constexpr, KERNEL: tl.constexpr,
              STEP: tl.constexpr):  # fmt: skip
    """The first tap that read input positions = ``phase`` (mod STRIDE), of which every STEP-th did; or KERNEL."""
    first = KERNEL
    for k in tl.static_range(STEP):
        # STRIDE * KERNEL * DILATION keeps the dividend positive.
        reads = (phase + PAD + STRIDE * KERNEL * DILATION - k * DILATION) % STRIDE == 0
        first = tl.where(reads, k, first)
    return first


@triton.jit
def grad_shift(tap, phase, PAD: tl.constexpr, STRIDE: tl.constexpr, DILATION: tl.constexpr, KERNEL: tl.constexpr):
    """How far the output position that read input position ``phase`` through ``tap`` lies from output position 0.

    Far outside of every image for a tap beyond the window. The difference is a multiple of the stride, so that the
    division, which rounds to zero, is exact.
    """
    return tl.where(tap < KERNEL, (phase + PAD - tap * DILATION) // STRIDE, -(1 << 24))


def phase_steps(stride: Sequence[int], dilation: Sequence[int]) -> tuple[int, int]:
    """STEP for height and width: which taps of a window read one phase."""
    step_h, step_w = (s // math.gcd(s, d) for s, d in zip(stride, dilation, strict=True))
    return step_h, step_w


def window_constants(weight: Tensor, stride, padding, dilation) -> dict[str, int]:
    """The window of a convolution as compile-time constants; the padding after follows from the sizes."""
    return dict(
        KERNEL_H=weight.size(2), KERNEL_W=weight.size(3), STRIDE_H=stride[0], STRIDE_W=stride[1],
        DILATION_H=dilation[0], DILATION_W=dilation[1], PAD_TOP=padding[0], PAD_LEFT=padding[2],
    )  # fmt: skip
