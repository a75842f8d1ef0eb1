"""tinytl::activation with code_bits=8: one byte an element, and gradients as near as the docstring says."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from tests.checks import assert_as_exact_as_torch, saved_bytes
from tests.ops.layouts import DTYPES, LAYOUTS, images
from tinytl_kernels import ops
from tinytl_kernels.core.activations import BIT_MASK, STAND_ALONE
from tinytl_kernels.core.derivative_code import DERIVATIVE_CODES, NAN_CODE

SMOOTH = tuple(name for name in STAND_ALONE if name not in BIT_MASK)
STOCK = {
    "hardswish": F.hardswish,
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "sigmoid": torch.sigmoid,
}


def coded(x, name):
    return ops.activation(x, name, code_bits=8)


def value_and_gradient(function, x, grad_output):
    x = x.detach().requires_grad_()
    y = function(x)
    return y.detach(), *torch.autograd.grad(y, x, grad_output.to(y.dtype))


def check(name, x, grad_output):
    """The value is as exact as PyTorch's; the gradient is off by the code's error, and rounded to its dtype twice."""
    y, grad = value_and_gradient(lambda x: coded(x, name), x, grad_output)
    exact_y, exact_grad = value_and_gradient(STOCK[name], x.double(), grad_output.to(x.dtype))
    assert_as_exact_as_torch(f"{name}: output", y, STOCK[name](x), exact_y)
    assert grad.dtype == x.dtype
    allowed = (DERIVATIVE_CODES[name].error + 1e-6) * grad_output.to(x.dtype).double().abs()
    allowed += torch.finfo(x.dtype).eps * (exact_grad.abs() + allowed)
    excess = (grad.double() - exact_grad).abs() - allowed
    assert x.numel() == 0 or excess.max() <= 0, f"{name}: {excess.max():.2e} beyond what is allowed"


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", SMOOTH)
def test_values_and_gradients_are_within_the_stated_error(name, dtype, layout):
    check(name, images((2, 13, 5, 7), dtype, layout), torch.randn(2, 13, 5, 7))


@pytest.mark.parametrize("size", [(), (1,), (9,), (3, 17), (2, 3, 5), (1, 2, 3, 4, 11), (0, 8, 4, 4), (0,)], ids=str)
def test_any_shape(size):
    check("silu", torch.randn(size).mul(3), torch.randn(size))


@pytest.mark.parametrize("name", SMOOTH)
def test_every_activation_is_within_half_a_step_at_every_number_of_float16(name):
    x = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(torch.float16)
    x = x[x.isfinite()].float()
    _, grad = value_and_gradient(lambda x: coded(x, name), x, torch.ones_like(x))
    _, exact = value_and_gradient(STOCK[name], x.double(), torch.ones_like(x))
    error = (grad - exact).abs().max().item()
    assert 0.95 * DERIVATIVE_CODES[name].error <= error <= DERIVATIVE_CODES[name].error + 1e-6


@pytest.mark.parametrize("name", ["hardswish", "silu", "gelu", "gelu_tanh"])
def test_every_activation_is_exact_where_its_derivative_is_0_or_1(name):
    x, grad_output = torch.tensor([-40.0, 40.0]).repeat_interleave(37), torch.randn(74)
    _, grad = value_and_gradient(lambda x: coded(x, name), x, grad_output)
    assert torch.equal(grad, torch.where(x > 0, grad_output, 0.0))


@pytest.mark.parametrize("name", SMOOTH)
def test_special_values_are_nan_where_pytorchs_gradient_is(name):
    special = torch.tensor([float("nan"), float("inf"), -float("inf"), 0.0]).repeat_interleave(16)  # whole vectors
    _, grad = value_and_gradient(lambda x: coded(x, name), special, torch.ones(64))
    _, expected = value_and_gradient(STOCK[name], special, torch.ones(64))
    torch.testing.assert_close(grad, expected, equal_nan=True, rtol=0, atol=DERIVATIVE_CODES[name].error)
    assert grad[:16].isnan().all()


def test_special_values_among_others_stay_where_they_are():
    # Not a whole vector, where ATen's hardswish lets a gradient pass.
    x = torch.tensor([1.0, float("nan"), 1.0])
    _, grad = value_and_gradient(lambda x: coded(x, "hardswish"), x, torch.ones(3))
    assert grad.isnan().tolist() == [False, True, False]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_any_shape_keeps_one_byte_an_element(dtype, layout):
    x = images((3, 9, 5, 7), dtype, layout).requires_grad_()
    for name in SMOOTH:
        assert saved_bytes(lambda name=name: coded(x, name)) == x.numel()


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_any_shape_keeps_its_strides(layout):
    x = images((2, 9, 4, 5), layout=layout).requires_grad_()
    y = coded(x, "gelu")
    for grad_output in (torch.randn_like(y), torch.randn(2, 9, 4, 5), torch.ones(()).expand(2, 9, 4, 5)):
        (grad,) = torch.autograd.grad(y, x, grad_output, retain_graph=True)
        assert y.stride() == x.stride()
        assert grad.is_contiguous(
            memory_format=torch.channels_last if layout == "channels_last" else torch.contiguous_format
        )
        torch.testing.assert_close(grad, torch.autograd.grad(y, x, grad_output.clone(), retain_graph=True)[0])


def test_the_relu_family_keeps_its_bits():
    x = torch.randn(2, 16, 4, 4, requires_grad=True)
    assert saved_bytes(lambda: coded(x, "relu6")) == 2 * 4 * 4 * 2


def test_no_codes_without_a_gradient_to_come():
    x = torch.randn(2, 8, 5, 5, requires_grad=True)
    with torch.no_grad():
        assert coded(x, "silu").grad_fn is None
    assert torch.ops.tinytl.activation(x.detach(), "silu", 0.01, False, False)[1].numel() == 0


def test_exact_is_the_default():
    x, grad_output = images((2, 8, 4, 4)), torch.randn(2, 8, 4, 4)
    for name in SMOOTH:
        _, exact = value_and_gradient(STOCK[name], x, grad_output)
        torch.testing.assert_close(value_and_gradient(lambda x, n=name: ops.activation(x, n), x, grad_output)[1], exact)


def test_second_derivative_is_refused_even_of_a_sum():
    # The gradient of a sum does not depend on grad_output: without history it would be silently incomplete.
    x = torch.randn(2, 8, requires_grad=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(coded(x, "silu").sum(), x, create_graph=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_autocast_leaves_the_dtype_alone_as_pytorch_does(dtype):
    x = torch.randn(2, 8, 4, 4, dtype=dtype, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = coded(x, "silu")
        assert saved_bytes(lambda: coded(x, "silu")) == x.numel()
    assert y.dtype == F.silu(x).dtype == dtype
    assert torch.autograd.grad(y.sum(), x)[0].dtype == dtype


@pytest.mark.parametrize("code_bits", [4, 16, True, "8"])
def test_other_numbers_of_bits_are_refused(code_bits):
    with pytest.raises(ValueError, match="code_bits: expected None"):
        ops.activation(torch.zeros(3), "silu", code_bits=code_bits)


def test_codes_for_the_relu_family_are_refused_by_the_operator():
    with pytest.raises(ValueError, match="needs_codes: expected False, for 'relu' keeps bits"):
        torch.ops.tinytl.activation(torch.zeros(3), "relu", 0.01, True, True)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["silu", "sigmoid"])
def test_opcheck(name, layout):
    x = images((2, 9, 4, 5), layout=layout).requires_grad_()
    torch.library.opcheck(torch.ops.tinytl.activation.default, (x, name, 0.01, True, True))
    codes = torch.ops.tinytl.activation(x.detach(), name, 0.01, True, True)[1]
    grad_output = torch.randn(2, 9, 1, 1).expand(2, 9, 4, 5)
    torch.library.opcheck(torch.ops.tinytl.activation_backward.default, (grad_output, codes, name, 0.01))


def test_compiles_without_a_graph_break_with_dynamic_shapes():
    def step(x):
        return coded(coded(x, "gelu"), "silu").square().mean()

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager", dynamic=True)
    for size in (5, 8):
        x = torch.randn(2, size, size, 3).requires_grad_()
        expected = torch.autograd.grad(step(x), x)[0]
        torch.testing.assert_close(torch.autograd.grad(compiled(x), x)[0], expected)


@pytest.mark.parametrize("name", SMOOTH)
def test_no_code_with_more_steps_would_fit(name):
    """One step more, and the range of the derivatives leaves no room for the code of NaN, wherever zero is put."""
    x = torch.linspace(-10, 10, 200_001, dtype=torch.float64)
    _, derivative = value_and_gradient(STOCK[name], x, torch.ones_like(x))
    low, high = derivative.min().item(), derivative.max().item()

    def fits(zero, steps):
        return round(zero + steps * low) >= 0 and round(zero + steps * high) < NAN_CODE

    code = DERIVATIVE_CODES[name]
    more = 4 if name == "sigmoid" else 1  # sigmoid's largest derivative, 1/4, is to be exact
    assert fits(code.zero, code.steps)
    assert not any(fits(zero, code.steps + more) for zero in range(NAN_CODE))
