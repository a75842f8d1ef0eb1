"""tinytl::frozen_conv against conv2d + activation: values, gradients, masks, what is kept, what is refused."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from tests.checks import compare_with_torch, saved_bytes
from tinytl_kernels import ops

ACTIVATIONS = {
    None: lambda x: x,
    "relu": F.relu,
    "relu6": F.relu6,
    "leaky_relu": F.leaky_relu,
    "hardsigmoid": lambda x: F.relu6(x + 3) / 6,  # F.hardsigmoid rounds 1 / 6 to float32 even in float64
    "hardswish": F.hardswish,
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
}

# (N, C, H, W), (O, C / groups, kH, kW), stride, (top, bottom, left, right), dilation, groups
GEOMETRIES = {
    "pointwise": ((2, 24, 9, 7), (40, 24, 1, 1), 1, (0, 0, 0, 0), 1, 1),
    "stem, 3 channels": ((2, 3, 17, 15), (8, 3, 3, 3), 2, (1, 1, 1, 1), 1, 1),
    "depthwise": ((2, 24, 10, 9), (24, 1, 3, 3), 1, (1, 1, 1, 1), 1, 24),
    "depthwise, stride 2, TensorFlow SAME": ((2, 13, 10, 9), (13, 1, 5, 5), 2, (1, 2, 2, 2), 1, 13),
    "depthwise with multiplier": ((1, 5, 8, 8), (10, 1, 3, 3), 1, (1, 1, 1, 1), 1, 5),
    "grouped": ((2, 12, 8, 6), (18, 4, 3, 3), 2, (1, 1, 1, 1), 1, 3),
    "dilated": ((1, 8, 13, 12), (8, 8, 3, 3), 1, (2, 2, 2, 2), 2, 1),
    "stride beyond the kernel": ((2, 8, 11, 10), (16, 8, 2, 2), 5, (0, 0, 0, 0), 1, 1),
    "padding beyond the kernel": ((1, 8, 5, 5), (8, 8, 3, 3), 1, (4, 6, 5, 3), 1, 1),
    # Stock PyTorch crashes, with a bias in float32 and channels_last: the only column is 5, the taps see 0, 2, 4 ...
    "every window beside the image": ((2, 6, 3, 1), (112, 3, 3, 3), 2, (4, 4, 5, 5), 2, 2),
    "every window beside the image, TensorFlow SAME": ((3, 12, 8, 1), (50, 12, 1, 1), 2, (0, 0, 1, 2), 1, 1),
    "even kernel, padding same": ((2, 8, 7, 7), (8, 8, 4, 4), 1, (1, 2, 1, 2), 1, 1),
    "one pixel": ((3, 16, 1, 1), (1000, 16, 1, 1), 1, (0, 0, 0, 0), 1, 1),
    "empty batch": ((0, 8, 6, 6), (8, 8, 3, 3), 1, (1, 1, 1, 1), 1, 1),
}
LAYOUTS = ("contiguous", "channels_last", "sliced")


def make_case(geometry, dtype, layout):
    size, weight_size, stride, padding, dilation, groups = GEOMETRIES[geometry]
    fan_in = weight_size[1] * weight_size[2] * weight_size[3]
    if layout == "sliced":
        n, c, h, w = size
        input = torch.randn(n, c + 2, 2 * h, w + 1).mul(3).to(dtype)[:, 1:-1, ::2, 1:]
        assert n == 0 or not input.is_contiguous()
    else:
        input = torch.randn(size).mul(3).to(dtype)
        if layout == "channels_last":
            input = input.contiguous(memory_format=torch.channels_last)
    weight = (torch.randn(weight_size) / fan_in**0.5).to(dtype)
    bias = torch.randn(weight_size[0]).to(dtype)
    return input, weight, bias, (stride, padding, dilation, groups)


def stock(input, weight, bias, geometry, activation):
    stride, (top, bottom, left, right), dilation, groups = geometry
    padded = F.pad(input, (left, right, top, bottom))
    return ACTIVATIONS[activation](F.conv2d(padded, weight, bias, stride, 0, dilation, groups))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_values_and_gradients_are_as_exact_as_pytorchs(geometry, dtype, layout):
    input, weight, bias, numbers = make_case(geometry, dtype, layout)
    compare_with_torch(
        lambda x, b: ops.frozen_conv(x, weight.to(x.dtype), b, *numbers, activation="relu6"),
        lambda x, b: stock(x, weight.to(x.dtype), b, numbers, "relu6"),
        [input, bias],
    )


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_activation_is_as_exact_as_pytorchs(activation):
    input, weight, bias, numbers = make_case("grouped", torch.float32, "channels_last")
    compare_with_torch(
        lambda x, b: ops.frozen_conv(x, weight.to(x.dtype), b, *numbers, activation=activation),
        lambda x, b: stock(x, weight.to(x.dtype), b, numbers, activation),
        [input, bias],
    )


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_gradcheck_in_float64(geometry):
    input, weight, bias, numbers = make_case(geometry, torch.float64, "contiguous")
    torch.autograd.gradcheck(
        lambda x, b: ops.frozen_conv(x, weight, b, *numbers, activation="leaky_relu"),
        (input.detach().clone().requires_grad_(), bias.requires_grad_()),
        fast_mode=True,
    )


@pytest.mark.parametrize("activation", ["relu", "relu6"])
def test_mask_has_bit_k_of_byte_j_for_channel_8j_plus_k(activation):
    input, weight, bias, numbers = make_case("stem, 3 channels", torch.float32, "channels_last")
    weight, bias = weight.repeat(2, 1, 1, 1)[:13], bias.repeat(2)[:13]  # 13 channels do not fill the second byte
    value = stock(input, weight, bias, numbers, None)
    _, mask = torch.ops.tinytl.frozen_conv(input, weight, bias, [2, 2], [1, 1, 1, 1], [1, 1], 1, activation, True)
    passes = (value > 0) & (value < 6) if activation == "relu6" else value > 0
    n, c, h, w = value.shape
    expected = torch.zeros(n, h, w, 2, dtype=torch.uint8)
    for channel in range(c):
        expected[..., channel // 8] |= passes[:, channel].to(torch.uint8) << (channel % 8)
    assert torch.equal(mask, expected)


def test_keeps_one_bit_an_element_and_neither_input_nor_output():
    x = torch.randn(4, 16, 20, 20, requires_grad=True)
    weight, bias = torch.randn(32, 16, 1, 1), torch.zeros(32, requires_grad=True)
    kept = saved_bytes(lambda: ops.frozen_conv(x, weight, bias, activation="relu6"), exclude=[weight])
    assert kept == 4 * 20 * 20 * 32 // 8


def test_keeps_nothing_but_the_weight_without_activation():
    x, weight = torch.randn(4, 16, 20, 20, requires_grad=True), torch.randn(32, 16, 1, 1)
    assert saved_bytes(lambda: ops.frozen_conv(x, weight), exclude=[weight]) == 0


def test_no_mask_without_a_gradient_to_come(monkeypatch):
    from tinytl_kernels.backends.reference import frozen_conv as reference

    def packed(*args):
        raise AssertionError("a mask was packed")

    monkeypatch.setattr(reference, "activation_mask", packed)
    weight, bias = torch.randn(8, 4, 1, 1), torch.zeros(8, requires_grad=True)
    with torch.no_grad():
        ops.frozen_conv(torch.randn(1, 4, 3, 3), weight, bias, activation="relu")
    ops.frozen_conv(torch.randn(1, 4, 3, 3), weight, bias.detach(), activation="relu")
    with pytest.raises(AssertionError, match="a mask was packed"):
        ops.frozen_conv(torch.randn(1, 4, 3, 3), weight, bias, activation="relu")


def test_only_what_is_needed_is_computed():
    weight, bias = torch.randn(8, 4, 3, 3), torch.zeros(8, requires_grad=True)
    x = torch.randn(2, 4, 6, 6)
    ops.frozen_conv(x, weight, bias, activation="relu").sum().backward()
    assert x.grad is None
    grad_input, grad_bias = torch.ops.tinytl.frozen_conv_backward(
        torch.randn(2, 8, 4, 4), weight, torch.empty(0, dtype=torch.uint8), [2, 4, 6, 6], [1, 1], [0] * 4, [1, 1], 1,
        None, False, False, True,
    )  # fmt: skip
    assert grad_input.numel() == 0
    assert grad_bias.shape == (8,)


@pytest.mark.parametrize("activation", [a for a in ACTIVATIONS if a != "hardsigmoid"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")], ids=str)
def test_nan_and_inf_travel_as_in_pytorch(activation, value):
    x = torch.randn(1, 9, 4, 4)
    x[0, 3, 1, 2] = value
    weight = torch.ones(9, 1, 1, 1)  # depthwise, so that inf meets no other channel

    def output_and_gradient(dtype, conv, activate) -> tuple[torch.Tensor, torch.Tensor]:
        image = x.to(dtype).requires_grad_()
        output = activate(conv(image, weight.to(dtype), groups=9))
        (gradient,) = torch.autograd.grad(output, image, torch.ones_like(output))
        return output.float(), gradient.float()

    f = ACTIVATIONS[activation]
    ours = output_and_gradient(
        torch.float32, lambda *args, **options: ops.frozen_conv(*args, **options, activation=activation), lambda y: y
    )
    theirs = output_and_gradient(torch.float32, F.conv2d, f)
    if not torch.equal(ours[0].isnan(), theirs[0].isnan()):
        # With AVX-512 PyTorch's GELU of infinity is NaN in float32; in float64 and elsewhere it is infinity.
        theirs = output_and_gradient(torch.float64, F.conv2d, f)
    for mine, expected in zip(ours, theirs, strict=True):
        assert torch.equal(mine.isnan(), expected.isnan())
        torch.testing.assert_close(mine, expected, equal_nan=True)


def test_a_stopped_gradient_is_zero_even_if_it_is_infinite():
    x = torch.tensor([-1.0, 1.0]).view(1, 2, 1, 1).requires_grad_()
    y = ops.frozen_conv(x, torch.ones(2, 1, 1, 1), groups=2, activation="relu")
    (grad,) = torch.autograd.grad(y, x, torch.full_like(y, float("inf")))
    assert grad.flatten().tolist() == [0.0, float("inf")]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_output_is_channels_last_where_the_input_is(layout):
    input, weight, bias, numbers = make_case("depthwise", torch.float32, layout)
    output = ops.frozen_conv(input, weight, bias, *numbers, activation="relu")
    expected = torch.channels_last if layout == "channels_last" else torch.contiguous_format
    assert output.is_contiguous(memory_format=expected)


def test_gradient_comes_back_channels_last_even_if_grad_output_does_not():
    # An average over the image hands back an expanded gradient, and everything below would fall out of channels_last.
    x = torch.randn(2, 8, 6, 6).contiguous(memory_format=torch.channels_last).requires_grad_()
    y = ops.frozen_conv(x, torch.randn(8, 8, 3, 3), padding=1, activation="relu")
    (grad,) = torch.autograd.grad(y.mean((2, 3)).sum(), x)
    assert grad.is_contiguous(memory_format=torch.channels_last)


def test_channels_last_weight_makes_the_output_channels_last():
    weight = torch.randn(8, 3, 3, 3).contiguous(memory_format=torch.channels_last)
    assert ops.frozen_conv(torch.randn(2, 3, 9, 9), weight).is_contiguous(memory_format=torch.channels_last)


def test_autocast_rounds_the_input_and_leaves_bias_gradient_in_float32():
    x = torch.randn(2, 8, 6, 6, requires_grad=True)
    weight, bias = torch.randn(16, 8, 3, 3), torch.zeros(16, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = ops.frozen_conv(x, weight, bias, activation="relu")
        kept = saved_bytes(lambda: ops.frozen_conv(x, weight, bias, activation="relu"), exclude=[weight])
    assert y.dtype == torch.bfloat16
    assert kept == 2 * 4 * 4 * 16 // 8  # no bfloat16 copy of the weight is kept
    y.sum().backward()
    assert (x.grad.dtype, bias.grad.dtype) == (torch.float32, torch.float32)
    expected = F.relu(F.conv2d(x.bfloat16(), weight.bfloat16(), bias.bfloat16()))
    torch.testing.assert_close(y, expected, rtol=2**-7, atol=2**-6)


def test_second_derivative_is_refused_and_not_zero():
    x = torch.randn(1, 4, 5, 5, requires_grad=True)
    y = ops.frozen_conv(x, torch.randn(4, 4, 3, 3), activation="relu")
    (grad,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match=r"no second derivative.*to_torch"):
        grad.sum().backward()


def test_second_backward_through_one_graph_is_refused():
    x = torch.randn(1, 4, 5, 5, requires_grad=True)
    y = ops.frozen_conv(x, torch.randn(4, 4, 3, 3), activation="relu").sum()
    y.backward()
    with pytest.raises(RuntimeError, match="second time"):
        y.backward()


def test_a_trainable_weight_is_refused():
    weight = torch.randn(4, 4, 3, 3, requires_grad=True)
    with pytest.raises(RuntimeError, match="to_torch"):
        ops.frozen_conv(torch.randn(1, 4, 5, 5), weight, torch.zeros(4, requires_grad=True))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(activation="relu7"), "activation: expected None or one of"),
        (dict(groups=3), "groups: expected a divisor of the 8 output channels, got 3"),
        (dict(bias=torch.zeros(3)), r"bias: expected shape \(8,\)"),
        (dict(weight=torch.zeros(8, 5, 3, 3)), "input: expected 5 channels"),
        (dict(weight=torch.zeros(8, 4, 3, 3, dtype=torch.float64)), "weight: expected dtype torch.float32"),
        (dict(weight=torch.zeros(8, 4, 3)), "weight: expected"),
        (dict(input=torch.zeros(4, 6, 6)), "input: expected"),
        (dict(input=torch.zeros(1, 4, 6, 6, dtype=torch.int64)), "input: expected a floating point"),
        (dict(stride=0), "stride: expected 2 numbers of at least 1"),
        (dict(stride=(1, 2, 3)), "stride: expected an int or a pair"),
        (dict(padding=-1), "padding: expected 4 numbers of at least 0"),
        (dict(padding=(1, 2, 3)), "padding: expected"),
        (dict(dilation=4), "smaller than the kernel"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    good = dict(input=torch.zeros(1, 4, 6, 6), weight=torch.zeros(8, 4, 3, 3), bias=torch.zeros(8))
    with pytest.raises(ValueError, match=message):
        ops.frozen_conv(**{**good, **arguments})


@pytest.mark.parametrize("activation", [None, "relu6", "silu"])
@pytest.mark.parametrize("layout", LAYOUTS[:2])
def test_opcheck(activation, layout):
    input, weight, bias, (stride, padding, dilation, groups) = make_case("grouped", torch.float32, layout)
    arguments = (
        input.requires_grad_(), weight, bias.requires_grad_(), [stride] * 2, padding, [dilation] * 2, groups,
        activation, True,
    )  # fmt: skip
    torch.library.opcheck(torch.ops.tinytl.frozen_conv.default, arguments)


def test_compiles_without_a_graph_break_with_dynamic_shapes():
    weight, bias = torch.randn(8, 4, 3, 3), torch.zeros(8, requires_grad=True)

    def step(x):
        return ops.frozen_conv(x, weight, bias, stride=2, padding=(0, 1, 0, 1), activation="relu6").square().mean()

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager", dynamic=True)
    for size in (8, 11):
        x = torch.randn(2, 4, size, size)
        expected = torch.autograd.grad(step(x), bias)[0]
        torch.testing.assert_close(torch.autograd.grad(compiled(x), bias)[0], expected)
