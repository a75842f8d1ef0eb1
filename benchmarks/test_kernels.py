"""The C++ kernels of the CPU backend, forward and backward, beside the limits of the machine."""

from __future__ import annotations

import pytest

from benchmarks.conftest import REPLAY
from benchmarks.kernels import KERNELS
from benchmarks.roofline import DIRECTIONS

pytestmark = pytest.mark.benchmark(timer=REPLAY)


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("kernel", [pytest.param(kernel, id=kernel.name) for kernel in KERNELS])
def test_kernel(kernel, direction, against_limit) -> None:
    against_limit(kernel, direction)
