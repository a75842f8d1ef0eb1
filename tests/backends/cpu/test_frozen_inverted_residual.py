"""The fused block in C++ equals the reference bit by bit on whole numbers, and float64 on any others."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from tests.backends.cpu.exact import both, operator, whole_numbers
from tests.checks import compare_with_torch
from tests.ops.layouts import DTYPES
from tests.ops.test_frozen_inverted_residual import ours, stock
from tests.threads import num_threads
from tinytl_kernels.core.geometry import output_length

pytestmark = pytest.mark.usefixtures("cpu_kernels")


@st.composite
def blocks(draw):
    """(input size, hidden, output channels, kernel, stride, padding, expand, residual) of a possible block."""
    size = (draw(st.integers(0, 3)), draw(st.integers(1, 40)), draw(st.integers(1, 14)), draw(st.integers(1, 14)))
    expand = draw(st.booleans())
    hidden = draw(st.integers(1, 120)) if expand else size[1]
    kernel, stride = draw(st.sampled_from([1, 2, 3, 4, 5, 7])), draw(st.integers(1, 3))
    padding = draw(st.tuples(*[st.integers(0, 4)] * 4))
    if draw(st.booleans()):  # half of them padded as nets are
        padding = ((kernel - 1) // 2, kernel // 2) * 2
    height, width = (
        output_length(size[2 + i], kernel, stride, padding[2 * i], padding[2 * i + 1], 1) for i in range(2)
    )
    assume(height > 0 and width > 0)
    residual = (height, width) == size[2:] and draw(st.booleans())
    out = size[1] if residual else draw(st.integers(1, 40))
    return size, hidden, out, kernel, stride, padding, expand, residual


@given(
    block=blocks(), activation=st.sampled_from([None, "relu", "relu6"]), want_pooled=st.booleans(),
    threads=st.sampled_from([1, 2, 5]), seed=st.integers(0, 2**31),
)  # fmt: skip
@settings(max_examples=200, deadline=None)
def test_equals_the_reference_for_any_geometry(block, activation, want_pooled, threads, seed):
    want_pooled = want_pooled and min(block[0][2:]) > 1  # there is nothing to pool in one row
    (n, channels, h, w), hidden, out, kernel, stride, padding, expand, residual = block
    generator = torch.Generator().manual_seed(seed)
    # Values small enough that 7 x 7 taps x 120 channels stay below 2^24.
    input = whole_numbers((n, channels, h, w), 2, generator).contiguous(memory_format=torch.channels_last)
    input = input * 4  # so that the average of four is a whole number
    weights = [whole_numbers(s, 1, generator) for s in ((hidden, channels, 1, 1), (hidden, 1, kernel, kernel))]
    weights.append(whole_numbers((out, hidden, 1, 1), 1, generator))
    biases = [whole_numbers((hidden,), 9, generator), whole_numbers((hidden,), 9, generator)]
    biases.append(whole_numbers((out,), 9, generator))
    if not expand:
        weights[0] = biases[0] = None
    with num_threads(threads):  # fewer images than threads: bands of rows with a halo
        output, expand_mask, depthwise_mask, pooled = both(
            "frozen_inverted_residual",
            input, weights[0], biases[0], weights[1], biases[1], weights[2], biases[2], [stride] * 2, list(padding),
            activation, residual, True, want_pooled,
        )  # fmt: skip
        grad_output = whole_numbers(output.shape, 2, generator).contiguous(memory_format=torch.channels_last)
        grad_pooled = whole_numbers(pooled.shape, 2, generator) * 4 if want_pooled else None
        both(
            "frozen_inverted_residual_backward", grad_output, grad_pooled, *weights, expand_mask, depthwise_mask,
            [n, channels, h, w], [stride] * 2, list(padding), activation, residual, True,
            [True, expand, True, True],
        )  # fmt: skip


def random_block(size, hidden, out, kernel, dtype, expand=True):
    shapes = [(hidden, size[1], 1, 1), (hidden, 1, kernel, kernel), (out, hidden, 1, 1)]
    weights = [(torch.randn(s) / (s[1] * s[2] * s[3]) ** 0.5).to(dtype) for s in shapes]
    biases = [torch.randn(s[0]).to(dtype) for s in shapes]
    if not expand:
        weights[0] = biases[0] = None
    input = torch.randn(size).mul(2).to(dtype).contiguous(memory_format=torch.channels_last)
    return input, weights, biases


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("size", "hidden", "out", "kernel", "stride"),
    [
        ((1, 160, 7, 7), 960, 160, 3, 1),  # long sums, one image
        ((2, 24, 28, 28), 144, 32, 5, 2),  # several steps of rows
        ((1, 8, 40, 38), 200, 8, 7, 1),  # a ring larger than the scratch budget
    ],
)
def test_is_as_exact_as_pytorch(size, hidden, out, kernel, stride, dtype):
    input, weights, biases = random_block(size, hidden, out, kernel, dtype)
    arguments = (weights, stride, (kernel // 2,) * 4, "relu6", stride == 1, True)
    compare_with_torch(ours(*arguments), stock(*arguments), [input, *biases])


def test_what_is_not_needed_is_empty_and_the_rest_unchanged():
    input, weights, biases = random_block((2, 13, 6, 7), 40, 13, 3, torch.float32)
    numbers = ([1, 1], [1] * 4, "relu6", True)
    forward, backward = (operator("cpu", "frozen_inverted_residual" + end) for end in ("", "_backward"))
    pairs = [t for pair in zip(weights, biases, strict=True) for t in pair]
    output, *masks, pooled = forward(input, *pairs, *numbers, True, True)
    bare = forward(input, *pairs, *numbers, False, False)
    assert torch.equal(bare[0], output)
    assert [t.numel() for t in bare[1:]] == [0, 0, 0]
    grads = torch.randn_like(output), torch.randn_like(pooled)
    every = backward(*grads, *weights, *masks, list(input.shape), *numbers, True, [True] * 4)
    for needed in itertools.product([True, False], repeat=4):
        some = backward(*grads, *weights, *masks, list(input.shape), *numbers, True, list(needed))
        for wanted, part, whole in zip(needed, some, every, strict=True):
            assert torch.equal(part, whole) if wanted else part.numel() == 0, needed


@pytest.mark.parametrize("hidden", [40, 37, 16])
def test_infinity_meets_no_padding(hidden):
    # Channels are padded to whole vectors with zeros, and zero times infinity is not zero.
    input, weights, biases = random_block((1, 8, 6, 6), hidden, 8, 3, torch.float32)
    input[0, 3, 2, 2] = float("inf")
    arguments = (weights, 1, (1,) * 4, "relu6", False, True)
    expected = stock(*arguments)(input, *biases)
    assert expected.isfinite().all()  # relu6 has made 6 of it
    output = ours(*arguments)(input, *biases)
    torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-4)
