"""The tests of values, gradients and masks run on every backend that can take CPU tensors here."""

from __future__ import annotations

import pytest
import torch

from tinytl_kernels import use_backend
from tinytl_kernels.backends import BACKENDS, backend_module

# Tests of anything else (schemas, refused inputs, float64) say nothing about a backend and run once.
ON_EVERY_BACKEND = (
    "test_values_and_gradients", "test_half_precision", "test_every_activation", "test_mask_has", "test_nan_and_inf",
    "test_any_shape", "test_special_values", "test_pooled_port", "test_layouts_may_differ",
)  # fmt: skip

# These look at how the reference does it: slabs without a full temporary in either layout, its own functions replaced.
ON_REFERENCE = ("test_no_mask_without_a_gradient", "test_only_what_is_needed")


def backends() -> list[str]:
    modules = {name: backend_module(name) for name in BACKENDS}
    return [n for n, m in modules.items() if not m.cannot_take(torch.zeros(1)) and not m.unavailable_reason()]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if metafunc.function.__name__.startswith(ON_EVERY_BACKEND):
        metafunc.parametrize("backend", backends(), indirect=True)
    elif metafunc.module.__name__.endswith("test_temporaries") or metafunc.function.__name__.startswith(ON_REFERENCE):
        metafunc.parametrize("backend", ["reference"], indirect=True)


@pytest.fixture(autouse=True)
def backend(request: pytest.FixtureRequest):
    """The name of the backend that is forced, or None where the registry chooses."""
    if not hasattr(request, "param"):
        yield None
        return
    with use_backend(request.param):
        yield request.param
