"""tinytl::frozen_inverted_residual against three convolutions, with and without its ports for a lite residual."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from tests.checks import compare_with_torch, saved_bytes
from tinytl_kernels import ops

# name: input, hidden, output channels, kernel, stride, (top, bottom, left, right), expand convolution, residual
BLOCKS = {
    "shortcut": ((3, 8, 9, 7), 48, 8, 3, 1, (1, 1, 1, 1), True, True),
    "stride 2": ((2, 16, 10, 12), 40, 24, 3, 2, (1, 1, 1, 1), True, False),
    "no expansion": ((2, 13, 8, 9), 13, 10, 3, 1, (1, 1, 1, 1), False, False),
    "5x5, TensorFlow SAME": ((2, 6, 10, 11), 21, 9, 5, 2, (1, 2, 2, 2), True, False),
    "7x7 on a smaller image": ((1, 8, 4, 3), 24, 8, 7, 1, (3, 3, 3, 3), True, True),
    "one pixel": ((2, 8, 1, 1), 16, 8, 3, 1, (1, 1, 1, 1), True, True),
    "empty batch": ((0, 8, 6, 6), 16, 8, 3, 1, (1, 1, 1, 1), True, True),
}
ACTIVATIONS = {None: lambda x: x, "relu": F.relu, "relu6": F.relu6}


def make_block(name, dtype=torch.float32, layout=torch.channels_last):
    size, hidden, out, k, stride, padding, expand, residual = BLOCKS[name]
    input = torch.randn(size).mul(2).to(dtype).contiguous(memory_format=layout)
    shapes = [(hidden, size[1], 1, 1), (hidden, 1, k, k), (out, hidden, 1, 1)]
    weights = [(torch.randn(s) / (s[1] * s[2] * s[3]) ** 0.5).to(dtype) for s in shapes]
    biases = [torch.randn(s[0]).to(dtype) for s in shapes]
    if not expand:
        weights[0] = biases[0] = None
    return input, weights, biases, stride, padding, residual


def ours(weights, stride, padding, activation, residual, expand):
    def block(x, *biases):
        b = list(biases) if expand else [None, *biases]
        w = [None if t is None else t.to(x.dtype) for t in weights]
        return ops.frozen_inverted_residual(
            x, w[0], b[0], w[1], b[1], w[2], b[2], stride, padding, activation, residual
        )

    return block


def stock(weights, stride, padding, activation, residual, expand):
    top, bottom, left, right = padding

    def block(x, *biases):
        b = list(biases) if expand else [None, *biases]
        w = [None if t is None else t.to(x.dtype) for t in weights]
        f = ACTIVATIONS[activation]
        y = f(F.conv2d(x, w[0], b[0])) if expand else x
        y = f(F.conv2d(F.pad(y, (left, right, top, bottom)), w[1], b[1], stride, groups=w[1].size(0)))
        y = F.conv2d(y, w[2], b[2])
        return x + y if residual else y

    return block


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("name", BLOCKS)
def test_values_and_gradients_are_as_exact_as_pytorchs(name, activation):
    input, weights, biases, stride, padding, residual = make_block(name)
    arguments = (weights, stride, padding, activation, residual, weights[0] is not None)
    compare_with_torch(ours(*arguments), stock(*arguments), [input, *(b for b in biases if b is not None)])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("name", ["shortcut", "stride 2", "no expansion"])
def test_half_precision_is_as_exact_as_pytorchs(name, layout, dtype):
    input, weights, biases, stride, padding, residual = make_block(name, dtype, layout)
    arguments = (weights, stride, padding, "relu6", residual, weights[0] is not None)
    compare_with_torch(ours(*arguments), stock(*arguments), [input, *(b for b in biases if b is not None)])


def test_pooled_port_carries_its_gradient():
    input, weights, biases, stride, padding, residual = make_block("shortcut")

    def with_port(x):
        w = [t.to(x.dtype) for t in weights]
        b = [t.to(x.dtype) for t in biases]
        y, pooled = ops.frozen_inverted_residual_pooled(
            x, w[0], b[0], w[1], b[1], w[2], b[2], stride, padding, "relu", residual
        )
        return torch.cat([y.flatten(), pooled.sin().flatten()])

    def without(x):
        b = [t.to(x.dtype) for t in biases]
        y = stock(weights, stride, padding, "relu", residual, True)(x, *b)
        return torch.cat([y.flatten(), F.avg_pool2d(x, 2).sin().flatten()])

    compare_with_torch(with_port, without, [input])


@pytest.mark.parametrize("used", ["output", "pooled"])
def test_one_port_alone_has_the_right_gradient(used):
    input, weights, biases, stride, padding, residual = make_block("stride 2", torch.float64)
    x = input.requires_grad_()
    y, pooled = ops.frozen_inverted_residual_pooled(
        x, weights[0], biases[0], weights[1], biases[1], weights[2], biases[2], stride, padding, "relu", residual
    )
    expected = {
        "output": stock(weights, stride, padding, "relu", residual, True)(x, *biases),
        "pooled": F.avg_pool2d(x, 2),
    }[used]
    grad_output = torch.randn_like(expected)
    (grad,) = torch.autograd.grad(y if used == "output" else pooled, x, grad_output)
    torch.testing.assert_close(grad, torch.autograd.grad(expected, x, grad_output)[0])


def test_keeps_two_bit_masks_and_nothing_else():
    input, weights, biases, stride, padding, residual = make_block("stride 2")
    x = input.requires_grad_()
    block = ours(weights, stride, padding, "relu6", residual, True)
    kept = saved_bytes(lambda: block(x, *(b.requires_grad_() for b in biases)), exclude=weights)
    assert kept == 2 * 10 * 12 * 5 + 2 * 5 * 6 * 5


@pytest.mark.parametrize("name", ["shortcut", "no expansion"])
@pytest.mark.parametrize("pooled", [False, True])
def test_opcheck(name, pooled):
    input, weights, biases, stride, padding, residual = make_block(name)
    for tensor in (input, *biases):
        if tensor is not None:
            tensor.requires_grad_()
    torch.library.opcheck(
        torch.ops.tinytl.frozen_inverted_residual.default,
        (input, weights[0], biases[0], weights[1], biases[1], weights[2], biases[2], [stride] * 2, padding, "relu6",
         residual, True, pooled),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(activation="silu"), "activation: expected None or one of 'relu'"),
        (dict(residual=True, stride=2), "residual: the input"),
        (dict(expand_weight=None, expand_bias=None), "depthwise_weight: without expand_weight"),
        (dict(project_weight=torch.zeros(8, 5, 1, 1)), "project_weight: expected shape"),
        (dict(depthwise_bias=torch.zeros(3)), "depthwise_bias: expected shape"),
        (dict(input=torch.zeros(8, 6, 6)), "input: expected"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    good = dict(
        input=torch.zeros(1, 8, 6, 6), expand_weight=torch.zeros(16, 8, 1, 1), expand_bias=torch.zeros(16),
        depthwise_weight=torch.zeros(16, 1, 3, 3), depthwise_bias=torch.zeros(16),
        project_weight=torch.zeros(8, 16, 1, 1), project_bias=torch.zeros(8),
    )  # fmt: skip
    with pytest.raises(ValueError, match=message):
        ops.frozen_inverted_residual(**{**good, **arguments})
