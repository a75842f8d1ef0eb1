"""The table of this backend's operators. Importing it needs Triton, not a GPU."""

from __future__ import annotations

from tinytl_kernels.backends.triton import (
    activation,
    adaptive_avg_pool,
    avg_pool,
    dropout,
    frozen_conv,
    frozen_inverted_residual,
    group_norm,
    group_norm_backward,
    lite_branch,
    max_pool,
    upsample_add,
)

OPERATORS = {
    **activation.OPERATORS,
    **adaptive_avg_pool.OPERATORS,
    **avg_pool.OPERATORS,
    **dropout.OPERATORS,
    **frozen_conv.OPERATORS,
    **frozen_inverted_residual.OPERATORS,
    **group_norm.OPERATORS,
    **group_norm_backward.OPERATORS,
    **lite_branch.OPERATORS,
    **max_pool.OPERATORS,
    **upsample_add.OPERATORS,
}
