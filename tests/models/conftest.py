"""Shared by the tests of models."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

import tinytl_kernels as tk


@pytest.fixture
def reference_backend() -> Iterator[None]:
    """The backend that takes float64; what a model is does not depend on it."""
    with tk.use_backend("reference"):
        yield
