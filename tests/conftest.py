"""Shared fixtures: every test starts from a printed seed."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(autouse=True)
def seeded() -> int:
    """Seed every generator; pytest shows the print when a test fails."""
    seed = 20260101
    print(f"seed {seed}")
    torch.manual_seed(seed)
    return seed
