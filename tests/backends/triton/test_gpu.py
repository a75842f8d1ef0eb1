"""The kernels on a GPU, in all dtypes, against the reference there: what the interpreter cannot say."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from tests.checks import assert_as_exact_as_torch
from tinytl_kernels.backends import reference
from tinytl_kernels.backends.triton.operators import OPERATORS

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU that PyTorch sees"),
]

# (N, C, H, W), (O, C / groups, kH, kW), stride, (top, bottom, left, right), groups
GEOMETRIES = {
    "pointwise": ((8, 24, 28, 28), (144, 24, 1, 1), (1, 1), (0, 0, 0, 0), 1),
    "pointwise, deep": ((8, 960, 7, 7), (160, 960, 1, 1), (1, 1), (0, 0, 0, 0), 1),
    "pointwise, stride 2": ((4, 64, 15, 14), (96, 64, 1, 1), (2, 2), (0, 0, 0, 0), 1),
    "depthwise": ((8, 144, 28, 28), (144, 1, 3, 3), (1, 1), (1, 1, 1, 1), 144),
    "depthwise, stride 2": ((4, 96, 57, 56), (96, 1, 5, 5), (2, 2), (1, 2, 2, 2), 96),
    "dense": ((4, 64, 14, 14), (64, 64, 3, 3), (1, 1), (1, 1, 1, 1), 1),
}


@pytest.fixture(autouse=True)
def float32_in_full():
    """TF32 off: the float64 answer is compared with float32's error."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = before


@pytest.mark.parametrize("layout", ["channels_last", "contiguous"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_forward_and_backward_are_as_exact_as_pytorchs(geometry, dtype, layout):
    size, weight_size, stride, padding, groups = GEOMETRIES[geometry]
    last = layout == "channels_last"
    fan_in = weight_size[1] * weight_size[2] * weight_size[3]
    x = torch.randn(size, device="cuda", dtype=dtype)
    x = x.contiguous(memory_format=torch.channels_last) if last else x
    weight = (torch.randn(weight_size, device="cuda") / fan_in**0.5).to(dtype)
    bias = torch.randn(weight_size[0], device="cuda", dtype=dtype)
    shape = (stride, padding, (1, 1), groups)
    # Without an activation, whose corners would turn a rounding into another mask bit.
    ours, _ = OPERATORS["frozen_conv"](x, weight, bias, *shape, None, True)
    stock, _ = reference.OPERATORS["frozen_conv"](x, weight, bias, *shape, None, True)
    exact, _ = reference.OPERATORS["frozen_conv"](x.double(), weight.double(), bias.double(), *shape, None, True)
    assert_as_exact_as_torch("output", ours, stock, exact)
    _, mask = reference.OPERATORS["frozen_conv"](x, weight, bias, *shape, "relu6", True)
    grad = torch.randn_like(ours)
    rest = (mask, size, *shape, "relu6", last, True, True)
    ours = OPERATORS["frozen_conv_backward"](grad, weight, *rest)
    stock = reference.OPERATORS["frozen_conv_backward"](grad, weight, *rest)
    exact = reference.OPERATORS["frozen_conv_backward"](grad.double(), weight.double(), *rest)
    for name, a, b, c in zip(("grad_input", "grad_bias"), ours, stock, exact, strict=True):
        assert_as_exact_as_torch(name, a, b, c)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_masks_agree_in_every_bit_where_sums_are_exact(dtype):
    x = torch.randint(-3, 4, (4, 24, 14, 14), device="cuda").to(dtype).contiguous(memory_format=torch.channels_last)
    weight = torch.randint(-1, 2, (40, 24, 1, 1), device="cuda").to(dtype)
    arguments = (x, weight, None, (1, 1), (0, 0, 0, 0), (1, 1), 1, "relu6", True)
    for ours, theirs in zip(
        OPERATORS["frozen_conv"](*arguments), reference.OPERATORS["frozen_conv"](*arguments), strict=True
    ):
        assert torch.equal(ours, theirs)


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
