"""Comparing the C++ kernels with the reference bit by bit.

On small whole numbers every sum is exact in float32 whatever its order, so outputs, masks and gradients of two correct
implementations are equal, and 0 and 6, where a mask is decided, come up all the time. New memory is filled with NaN
while the kernels run, so that an element which nobody writes shows.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from tinytl_kernels.backends import backend_module


def whole_numbers(size, limit: int, generator: torch.Generator, dtype: torch.dtype = torch.float32) -> Tensor:
    """Random whole numbers from ``-limit`` to ``limit``."""
    return torch.randint(-limit, limit + 1, size, generator=generator).to(dtype)


@contextlib.contextmanager
def poisoned_memory() -> Iterator[None]:
    """New tensors come filled with NaN."""
    assert torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def operator(backend: str, name: str) -> Callable:
    """What ``backend`` computes the operator ``name`` with."""
    return backend_module(backend).OPERATORS[name]


def both(name: str, *arguments) -> tuple:
    """The result of the C++ kernels, after asserting that it equals the reference's."""
    with poisoned_memory():
        ours = operator("cpu", name)(*arguments)
    theirs = operator("reference", name)(*arguments)
    outputs = [(t if isinstance(t, tuple) else (t,)) for t in (ours, theirs)]
    for i, (a, b) in enumerate(zip(*outputs, strict=True)):
        assert a.shape == b.shape, f"{name}, output {i}: shape {tuple(a.shape)}, reference {tuple(b.shape)}"
        assert a.dtype == b.dtype, f"{name}, output {i}: {a.dtype}, reference {b.dtype}"
        differing = ((a != b) & ~(a.isnan() & b.isnan())).sum().item()
        assert not differing, f"{name}, output {i}: {differing} of {a.numel()} elements differ from the reference"
    return ours
