"""tinytl::activation against torch.nn.functional: values, gradients, bits kept, what is refused."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from tests.checks import compare_with_torch, saved_bytes
from tests.ops.layouts import DTYPES, LAYOUTS, images
from tinytl_kernels import ops
from tinytl_kernels.core.activations import BIT_MASK, STAND_ALONE

STOCK = {
    "relu": F.relu,
    "relu6": F.relu6,
    "leaky_relu": F.leaky_relu,
    "hardsigmoid": lambda x: F.relu6(x + 3) / 6,  # F.hardsigmoid rounds 1 / 6 to float32 even in float64
    "hardswish": F.hardswish,
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "sigmoid": torch.sigmoid,
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", STAND_ALONE)
def test_values_and_gradients_are_as_exact_as_pytorchs(name, dtype, layout):
    compare_with_torch(lambda x: ops.activation(x, name), STOCK[name], [images((2, 13, 5, 7), dtype, layout)])


# 0-dim and 1-dim have no dimension to cut; 5-dim and (C, H, W) count their last dimension as channels.
@pytest.mark.parametrize("size", [(), (1,), (9,), (3, 17), (2, 3, 5), (1, 2, 3, 4, 11), (0, 8, 4, 4), (0,)])
@pytest.mark.parametrize("name", ["relu6", "leaky_relu", "silu"])
def test_any_shape(name, size):
    x = torch.randn(size).mul(3)
    compare_with_torch(lambda x: ops.activation(x, name), STOCK[name], [x])


@pytest.mark.parametrize("name", STAND_ALONE)
def test_gradcheck_in_float64(name):
    x = torch.randn(2, 9, 3, 2, dtype=torch.float64).mul(3).requires_grad_()
    torch.autograd.gradcheck(lambda x: ops.activation(x, name, 0.2), (x,), fast_mode=True)


@pytest.mark.parametrize("negative_slope", [0.0, 0.01, 0.5, 2.0])
def test_leaky_relu_takes_any_slope(negative_slope):
    compare_with_torch(
        lambda x: ops.activation(x, "leaky_relu", negative_slope),
        lambda x: F.leaky_relu(x, negative_slope),
        [images((2, 9, 4, 4))],
    )


@pytest.mark.parametrize("name", BIT_MASK)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 0.0, -0.0, 6.0, 3.0, -3.0], ids=str)
def test_special_values_and_edges_are_pytorchs(name, value):
    stock = {**STOCK, "hardsigmoid": F.hardsigmoid}[name]
    # Whole vectors: in the tail of a tensor ATen's scalar code lets the gradient of ReLU6 pass at a NaN.
    x = torch.tensor([1.0, value, -1.0, value]).repeat_interleave(64)
    mine, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    a, b = ops.activation(mine, name), stock(theirs)
    torch.testing.assert_close(a, b, equal_nan=True)
    a.sum().backward()
    b.sum().backward()
    torch.testing.assert_close(mine.grad, theirs.grad, equal_nan=True)


@pytest.mark.parametrize("name", ["relu", "relu6", "hardsigmoid"])
def test_a_stopped_gradient_is_zero_even_if_it_is_not_finite(name):
    x = torch.tensor([-9.0, 1.0]).requires_grad_()
    (grad,) = torch.autograd.grad(ops.activation(x, name), x, torch.full((2,), float("nan")))
    assert grad[0] == 0
    assert grad[1].isnan()


@pytest.mark.parametrize("name", BIT_MASK)
def test_keeps_one_bit_an_element(name):
    x = torch.randn(4, 24, 10, 10, requires_grad=True)
    assert saved_bytes(lambda: ops.activation(x, name)) == 4 * 10 * 10 * 24 // 8


def test_keeps_whole_bytes_a_pixel():
    x = torch.randn(2, 9, 5, 5, requires_grad=True)
    assert saved_bytes(lambda: ops.activation(x, "relu")) == 2 * 5 * 5 * 2


@pytest.mark.parametrize("name", ["hardswish", "silu", "gelu", "gelu_tanh"])
def test_smooth_activations_keep_their_input_and_no_copy(name):
    x = torch.randn(2, 8, 5, 5, requires_grad=True)
    assert saved_bytes(lambda: ops.activation(x, name)) == x.nbytes
    assert saved_bytes(lambda: ops.activation(x, name), exclude=[x]) == 0


def test_sigmoid_keeps_its_output_which_a_product_with_it_keeps_anyway():
    x, features = torch.randn(2, 8, 1, 1, requires_grad=True), torch.randn(2, 8, 5, 5)
    assert saved_bytes(lambda: features * ops.activation(x, "sigmoid"), exclude=[features]) == x.nbytes


def test_no_mask_without_a_gradient_to_come():
    x = torch.randn(2, 8, 5, 5)
    assert torch.ops.tinytl.activation(x, "relu", 0.01, False)[1].numel() == 0
    with torch.no_grad():
        assert ops.activation(x.requires_grad_(), "relu").grad_fn is None


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("name", ["relu6", "silu"])
def test_strides_are_kept(name, layout):
    x = images((2, 9, 4, 5), layout=layout).requires_grad_()
    y = ops.activation(x, name)
    (grad,) = torch.autograd.grad(y, x, torch.randn_like(y))
    assert y.stride() == x.stride() == grad.stride()


def test_input_stays_as_it_was():
    x = torch.randn(2, 8, 4, 4)
    before = x.clone()
    ops.activation(x, "leaky_relu")
    assert torch.equal(x, before)


@pytest.mark.parametrize("name", ["relu", "silu"])
def test_second_derivative_is_refused_and_not_zero(name):
    x = torch.randn(2, 8, requires_grad=True)
    (grad,) = torch.autograd.grad(ops.activation(x, name).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        grad.sum().backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_autocast_leaves_the_dtype_alone_as_pytorch_does(dtype):
    x = torch.randn(2, 8, 4, 4, dtype=dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert ops.activation(x, "relu6").dtype == F.relu6(x).dtype == dtype


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(name="relu7"), "name: expected None or one of"),
        (dict(name=None), "name: expected an activation, got None"),
        (dict(input=torch.zeros(3, dtype=torch.int64)), "input: expected a floating point dtype"),
        (dict(name="leaky_relu", negative_slope=-0.1), "negative_slope: expected at least 0"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    # name=None is stopped by the schema of the operator before any check of ours.
    with pytest.raises((ValueError, RuntimeError), match=message if arguments.get("name", "") is not None else "name"):
        ops.activation(**{"input": torch.zeros(3), "name": "relu", **arguments})


def test_a_mask_of_another_shape_is_refused():
    with pytest.raises(ValueError, match=r"saved: expected shape \(2, 4, 4, 1\)"):
        torch.ops.tinytl.activation_backward(torch.zeros(2, 8, 4, 4), torch.zeros(2, 4, 4, 2), "relu", 0.01)


@pytest.mark.parametrize("name", ["relu6", "gelu", "sigmoid"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_opcheck(name, layout):
    x = images((2, 9, 4, 5), layout=layout).requires_grad_()
    torch.library.opcheck(torch.ops.tinytl.activation.default, (x, name, 0.01, True))


@pytest.mark.parametrize("name", ["relu6", "hardswish", "silu", "gelu"])
def test_the_fake_of_the_backward_has_its_strides(name):
    # An average hands back an expanded gradient; ATen would follow the strides of the saved value instead.
    value = images((2, 9, 4, 5), layout="channels_last")
    saved = torch.ops.tinytl.activation(value, name, 0.01, True)[1] if name in BIT_MASK else value
    grad = torch.randn(2, 9, 1, 1).expand(2, 9, 4, 5)
    torch.library.opcheck(torch.ops.tinytl.activation_backward.default, (grad, saved, name, 0.01))


def test_compiles_without_a_graph_break_with_dynamic_shapes():
    def step(x):
        return ops.activation(ops.activation(x, "relu6"), "silu").square().mean()

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager", dynamic=True)
    for size in (5, 8):
        x = torch.randn(2, size, size, 3).requires_grad_()
        expected = torch.autograd.grad(step(x), x)[0]
        torch.testing.assert_close(torch.autograd.grad(compiled(x), x)[0], expected)


def test_gradient_comes_back_channels_last_even_if_grad_output_is_expanded():
    x = torch.randn(2, 8, 6, 6).contiguous(memory_format=torch.channels_last).requires_grad_()
    (grad,) = torch.autograd.grad(ops.activation(x, "relu").mean((2, 3)).sum(), x)
    assert grad.is_contiguous(memory_format=torch.channels_last)
