"""tinytl::frozen_conv_add against conv2d + shortcut + activation: values, gradients, what is kept, what is refused."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from tests.checks import compare_with_torch, saved_bytes
from tests.ops.test_frozen_conv import ACTIVATIONS, GEOMETRIES, LAYOUTS, make_case, stock
from tinytl_kernels import ops
from tinytl_kernels.core.activations import BIT_MASK
from tinytl_kernels.nn import FrozenConvBias


def shortcut_of(input, weight, bias, geometry):
    return torch.randn_like(stock(input, weight, bias, geometry, None))


def ours(input, shortcut, weight, bias, geometry, activation):
    return ops.frozen_conv_add(input, shortcut, weight, bias, *geometry, activation)


def expected(input, shortcut, weight, bias, geometry, activation):
    return ACTIVATIONS[activation](stock(input, weight, bias, geometry, None) + shortcut)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_values_and_gradients_are_as_exact_as_pytorchs(geometry, dtype, layout):
    input, weight, bias, numbers = make_case(geometry, dtype, layout)
    shortcut = shortcut_of(input, weight, bias, numbers)
    compare_with_torch(
        lambda x, y, b: ours(x, y, weight.to(x.dtype), b, numbers, "relu"),
        lambda x, y, b: expected(x, y, weight.to(x.dtype), b, numbers, "relu"),
        [input, shortcut, bias],
    )


@pytest.mark.parametrize("activation", [None, *BIT_MASK])
@pytest.mark.parametrize("geometry", ["pointwise", "even kernel, padding same"])
def test_every_activation(geometry, activation):
    input, weight, bias, numbers = make_case(geometry, torch.float32, "channels_last")
    shortcut = shortcut_of(input, weight, bias, numbers)
    compare_with_torch(
        lambda x, y, b: ours(x, y, weight.to(x.dtype), b, numbers, activation),
        lambda x, y, b: expected(x, y, weight.to(x.dtype), b, numbers, activation),
        [input, shortcut, bias],
    )


@pytest.mark.parametrize("activation", [None, "relu"])
@pytest.mark.parametrize(
    "wanted", [(True, False, False), (False, True, False), (False, False, True), (True, False, True)]
)
def test_only_what_is_wanted_gets_a_gradient(wanted, activation):
    input, weight, bias, numbers = make_case("pointwise", torch.float32, "channels_last")
    tensors = [input, shortcut_of(input, weight, bias, numbers), bias]
    results = []
    for function in (ours, expected):
        x, y, b = (t.clone().requires_grad_(w) for t, w in zip(tensors, wanted, strict=True))
        function(x, y, weight, b, numbers, activation).square().sum().backward()
        results.append([t.grad for t in (x, y, b)])
    assert [g is not None for g in results[0]] == list(wanted)
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("geometry", ["pointwise", "grouped"])
def test_gradcheck_in_float64(geometry):
    input, weight, bias, numbers = make_case(geometry, torch.float64, "contiguous")
    tensors = [t.requires_grad_() for t in (input, shortcut_of(input, weight, bias, numbers), bias)]
    assert torch.autograd.gradcheck(lambda x, y, b: ours(x, y, weight, b, numbers, "relu6"), tensors, fast_mode=True)


@pytest.mark.parametrize("channels", [8, 36])
def test_keeps_one_bit_an_element_and_neither_summand(channels):
    input, weight = torch.randn(2, 16, 9, 7, requires_grad=True), torch.randn(channels, 16, 1, 1)
    shortcut = torch.randn(2, channels, 9, 7, requires_grad=True)
    kept = saved_bytes(lambda: ops.frozen_conv_add(input, shortcut, weight, activation="relu"), [weight])
    assert kept == 2 * 9 * 7 * ((channels + 7) // 8)


def test_the_summands_are_left_as_they_are():
    input, weight, bias, numbers = make_case("pointwise", torch.float32, "channels_last")
    shortcut = shortcut_of(input, weight, bias, numbers).contiguous(memory_format=torch.channels_last)
    before = [input.clone(), shortcut.clone()]
    ours(input, shortcut, weight, bias, numbers, "relu")
    assert torch.equal(input, before[0])
    assert torch.equal(shortcut, before[1])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")], ids=str)
def test_nan_and_inf_travel_as_in_pytorch(value):
    input, weight, bias, numbers = make_case("pointwise", torch.float32, "channels_last")
    shortcut = shortcut_of(input, weight, bias, numbers)
    shortcut[:, ::3] = value
    results = []
    for function in (ours, expected):
        y = shortcut.clone().requires_grad_()
        out = function(input, y, weight, bias, numbers, "relu")
        out.sum().backward()
        results.append([out.detach(), y.grad])
    torch.testing.assert_close(*results, equal_nan=True)


@pytest.mark.parametrize("code", ["int8", "kmeans"])
def test_weights_in_8_bits(code):
    layer = FrozenConvBias(16, 24, 1, activation="relu").quantize_(code)
    x, y = torch.randn(2, 16, 5, 5), torch.randn(2, 24, 5, 5)
    torch.testing.assert_close(layer(x, y), F.relu(F.conv2d(x, layer.float_weight(), layer.bias) + y))


def test_autocast_rounds_both_summands():
    input, weight, bias, numbers = make_case("pointwise", torch.float32, "channels_last")
    x, b = input.requires_grad_(), bias.requires_grad_()
    y = shortcut_of(input.detach(), weight, bias.detach(), numbers).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        output = ours(x, y, weight, b, numbers, "relu")
    assert output.dtype == torch.bfloat16
    output.float().sum().backward()
    assert x.grad.dtype == y.grad.dtype == b.grad.dtype == torch.float32


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(shortcut=torch.zeros(1, 24, 1, 1)), r"shortcut: expected the shape of the output \(2, 24, 5, 5\)"),
        (dict(shortcut=torch.zeros(2, 24, 5, 5).double()), "shortcut: expected the dtype of input, torch.float32"),
        (dict(activation="silu"), "activation: expected None or one of 'relu'"),
        (dict(weight=torch.zeros(24, 15, 1, 1)), "input: expected 15 channels"),
        (dict(bias=torch.zeros(3)), r"bias: expected shape \(24,\)"),
    ],
)
def test_bad_arguments_are_named(change, message):
    arguments = dict(
        input=torch.zeros(2, 16, 5, 5), shortcut=torch.zeros(2, 24, 5, 5), weight=torch.zeros(24, 16, 1, 1)
    )
    with pytest.raises(ValueError, match=message):
        ops.frozen_conv_add(**arguments | change)


def test_a_trained_weight_and_a_second_derivative_are_refused():
    x, y = torch.randn(2, 16, 5, 5, requires_grad=True), torch.randn(2, 24, 5, 5)
    weight = torch.randn(24, 16, 1, 1, requires_grad=True)
    with pytest.raises(RuntimeError, match="computes no weight gradient"):
        ops.frozen_conv_add(x, y, weight)
    (grad,) = torch.autograd.grad(
        ops.frozen_conv_add(x, y, weight.detach(), activation="relu").square().sum(), x, create_graph=True
    )
    with pytest.raises(RuntimeError, match="no second derivative"):
        grad.sum().backward()


@pytest.mark.parametrize("activation", [None, "relu"])
@pytest.mark.parametrize("layout", LAYOUTS[:2])
def test_opcheck(activation, layout):
    input, weight, bias, (stride, padding, dilation, groups) = make_case("pointwise", torch.float32, layout)
    shortcut = shortcut_of(input, weight, bias, (stride, padding, dilation, groups)).requires_grad_()
    arguments = (
        input.requires_grad_(), shortcut, weight, bias.requires_grad_(), [stride] * 2, list(padding), [dilation] * 2,
        groups, activation, True,
    )  # fmt: skip
    torch.library.opcheck(torch.ops.tinytl.frozen_conv_add.default, arguments)
