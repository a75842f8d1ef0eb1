"""tinytl::group_norm_activation against torch.nn.functional: values, gradients, what is kept, what is refused."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from tests.checks import compare_with_torch, saved_bytes
from tests.ops.layouts import DTYPES, LAYOUTS, has_layout, images
from tests.ops.test_activation import STOCK
from tinytl_kernels import ops
from tinytl_kernels.core.activations import ACTIVATIONS

EPS = 1e-3  # of the authors' networks


def stock(num_groups, activation):
    act = STOCK.get(activation, lambda z: z)
    return lambda x, w, b: act(F.group_norm(x, num_groups, w, b, EPS))


def ours(num_groups, activation, **options):
    return lambda x, w, b: ops.group_norm_activation(x, num_groups, w, b, EPS, activation, **options)


def affine(channels, dtype=torch.float32):
    return [torch.randn(channels).add(1).to(dtype), torch.randn(channels).to(dtype)]


# 13 channels in one group and 24 in groups of 8: whole and broken vectors of every width.
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("channels", "num_groups"), [(24, 3), (13, 1)])
def test_values_and_gradients_are_as_exact_as_pytorchs(channels, num_groups, dtype, layout):
    x = images((3, channels, 5, 7), dtype, layout)
    compare_with_torch(ours(num_groups, "relu6"), stock(num_groups, "relu6"), [x, *affine(channels, dtype)])


@pytest.mark.parametrize("activation", [None, *ACTIVATIONS])
def test_every_activation(activation):
    compare_with_torch(ours(2, activation), stock(2, activation), [images((2, 18, 6, 5)), *affine(18)])


# A mean a thousand times the deviation: sums of squares alone would lose every digit.
def test_values_and_gradients_far_from_zero():
    x = images((2, 16, 40, 9)).add(3000)
    compare_with_torch(ours(2, "silu"), stock(2, "silu"), [x, *affine(16)])


@pytest.mark.parametrize("size", [(2, 8, 1, 1), (0, 8, 4, 4), (1, 8, 37, 1), (5, 8, 2, 2)])
def test_any_shape(size):
    if size[2:] == (1, 1):
        size = (2, 16, 1, 1)
    compare_with_torch(ours(2, "relu6"), stock(2, "relu6"), [images(size), *affine(size[1])])


def test_without_weight_and_bias():
    x = images((2, 16, 5, 3))
    compare_with_torch(
        lambda x: ops.group_norm_activation(x, 2, activation="relu"), lambda x: F.relu(F.group_norm(x, 2)), [x]
    )


def test_gradcheck_in_float64():
    x = torch.randn(2, 6, 3, 2, dtype=torch.float64, requires_grad=True)
    w, b = (torch.randn(6, dtype=torch.float64, requires_grad=True) for _ in range(2))
    torch.autograd.gradcheck(lambda x, w, b: ops.group_norm_activation(x, 3, w, b, 1e-2, "silu"), (x, w, b))


def test_values_and_gradients_with_float32_parameters_beside_half():
    x = images((2, 16, 5, 5), torch.bfloat16, "channels_last").requires_grad_()
    w, b = (t.requires_grad_() for t in affine(16))
    y = ops.group_norm_activation(x, 2, w, b, EPS, "relu6")
    y.float().sum().backward()
    assert (y.dtype, x.grad.dtype, w.grad.dtype, b.grad.dtype) == (torch.bfloat16,) * 2 + (torch.float32,) * 2
    exact = stock(2, "relu6")(x.double(), w.double(), b.double())
    assert (y.double() - exact).abs().max() <= torch.finfo(torch.bfloat16).eps * exact.abs().max()


@pytest.mark.parametrize("activation", ["relu6", "silu"])
def test_keeps_its_input_by_reference_and_the_statistics(activation):
    x, (w, b) = images((2, 16, 8, 8)).requires_grad_(), affine(16)
    kept = saved_bytes(lambda: ours(2, activation)(x, w, b), exclude=[x, w, b])
    assert kept == 2 * (2 * 2 * 4)


def test_only_what_is_asked_for_gets_a_gradient():
    x, (w, b) = images((2, 16, 4, 4)), affine(16)
    b.requires_grad_()
    ours(2, "relu")(x, w, b).sum().backward()
    assert b.grad is not None
    assert x.grad is None
    assert w.grad is None


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_strides_are_kept(layout):
    x = images((2, 16, 4, 5), layout=layout).requires_grad_()
    y = ours(2, "relu")(x, *affine(16))
    (grad,) = torch.autograd.grad(y, x, torch.randn(y.shape))
    assert has_layout(y, layout)
    assert has_layout(grad, layout)


def test_a_nan_poisons_its_group_alone():
    x = images((1, 16, 4, 4))
    x[0, 3, 1, 1] = float("nan")
    y = ops.group_norm_activation(x, 2, activation="relu6")
    assert y[:, :8].isnan().all()
    assert y[:, 8:].isfinite().all()


# relative error (root mean square) of the gradients of input, weight and bias with x_hat in 8 bits
@pytest.mark.parametrize(("activation", "bound"), [(None, 0.01), ("silu", 0.01), ("relu6", 0.06)])
def test_eight_bit_codes_keep_a_byte_an_element_and_are_this_far_off(activation, bound):
    x, (w, b) = images((4, 32, 14, 14)).requires_grad_(), (t.requires_grad_() for t in affine(32))
    coded = ours(4, activation, code_bits=8)
    assert saved_bytes(lambda: coded(x, w, b), exclude=[x, w, b]) == x.numel() + 3 * (4 * 4 * 4)
    g = torch.randn(x.shape)
    exact = torch.autograd.grad(ours(4, activation)(x, w, b), (x, w, b), g)
    rough = torch.autograd.grad(coded(x, w, b), (x, w, b), g)
    for name, a, e in zip(("input", "weight", "bias"), rough, exact, strict=True):
        error = ((a - e).norm() / e.norm()).item()
        print(f"{activation} {name}: {error:.4f}")
        assert error < bound, f"{name}: {error:.4f}"
    assert torch.equal(coded(x, w, b), ops.group_norm_activation(x.detach(), 4, w, b, EPS, activation, code_bits=8))


def test_second_derivative_is_refused_and_not_zero():
    x = images((1, 8, 3, 3)).requires_grad_()
    (grad,) = torch.autograd.grad(ops.group_norm_activation(x, 1).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        grad.sum().backward()


def test_compiles_as_one_graph():
    x, (w, b) = images((2, 16, 5, 5)).requires_grad_(), affine(16)
    compiled = torch.compile(ours(2, "relu6"), fullgraph=True, backend="aot_eager")
    y, expected = compiled(x, w, b), ours(2, "relu6")(x, w, b)
    torch.testing.assert_close(y, expected)
    y.sum().backward()


def test_opcheck():
    x, (w, b) = images((2, 16, 3, 5)).requires_grad_(), affine(16)
    for codes in (False, True):
        torch.library.opcheck(torch.ops.tinytl.group_norm_activation, (x, w, b, 2, EPS, "relu", codes))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.randn(2, 16, 4), 2), "input: expected"),
        ((torch.zeros(2, 16, 4, 4, dtype=torch.int64), 2), "input: expected a floating"),
        ((torch.randn(2, 16, 4, 4), 3), "num_groups: expected a divisor of the 16"),
        ((torch.randn(2, 16, 4, 4), 2, torch.randn(8)), r"weight: expected shape \(16,\)"),
        ((torch.randn(2, 16, 4, 4), 2, None, torch.randn(16).double()), "bias: expected dtype"),
        ((torch.randn(2, 16, 4, 4), 2, None, None, -1.0), "eps: expected"),
        ((torch.randn(2, 16, 4, 4), 2, None, None, 1e-5, "mish"), "activation: expected"),
        ((torch.randn(2, 16, 4, 4), 2, None, None, 1e-5, None, 4), "code_bits: expected"),
    ],
)
def test_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        ops.group_norm_activation(*arguments)
