"""Which kernels compute a frozen convolution: one rule, asked by the forward and the backward."""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch
from torch import Tensor

from tinytl_kernels.backends.triton import dense
from tinytl_kernels.backends.triton.configurations import Configuration, tunable

# Forces one of DENSE for every convolution that it can compute, for benchmarks.
ENVIRONMENT_VARIABLE = "TINYTL_TRITON_DENSE"

POINTWISE, DEPTHWISE, LIBRARY, IMPLICIT_GEMM = "pointwise", "depthwise", "library", "implicit_gemm"
DENSE = (LIBRARY, IMPLICIT_GEMM)


def choose(
    weight: Tensor, stride: Sequence[int], padding: Sequence[int], groups: int, pixels: int, dtype: torch.dtype,
    backward: bool = False,
) -> str:  # fmt: skip
    """Who computes a frozen convolution.

    1x1 and depthwise ones are always ours. Others are computed by ``dense``'s implicit matrix product, or by cuDNN
    (MIOpen) between a kernel that masks the gradient before it and one that applies bias, activation and mask after it:
    as :func:`dense_by` says, or a table that ``tinytl tune`` measured, or the environment variable.

    Args:
        weight: (O, C / groups, kH, kW).
        padding: (top, bottom, left, right).
        pixels: of the output, N * H' * W'.
        dtype: of the input.

    Returns:
        ``"pointwise"``, ``"depthwise"``, ``"library"`` or ``"implicit_gemm"``.

    Raises:
        ValueError: ``TINYTL_TRITON_DENSE`` is set to something else than one of the last two.
    """
    out_channels, group_channels, *window = weight.shape
    if groups == 1 and window == [1, 1] and not any(padding):
        return POINTWISE
    if out_channels == groups and group_channels == 1:
        return DEPTHWISE
    forced = os.environ.get(ENVIRONMENT_VARIABLE)
    if forced and forced not in DENSE:
        raise ValueError(f"{ENVIRONMENT_VARIABLE}: expected {' or '.join(map(repr, DENSE))}, got {forced!r}")
    if not dense.can_take(weight, groups):
        return LIBRARY
    if forced:
        return forced
    (by,) = dense_by(pixels, out_channels, group_channels, groups, tuple(window), tuple(stride), dtype, backward)
    return DENSE[by]


def _either(*shape: object) -> list[Configuration]:
    """What ``tinytl tune`` tries."""
    return [(by,) for by in range(len(DENSE))]


@tunable(_either)
def dense_by(
    pixels: int, out_channels: int, group_channels: int, groups: int, window: tuple[int, ...], stride: tuple[int, ...],
    dtype: torch.dtype, backward: bool,
) -> Configuration:  # fmt: skip
    """Index into ``DENSE`` of who computes a dense or grouped convolution.

    cuDNN is hard to beat at dense ones, and they are its until a measurement says otherwise. Groups make its arithmetic
    thin, while ours still takes every tensor on one trip.
    """
    return (DENSE.index(IMPLICIT_GEMM if groups > 1 else LIBRARY),)
