"""The C++ kernels unpack weights in 8 bits to the very operands that the dequantised weight gives, and no further."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from tests.allocations import steadily_allocated
from tests.backends.cpu.exact import operator, poisoned_memory
from tests.checks import compare_with_torch
from tests.ops.layouts import DTYPES
from tinytl_kernels import ops
from tinytl_kernels.backends.reference import weights as slices
from tinytl_kernels.core.quantization import CODES, dequantize, quantize

pytestmark = pytest.mark.usefixtures("cpu_kernels")

# Input size, weight size, groups. Channels that fill no vector, no panel and no byte of a mask.
CONVOLUTIONS = {
    "pointwise": ((2, 37, 5, 7), (51, 37, 1, 1), 1),
    "pointwise, one channel": ((2, 1, 5, 7), (9, 1, 1, 1), 1),
    "pointwise, unpacked in parts": ((1, 1030, 3, 3), (700, 1030, 1, 1), 1),
    "depthwise": ((2, 37, 9, 7), (37, 1, 5, 3), 37),
    "dense": ((2, 3, 9, 7), (21, 3, 3, 3), 1),
    "grouped": ((2, 12, 9, 7), (21, 4, 3, 3), 3),
}


def same_bits(ours, theirs) -> None:
    for a, b in zip(ours, theirs, strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        assert torch.equal(a, b)


@pytest.mark.parametrize("code", CODES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", CONVOLUTIONS)
def test_a_convolution_has_the_bits_of_the_dequantised_weight(kind, dtype, code):
    size, weight_size, groups = CONVOLUTIONS[kind]
    weight, scale = quantize(torch.randn(weight_size) / (weight_size[1] * weight_size[2]) ** 0.5, code)
    exact = dequantize(weight, scale, dtype)
    padding = [0] * 4 if kind.startswith("pointwise") else [1, 2, 0, 1]
    numbers = ([1, 1] if "parts" in kind else [2, 1], padding, [1, 1], groups, "relu6")
    x, bias = (
        torch.randn(size).mul(3).to(dtype).contiguous(memory_format=torch.channels_last),
        torch.randn(weight_size[0]),
    )
    forward, backward = operator("cpu", "frozen_conv"), operator("cpu", "frozen_conv_backward")
    with poisoned_memory():
        output, mask = forward(x, weight, bias, *numbers, True, scale)
        same_bits((output, mask), forward(x, exact, bias, *numbers, True))
        grad = torch.randn_like(output)
        same_bits(
            backward(grad, weight, mask, list(size), *numbers, True, True, True, scale),
            backward(grad, exact, mask, list(size), *numbers, True, True, True),
        )


@pytest.mark.parametrize("code", CODES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("size", "hidden", "out", "kernel", "stride", "expand"),
    [
        ((2, 13, 9, 7), 37, 21, 3, 1, True),
        ((1, 13, 9, 7), 100, 13, 5, 2, True),  # fewer images than threads: bands of rows
        ((2, 19, 8, 8), 19, 9, 3, 1, False),
    ],
)
def test_a_block_has_the_bits_of_the_dequantised_weights(size, hidden, out, kernel, stride, expand, dtype, code):
    shapes = [(hidden, size[1], 1, 1), (hidden, 1, kernel, kernel), (out, hidden, 1, 1)]
    pairs = [quantize(torch.randn(s) / (s[1] * s[2] * s[3]) ** 0.5, code) for s in shapes]
    if not expand:
        pairs[0] = (None, None)
    codes, scales = [list(t) for t in zip(*pairs, strict=True)]
    exact = [None if w is None else dequantize(w, s, dtype) for w, s in pairs]
    biases = [torch.randn(s[0]) for s in shapes] if expand else [None, torch.randn(hidden), torch.randn(out)]
    x = torch.randn(size).mul(2).to(dtype).contiguous(memory_format=torch.channels_last)
    numbers = ([stride] * 2, [kernel // 2] * 4, "relu6", False)
    forward, backward = (operator("cpu", "frozen_inverted_residual" + end) for end in ("", "_backward"))

    def given(weights):
        return [t for pair in zip(weights, biases, strict=True) for t in pair]

    with poisoned_memory():
        output, *masks, pooled = forward(x, *given(codes), *numbers, True, True, *scales)
        same_bits((output, *masks, pooled), forward(x, *given(exact), *numbers, True, True))
        grads = torch.randn_like(output), torch.randn_like(pooled)
        rest = (*masks, list(size), *numbers, True, [True, expand, True, True])
        same_bits(backward(*grads, *codes, *rest, *scales), backward(*grads, *exact, *rest))


@pytest.mark.parametrize("slice_bytes", [1, 5_000, 40_000])  # one channel, a few, several groups at a time
@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("code", CODES)
def test_slices_of_a_dense_convolution_are_as_exact_as_pytorch(code, groups, slice_bytes, monkeypatch):
    monkeypatch.setattr(slices, "SLICE_BYTES", slice_bytes)
    weight, scale = quantize(torch.randn(52, 40 // groups, 3, 3) / (360 / groups) ** 0.5, code)
    exact = dequantize(weight, scale)
    compare_with_torch(
        lambda x, b: ops.frozen_conv(x, weight, b, 2, (1, 1, 0, 2), 1, groups, "relu6", weight_scale=scale),
        lambda x, b: F.relu6(F.conv2d(F.pad(x, (0, 2, 1, 1)), exact.to(x.dtype), b, 2, 0, 1, groups)),
        [torch.randn(2, 40, 9, 8).contiguous(memory_format=torch.channels_last), torch.randn(52)],
    )


@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize(("kernel", "activation"), [(3, "relu"), (1, "relu"), (1, "silu")])
def test_no_floating_point_copy_of_a_large_weight_is_ever_made(kernel, activation, direction):
    channels = {3: 512, 1: 1536}[kernel]
    weight, scale = quantize(torch.randn(channels, channels, kernel, kernel))
    x = torch.randn(1, channels, 4, 4).contiguous(memory_format=torch.channels_last)
    numbers = ([1, 1], [kernel // 2] * 4, [1, 1], 1, activation)
    forward, backward = operator("cpu", "frozen_conv"), operator("cpu", "frozen_conv_backward")
    output, saved = forward(x, weight, None, *numbers, True, scale)

    def call():
        if direction == "forward":
            return forward(x, weight, None, *numbers, True, scale)
        return backward(output, weight, saved, list(x.shape), *numbers, True, True, True, scale)

    peak, _ = steadily_allocated(call)
    floats = weight.numel() * 4
    # Dequantising holds a slice twice, and oneDNN may pack it once more.
    assert peak < 3.5 * slices.SLICE_BYTES < floats / 2
