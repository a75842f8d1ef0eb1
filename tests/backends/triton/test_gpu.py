"""The kernels on a GPU, in all dtypes, against the reference there: what the interpreter cannot say."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from benchmarks.gpu.operators import DTYPES, cases, difference
from tests.checks import assert_as_exact_as_torch
from tinytl_kernels.backends import reference
from tinytl_kernels.backends.triton import choice, whole_block
from tinytl_kernels.backends.triton.operators import OPERATORS

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU that PyTorch sees"),
]


@pytest.fixture(autouse=True)
def float32_in_full():
    """TF32 off: the float64 answer is compared with float32's error."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = before


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", list(cases()), ids=lambda case: case.name)
def test_forward_and_backward_are_as_exact_as_the_reference(case, dtype):
    torch.backends.cudnn.allow_tf32 = dtype == "tf32"
    found = difference(case, dtype, torch.device("cuda"), "triton")
    assert found.right, found


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", [c for c in cases() if "dense" in c.name or "grouped" in c.name], ids=lambda c: c.name)
def test_the_implicit_product_is_as_exact_as_the_reference(case, dtype, monkeypatch):
    monkeypatch.setenv(choice.ENVIRONMENT_VARIABLE, choice.IMPLICIT_GEMM)
    torch.backends.cudnn.allow_tf32 = dtype == "tf32"
    found = difference(case, dtype, torch.device("cuda"), "triton")
    assert found.right, found


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", [c for c in cases() if c.name.startswith("block")], ids=lambda c: c.name)
def test_a_block_in_one_kernel_is_as_exact_as_the_reference(case, dtype, monkeypatch):
    monkeypatch.setenv(whole_block.ENVIRONMENT_VARIABLE, whole_block.ONE_KERNEL)
    torch.backends.cudnn.allow_tf32 = dtype == "tf32"
    found = difference(case, dtype, torch.device("cuda"), "triton")
    assert found.right, found


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_masks_agree_in_every_bit_where_sums_are_exact(dtype):
    x = torch.randint(-3, 4, (4, 24, 14, 14), device="cuda").to(dtype).contiguous(memory_format=torch.channels_last)
    weight = torch.randint(-1, 2, (40, 24, 1, 1), device="cuda").to(dtype)
    arguments = (x, weight, None, (1, 1), (0, 0, 0, 0), (1, 1), 1, "relu6", True)
    for ours, theirs in zip(
        OPERATORS["frozen_conv"](*arguments), reference.OPERATORS["frozen_conv"](*arguments), strict=True
    ):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_group_norm_is_as_exact_as_pytorchs(dtype):
    x = (torch.randn(4, 96, 28, 28, device="cuda") + 3).to(dtype).contiguous(memory_format=torch.channels_last)
    weight, bias = torch.randn(2, 96, device="cuda")
    arguments = (weight, bias, 12, 1e-5, None, False)
    ours = OPERATORS["group_norm_activation"](x, *arguments)
    stock = reference.OPERATORS["group_norm_activation"](x, *arguments)
    exact = reference.OPERATORS["group_norm_activation"](x.double(), weight.double(), bias.double(), *arguments[2:])
    for name, a, b, c in zip(("output", "mean", "rstd"), ours, stock, exact, strict=False):
        assert_as_exact_as_torch(name, a, b, c)
    kept, grad = (x, *stock[1:3], stock[2]), torch.randn_like(x)
    rest = (weight, bias, 12, None, [True] * 3)
    ours = OPERATORS["group_norm_activation_backward"](grad, *kept, *rest)
    stock = reference.OPERATORS["group_norm_activation_backward"](grad, *kept, *rest)
    exact = reference.OPERATORS["group_norm_activation_backward"](
        grad.double(), *(t.double() for t in kept), weight.double(), bias.double(), *rest[2:]
    )
    for name, a, b, c in zip(("grad_input", "grad_weight", "grad_bias"), ours, stock, exact, strict=True):
        assert_as_exact_as_torch(name, a, b, c)


def test_dropout_keeps_as_many_and_its_gradient_follows_the_bits():
    x = torch.ones(256, 1280, device="cuda", dtype=torch.bfloat16)
    output, mask = OPERATORS["dropout"](x, 0.2)
    assert abs((output != 0).double().mean().item() - 0.8) < 5 * (0.16 / x.numel()) ** 0.5
    assert torch.equal(OPERATORS["dropout_backward"](x, mask, 0.2), output)
    assert not torch.equal(OPERATORS["dropout"](x, 0.2)[1], mask)


def test_a_cuda_graph_captures_forward_and_backward():
    x = torch.randn(4, 24, 14, 14, device="cuda").contiguous(memory_format=torch.channels_last)
    weight, bias = torch.randn(24, 1, 3, 3, device="cuda"), torch.randn(24, device="cuda")
    shape = ((1, 1), (1, 1, 1, 1), (1, 1), 24)

    def step():
        output, saved = OPERATORS["frozen_conv"](x, weight, bias, *shape, "relu6", True)
        return OPERATORS["frozen_conv_backward"](output, weight, saved, x.shape, *shape, "relu6", True, True, True)

    expected = step()  # also compiles, which a capture may not
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    graph.replay()
    torch.cuda.synchronize()
    for a, b in zip(captured, expected, strict=True):
        assert torch.equal(a, b)
