"""The CPU backend: C++ kernels from ``kernels/cpu``, compiled at first use. Operators it lacks are the reference's."""

from __future__ import annotations

import torch
from torch import Tensor

from tinytl_kernels.backends.cpu import (
    activation,
    block_chain,
    frozen_conv,
    frozen_inverted_residual,
    group_norm,
    linear,
    lite_branch,
    mbconv,
    pooling,
    upsample_add,
)
from tinytl_kernels.backends.cpu.build import load_kernels

DTYPES = (torch.float32, torch.bfloat16, torch.float16)

OPERATORS = {
    **activation.OPERATORS,
    **frozen_conv.OPERATORS,
    **frozen_inverted_residual.OPERATORS,
    **group_norm.OPERATORS,
    **lite_branch.OPERATORS,
    **pooling.OPERATORS,
    **upsample_add.OPERATORS,
}
DIFFERENTIABLE = {
    **frozen_conv.DIFFERENTIABLE,
    **frozen_inverted_residual.DIFFERENTIABLE,
    **lite_branch.DIFFERENTIABLE,
    **upsample_add.DIFFERENTIABLE,
}
FUSED = {**block_chain.FUSED, **linear.FUSED, **mbconv.FUSED}


def unavailable_reason() -> str | None:
    """Why the kernels cannot run here, or None; compiles them if nobody has."""
    return load_kernels()


def reset_scratch_bytes() -> None:
    """Begin :func:`scratch_bytes` anew."""
    if _counts_scratch():
        torch.ops.tinytl_cpu.reset_scratch_bytes()


def scratch_bytes() -> int:
    """Bytes of working memory that the kernels have asked for since :func:`reset_scratch_bytes`, all threads together.

    A thread keeps it from call to call, so that a process which runs nothing else holds it from its second step on.
    """
    return torch.ops.tinytl_cpu.scratch_bytes() if _counts_scratch() else 0


def _counts_scratch() -> bool:
    return hasattr(torch.ops.tinytl_cpu, "scratch_bytes")  # not before the kernels are loaded


def cannot_take(tensor: Tensor) -> str | None:
    """Why the kernels cannot take ``tensor``, or None."""
    if tensor.device.type != "cpu":
        return f"expected a CPU tensor, got one on {tensor.device}"
    if tensor.dtype not in DTYPES:
        return f"expected float32, bfloat16 or float16, got {tensor.dtype}"
    return None
