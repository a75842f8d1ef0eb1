"""The table of this backend's operators. Importing it needs Triton, not a GPU."""

from __future__ import annotations

from tinytl_kernels.backends.triton import (
    activation,
    avg_pool,
    frozen_conv,
    frozen_inverted_residual,
    max_pool,
    upsample_add,
)

OPERATORS = {
    **activation.OPERATORS,
    **avg_pool.OPERATORS,
    **frozen_conv.OPERATORS,
    **frozen_inverted_residual.OPERATORS,
    **max_pool.OPERATORS,
    **upsample_add.OPERATORS,
}
