"""Everything here runs on the C++ kernels; where they cannot be compiled it is skipped, with the reason."""

from __future__ import annotations

import pytest

from tinytl_kernels.backends import use_backend
from tinytl_kernels.backends.cpu import unavailable_reason


@pytest.fixture
def cpu_kernels():
    """Force the C++ kernels, so that no call can be answered by another backend."""
    if reason := unavailable_reason():
        pytest.skip(f"cpu backend: {reason}")
    with use_backend("cpu"):
        yield
