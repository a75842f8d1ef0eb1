"""The frozen convolutions in C++ equal the reference bit by bit on whole numbers, for any geometry."""

from __future__ import annotations

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from tests.backends.cpu.exact import both, operator, poisoned_memory, whole_numbers
from tests.checks import compare_with_torch
from tests.ops.layouts import DTYPES, LAYOUTS, images
from tests.ops.test_frozen_conv import stock
from tests.threads import num_threads
from tinytl_kernels import ops
from tinytl_kernels.backends.reference.activation import (
    activation_gradient,
    activation_mask,
    apply_activation_,
    apply_smooth_activation,
)
from tinytl_kernels.core.activations import FULL_VALUE
from tinytl_kernels.core.geometry import output_length

pytestmark = pytest.mark.usefixtures("cpu_kernels")

# Channels around the width of a vector, of a byte of the mask and of a panel of the GEMM.
CHANNELS = st.sampled_from([1, 2, 3, 7, 8, 9, 13, 16, 17, 24, 31, 33, 48, 49, 100])
KINDS = ("pointwise", "depthwise", "dense", "grouped")


@st.composite
def convolutions(draw, kind: str):
    """Arguments of ``frozen_conv`` from the stride on, and the sizes of its tensors."""
    pair = st.tuples(st.integers(1, 3), st.integers(1, 3))
    channels = draw(CHANNELS if kind in ("pointwise", "depthwise") else st.sampled_from([1, 3, 4, 9, 12]))
    groups = {"depthwise": channels, "grouped": max(channels // 2, 1)}.get(kind, 1)
    assume(channels % groups == 0)
    out_channels = channels if kind == "depthwise" else groups * draw(st.integers(1, 4)) * (8 if groups == 1 else 1)
    out_channels -= draw(st.integers(0, 3)) if groups == 1 and out_channels > 3 else 0
    stride = draw(pair)
    if kind == "pointwise":
        kernel, dilation, padding = (1, 1), (1, 1), (0, 0, 0, 0)
    else:
        kernel = draw(st.tuples(st.integers(1, 5), st.integers(1, 5)))
        dilation = draw(st.tuples(st.integers(1, 2), st.integers(1, 2)))
        padding = draw(st.tuples(*[st.integers(0, 4)] * 4))
    size = (draw(st.integers(0, 3)), channels, draw(st.integers(1, 13)), draw(st.integers(1, 13)))
    height, width = (
        output_length(size[2 + i], kernel[i], stride[i], padding[2 * i], padding[2 * i + 1], dilation[i])
        for i in range(2)
    )
    assume(height > 0 and width > 0)
    return (
        size, (out_channels, channels // groups, *kernel), (size[0], out_channels, height, width),
        (list(stride), list(padding), list(dilation), groups),
    )  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
@given(
    data=st.data(), activation=st.sampled_from([None, "relu", "relu6"]), with_bias=st.booleans(),
    need_input=st.booleans(), seed=st.integers(0, 2**31), layout=st.sampled_from([0, 1]),
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_equals_the_reference_for_any_geometry(kind, data, activation, with_bias, need_input, seed, layout):
    size, weight_size, output_size, numbers = data.draw(convolutions(kind))
    generator = torch.Generator().manual_seed(seed)
    format = (torch.contiguous_format, torch.channels_last)[layout]
    input = whole_numbers(size, 3, generator).contiguous(memory_format=format)
    weight = whole_numbers(weight_size, 2, generator)
    bias = whole_numbers(weight_size[:1], 4, generator) if with_bias else None
    _, saved = both("frozen_conv", input, weight, bias, *numbers, activation, True)
    grad_output = whole_numbers(output_size, 3, generator).contiguous(memory_format=format)
    both(
        "frozen_conv_backward", grad_output, weight, saved, list(size), *numbers, activation, bool(layout), need_input,
        True,
    )  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", [None, "relu", "relu6", "leaky_relu", "hardsigmoid", "hardswish", "gelu"])
@pytest.mark.parametrize("kind", KINDS)
def test_is_as_exact_as_pytorch(kind, activation, dtype, layout):
    size, weight_size, groups = {
        "pointwise": ((2, 130, 5, 7), (50, 130, 1, 1), 1),
        "depthwise": ((2, 50, 9, 7), (50, 1, 5, 3), 50),
        "dense": ((2, 12, 9, 7), (21, 12, 3, 3), 1),
        "grouped": ((2, 12, 9, 7), (21, 4, 3, 3), 3),
    }[kind]
    padding = (0, 0, 0, 0) if kind == "pointwise" else (1, 2, 0, 3)
    numbers = ((2, 1), padding, 1, groups)
    weight = (torch.randn(weight_size) / (weight_size[1] * weight_size[2] * weight_size[3]) ** 0.5).to(dtype)
    compare_with_torch(
        lambda x, b: ops.frozen_conv(x, weight.to(x.dtype), b, *numbers, activation=activation),
        lambda x, b: stock(x, weight.to(x.dtype), b, numbers, activation),
        [images(size, dtype, layout), torch.randn(weight_size[0]).to(dtype)],
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ["relu", "relu6"])
@pytest.mark.parametrize("kind", ["pointwise", "depthwise"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")], ids=str)
def test_nan_and_inf_travel_as_in_the_reference(value, kind, activation, dtype):
    # 37 channels: the odd value sits in whole vectors and in the tail. One input channel a GEMM: inf meets no 0.
    pointwise = kind == "pointwise"
    channels = 1 if pointwise else 37
    input = torch.randn(2, channels, 4, 5).to(dtype)
    input[0, :, 1, 2] = value
    weight = torch.ones(37, 1, 1, 1, dtype=dtype)
    arguments = ([1, 1], [0, 0, 0, 0], [1, 1], 1 if pointwise else 37, activation, True)
    ours, mask = operator("cpu", "frozen_conv")(input, weight, None, *arguments)
    theirs, expected = operator("reference", "frozen_conv")(input, weight, None, *arguments)
    assert torch.equal(ours.isnan(), theirs.isnan())
    assert torch.equal(ours.nan_to_num(), theirs.nan_to_num())
    assert torch.equal(mask, expected)


def activated(values, activation):
    if activation in FULL_VALUE:
        return apply_smooth_activation(values, activation)
    return apply_activation_(values.clone(), activation)


def convolved(kernel, input, weight, scale, bias, numbers, activation, needs_saved):
    """(output, saved) of ``kernel``, whatever the backend would choose."""
    stride, padding, dilation, groups = numbers
    forward = getattr(torch.ops.tinytl_cpu, f"{kernel}_forward")
    rest = (activation or "none", needs_saved)
    if kernel == "pointwise":
        return forward(input, weight, scale, bias, None, stride, *rest)
    return forward(input, weight, scale, bias, stride, padding, dilation, *([groups] * (kernel == "dense")), *rest)


def gradients(kernel, grad_output, saved, weight, scale, size, numbers, activation, need_input):
    """(grad_input, grad_bias) of ``kernel``."""
    stride, padding, dilation, _ = numbers
    geometry = {"pointwise": (stride,), "depthwise": (stride, padding, dilation)}.get(kernel, numbers)
    backward = getattr(torch.ops.tinytl_cpu, f"{kernel}_backward")
    return backward(grad_output, saved, weight, scale, size, *geometry, activation or "none", need_input, True)


# kernel, input, weight, geometry. Of the last three the weight is more than is packed at a time: the tensors are walked
# several times, and a pixel is complete after the last.
PASSES = {
    "pointwise": ("pointwise", (3, 20, 5, 7), (37, 20, 1, 1), ([2, 1], [0] * 4, [1, 1], 1)),
    "depthwise": ("depthwise", (3, 37, 9, 7), (37, 1, 5, 3), ([2, 1], [1, 2, 0, 3], [1, 1], 37)),
    "dense": ("dense", (3, 12, 9, 7), (21, 12, 3, 3), ([1, 1], [1, 2, 0, 3], [2, 1], 1)),
    "grouped": ("dense", (3, 24, 9, 7), (48, 8, 3, 3), ([2, 2], [1] * 4, [1, 1], 3)),
    "squares": ("dense", (2, 32, 14, 15), (40, 32, 3, 3), ([1, 1], [1] * 4, [1, 1], 1)),
    "large pointwise in 8 bits": ("pointwise", (2, 1000, 3, 3), (1001, 1000, 1, 1), ([1, 1], [0] * 4, [1, 1], 1)),
    "large dense": ("dense", (2, 200, 5, 5), (403, 200, 3, 3), ([2, 2], [1] * 4, [1, 1], 1)),
    "large squares": ("dense", (2, 224, 14, 14), (224, 224, 3, 3), ([1, 1], [1] * 4, [1, 1], 1)),
}


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("activation", ["leaky_relu", "hardsigmoid", "hardswish", "silu", "gelu", "gelu_tanh"])
@pytest.mark.parametrize("kind", PASSES)
def test_an_activation_of_its_own_pass_is_that_of_the_plain_convolution(kind, activation, dtype, threads):
    kernel, size, weight_size, numbers = PASSES[kind]
    input = torch.randn(size).to(dtype).contiguous(memory_format=torch.channels_last)
    weight = torch.randn(weight_size) * (weight_size[1] * weight_size[2] * weight_size[3]) ** -0.5
    bias, scale = torch.randn(weight_size[0]), None
    if kind.endswith("8 bits"):
        scale = weight.abs().amax((1, 2, 3)) / 127
        weight = (weight / scale[:, None, None, None]).round().to(torch.int8)
    with num_threads(threads):
        arguments = (kernel, input, weight, scale, bias, numbers)
        with poisoned_memory():
            plain, _ = convolved(*arguments, None, True)
            output, saved = convolved(*arguments, activation, True)
            without, nothing = convolved(*arguments, activation, False)
        assert torch.equal(output, without)
        assert nothing.numel() == 0
        assert torch.equal(saved, plain if activation in FULL_VALUE else activation_mask(plain, activation))
        torch.testing.assert_close(output, activated(plain, activation))
        grad_output = torch.randn(output.shape).to(dtype).contiguous(memory_format=torch.channels_last)
        grad = activation_gradient(grad_output, saved, activation).contiguous(memory_format=torch.channels_last)
        none = torch.empty(0, dtype=torch.uint8)
        for need_input in (True, False):
            with poisoned_memory():
                ours = gradients(kernel, grad_output, saved, weight, scale, size, numbers, activation, need_input)
            theirs = gradients(kernel, grad, none, weight, scale, size, numbers, None, need_input)
            # In half precision a gradient may round the other way, and counts in sums of up to 2000 terms.
            slack = {} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 2e-2}
            for a, b in zip(ours, theirs, strict=True):
                torch.testing.assert_close(a, b, **slack)
