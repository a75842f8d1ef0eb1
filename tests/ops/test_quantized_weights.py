"""Operators with weights in 8 bits compute what they compute with the weight that the 8 bits stand for."""

from __future__ import annotations

import pytest
import torch

from tests.checks import compare_with_torch, saved_bytes
from tests.ops.test_frozen_conv import GEOMETRIES, make_case, stock
from tests.ops.test_frozen_inverted_residual import BLOCKS, make_block
from tests.ops.test_frozen_inverted_residual import stock as stock_block
from tinytl_kernels import ops
from tinytl_kernels.core.quantization import CODES, dequantize, quantize

SCALES = ("expand_scale", "depthwise_scale", "project_scale")


def coded(weights, code):
    """(codes, scales, what they stand for) of some weights, None for None."""
    pairs = [(None, None) if w is None else quantize(w, code) for w in weights]
    exact = [None if w is None else dequantize(w, s) for w, s in pairs]
    return [w for w, _ in pairs], [s for _, s in pairs], exact


@pytest.mark.parametrize("code", CODES)
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_values_and_gradients_are_those_of_the_dequantised_weight(geometry, code):
    input, weight, bias, numbers = make_case(geometry, torch.float32, "channels_last")
    (weight,), (scale,), (exact,) = coded([weight], code)
    compare_with_torch(
        lambda x, b: ops.frozen_conv(x, weight, b, *numbers, activation="relu6", weight_scale=scale),
        lambda x, b: stock(x, exact.to(x.dtype), b, numbers, "relu6"),
        [input, bias],
    )


@pytest.mark.parametrize("code", CODES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("geometry", ["pointwise", "depthwise", "grouped"])
def test_half_precision_rounds_the_dequantised_weight(geometry, dtype, code):
    input, weight, bias, numbers = make_case(geometry, dtype, "contiguous")
    (weight,), (scale,), (exact,) = coded([weight], code)
    compare_with_torch(
        lambda x, b: ops.frozen_conv(x, weight, b, *numbers, activation="relu", weight_scale=scale),
        lambda x, b: stock(x, exact.to(dtype).to(x.dtype), b, numbers, "relu"),
        [input, bias],
    )


@pytest.mark.parametrize("code", CODES)
def test_every_activation_that_keeps_its_value_takes_codes_too(code):
    input, weight, bias, numbers = make_case("grouped", torch.float32, "channels_last")
    (weight,), (scale,), (exact,) = coded([weight], code)
    compare_with_torch(
        lambda x, b: ops.frozen_conv(x, weight, b, *numbers, activation="silu", weight_scale=scale),
        lambda x, b: stock(x, exact.to(x.dtype), b, numbers, "silu"),
        [input, bias],
    )


def block(weights, scales, biases, stride, padding, residual):
    def function(x, *given):
        b = list(given) if biases[0] is not None else [None, *given]
        return ops.frozen_inverted_residual(
            x, weights[0], b[0], weights[1], b[1], weights[2], b[2], stride, padding, "relu6", residual,
            **dict(zip(SCALES, scales, strict=True)),
        )  # fmt: skip

    return function


@pytest.mark.parametrize("code", CODES)
@pytest.mark.parametrize("name", BLOCKS)
def test_values_and_gradients_of_a_block(name, code):
    input, weights, biases, stride, padding, residual = make_block(name)
    codes, scales, exact = coded(weights, code)
    compare_with_torch(
        block(codes, scales, biases, stride, padding, residual),
        stock_block(exact, stride, padding, "relu6", residual, weights[0] is not None),
        [input, *(b for b in biases if b is not None)],
    )


def test_values_and_gradients_of_a_block_with_each_weight_held_differently():
    input, weights, biases, stride, padding, residual = make_block("shortcut")
    expand, depthwise = quantize(weights[0]), quantize(weights[1], "kmeans")
    exact = [dequantize(*expand), dequantize(*depthwise), weights[2]]
    compare_with_torch(
        lambda x, *b: ops.frozen_inverted_residual(
            x, expand[0], b[0], depthwise[0], b[1], weights[2].to(x.dtype), b[2], stride, padding, "relu6", residual,
            expand_scale=expand[1], depthwise_scale=depthwise[1],
        ),
        stock_block(exact, stride, padding, "relu6", residual, True),
        [input, *biases],
    )  # fmt: skip


@pytest.mark.parametrize("code", CODES)
def test_keeps_codes_and_scale_by_reference_and_one_bit_an_element(code):
    x = torch.randn(4, 16, 20, 20, requires_grad=True)
    weight, scale = quantize(torch.randn(32, 16, 1, 1), code)
    bias = torch.zeros(32, requires_grad=True)
    kept = saved_bytes(
        lambda: ops.frozen_conv(x, weight, bias, activation="relu6", weight_scale=scale), exclude=[weight, scale]
    )
    assert kept == 4 * 20 * 20 * 32 // 8


def test_autocast_leaves_codes_and_scale_alone():
    x = torch.randn(2, 8, 6, 6, requires_grad=True)
    weight, scale = quantize(torch.randn(16, 8, 3, 3))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = ops.frozen_conv(x, weight, activation="relu", weight_scale=scale)
    expected = ops.frozen_conv(x.bfloat16(), dequantize(weight, scale, torch.bfloat16), activation="relu")
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y, expected)


@pytest.mark.parametrize("code", CODES)
def test_opcheck_of_a_convolution(code):
    input, weight, bias, (stride, padding, dilation, groups) = make_case("grouped", torch.float32, "channels_last")
    weight, scale = quantize(weight, code)
    torch.library.opcheck(
        torch.ops.tinytl.frozen_conv.default,
        (input.requires_grad_(), weight, bias.requires_grad_(), [stride] * 2, padding, [dilation] * 2, groups,
         "relu6", True, scale),
    )  # fmt: skip


@pytest.mark.parametrize("name", ["shortcut", "no expansion"])
def test_opcheck_of_a_block(name):
    input, weights, biases, stride, padding, residual = make_block(name)
    codes, scales, _ = coded(weights, "int8")
    for tensor in (input, *biases):
        if tensor is not None:
            tensor.requires_grad_()
    pairs = [t for pair in zip(codes, biases, strict=True) for t in pair]
    torch.library.opcheck(
        torch.ops.tinytl.frozen_inverted_residual.default,
        (input, *pairs, [stride] * 2, padding, "relu6", residual, True, True, *scales),
    )


def test_compiles_without_a_graph_break():
    (weight, scale), bias = quantize(torch.randn(8, 4, 3, 3)), torch.zeros(8, requires_grad=True)

    def step(x):
        return ops.frozen_conv(x, weight, bias, stride=2, activation="relu6", weight_scale=scale).square().mean()

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager", dynamic=True)
    x = torch.randn(2, 4, 9, 9)
    expected = torch.autograd.grad(step(x), bias)[0]
    torch.testing.assert_close(torch.autograd.grad(compiled(x), bias)[0], expected)


INT8 = torch.ones(8, 4, 3, 3, dtype=torch.int8)


@pytest.mark.parametrize(
    ("weight", "scale", "message"),
    [
        (torch.zeros(8, 4, 3, 3), torch.ones(8), "weight_scale: expected None with a weight of dtype torch.float32"),
        (INT8, None, "weight_scale: expected the scale of a weight of dtype torch.int8, got None"),
        (INT8, torch.ones(4), r"weight_scale: expected a scale of shape \(8,\), float32, got \(4,\)"),
        (INT8, torch.ones(8).double(), "weight_scale: expected a scale .* torch.float64"),
        (INT8.byte(), None, "weight_scale: expected the codebook of a weight of dtype torch.uint8, got None"),
        (INT8.byte(), torch.ones(8), r"weight_scale: expected a codebook of shape \(256,\)"),
        (INT8.int(), None, "weight: expected dtype torch.float32 as the input, got torch.int32"),
        (INT8, torch.ones(8, device="meta"), "weight_scale: expected on cpu as the input, got meta"),
    ],
)
def test_a_weight_and_a_scale_that_do_not_fit_are_named(weight, scale, message):
    with pytest.raises(ValueError, match=message):
        ops.frozen_conv(torch.zeros(1, 4, 6, 6), weight, weight_scale=scale)


def test_a_scale_of_a_block_that_does_not_fit_is_named():
    input, weights, _, stride, padding, residual = make_block("shortcut")
    codes, scales, _ = coded(weights, "int8")
    arguments = (input, codes[0], None, codes[1], None, codes[2], None, stride, padding, "relu6", residual)
    with pytest.raises(ValueError, match="depthwise_scale: expected the scale"):
        ops.frozen_inverted_residual(*arguments, expand_scale=scales[0], project_scale=scales[2])
    with pytest.raises(ValueError, match="expand_scale: expected None as there is no expand_weight"):
        ops.frozen_inverted_residual(
            torch.zeros(1, 13, 6, 6), None, None, torch.zeros(13, 1, 3, 3), None, torch.zeros(8, 13, 1, 1), None,
            expand_scale=scales[0],
        )  # fmt: skip


def test_a_scale_that_asks_for_a_gradient_is_refused():
    weight, scale = quantize(torch.randn(4, 4, 3, 3))
    with pytest.raises(RuntimeError, match="to_torch"):
        ops.frozen_conv(torch.randn(1, 4, 5, 5), weight, weight_scale=scale.requires_grad_())
