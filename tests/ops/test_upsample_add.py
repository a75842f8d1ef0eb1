"""tinytl::upsample_add against main + interpolate(branch): values, both gradients, layouts, nothing kept."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from tests.checks import compare_with_torch, saved_bytes
from tests.ops.layouts import DTYPES, LAYOUTS, has_layout, images
from tinytl_kernels import ops
from tinytl_kernels.backends.reference import upsample_add as reference

# (H, W) of main, (h, w) of branch
SIZES = {
    "twice": ((14, 12), (7, 6)),
    "odd": ((15, 11), (7, 5)),
    "one pixel is broadcast": ((7, 5), (1, 1)),
    "one row": ((7, 5), (1, 3)),
    "same size": ((6, 5), (6, 5)),
    "branch larger than main": ((5, 4), (9, 7)),
    "one pixel on both sides": ((1, 1), (1, 1)),
}


def stock(main, branch):
    return main + F.interpolate(branch, main.shape[2:], mode="bilinear", align_corners=False)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", SIZES)
def test_values_and_gradients_are_as_exact_as_pytorchs(sizes, dtype, layout):
    main, branch = (images((2, 13, *size), dtype, layout) for size in SIZES[sizes])
    compare_with_torch(ops.upsample_add, stock, [main, branch])


@pytest.mark.parametrize(("main_layout", "branch_layout"), [LAYOUTS[:2], LAYOUTS[1::-1]])
def test_layouts_may_differ_and_each_gradient_has_its_own(main_layout, branch_layout):
    main, branch = images((2, 8, 9, 8), layout=main_layout), images((2, 8, 4, 4), layout=branch_layout)
    compare_with_torch(ops.upsample_add, stock, [main, branch])
    branch.requires_grad_()
    y = ops.upsample_add(main, branch)
    (grad,) = torch.autograd.grad(y, branch, torch.randn(2, 8, 1, 1).expand_as(y))
    assert has_layout(y, main_layout)
    assert has_layout(grad, branch_layout)


def test_gradcheck_in_float64():
    inputs = [torch.randn(2, 3, *size, dtype=torch.float64, requires_grad=True) for size in ((7, 6), (3, 4))]
    torch.autograd.gradcheck(ops.upsample_add, inputs, fast_mode=True)


@pytest.mark.parametrize("sizes", SIZES)
def test_the_adjoint_by_matrices_is_the_adjoint(sizes):
    # What runs on devices whose own kernel adds in no fixed order.
    (height, width), branch_size = SIZES[sizes]
    grad = torch.randn(2, 3, height, width)
    rows = reference._interpolation_matrix(branch_size[0], height, grad)
    columns = reference._interpolation_matrix(branch_size[1], width, grad)
    expected = torch.ops.tinytl.upsample_add_backward(grad, branch_size, False)
    torch.testing.assert_close(rows.T @ grad @ columns, expected)


def test_empty_batch():
    main, branch = torch.zeros(0, 8, 6, 6, requires_grad=True), torch.zeros(0, 8, 3, 3, requires_grad=True)
    y = ops.upsample_add(main, branch)
    y.sum().backward()
    assert y.shape == (0, 8, 6, 6)
    assert (main.grad.shape, branch.grad.shape) == (main.shape, branch.shape)


@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=str)
def test_nan_and_inf_travel_as_in_pytorch(value):
    main, branch = torch.randn(1, 3, 6, 6), torch.randn(1, 3, 3, 3)
    branch[0, 1, 2, 2] = main[0, 0, 0, 0] = value
    torch.testing.assert_close(ops.upsample_add(main, branch), stock(main, branch), equal_nan=True)


def test_keeps_nothing_and_leaves_main_as_it_was():
    main, branch = torch.randn(2, 8, 6, 6, requires_grad=True), torch.randn(2, 8, 3, 3, requires_grad=True)
    before = main.detach().clone()
    assert saved_bytes(lambda: ops.upsample_add(main, branch)) == 0
    assert torch.equal(main.detach(), before)


def test_only_what_is_needed_is_computed(monkeypatch):
    def computed(*args):
        raise AssertionError("the gradient of the branch was computed")

    monkeypatch.setitem(reference_operators(), "upsample_add_backward", computed)
    main, branch = torch.randn(1, 4, 6, 6, requires_grad=True), torch.randn(1, 4, 3, 3)
    ops.upsample_add(main, branch).sum().backward()
    assert torch.equal(main.grad, torch.ones_like(main))
    with pytest.raises(AssertionError, match="was computed"):
        ops.upsample_add(main, branch.requires_grad_()).sum().backward()


def reference_operators():
    from tinytl_kernels.backends.reference import OPERATORS

    return OPERATORS


@pytest.mark.parametrize(
    ("main_dtype", "branch_dtype"), [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)]
)
def test_autocast_brings_the_branch_to_the_dtype_of_main(main_dtype, branch_dtype):
    main = torch.randn(1, 4, 6, 6, dtype=main_dtype)
    branch = torch.randn(1, 4, 3, 3, dtype=branch_dtype, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = ops.upsample_add(main, branch)
    y.sum().backward()
    assert y.dtype == main_dtype
    assert branch.grad.dtype == branch_dtype


def test_second_derivative_is_refused():
    main, branch = torch.randn(1, 4, 6, 6), torch.randn(1, 4, 3, 3, requires_grad=True)
    (grad,) = torch.autograd.grad(ops.upsample_add(main, branch).square().sum(), branch, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        grad.sum().backward()


@pytest.mark.parametrize(
    ("branch", "message"),
    [
        (torch.zeros(2, 4, 3, 3), r"branch: expected \(N, C, h, w\) with N, C of main \(1, 4, 6, 6\)"),
        (torch.zeros(1, 5, 3, 3), "branch: expected .* with N, C of main"),
        (torch.zeros(4, 3, 3), "branch: expected .* with N, C of main"),
        (torch.zeros(1, 4, 3, 3, dtype=torch.bfloat16), "branch: expected the floating point dtype and device of main"),
        (torch.zeros(1, 4, 0, 3), "main, branch: expected images"),
    ],
)
def test_bad_arguments_are_named(branch, message):
    with pytest.raises(ValueError, match=message):
        ops.upsample_add(torch.zeros(1, 4, 6, 6), branch)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_opcheck(layout):
    main, branch = images((2, 8, 7, 6), layout=layout), images((2, 8, 3, 3), layout=layout)
    torch.library.opcheck(torch.ops.tinytl.upsample_add.default, (main.requires_grad_(), branch.requires_grad_()))


def test_compiles_without_a_graph_break_with_dynamic_shapes():
    def step(main, branch):
        return ops.upsample_add(main, branch).square().mean()

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager", dynamic=True)
    for size in (8, 11):
        main, branch = (torch.randn(2, 4, s, s, requires_grad=True) for s in (size, size // 2))
        expected = torch.autograd.grad(step(main, branch), (main, branch))
        torch.testing.assert_close(torch.autograd.grad(compiled(main, branch), (main, branch)), expected)
