"""The small modules are their torch.nn namesakes: class, arguments, values, and less that is kept."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import tinytl_kernels.nn as tnn
from tests.checks import compare_with_torch, saved_bytes

MODULES = [
    ("ReLU", {}), ("ReLU", dict(inplace=True)), ("ReLU6", {}), ("LeakyReLU", dict(negative_slope=0.2)),
    ("Hardswish", {}), ("SiLU", {}), ("SiLU", dict(inplace=True)), ("Sigmoid", {}), ("GELU", {}),
    ("GELU", dict(approximate="tanh")),
    ("AvgPool2d", dict(kernel_size=2)), ("AvgPool2d", dict(kernel_size=3, stride=2, padding=1, ceil_mode=True)),
    ("AdaptiveAvgPool2d", dict(output_size=1)), ("AdaptiveAvgPool2d", dict(output_size=(3, None))),
    ("MaxPool2d", dict(kernel_size=3, stride=2, padding=1)), ("MaxPool2d", dict(kernel_size=(2, 3), dilation=2)),
]  # fmt: skip


@pytest.mark.parametrize(("name", "arguments"), MODULES)
def test_is_its_namesake(name, arguments):
    stock = getattr(nn, name)(**arguments)
    mine = getattr(tnn, name)(**arguments)
    assert isinstance(mine, getattr(nn, name))
    assert repr(mine) == repr(stock)
    assert mine.state_dict() == {}
    # In place, stock would overwrite the input that both share.
    compare_with_torch(copy.deepcopy(mine), lambda x: stock(x.clone()), [torch.randn(2, 9, 8, 7).mul(3)])


def test_hardsigmoid_is_its_namesake():
    x = torch.randn(2, 9, 8, 7).mul(3)
    torch.testing.assert_close(tnn.Hardsigmoid()(x), nn.Hardsigmoid()(x))
    assert isinstance(tnn.Hardsigmoid(), nn.Hardsigmoid)


@pytest.mark.parametrize("name", ["ReLU", "ReLU6", "LeakyReLU", "Hardsigmoid"])
def test_relu_family_keeps_one_bit_an_element(name):
    x = torch.randn(2, 16, 5, 5, requires_grad=True)
    assert saved_bytes(lambda: getattr(tnn, name)()(x)) == 2 * 5 * 5 * 2


@pytest.mark.parametrize(
    ("module", "text"),
    [
        (tnn.SiLU(code_bits=8), "SiLU(code_bits=8)"),
        (tnn.Hardswish(inplace=True, code_bits=8), "Hardswish(code_bits=8)"),
        (tnn.GELU("tanh", code_bits=8), "GELU(approximate='tanh', code_bits=8)"),
        (tnn.Sigmoid(code_bits=8), "Sigmoid(code_bits=8)"),
    ],
    ids=str,
)
def test_smooth_activations_keep_a_byte_an_element_if_asked(module, text):
    x = torch.randn(2, 16, 5, 5, requires_grad=True)
    assert repr(module) == text
    assert saved_bytes(lambda: module(x)) == x.numel()
    module.code_bits = None
    assert saved_bytes(lambda: module(x)) == x.nbytes


def test_an_activation_with_codes_is_not_fused_where_it_would_keep_the_value():
    with pytest.raises(ValueError, match="cannot be fused"):
        tnn.FrozenConvBias.from_conv(nn.Conv2d(3, 4, 3), activation=tnn.SiLU(code_bits=8))


def test_smooth_activations_refuse_other_numbers_of_bits():
    with pytest.raises(ValueError, match="code_bits: expected None"):
        tnn.SiLU(code_bits=4)


def test_inplace_leaves_the_input_as_it_was():
    x = torch.randn(2, 8, 4, 4)
    before = x.clone()
    tnn.ReLU(inplace=True)(x)
    assert torch.equal(x, before)


@pytest.mark.parametrize(
    ("module", "name"),
    [
        (nn.ReLU(), "relu"),
        (tnn.ReLU(), "relu"),
        (nn.ReLU6(), "relu6"),
        (nn.Hardtanh(0.0, 6.0), "relu6"),
        (nn.Hardtanh(), None),
        (nn.LeakyReLU(), "leaky_relu"),
        (nn.LeakyReLU(0.2), None),
        (nn.GELU("tanh"), "gelu_tanh"),
        (nn.GELU(), "gelu"),
        (nn.SiLU(), "silu"),
        (nn.Hardswish(), "hardswish"),
        (nn.Hardsigmoid(), "hardsigmoid"),
        (nn.PReLU(), None),
        (type("Own", (nn.ReLU,), {})(), None),  # a subclass may compute something else
    ],
)
def test_activation_name(module, name):
    assert tnn.activation_name(module) == name


@pytest.mark.parametrize("name", ["AvgPool2d", "MaxPool2d"])
def test_unbatched_images_are_pytorchs_own(name):
    x = torch.randn(3, 8, 8)
    assert torch.equal(getattr(tnn, name)(2)(x), getattr(nn, name)(2)(x))


def test_max_pool_falls_back_to_pytorchs_own():
    x = torch.randn(1, 2, 20, 20)
    values, indices = tnn.MaxPool2d(2, return_indices=True)(x)
    assert torch.equal(indices, nn.MaxPool2d(2, return_indices=True)(x)[1])
    assert values.shape == (1, 2, 10, 10)
    assert torch.equal(tnn.MaxPool2d(17)(x), nn.MaxPool2d(17)(x))  # 289 elements a window


def test_pooling_keeps_4_bits_or_nothing():
    x = torch.randn(2, 8, 8, 8, requires_grad=True)
    assert saved_bytes(lambda: tnn.MaxPool2d(2)(x)) == 2 * 4 * 4 * 8 // 2
    assert saved_bytes(lambda: tnn.AvgPool2d(2)(x)) == 0
    assert saved_bytes(lambda: tnn.AdaptiveAvgPool2d(1)(x)) == 0
    assert saved_bytes(lambda: tnn.AdaptiveAvgPool2d(3)(x)) == 0


def test_dropout():
    x = torch.ones(100, 80, requires_grad=True)
    layer = tnn.Dropout(0.25)
    assert isinstance(layer, nn.Dropout)
    assert saved_bytes(lambda: layer(x)) == x.numel() // 8
    torch.manual_seed(3)
    first = layer(x)
    torch.manual_seed(3)
    assert torch.equal(layer(x), first)
    assert first.unique().tolist() == [0.0, pytest.approx(1 / 0.75)]
    assert layer.eval()(x) is x
    assert torch.equal(tnn.Dropout(0.0)(x), x)
    assert torch.equal(tnn.Dropout(1.0)(x), torch.zeros_like(x))


def test_dropout_inplace_leaves_the_input_as_it_was():
    x = torch.ones(64)
    tnn.Dropout(0.5, inplace=True)(x)
    assert torch.equal(x, torch.ones(64))
