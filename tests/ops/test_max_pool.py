"""tinytl::max_pool2d against torch.nn.functional: values, gradients, ties, NaN, positions kept in 4 bits."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from tests.checks import compare_with_torch, saved_bytes
from tests.ops.layouts import DTYPES, LAYOUTS, has_layout, images
from tinytl_kernels import ops
from tinytl_kernels.backends.reference import max_pool

# (N, C, H, W), then kernel_size, stride, padding, dilation, ceil_mode
WINDOWS = {
    "stem": ((2, 13, 12, 10), (3, 2, 1)),
    "odd image": ((2, 8, 7, 9), (2,)),
    "overlapping at stride 1": ((2, 8, 9, 7), (3, 1, 1)),
    "16 elements: the largest 4-bit window": ((1, 5, 9, 9), (4, 2)),
    "20 elements: a byte": ((1, 5, 9, 9), ((4, 5), 2)),
    "256 elements: the largest window": ((1, 3, 18, 17), (16, 1)),
    "dilated": ((1, 8, 13, 12), (3, 2, 1, 2)),
    "ceil mode": ((2, 8, 8, 11), (3, 2, 0, 1, True)),
    "stride beyond the kernel": ((2, 8, 11, 10), (2, 5)),
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
        lambda x: ops.max_pool2d(x, *numbers), lambda x: F.max_pool2d(x, *numbers), [images(size, dtype, layout)]
    )


PAIR = st.tuples(st.integers(1, 5), st.integers(1, 5))


@given(
    size=st.tuples(st.integers(1, 3), st.integers(1, 5), st.integers(1, 14), st.integers(1, 12)),
    kernel_size=PAIR, stride=PAIR, padding=st.tuples(st.integers(0, 2), st.integers(0, 2)), dilation=PAIR,
    ceil_mode=st.booleans(), elements=st.sampled_from([8, 80, 800]), seed=st.integers(0, 2**31),
)  # fmt: skip
@settings(max_examples=150, deadline=None)
def test_any_window_in_bands_of_any_height(size, kernel_size, stride, padding, dilation, ceil_mode, elements, seed):
    # Rounded: ties in every window. Bands of a few rows: windows reach over their edges.
    x = torch.randn(size, generator=torch.Generator().manual_seed(seed)).round()
    window = (kernel_size, stride, padding, dilation, ceil_mode)
    try:
        expected = F.max_pool2d(x, *window)
    except RuntimeError:
        with pytest.raises(ValueError):
            ops.max_pool2d(x, *window)
        return
    assume(bool(expected.isfinite().all()))  # a window without a pixel: ATen's backward writes out of bounds
    grad_output = torch.randn_like(expected)
    mine, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(max_pool, "SLAB_ELEMENTS", 8 * elements)
        y = ops.max_pool2d(mine, *window)
    assert torch.equal(y, expected)
    (a,) = torch.autograd.grad(y, mine, grad_output)
    (b,) = torch.autograd.grad(F.max_pool2d(theirs, *window), theirs, grad_output)
    torch.testing.assert_close(a, b, rtol=0, atol=1e-5)


def test_gradcheck_in_float64():
    x = torch.randperm(2 * 3 * 7 * 5).double().view(2, 3, 7, 5).requires_grad_()  # no two values close
    torch.autograd.gradcheck(lambda x: ops.max_pool2d(x, 3, 2, 1), (x,), fast_mode=True)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1.0], ids=str)
def test_ties_and_special_values_win_where_pytorch_lets_them(value):
    x = torch.randn(2, 3, 9, 9)
    x[x > 0] = value
    mine, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    a, b = ops.max_pool2d(mine, 3, 2, 1), F.max_pool2d(theirs, 3, 2, 1)
    torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)
    grad_output = torch.randn_like(a)
    a.backward(grad_output)
    b.backward(grad_output)
    torch.testing.assert_close(mine.grad, theirs.grad)


def test_an_infinite_gradient_reaches_only_the_winner():
    x = torch.tensor([1.0, 2.0, 3.0, 4.0]).view(1, 1, 2, 2).requires_grad_()
    ops.max_pool2d(x, 2).backward(torch.full((1, 1, 1, 1), float("inf")))
    assert x.grad.flatten().tolist() == [0, 0, 0, float("inf")]


def test_positions_are_two_channels_a_byte_the_even_one_low():
    x = torch.zeros(1, 3, 2, 2)
    x[0, 0, 1, 1] = x[0, 1, 0, 1] = x[0, 2, 1, 0] = 1  # positions 3, 1 and 2 in the window
    _, positions = torch.ops.tinytl.max_pool2d(x, [2, 2], [2, 2], [0, 0], [1, 1], False, True)
    assert positions.tolist() == [[[[3 | 1 << 4, 2]]]]


def test_keeps_4_bits_an_output_element():
    x = torch.randn(2, 8, 8, 8, requires_grad=True)
    assert saved_bytes(lambda: ops.max_pool2d(x, 3, 2, 1)) == 2 * 4 * 4 * 8 // 2
    assert saved_bytes(lambda: ops.max_pool2d(x, 5, 1)) == 2 * 4 * 4 * 8  # 25 elements: a byte
    assert saved_bytes(lambda: F.max_pool2d(x, 3, 2, 1)) == x.nbytes + 8 * 2 * 4 * 4 * 8  # stock PyTorch


def test_no_positions_without_a_gradient_to_come():
    x = torch.randn(1, 4, 4, 4)
    _, positions = torch.ops.tinytl.max_pool2d(x, [2, 2], [2, 2], [0, 0], [1, 1], False, False)
    assert positions.numel() == 0
    assert ops.max_pool2d(x, 2).grad_fn is None


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout_is_kept_forward_and_backward(layout):
    x = images((2, 8, 8, 6), layout=layout).requires_grad_()
    y = ops.max_pool2d(x, 3, 2, 1)
    (grad,) = torch.autograd.grad(y, x, torch.randn(2, 8, 1, 1).expand_as(y))
    assert has_layout(y, layout)
    assert has_layout(grad, layout)


def test_second_derivative_is_refused():
    x = torch.randn(1, 4, 6, 6, requires_grad=True)
    (grad,) = torch.autograd.grad(ops.max_pool2d(x, 2).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        grad.sum().backward()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(input=torch.zeros(4, 6, 6)), r"input: expected \(N, C, H, W\)"),
        (dict(input=torch.zeros(1, 4, 6, 6, dtype=torch.int64)), "input: expected .* floating point"),
        (dict(kernel_size=(1, 2, 3)), "kernel_size: expected an int or a pair"),
        (dict(kernel_size=17), "kernel_size: expected at most 256|smaller than the window"),
        (dict(input=torch.zeros(1, 1, 20, 20), kernel_size=17), "kernel_size: expected at most 256 elements"),
        (dict(stride=0), "stride: expected at least 1"),
        (dict(dilation=0), "dilation: expected at least 1"),
        (dict(padding=2), "padding: expected 0 to half the kernel"),
        (dict(padding=-1), "padding: expected 0 to half the kernel"),
        (dict(dilation=3), "smaller than the window of 7"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        ops.max_pool2d(**{"input": torch.zeros(1, 4, 6, 6), "kernel_size": 3, **arguments})


def test_positions_of_another_shape_are_refused():
    with pytest.raises(ValueError, match="positions: expected uint8 of shape"):
        torch.ops.tinytl.max_pool2d_backward(
            torch.zeros(1, 4, 2, 2), torch.zeros(1, 2, 2, 3, dtype=torch.uint8), [1, 4, 4, 4],
            [2, 2], [2, 2], [0, 0], [1, 1], False,
        )  # fmt: skip


@pytest.mark.parametrize("kernel", [3, 5])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_opcheck(layout, kernel):
    x = images((2, 9, 7, 6), layout=layout).requires_grad_()
    torch.library.opcheck(torch.ops.tinytl.max_pool2d.default, (x, [kernel] * 2, [2, 2], [1, 1], [1, 1], True, True))


def test_compiles_without_a_graph_break_with_dynamic_shapes():
    def step(x):
        return ops.max_pool2d(x, 3, 2, 1).square().mean()

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager", dynamic=True)
    for size in (8, 11):
        x = torch.randn(2, 4, size, size, requires_grad=True)
        expected = torch.autograd.grad(step(x), x)[0]
        torch.testing.assert_close(torch.autograd.grad(compiled(x), x)[0], expected)
