"""Shared fixtures: every test starts from a printed seed, and what is to run on the C++ kernels does."""

from __future__ import annotations

import pytest
import torch

from tests.threads import num_threads
from tinytl_kernels.backends import use_backend
from tinytl_kernels.backends.cpu import unavailable_reason


@pytest.fixture(autouse=True)
def seeded() -> int:
    """Seed every generator; pytest shows the print when a test fails."""
    seed = 20260101
    print(f"seed {seed}")
    torch.manual_seed(seed)
    return seed


@pytest.fixture
def one_thread():
    """Small tensors, one order of summation, the same scratch memory in every step: with more it is chance."""
    with num_threads(1):
        yield


@pytest.fixture
def cpu_kernels():
    """Force the C++ kernels, so that no call can be answered by another backend; skip where they cannot be compiled."""
    if reason := unavailable_reason():
        pytest.skip(f"cpu backend: {reason}")
    with use_backend("cpu"):
        yield
