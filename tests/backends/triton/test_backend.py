"""What the backend says of itself: when it can run, what it takes, that its operators are those of the schema."""

from __future__ import annotations

import inspect

import pytest
import torch

pytest.importorskip("triton")

from tinytl_kernels import ops  # noqa: F401 - declares the operators
from tinytl_kernels.backends import reference
from tinytl_kernels.backends import triton as backend
from tinytl_kernels.backends.triton.operators import OPERATORS


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_why_and_offers_nothing():
    assert "no GPU" in backend.unavailable_reason()
    assert backend.OPERATORS == {}


def test_it_takes_neither_cpu_tensors_nor_float64():
    assert "GPU" in backend.cannot_take(torch.zeros(1))
    on_gpu = torch.empty(1, dtype=torch.float64, device="meta")
    assert "got one on meta" in backend.cannot_take(on_gpu)


@pytest.mark.parametrize("name", OPERATORS)
def test_operators_take_the_arguments_of_the_schema(name):
    assert name in reference.OPERATORS
    arguments = getattr(torch.ops.tinytl, name).default._schema.arguments
    inspect.signature(OPERATORS[name]).bind(*arguments)
