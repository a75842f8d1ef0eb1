"""ops.linear against torch.nn.functional.linear: values, gradients, what is kept, what is left to PyTorch."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import tinytl_kernels as tk
from tests.checks import compare_with_torch, saved_bytes
from tinytl_kernels import nn as tnn
from tinytl_kernels import ops


def operands(rows: int, inputs: int, outputs: int, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    return [torch.randn(size, dtype=dtype) for size in ((rows, inputs), (outputs, inputs), (outputs,))]


# Rows: tiles of 8, 4 and 6, and their rests; inputs: whole vectors and panels, rests of both, several chains of
# additions; outputs: one task and many, blocks of 16 and their rests. 33 rows are PyTorch's.
@pytest.mark.parametrize(
    ("rows", "inputs", "outputs"),
    [
        (1, 1, 1), (1, 64, 10), (2, 48, 3), (3, 17, 2), (7, 100, 19), (8, 1280, 1000), (9, 1601, 37), (13, 5, 130),
        (16, 95, 64), (31, 47, 33), (32, 129, 65), (33, 32, 8),
    ],
)  # fmt: skip
def test_values_and_gradients_are_as_exact_as_pytorchs(rows, inputs, outputs):
    compare_with_torch(ops.linear, F.linear, operands(rows, inputs, outputs))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_other_dtypes_are_pytorchs(dtype):
    x, w, b = operands(4, 40, 6, dtype)
    assert torch.equal(ops.linear(x, w, b), F.linear(x, w, b))


def test_without_bias():
    compare_with_torch(ops.linear, F.linear, operands(8, 70, 20)[:2])


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (0, 2), (1, 2)], ids=str)
def test_only_what_is_asked_for_gets_a_gradient(wanted):
    given = operands(5, 50, 21)
    for i in wanted:
        given[i].requires_grad_()
    grad = torch.randn(5, 21)
    asked = [given[i] for i in wanted]
    expected = torch.autograd.grad(F.linear(*given), asked, grad)
    torch.testing.assert_close(torch.autograd.grad(ops.linear(*given), asked, grad), expected)


@pytest.mark.parametrize(("input_trained", "weight_trained"), [(True, True), (False, True), (True, False)])
def test_keeps_what_pytorchs_keeps(input_trained, weight_trained):
    x, w, b = operands(4, 64, 32)
    x.requires_grad_(input_trained), w.requires_grad_(weight_trained)
    ours, stock = (saved_bytes(lambda f=f: f(x, w, b)) for f in (ops.linear, F.linear))
    assert ours == stock


@pytest.mark.parametrize("shape", [(0, 24), (24,), (2, 3, 24), (2, 0, 24)], ids=str)
def test_other_shapes_are_pytorchs(shape):
    x, (w, b) = torch.randn(shape, requires_grad=True), operands(1, 24, 8)[1:]
    assert torch.equal(ops.linear(x, w, b), F.linear(x, w, b))


def test_operands_of_any_strides():
    x, w, b = torch.randn(40, 8).t(), torch.randn(40, 6).t(), torch.randn(12)[::2]
    compare_with_torch(ops.linear, F.linear, [x, w, b])


def test_a_gradient_of_any_strides():
    x, w, b = (t.requires_grad_() for t in operands(8, 40, 6))
    grads = [torch.autograd.grad(f(x, w, b).sum(), (x, w, b)) for f in (ops.linear, F.linear)]
    torch.testing.assert_close(*grads)


def test_nan_and_infinity_go_where_they_go_in_pytorch():
    x, w, b = operands(3, 33, 7)
    x[1, 5], w[2, 32], x[0, 0] = float("nan"), float("inf"), float("inf")
    for t in (x, w, b):
        t.requires_grad_()
    results = []
    for f in (ops.linear, F.linear):
        y = f(x, w, b)
        results.append((y, *torch.autograd.grad(y, (x, w, b), torch.ones_like(y))))
    for ours, stock in zip(*results, strict=True):
        assert torch.equal(ours.isfinite(), stock.isfinite())


def test_gradients_can_be_differentiated_again():
    x, w, b = (t.requires_grad_() for t in operands(4, 32, 5))

    def second(f):
        grads = torch.autograd.grad(f(x, w, b).square().sum(), (x, w, b), create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in grads), (x, w, b))

    torch.testing.assert_close(second(ops.linear), second(F.linear), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize(
    ("x", "w", "b"),
    [
        (torch.randn(2, 3), torch.randn(4, 5), None),
        (torch.randn(2, 3), torch.randn(4, 3), torch.randn(5)),
        (torch.randn(2, 3), torch.randn(4, 3).double(), None),
    ],
)
def test_what_does_not_fit_is_pytorchs_error(x, w, b):
    with pytest.raises(RuntimeError) as expected:
        F.linear(x, w, b)
    with pytest.raises(RuntimeError) as raised:
        ops.linear(x, w, b)
    assert str(raised.value) == str(expected.value)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("given", [torch.float32, "autocast"])
@pytest.mark.parametrize("rows", [8, 40])
def test_autocast(rows, given, dtype):
    """Dtypes are PyTorch's, and errors at most: it rounds the rows as they are rounded here, and the weight, too."""
    x, w, b = operands(rows, 100, 24)
    x = x.to(dtype if given == "autocast" else given)
    grad = torch.randn(rows, 24).to(dtype)
    results = []
    for f in (ops.linear, F.linear):
        inputs = [t.clone().requires_grad_() for t in (x, w, b)]
        with torch.autocast("cpu", dtype, cache_enabled=False):
            y = f(*inputs)
        results.append((y.detach(), *torch.autograd.grad(y, inputs, grad)))
    exact_inputs = [t.double().requires_grad_() for t in (x.to(dtype), w, b)]
    y = F.linear(*exact_inputs)
    exact = (y.detach(), *torch.autograd.grad(y, exact_inputs, grad.double()))
    for ours, theirs, e in zip(*results, exact, strict=True):
        assert ours.dtype == theirs.dtype
        assert (ours.double() - e).norm() <= 1.01 * (theirs.double() - e).norm() + 1e-6 * e.norm()


def test_compiles_as_one_graph():
    layer = tnn.Linear(32, 8)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = torch.randn(4, 32)
    torch.testing.assert_close(compiled(x), layer(x))


def test_transforms_modes_and_tracing_see_pytorchs():
    layer, x = tnn.Linear(32, 8), torch.randn(4, 32)
    parameters = dict(layer.named_parameters())

    def loss(parameters, x):
        return torch.func.functional_call(layer, parameters, (x[None],)).square().sum()

    each = torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, x)
    assert each["weight"].shape == (4, 8, 32)
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode(allow_non_fake_inputs=True):
        assert layer(torch.empty(4, 32)).shape == (4, 8)
    assert "aten::linear" in str(torch.jit.trace(layer, x).inlined_graph)


def test_the_module_is_nn_linear():
    stock, ours = nn.Linear(20, 5, bias=False), tnn.Linear(20, 5, bias=False)
    ours.load_state_dict(stock.state_dict())
    x = torch.randn(3, 20)
    torch.testing.assert_close(ours(x), stock(x))
    assert repr(ours) == repr(stock)


@pytest.mark.skipif(tk.available_backends()["cpu"] != "available", reason="needs the C++ kernels")
def test_few_rows_are_the_kernels_and_many_are_not():
    x, w, b = (t.requires_grad_() for t in operands(32, 24, 8))
    assert "Linear" in type(ops.linear(x, w, b).grad_fn).__name__ + ops.linear(x, w, b).grad_fn.name()
    assert "Addmm" in ops.linear(torch.cat([x, x]), w, b).grad_fn.name()
    with tk.use_backend("reference"):
        assert "Addmm" in ops.linear(x, w, b).grad_fn.name()
