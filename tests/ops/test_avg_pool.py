"""tinytl::avg_pool2d and adaptive_avg_pool2d against torch.nn.functional; they keep nothing."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from tests.checks import compare_with_torch, saved_bytes
from tests.ops.layouts import DTYPES, LAYOUTS, has_layout, images
from tinytl_kernels import ops

# (N, C, H, W), then kernel_size, stride, padding, ceil_mode, count_include_pad, divisor_override
WINDOWS = {
    "lite residual": ((2, 13, 10, 8), (2, None)),
    "odd image: the last row is left out": ((2, 8, 7, 9), (2, None)),
    "overlapping, padded": ((2, 8, 9, 7), (3, 2, 1)),
    "padding not counted": ((1, 3, 8, 8), (3, 2, 1, False, False)),
    "ceil mode": ((2, 8, 8, 11), (3, 2, 0, True)),
    "ceil mode, padded": ((2, 8, 8, 10), ((2, 3), (3, 2), (1, 1), True, False)),
    "own divisor": ((1, 8, 6, 6), (2, 2, 0, False, True, 3)),
    "stride beyond the kernel": ((2, 8, 11, 10), (2, 5)),
    "whole image": ((2, 8, 7, 5), ((7, 5),)),
    "one pixel": ((3, 8, 1, 1), (1,)),
    "one channel": ((2, 1, 6, 6), (2,)),
    "empty batch": ((0, 8, 6, 6), (2,)),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("window", WINDOWS)
def test_values_and_gradients_are_as_exact_as_pytorchs(window, dtype, layout):
    size, numbers = WINDOWS[window]
    compare_with_torch(
        lambda x: ops.avg_pool2d(x, *numbers), lambda x: F.avg_pool2d(x, *numbers), [images(size, dtype, layout)]
    )


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("output_size", [1, 2, 7, (3, 5), (None, 2), (11, 13)], ids=str)  # 11 of 9: windows repeat
def test_adaptive_is_as_exact_as_pytorchs(output_size, dtype, layout):
    compare_with_torch(
        lambda x: ops.adaptive_avg_pool2d(x, output_size),
        lambda x: F.adaptive_avg_pool2d(x, output_size),
        [images((2, 13, 9, 8), dtype, layout)],
    )


def test_adaptive_takes_an_empty_batch():
    x = torch.zeros(0, 8, 6, 6, requires_grad=True)
    y = ops.adaptive_avg_pool2d(x, 2)
    y.sum().backward()
    assert y.shape == (0, 8, 2, 2)
    assert x.grad.shape == x.shape


@pytest.mark.parametrize("operator", [lambda x: ops.avg_pool2d(x, 3, 2, 1), lambda x: ops.adaptive_avg_pool2d(x, 3)])
def test_gradcheck_in_float64(operator):
    x = torch.randn(2, 3, 7, 5, dtype=torch.float64, requires_grad=True)
    torch.autograd.gradcheck(operator, (x,), fast_mode=True)


@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=str)
def test_nan_and_inf_travel_as_in_pytorch(value):
    x = torch.randn(1, 3, 6, 6)
    x[0, 1, 2, 2] = value
    torch.testing.assert_close(ops.avg_pool2d(x, 2), F.avg_pool2d(x, 2), equal_nan=True)
    torch.testing.assert_close(ops.adaptive_avg_pool2d(x, 2), F.adaptive_avg_pool2d(x, 2), equal_nan=True)


def test_keeps_nothing():
    x = torch.randn(2, 8, 8, 8, requires_grad=True)
    assert saved_bytes(lambda: ops.avg_pool2d(x, 2)) == 0
    assert saved_bytes(lambda: ops.adaptive_avg_pool2d(x, 3)) == 0
    assert saved_bytes(lambda: F.avg_pool2d(x, 2)) == x.nbytes  # what stock PyTorch keeps


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("operator", [lambda x: ops.avg_pool2d(x, 2), lambda x: ops.adaptive_avg_pool2d(x, 3)])
def test_layout_is_kept_forward_and_backward(operator, layout):
    x = images((2, 8, 8, 6), layout=layout).requires_grad_()
    y = operator(x)
    # A gradient in the other layout, as an average over the image hands back.
    (grad,) = torch.autograd.grad(y, x, torch.randn(2, 8, 1, 1).expand_as(y))
    assert has_layout(y, layout)
    assert has_layout(grad, layout)


def test_second_derivative_is_refused():
    x = torch.randn(1, 4, 6, 6, requires_grad=True)
    (grad,) = torch.autograd.grad(ops.avg_pool2d(x, 2).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        grad.sum().backward()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(input=torch.zeros(4, 6, 6)), r"input: expected \(N, C, H, W\)"),
        (dict(input=torch.zeros(1, 4, 6, 6, dtype=torch.int64)), "input: expected .* floating point"),
        (dict(kernel_size=(1, 2, 3)), "kernel_size: expected an int or a pair"),
        (dict(kernel_size=0), "kernel_size: expected at least 1"),
        (dict(stride=0), "stride: expected at least 1"),
        (dict(padding=2), "padding: expected 0 to half the kernel"),
        (dict(padding=-1), "padding: expected 0 to half the kernel"),
        (dict(divisor_override=0), "divisor_override: expected a number other than 0"),
        (dict(kernel_size=7), "input: its height 6 .* smaller than the window of 7"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        ops.avg_pool2d(**{"input": torch.zeros(1, 4, 6, 6), "kernel_size": 3, **arguments})


@pytest.mark.parametrize("output_size", [0, (1, 2, 3), (2, -1)], ids=str)
def test_bad_output_size_is_named(output_size):
    with pytest.raises(ValueError, match="output_size: expected two positive numbers"):
        ops.adaptive_avg_pool2d(torch.zeros(1, 4, 6, 6), output_size)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_opcheck(layout):
    x = images((2, 8, 7, 6), layout=layout).requires_grad_()
    window = ([3, 3], [2, 2], [1, 1], True, False, None)
    torch.library.opcheck(torch.ops.tinytl.avg_pool2d.default, (x, *window))
    torch.library.opcheck(torch.ops.tinytl.adaptive_avg_pool2d.default, (x, [3, 2]))


def test_compiles_without_a_graph_break_with_dynamic_shapes():
    def step(x):
        return ops.adaptive_avg_pool2d(ops.avg_pool2d(x, 3, 2, 1), (2, 2)).square().mean()

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager", dynamic=True)
    for size in (8, 11):
        x = torch.randn(2, 4, size, size, requires_grad=True)
        expected = torch.autograd.grad(step(x), x)[0]
        torch.testing.assert_close(torch.autograd.grad(compiled(x), x)[0], expected)
