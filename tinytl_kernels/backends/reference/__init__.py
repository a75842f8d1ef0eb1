"""The reference backend: every operator in ATen alone, on any device. It defines the right answer, and it is lean.

Temporaries are bounded: what would be a full extra copy of an activation is made for a slab of rows or a few images
at a time (``slabs.py``).
"""

from __future__ import annotations

from tinytl_kernels.backends.reference import (
    activation,
    avg_pool,
    dropout,
    frozen_conv,
    frozen_inverted_residual,
    group_norm,
    lite_branch,
    max_pool,
    pad,
    upsample_add,
)

OPERATORS = {
    **activation.OPERATORS,
    **avg_pool.OPERATORS,
    **dropout.OPERATORS,
    **frozen_conv.OPERATORS,
    **frozen_inverted_residual.OPERATORS,
    **group_norm.OPERATORS,
    **lite_branch.OPERATORS,
    **max_pool.OPERATORS,
    **pad.OPERATORS,
    **upsample_add.OPERATORS,
}


def unavailable_reason() -> None:
    """ATen is always there."""
    return None


def cannot_take(tensor) -> None:
    """It takes every tensor."""
    return None
