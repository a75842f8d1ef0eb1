"""Smooth activations with their derivative in 8 bits."""

from __future__ import annotations

import pytest
import torch

from tests.backends.triton.interpreted.against import DTYPES, LAYOUTS, image
from tests.checks import assert_as_exact_as_torch
from tinytl_kernels.backends import reference
from tinytl_kernels.backends.triton import derivative_code as kernels
from tinytl_kernels.backends.triton.operators import OPERATORS
from tinytl_kernels.core.derivative_code import DERIVATIVE_CODES, NAN_CODE

NAMES = list(DERIVATIVE_CODES)


def check(x, name):
    """Values as the reference's, codes at most a step away (a tie may go either way), gradients its in every bit."""
    output, codes = OPERATORS["activation"](x, name, 0.01, True, True)
    expected, expected_codes = reference.OPERATORS["activation"](x, name, 0.01, True, True)
    exact, _ = reference.OPERATORS["activation"](x.double(), name, 0.01, True, False)
    assert_as_exact_as_torch(name, output, expected, exact)
    assert output.stride() == codes.stride() == expected.stride()
    assert (codes.int() - expected_codes.int()).abs().max() <= 1 if x.numel() else codes.numel() == 0
    grad_output = torch.randn(x.shape).to(x.dtype)
    grad = OPERATORS["activation_backward"](grad_output, codes, name, 0.01)
    assert torch.equal(grad, reference.OPERATORS["activation_backward"](grad_output, codes, name, 0.01))
    assert grad.stride() == grad_output.stride()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_every_activation(name, dtype):
    check(torch.randn(2, 13, 3, 5).mul(3).to(dtype), name)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout(layout):
    check(image((2, 11, 4, 3), torch.float32, layout), "silu")


# 50 x 90 elements are several programs.
@pytest.mark.parametrize("shape", [(7,), (), (3, 4, 11), (0, 3), (50, 90)], ids=str)
def test_every_shape(shape):
    check(torch.randn(shape) * 4, "gelu")


def test_offsets_of_64_bits_give_the_same_answers(monkeypatch):
    monkeypatch.setattr(kernels, "needs_wide_offsets", lambda *tensors: True)
    check(torch.randn(50, 90) * 4, "hardswish")


@pytest.mark.parametrize("name", NAMES)
def test_nan_has_a_code_of_its_own(name):
    x = torch.tensor([float("nan"), 0.0, -20.0, 20.0])
    codes = OPERATORS["activation"](x, name, 0.01, True, True)[1]
    assert (codes == NAN_CODE).tolist() == [True, False, False, False]
    grad = OPERATORS["activation_backward"](torch.ones(4), codes, name, 0.01)
    assert grad.isnan().tolist() == [True, False, False, False]
