"""tinytl::dropout: its law, its gradient, its bits."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from tests.checks import saved_bytes
from tests.ops.layouts import DTYPES, LAYOUTS, images
from tinytl_kernels import ops
from tinytl_kernels.backends.reference.bitmask import unpack_bits


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_elements_are_zero_or_scaled_and_the_gradient_follows_the_same_mask(dtype, layout):
    x = images((2, 13, 9, 7), dtype, layout).requires_grad_()
    y, mask = torch.ops.tinytl.dropout(x, 0.3)
    kept = unpack_bits(mask, 13).permute(0, 3, 1, 2)
    grad_output = torch.randn_like(y)
    (grad,) = torch.autograd.grad(y, x, grad_output)
    for result, value in ((y, x), (grad, grad_output)):
        expected = torch.where(kept, value.double() / 0.7, 0.0)
        # One rounding of the scale, one of the product.
        eps = torch.finfo(dtype).eps
        torch.testing.assert_close(result.double(), expected, rtol=2 * eps, atol=eps)


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_share_dropped_is_p(p):
    y = ops.dropout(torch.ones(100, 1000), p)
    # Five standard deviations of the mean of 100 000 draws.
    assert abs((y == 0).double().mean().item() - p) < 5 * (p * (1 - p) / y.numel()) ** 0.5
    assert abs(y.double().mean().item() - 1) < 5 * (p / (1 - p) / y.numel()) ** 0.5


def test_p_0_keeps_and_p_1_drops_everything():
    x = torch.randn(4, 9, requires_grad=True)
    assert torch.equal(ops.dropout(x, 0.0), x)
    y = ops.dropout(x, 1.0)
    assert torch.equal(y, torch.zeros_like(x))
    y.sum().backward()
    assert torch.equal(x.grad, torch.zeros_like(x))


def test_in_evaluation_it_is_the_input_itself():
    x = torch.randn(4, 9)
    assert ops.dropout(x, 0.5, training=False) is x


def test_seed_governs_it():
    x = torch.ones(1000)
    torch.manual_seed(1)
    first, second = ops.dropout(x), ops.dropout(x)
    torch.manual_seed(1)
    assert torch.equal(ops.dropout(x), first)
    assert not torch.equal(first, second)


@pytest.mark.parametrize("p", [0.5, 1.0])
def test_a_dropped_nan_stays_nan_as_in_pytorch(p):
    x = torch.full((64,), float("nan"))
    assert torch.equal(ops.dropout(x, p).isnan(), F.dropout(x, p).isnan())


def test_keeps_one_bit_an_element():
    x = torch.randn(4, 24, 10, 10, requires_grad=True)
    assert saved_bytes(lambda: ops.dropout(x)) == 4 * 10 * 10 * 24 // 8


@pytest.mark.parametrize("size", [(), (9,), (3, 17), (2, 3, 5), (0, 8, 4, 4)])
def test_any_shape(size):
    x = torch.ones(size, requires_grad=True)
    y = ops.dropout(x)
    y.sum().backward()
    assert torch.equal(x.grad, y.detach())


def test_second_derivative_is_refused():
    x = torch.randn(2, 8, requires_grad=True)
    (grad,) = torch.autograd.grad(ops.dropout(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        grad.sum().backward()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(p=-0.1), "p: expected a probability from 0 to 1, got -0.1"),
        (dict(p=1.5), "p: expected a probability from 0 to 1, got 1.5"),
        (dict(p=float("nan")), "p: expected a probability from 0 to 1, got nan"),
        (dict(input=torch.zeros(3, dtype=torch.int64)), "input: expected a floating point dtype"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        ops.dropout(**{"input": torch.zeros(3), **arguments})


def test_opcheck():
    x = images((2, 9, 4, 5), layout="channels_last").requires_grad_()
    # Not test_aot_dispatch_dynamic: it compares two runs, and a random operator draws anew in each.
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(torch.ops.tinytl.dropout.default, (x, 0.5), test_utils=tests)


def test_compiles_without_a_graph_break_with_dynamic_shapes():
    compiled = torch.compile(lambda x: ops.dropout(x, 0.5), fullgraph=True, backend="aot_eager", dynamic=True)
    for size in (5, 8):
        x = torch.ones(2, size, size, 3, requires_grad=True)
        y = compiled(x)
        y.sum().backward()
        assert torch.equal(x.grad, y.detach())
        assert 0 < int((y == 0).sum()) < y.numel()
