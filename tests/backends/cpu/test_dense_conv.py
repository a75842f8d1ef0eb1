"""``dense_conv.cpp`` by itself, at every width: the dispatcher would leave narrow convolutions to oneDNN."""

from __future__ import annotations

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.backends.cpu.exact import operator, poisoned_memory, whole_numbers
from tests.checks import assert_as_exact_as_torch
from tests.threads import num_threads
from tinytl_kernels.core.geometry import output_length

pytestmark = pytest.mark.usefixtures("cpu_kernels")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
NAMES = {None: "none", "relu": "relu", "relu6": "relu6"}


def dense(input, weight, bias, numbers, activation, scale=None, needs_mask=True) -> tuple[Tensor, Tensor]:
    with poisoned_memory():
        return torch.ops.tinytl_cpu.dense_forward(input, weight, scale, bias, *numbers, NAMES[activation], needs_mask)


def dense_backward(grad, mask, weight, size, numbers, activation, scale=None, need_input=True, need_bias=True):
    with poisoned_memory():
        return torch.ops.tinytl_cpu.dense_backward(
            grad, mask, weight, scale, list(size), *numbers, NAMES[activation], need_input, need_bias
        )


def reference(input, weight, bias, grad, numbers, activation, scale=None) -> tuple[Tensor, ...]:
    """Output, mask, input gradient and bias gradient in ATen."""
    output, mask = operator("reference", "frozen_conv")(input, weight, bias, *numbers, activation, True, scale)
    gradients = operator("reference", "frozen_conv_backward")(
        grad, weight, mask, list(input.shape), *numbers, activation, True, True, True, scale
    )
    return output, mask, *gradients


def channels_last(tensor: Tensor) -> Tensor:
    return tensor.contiguous(memory_format=torch.channels_last)


@st.composite
def convolutions(draw):
    """Sizes of input, weight and output, and the arguments from the stride on."""
    groups = draw(st.sampled_from([1, 1, 2, 3]))
    # Around a vector, a panel and a byte of the mask; odd ones leave half a bfloat16 pair.
    inputs = draw(st.sampled_from([1, 3, 4, 5, 16, 33]))
    outputs = draw(st.sampled_from([1, 3, 8, 20, 50, 64] if groups == 1 else [8, 16, 24, 56]))
    kernel = draw(st.tuples(st.integers(1, 4), st.integers(1, 4)))
    stride, dilation = draw(st.tuples(*[st.integers(1, 3)] * 2)), draw(st.tuples(*[st.integers(1, 2)] * 2))
    padding = [draw(st.integers(0, 4)) for _ in range(4)]
    size = (draw(st.integers(0, 3)), groups * inputs, draw(st.integers(1, 13)), draw(st.integers(1, 13)))
    height, width = (
        output_length(size[2 + i], kernel[i], stride[i], padding[2 * i], padding[2 * i + 1], dilation[i])
        for i in range(2)
    )
    assume(height > 0 and width > 0)
    numbers = (list(stride), padding, list(dilation), groups)
    return size, (groups * outputs, inputs, *kernel), (size[0], groups * outputs, height, width), numbers


@given(
    sizes=convolutions(), activation=st.sampled_from([None, "relu", "relu6"]), dtype=st.sampled_from(DTYPES[:2]),
    weight_format=st.sampled_from([torch.contiguous_format, torch.channels_last]), seed=st.integers(0, 2**31),
)  # fmt: skip
@settings(max_examples=120, deadline=None)
def test_equals_the_reference_for_any_geometry(sizes, activation, dtype, weight_format, seed):
    size, weight_size, output_size, numbers = sizes
    generator = torch.Generator().manual_seed(seed)
    input = channels_last(whole_numbers(size, 3, generator))
    weight = whole_numbers(weight_size, 2, generator).contiguous(memory_format=weight_format)
    bias = whole_numbers(weight_size[:1], 4, generator)
    grad = channels_last(whole_numbers(output_size, 3, generator))
    # In float32 every sum is exact, and its rounding to bfloat16 is the kernel's only one.
    output, mask, grad_input, grad_bias = reference(input, weight, bias, grad, numbers, activation)
    ours, our_mask = dense(input.to(dtype), weight.to(dtype), bias, numbers, activation)
    assert torch.equal(ours, output.to(dtype))
    assert torch.equal(our_mask, mask)
    our_input, our_bias = dense_backward(grad.to(dtype), mask, weight.to(dtype), size, numbers, activation)
    assert torch.equal(our_input, grad_input.to(dtype))
    assert torch.equal(our_bias, grad_bias)


# Input, weight, (stride, padding, dilation, groups).
GEOMETRIES = {
    "stem": ((2, 3, 33, 35), (32, 3, 3, 3), ([2, 2], [0, 1, 0, 1], [1, 1], 1)),
    "7 x 7 stem": ((1, 3, 40, 36), (24, 3, 7, 7), ([2, 2], [3, 3, 3, 3], [1, 1], 1)),
    "strided": ((2, 50, 15, 14), (70, 50, 3, 3), ([2, 2], [1, 1, 1, 1], [1, 1], 1)),
    "dilated": ((2, 20, 12, 11), (36, 20, 3, 3), ([1, 1], [2, 2, 2, 2], [2, 2], 1)),
    "groups": ((2, 48, 11, 9), (96, 24, 3, 3), ([1, 1], [1, 1, 1, 1], [1, 1], 2)),
    # Chains of additions and chunks of the weight: 9 * 260 terms.
    "deep": ((2, 260, 7, 7), (56, 260, 3, 3), ([1, 1], [1, 1, 1, 1], [1, 1], 1)),
    # From here on what winograd.h computes, in both directions.
    "squares": ((2, 64, 19, 17), (32, 64, 3, 3), ([1, 1], [1, 1, 1, 1], [1, 1], 1)),
    "squares, uneven padding": ((1, 32, 25, 20), (96, 32, 3, 3), ([1, 1], [0, 2, 1, 0], [1, 1], 1)),
    "squares, groups": ((2, 96, 20, 16), (64, 48, 3, 3), ([1, 1], [1, 1, 1, 1], [1, 1], 2)),
    "squares, deep": ((5, 512, 7, 7), (64, 512, 3, 3), ([1, 1], [1, 1, 1, 1], [1, 1], 1)),
}


def example(geometry: str, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, tuple]:
    size, weight_size, numbers = GEOMETRIES[geometry]
    weight = torch.randn(weight_size) / (weight_size[1] * weight_size[2] * weight_size[3]) ** 0.5
    return channels_last(torch.randn(size)).to(dtype), weight.to(dtype), torch.randn(weight_size[0]), numbers


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_is_as_exact_as_pytorch(geometry, dtype):
    input, weight, bias, numbers = example(geometry, dtype)
    output, mask = dense(input, weight, bias.to(dtype), numbers, "relu6")
    grad = channels_last(torch.randn(output.shape)).to(dtype)
    grad_input, grad_bias = dense_backward(grad, mask, weight, input.shape, numbers, "relu6")
    # The same mask for all three: a sign that rounding turned is no error of the gradient.
    exact = operator("reference", "frozen_conv")(
        input.double(), weight.double(), bias.to(dtype), *numbers, "relu6", True
    )
    stock = operator("reference", "frozen_conv")(input, weight, bias.to(dtype), *numbers, "relu6", True)
    assert_as_exact_as_torch("output", output, stock[0], exact[0])
    arguments = (mask, list(input.shape), *numbers, "relu6", True, True, True)
    backward = operator("reference", "frozen_conv_backward")
    exact, stock = (backward(grad.to(t), weight.to(t), *arguments) for t in (torch.float64, dtype))
    assert_as_exact_as_torch("grad_input", grad_input, stock[0], exact[0])
    assert_as_exact_as_torch("grad_bias", grad_bias, stock[1], exact[1])


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_the_mask_is_that_of_the_output(geometry):
    input, weight, bias, numbers = example(geometry, torch.float32)
    output, mask = dense(input, weight, bias, numbers, "relu6")
    passes = ((output > 0) & (output < 6)).permute(0, 2, 3, 1)
    bits = (mask.unsqueeze(-1) >> torch.arange(8, dtype=torch.uint8)).bitwise_and(1).flatten(-2)
    assert torch.equal(bits[..., : output.size(1)].bool(), passes)
    unmasked, nothing = dense(input, weight, bias, numbers, "relu6", needs_mask=False)
    assert torch.equal(unmasked, output)
    assert nothing.numel() == 0


@pytest.mark.parametrize("method", ["int8", "kmeans"])
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_weights_in_8_bits_give_what_their_values_give(method, dtype):
    # 9 * 150 terms a panel of 48 channels: packed in more than one piece.
    input, weight, bias = (
        channels_last(torch.randn(1, 150, 6, 5)).to(dtype),
        torch.randn(160, 150, 3, 3),
        torch.randn(160),
    )
    numbers = ([1, 1], [1, 1, 1, 1], [1, 1], 1)
    if method == "int8":
        scale = weight.abs().amax((1, 2, 3)) / 127
        codes = (weight / scale.view(-1, 1, 1, 1)).round().to(torch.int8)
        values = (codes.float() * scale.view(-1, 1, 1, 1)).to(dtype)
    else:
        scale = torch.randn(256)
        codes = torch.randint(0, 256, weight.shape, dtype=torch.uint8)
        values = scale[codes.long()].to(dtype)
    output, mask = dense(input, codes, bias, numbers, "relu", scale)
    expected, expected_mask = dense(input, values, bias, numbers, "relu")
    assert torch.equal(output, expected)
    assert torch.equal(mask, expected_mask)
    gradients = dense_backward(output, mask, codes, input.shape, numbers, "relu", scale)
    expected = dense_backward(output, mask, values, input.shape, numbers, "relu")
    assert all(torch.equal(a, b) for a, b in zip(gradients, expected, strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ["relu", "relu6"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")], ids=str)
def test_nan_and_inf_reach_their_windows_and_no_other(value, activation, dtype):
    # Three channels: the zeros that fill a bfloat16 pair must not meet the next pixel's.
    input = channels_last(torch.randn(2, 3, 6, 5)).to(dtype)
    input[0, 1, 2, 3] = value
    weight, numbers = torch.rand(20, 3, 3, 3).to(dtype) + 1, ([1, 1], [1, 1, 1, 1], [1, 1], 1)
    output, mask = dense(input, weight, None, numbers, activation)
    expected, expected_mask = operator("reference", "frozen_conv")(input, weight, None, *numbers, activation, True)
    assert torch.equal(output.isnan(), expected.isnan())
    touched = torch.zeros(2, 1, 6, 5, dtype=torch.bool)
    touched[0, 0, 1:4, 2:5] = True
    touched = touched.expand_as(output)
    assert torch.equal(output[touched].nan_to_num(), expected[touched].nan_to_num())
    assert output[~touched].isfinite().all()
    pixels = touched[:, 0]
    assert torch.equal(mask[pixels], expected_mask[pixels])


@given(
    batch=st.integers(1, 4), height=st.integers(1, 23), width=st.integers(1, 23), groups=st.integers(1, 2),
    inputs=st.sampled_from([32, 48, 64, 160]), outputs=st.sampled_from([32, 48, 64, 160]),
    padding=st.lists(st.integers(0, 2), min_size=4, max_size=4), activation=st.sampled_from([None, "relu", "relu6"]),
    weight_format=st.sampled_from([torch.contiguous_format, torch.channels_last]), seed=st.integers(0, 2**31),
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_squares_equal_the_reference(
    batch, height, width, groups, inputs, outputs, padding, activation, weight_format, seed
):
    assume(height + padding[0] + padding[1] >= 3 and width + padding[2] + padding[3] >= 3)
    generator = torch.Generator().manual_seed(seed)
    numbers, size = ([1, 1], padding, [1, 1], groups), (batch, groups * inputs, height, width)
    input = channels_last(whole_numbers(size, 3, generator))
    weight = whole_numbers((groups * outputs, inputs, 3, 3), 2, generator).contiguous(memory_format=weight_format)
    bias = whole_numbers((groups * outputs,), 4, generator)
    ours, our_mask = dense(input, weight, bias, numbers, activation)
    grad = channels_last(whole_numbers(ours.shape, 3, generator))
    output, mask, grad_input, grad_bias = reference(input, weight, bias, grad, numbers, activation)
    assert torch.equal(ours, output)
    assert torch.equal(our_mask, mask)
    our_input, our_bias = dense_backward(grad, mask, weight, size, numbers, activation)
    assert torch.equal(our_input, grad_input)
    assert torch.equal(our_bias, grad_bias)


@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=str)
def test_nan_and_inf_reach_their_windows_and_at_most_the_squares_around(value):
    input, weight, bias, numbers = example("squares", torch.float32)
    expected, _ = dense(input, weight, bias, numbers, "relu")
    input[1, 3, 8, 6] = value
    output, _ = dense(input, weight, bias, numbers, "relu")
    near = torch.zeros(output.shape, dtype=torch.bool)
    near[1, :, 7:10, 5:8] = True
    assert not output[near].isfinite().all()
    near[1, :, 6:10, 4:8] = True  # whole squares of 2 x 2
    assert torch.equal(output[~near], expected[~near])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_blocked_infinite_gradient_is_zero_and_a_passing_one_stays_in_its_window(dtype):
    input, weight, _, numbers = example("strided", dtype)
    output, mask = dense(input, weight, None, numbers, "relu")
    grad = torch.zeros_like(output)
    blocked = (output <= 0).nonzero()[0]
    grad[tuple(blocked)] = float("inf")
    grad_input, grad_bias = dense_backward(grad, mask, weight, input.shape, numbers, "relu")
    assert not grad_input.any()
    assert not grad_bias.any()


def test_an_empty_batch_is_empty_and_its_bias_gradient_zero():
    numbers = ([1, 1], [1, 1, 1, 1], [1, 1], 1)
    weight = torch.randn(20, 16, 3, 3)
    output, mask = dense(torch.empty(0, 16, 5, 5), weight, torch.randn(20), numbers, "relu")
    assert output.shape == (0, 20, 5, 5)
    grad_input, grad_bias = dense_backward(output, mask, weight, (0, 16, 5, 5), numbers, "relu")
    assert grad_input.shape == (0, 16, 5, 5)
    assert torch.equal(grad_bias, torch.zeros(20))


def test_windows_in_the_padding_altogether_still_count_for_the_bias():
    # Padding 4 of a 2 x 2 window: whole rows and columns of the output read no input.
    numbers, weight = ([1, 1], [4, 3, 4, 3], [1, 1], 1), whole_numbers((20, 16, 2, 2), 2, torch.Generator())
    input = channels_last(torch.ones(1, 16, 3, 3))
    output, mask = dense(input, weight, torch.ones(20), numbers, None)
    padded = torch.nn.functional.pad(input, (4, 3, 4, 3))
    assert torch.equal(output, torch.conv2d(padded, weight, torch.ones(20)))
    _, grad_bias = dense_backward(torch.ones_like(output), mask, weight, input.shape, numbers, None)
    assert torch.equal(grad_bias, torch.full((20,), float(output[0, 0].numel())))


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_bands_of_rows_agree_and_repeat_bit_by_bit(geometry, threads):
    # One image: more threads, more bands. On whole numbers their results are equal to the last bit.
    input, weight, bias, numbers = example(geometry, torch.float32)
    generator = torch.Generator().manual_seed(0)
    whole = [whole_numbers(t.shape, 3, generator) for t in (input[:1], weight, bias)]

    def results(image, weight, bias):
        output, mask = dense(channels_last(image), weight, bias, numbers, "relu")
        return output, mask, *dense_backward(output, mask, weight, image.shape, numbers, "relu")

    with num_threads(1):
        expected = results(*whole)
    with num_threads(threads):
        assert all(torch.equal(a, b) for a, b in zip(results(*whole), expected, strict=True))
        runs = [results(input[:1], weight, bias) for _ in range(2)]
        assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": (24, 5, 3, 3)}, r"weight: expected \(C_out, 32 / groups"),
        ({"weight": (24, 16, 9, 3)}, "input: expected padded height and width of at least the dilated kernel"),
        ({"weight": (20, 16, 3, 3)}, "expected a multiple of 8 output channels a group"),
        ({"stride": [0, 1]}, "stride: expected two numbers >= 1"),
        ({"padding": [-1, 0, 0, 0]}, r"padding: expected \(top, bottom, left, right\), none negative"),
    ],
)
def test_refuses_what_does_not_fit(change, message):
    numbers = (change.get("stride", [1, 1]), change.get("padding", [0] * 4), [1, 1], 2)
    with pytest.raises(RuntimeError, match=message):
        dense(torch.randn(1, 32, 5, 5), torch.randn(change.get("weight", (24, 16, 3, 3))), None, numbers, "relu")
