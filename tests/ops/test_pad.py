"""tinytl::pad2d against torch.nn.functional.pad: values, gradients, nothing kept."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from tests.checks import compare_with_torch, saved_bytes
from tests.ops.layouts import DTYPES, LAYOUTS, has_layout, images
from tinytl_kernels import ops
from tinytl_kernels.ops.pad import MODES

PADDINGS = {
    "all sides alike": (1, 1, 1, 1),
    "four sides": (1, 2, 3, 0),
    "one side": (0, 0, 0, 4),
    "none": (0, 0, 0, 0),
    "overlapping reflections": (4, 4, 5, 5),
}


def stock(padding, mode):
    top, bottom, left, right = padding
    return lambda x: F.pad(x, (left, right, top, bottom), mode=mode)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("padding", PADDINGS)
def test_values_and_gradients_are_as_exact_as_pytorchs(padding, mode, layout):
    numbers = PADDINGS[padding]
    for dtype in DTYPES:
        compare_with_torch(
            lambda x: ops.pad2d(x, numbers, mode), stock(numbers, mode), [images((2, 9, 5, 6), dtype, layout)]
        )


@pytest.mark.parametrize("mode", MODES)
def test_gradcheck_in_float64(mode):
    x = torch.randn(2, 3, 5, 4, dtype=torch.float64, requires_grad=True)
    torch.autograd.gradcheck(lambda x: ops.pad2d(x, (1, 2, 3, 0), mode), (x,), fast_mode=True)


def test_circular_repeats_up_to_the_whole_image():
    compare_with_torch(lambda x: ops.pad2d(x, (5, 5, 6, 6), "circular"), stock((5, 5, 6, 6), "circular"),
                       [images((1, 2, 5, 6))])  # fmt: skip


def test_replicate_needs_one_pixel():
    compare_with_torch(lambda x: ops.pad2d(x, 3, "replicate"), stock((3,) * 4, "replicate"), [images((1, 2, 1, 1))])


@pytest.mark.parametrize("mode", ["reflect", "circular"])
def test_empty_batch(mode):
    x = torch.zeros(0, 8, 6, 6, requires_grad=True)
    y = ops.pad2d(x, 1, mode)
    y.sum().backward()
    assert y.shape == (0, 8, 8, 8)
    assert x.grad.shape == x.shape


@pytest.mark.parametrize("mode", MODES)
def test_keeps_nothing(mode):
    x = torch.randn(2, 8, 6, 6, requires_grad=True)
    assert saved_bytes(lambda: ops.pad2d(x, 1, mode)) == 0


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout_is_kept_forward_and_backward(layout, mode):
    x = images((2, 8, 8, 6), layout=layout).requires_grad_()
    y = ops.pad2d(x, (1, 2, 0, 3), mode)
    (grad,) = torch.autograd.grad(y, x, torch.randn(2, 8, 1, 1).expand_as(y))
    assert has_layout(y, layout)
    assert has_layout(grad, layout)


def test_second_derivative_is_refused():
    x = torch.randn(1, 4, 6, 6, requires_grad=True)
    (grad,) = torch.autograd.grad(ops.pad2d(x, 1, "reflect").square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        grad.sum().backward()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(input=torch.zeros(4, 6, 6)), r"input: expected \(N, C, H, W\)"),
        (dict(mode="mirror"), "mode: expected one of 'reflect', 'replicate', 'circular', got 'mirror'"),
        (dict(padding=(1, 2, 3)), "padding: expected an int, a pair"),
        (dict(padding=-1), "padding: expected four numbers of at least 0"),
        (dict(padding=6), r"padding: expected at most \(5, 5\) \(height, width\) in mode 'reflect'"),
        (dict(padding=7, mode="circular"), r"padding: expected at most \(6, 6\)"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        ops.pad2d(**{"input": torch.zeros(1, 4, 6, 6), "padding": 1, "mode": "reflect", **arguments})


@pytest.mark.parametrize("mode", MODES)
def test_opcheck(mode):
    x = images((2, 8, 7, 6), layout="channels_last").requires_grad_()
    torch.library.opcheck(torch.ops.tinytl.pad2d.default, (x, [1, 2, 0, 3], mode))


def test_compiles_without_a_graph_break_with_dynamic_shapes():
    def step(x):
        return ops.pad2d(x, (1, 2, 0, 3), "reflect").square().mean()

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager", dynamic=True)
    for size in (8, 11):
        x = torch.randn(2, 4, size, size, requires_grad=True)
        expected = torch.autograd.grad(step(x), x)[0]
        torch.testing.assert_close(torch.autograd.grad(compiled(x), x)[0], expected)
