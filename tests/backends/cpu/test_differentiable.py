"""Operators that a backend differentiates by itself equal the same operators under Python's autograd."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch

import tinytl_kernels as tk
from tests.checks import saved_tensors
from tinytl_kernels import ops
from tinytl_kernels.backends import backend_module
from tinytl_kernels.ops.lite_branch import Norm, lite_branch

pytestmark = pytest.mark.usefixtures("cpu_kernels")

CPU = backend_module("cpu")


def channels_last(*size: int, dtype=torch.float32) -> torch.Tensor:
    return torch.randn(*size).to(dtype).contiguous(memory_format=torch.channels_last)


def block(x, biases):
    weights = [torch.randn(size, generator=torch.Generator().manual_seed(5)) for size in
               ((24, 8, 1, 1), (24, 1, 3, 3), (8, 24, 1, 1))]  # fmt: skip
    expand, depthwise, project = biases
    arguments = (weights[0], expand, weights[1], depthwise, weights[2], project)
    return ops.frozen_inverted_residual_pooled(x, *arguments, residual=True)


def branch(x, parameters, running=None):
    weight1, scale1, bias1, weight2, scale2 = parameters
    norm1 = Norm(scale1, bias1, *(running or (None, None)))
    return lite_branch(x, weight1, norm1, weight2, Norm(scale2, None, groups=2), groups=2, stride=2)


def block_case():
    return (channels_last(3, 8, 7, 9), torch.randn(24), torch.randn(24), torch.randn(8)), lambda x, *b: block(x, b)


def branch_case():
    sizes = ((8, 4, 3, 3), (8,), (8,), (6, 8, 1, 1), (6,))
    return (channels_last(3, 8, 7, 9), *map(torch.randn, sizes)), lambda x, *p: branch(x, p)[:1]


def upsampling_case():
    return (channels_last(3, 8, 7, 9), channels_last(3, 8, 3, 5)), lambda x, y: (ops.upsample_add(x, y),)


def conv_case(weight_size, groups, activation, stride=1):
    weight = torch.randn(weight_size).contiguous(memory_format=torch.channels_last)
    inputs = (channels_last(3, weight_size[1] * groups, 9, 8), torch.randn(weight_size[0]))
    padding = weight_size[2] // 2
    return inputs, lambda x, b: (ops.frozen_conv(x, weight, b, stride, padding, 1, groups, activation),)


def conv_add_case(weight_size, activation):
    (input, bias), _ = conv_case(weight_size, 1, None)
    weight = torch.randn(weight_size).contiguous(memory_format=torch.channels_last)
    inputs = (input, channels_last(3, weight_size[0], 9, 8), bias)
    padding = weight_size[2] // 2
    return inputs, lambda x, y, b: (ops.frozen_conv_add(x, y, weight, b, 1, padding, activation=activation),)


class Case(NamedTuple):
    """An operator, what makes its inputs and the function of them, and whether it keeps values for backward."""

    operator: str
    make: Callable
    keeps_values: bool = False


CASES = {
    "block": Case("frozen_inverted_residual", block_case),
    "branch": Case("lite_branch", branch_case),
    "upsampling": Case("upsample_add", upsampling_case),
    "pointwise": Case("frozen_conv", lambda: conv_case((24, 8, 1, 1), 1, "relu6", stride=2)),
    "pointwise hardswish": Case("frozen_conv", lambda: conv_case((24, 8, 1, 1), 1, "hardswish"), True),
    "depthwise leaky": Case("frozen_conv", lambda: conv_case((20, 1, 5, 5), 20, "leaky_relu")),
    "depthwise silu": Case("frozen_conv", lambda: conv_case((20, 1, 3, 3), 20, "silu", stride=2), True),
    "dense hardsigmoid": Case("frozen_conv", lambda: conv_case((24, 16, 3, 3), 1, "hardsigmoid", stride=2)),
    "dense gelu": Case("frozen_conv", lambda: conv_case((24, 16, 5, 5), 1, "gelu"), True),
    "winograd gelu": Case("frozen_conv", lambda: conv_case((32, 32, 3, 3), 1, "gelu_tanh"), True),
    "linear": Case("frozen_conv", lambda: conv_case((24, 8, 1, 1), 1, None)),
    "pointwise add": Case("frozen_conv_add", lambda: conv_add_case((24, 8, 1, 1), "relu")),
    "linear add": Case("frozen_conv_add", lambda: conv_add_case((24, 8, 1, 1), None)),
    "dense linear add": Case("frozen_conv_add", lambda: conv_add_case((24, 16, 3, 3), None)),
    "dense add": Case("frozen_conv_add", lambda: conv_add_case((24, 16, 3, 3), "hardsigmoid")),
}


@pytest.fixture(params=CASES)
def case(request):
    operator, make, _ = CASES[request.param]
    return operator, *make()


@pytest.fixture
def counted(monkeypatch) -> dict[str, int]:
    """How often C++ took an operator, by name."""
    counts: dict[str, int] = {}

    def counting(name, function):
        def call(*args):
            outputs = function(*args)
            counts[name] = counts.get(name, 0) + (outputs is not None)
            return outputs

        return call

    for name, function in CPU.DIFFERENTIABLE.items():
        monkeypatch.setitem(CPU.DIFFERENTIABLE, name, counting(name, function))
    return counts


def gradients(function, inputs, wanted, pythons=None):
    leaves = [t.detach().clone(memory_format=torch.preserve_format).requires_grad_(w) for t, w in
              zip(inputs, wanted, strict=True)]  # fmt: skip
    torch.manual_seed(1)
    outputs = [o for o in function(*leaves) if o.is_floating_point() and o.requires_grad]
    loss = sum((o * torch.randn(o.shape)).sum() for o in outputs)
    loss.backward()
    return [o.detach() for o in outputs], [leaf.grad for leaf in leaves]


def test_every_one_of_them_is_tested():
    assert {case.operator for case in CASES.values()} == set(CPU.DIFFERENTIABLE)


def test_values_and_gradients_are_bit_for_bit_those_of_pythons_autograd(case, counted, monkeypatch):
    name, inputs, function = case
    everything = [True] * len(inputs)
    for one_missing in range(-1, len(inputs)):  # what is not needed is not given, and the rest stays the same
        wanted = [w and i != one_missing for i, w in enumerate(everything)]
        taken = counted.get(name, 0)
        outputs, grads = gradients(function, inputs, wanted)
        assert counted[name] == taken + 1
        with monkeypatch.context() as patch:
            patch.delitem(CPU.DIFFERENTIABLE, name)
            expected_outputs, expected = gradients(function, inputs, wanted)
        assert counted[name] == taken + 1
        for i, (a, b) in enumerate(zip(outputs, expected_outputs, strict=True)):
            assert torch.equal(a, b), f"{name}: output {i}"
        for i, (a, b) in enumerate(zip(grads, expected, strict=True)):
            assert (a is None) == (b is None) == (not wanted[i]), f"{name}: argument {i}"
            assert a is None or torch.equal(a, b), f"{name}: gradient of argument {i}"


def test_they_keep_the_same_bytes(case, monkeypatch):
    name, inputs, function = case

    def kept() -> list[tuple]:
        leaves = [t.clone(memory_format=torch.preserve_format).requires_grad_() for t in inputs]
        return saved_tensors(lambda: function(*leaves))

    ours = kept()
    monkeypatch.delitem(CPU.DIFFERENTIABLE, name)
    assert ours == kept()


def test_a_second_derivative_is_an_error_where_it_is_asked_for(case, counted, request):
    name, inputs, function = case
    leaves = [t.clone(memory_format=torch.preserve_format).requires_grad_() for t in inputs]
    output = function(*leaves)[0]
    kernel = name.replace("frozen_conv_add", "frozen_conv")
    if CASES[request.node.callspec.params["case"]].keeps_values:
        # Without history: refused as soon as the first derivative is to have one.
        with pytest.raises(RuntimeError, match=f"tinytl::{kernel} has no second derivative.*to_torch"):
            torch.autograd.grad(output.square().sum(), leaves, create_graph=True)
        return
    first = torch.autograd.grad(output.square().sum(), leaves, create_graph=True)
    assert counted[name] == 1
    with pytest.raises(RuntimeError, match=f"tinytl::{kernel}_backward has no second derivative.*to_torch"):
        sum(g.sum() for g in first).backward()


def test_a_second_backward_says_so(case):
    _, inputs, function = case
    leaves = [t.clone(memory_format=torch.preserve_format).requires_grad_() for t in inputs]
    output = function(*leaves)[0].square().sum()
    output.backward()
    with pytest.raises(RuntimeError, match="second time"):
        output.backward()


def test_a_weight_changed_in_place_before_backward_is_noticed():
    x, w1 = channels_last(2, 8, 6, 6), torch.randn(8, 4, 3, 3, requires_grad=True)
    output, _, _ = lite_branch(x, w1, Norm(None, None), torch.randn(6, 8, 1, 1), Norm(None, None), groups=2)
    with torch.no_grad():
        w1.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()


def test_statistics_given_are_not_those_of_the_batch(counted):
    inputs, _ = branch_case()
    running = (torch.randn(8), torch.rand(8) + 0.5)
    x = inputs[0].requires_grad_()
    branch(x, inputs[1:], running)[0].sum().backward()
    assert counted == {"lite_branch": 1}
    ours, x.grad = x.grad, None
    with tk.use_backend("reference"):
        branch(x, inputs[1:], running)[0].sum().backward()
    torch.testing.assert_close(ours, x.grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_biases_get_gradients_of_their_own_dtype(dtype, counted):
    biases = [torch.randn(size, dtype=kind, requires_grad=True) for size, kind in
              ((24, dtype), (24, torch.float32), (8, dtype))]  # fmt: skip
    output, _ = block(channels_last(2, 8, 6, 6, dtype=dtype), biases)
    output.float().sum().backward()
    assert counted == {"frozen_inverted_residual": 1}
    assert [b.grad.dtype for b in biases] == [b.dtype for b in biases]


def test_nchw_is_left_to_python(counted):
    block(torch.randn(2, 8, 6, 6, requires_grad=True), (None, None, None))[0].sum().backward()
    assert not any(counted.values())


def test_gradients_come_in_any_layout_and_more_than_once(case):
    _, inputs, function = case
    leaves = [t.clone(memory_format=torch.preserve_format).requires_grad_() for t in inputs]
    output = function(*leaves)[0]
    grad = torch.randn(output.shape[1:]).expand(output.shape)
    expected = torch.autograd.grad(
        output, leaves, grad.contiguous(memory_format=torch.channels_last), retain_graph=True
    )
    for other in (grad, grad.contiguous()):
        for a, b in zip(torch.autograd.grad(output, leaves, other, retain_graph=True), expected, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("code", [None, "int8"])
@pytest.mark.parametrize(("weight_size", "groups"), [((24, 8, 1, 1), 1), ((20, 1, 3, 3), 20), ((24, 16, 3, 3), 1)])
def test_convolutions_in_half_precision_and_with_8_bits(weight_size, groups, code, dtype, counted, monkeypatch):
    monkeypatch.setattr("tinytl_kernels.backends.cpu.frozen_conv._onednn_knows_more", lambda dtype: False)
    monkeypatch.setattr("tinytl_kernels.backends.cpu.frozen_conv._ONEDNN_LACKS_BFLOAT16", True)
    weight, scale = torch.randn(weight_size), None
    if code is not None:
        scale = weight.abs().amax((1, 2, 3)) / 127
        weight = (weight / scale[:, None, None, None]).round().to(torch.int8)
    inputs = (channels_last(2, weight_size[1] * groups, 9, 8, dtype=dtype), torch.randn(weight_size[0]).to(dtype))

    def function(x, b):
        return (ops.frozen_conv(x, weight, b, 1, weight_size[2] // 2, 1, groups, "silu", weight_scale=scale),)

    outputs, grads = gradients(function, inputs, [True, True])
    assert counted == {"frozen_conv": 1}
    monkeypatch.delitem(CPU.DIFFERENTIABLE, "frozen_conv")
    expected_outputs, expected = gradients(function, inputs, [True, True])
    for a, b in zip(outputs + grads, expected_outputs + expected, strict=True):
        assert a.dtype == b.dtype == dtype
        assert torch.equal(a, b)


def test_a_convolution_of_no_image(counted):
    weight = channels_last(24, 16, 3, 3)
    image, bias = torch.zeros(0, 16, 9, 8, requires_grad=True), torch.zeros(24, requires_grad=True)
    ops.frozen_conv(image, weight, bias, activation="silu").sum().backward()
    assert counted == {"frozen_conv": 1}
    assert image.grad.shape == image.shape
    assert torch.equal(bias.grad, torch.zeros(24))


def test_a_convolution_whose_weight_is_trained_is_refused(counted):
    weight = channels_last(24, 8, 1, 1).requires_grad_()
    with pytest.raises(RuntimeError, match="computes no weight gradient"):
        ops.frozen_conv(channels_last(2, 8, 9, 8).requires_grad_(), weight)
