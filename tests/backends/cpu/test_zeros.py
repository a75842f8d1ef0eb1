"""Products leave out zeros and what no mask lets pass, and nobody can tell by the result."""

from __future__ import annotations

import pytest
import torch

from tests.backends.cpu.exact import both, whole_numbers
from tests.backends.cpu.test_frozen_inverted_residual import random_block
from tests.checks import compare_with_torch
from tests.ops.test_frozen_inverted_residual import ours, stock

pytestmark = pytest.mark.usefixtures("cpu_kernels")

# Channels: tails of a vector, of a panel and of a wide panel, more of them than one wide panel has.
WIDTHS = [(40, 24), (33, 200), (96, 160), (112, 320), (250, 97)]


def sparse_block(channels: int, out: int, shift: int, seed: int):
    """Whole numbers; of the expanded values about half, fewer the lower ``shift`` of their biases is."""
    generator = torch.Generator().manual_seed(seed)
    hidden = 72
    input = whole_numbers((2, channels, 9, 7), 3, generator).contiguous(memory_format=torch.channels_last)
    shapes = [(hidden, channels, 1, 1), (hidden, 1, 3, 3), (out, hidden, 1, 1)]
    weights = [whole_numbers(s, 1, generator) for s in shapes]
    biases = [whole_numbers((n,), 9, generator) + shift for n in (hidden, hidden)]
    return input, weights, [*biases, whole_numbers((out,), 9, generator)], generator


def forward_and_backward(input, weights, biases, activation, generator):
    numbers = ([1, 1], [1, 1, 1, 1], activation, False)
    pairs = [t for pair in zip(weights, biases, strict=True) for t in pair]
    output, *masks, _ = both("frozen_inverted_residual", input, *pairs, *numbers, True, False)
    grad = whole_numbers(output.shape, 2, generator).contiguous(memory_format=torch.channels_last)
    both(
        "frozen_inverted_residual_backward", grad, None, *weights, *masks, list(input.shape), *numbers, True, [True] * 4
    )  # fmt: skip
    return output, masks


@pytest.mark.parametrize("activation", ["relu", "relu6"])
@pytest.mark.parametrize("shift", [-1000, -60, 0, 60, 1000])
@pytest.mark.parametrize(("channels", "out"), WIDTHS)
def test_any_share_of_zeros(channels, out, shift, activation):
    input, weights, biases, generator = sparse_block(channels, out, shift, seed=channels + shift)
    _, masks = forward_and_backward(input, weights, biases, activation, generator)
    if shift == -1000:
        assert not any(mask.any() for mask in masks)


@pytest.mark.parametrize(("channels", "out"), WIDTHS)
def test_a_share_that_changes_from_pixel_to_pixel(channels, out):
    input, weights, biases, generator = sparse_block(channels, out, 0, seed=out)
    input[:, :, :4] -= 9  # rows in which other channels pass
    input[:, :, :, 3:] *= 0  # columns in which the biases decide alone
    input[1] *= 50
    forward_and_backward(input, weights, biases, "relu", generator)


# Whose weight serves as it is stored: whole vectors, one wide panel.
@pytest.mark.parametrize("channels", [40, 48, 192, 208])
@pytest.mark.parametrize("address", [0, 1, 16])
def test_weights_at_any_address(channels, address):
    input, weights, biases, generator = sparse_block(channels, 64, -20, seed=address)
    memory = [torch.empty(address + w.numel())[address:].view(w.shape) for w in weights]
    weights = [m.copy_(w) for m, w in zip(memory, weights, strict=True)]
    forward_and_backward(input, weights, biases, "relu6", generator)


@pytest.mark.parametrize("channels", [40, 48])
@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
def test_zero_times_a_weight_that_is_not_finite(channels, value):
    # Both are NaN: a zero may be left out only where its weight is a number.
    for spoiled in (0, 2):
        input, weights, biases, generator = sparse_block(channels, 64, -60, seed=3)
        weights[spoiled][5, 7] = value
        if spoiled == 0:  # only what is multiplied backward by it: forward, half of everything would be NaN
            numbers = ([1, 1], [1, 1, 1, 1], "relu6", False)
            masks = [torch.full((2, 9, 7, 9), 0x5A, dtype=torch.uint8) for _ in range(2)]
            grad = whole_numbers((2, 64, 9, 7), 2, generator).contiguous(memory_format=torch.channels_last)
            grads = both(
                "frozen_inverted_residual_backward", grad, None, *weights, *masks, list(input.shape), *numbers, True,
                [True] * 4,
            )  # fmt: skip
            assert grads[0].isnan().any()
        else:
            output, _ = forward_and_backward(input, weights, biases, "relu6", generator)
            assert output.isnan().any()


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_a_value_that_is_not_finite_is_no_zero(value):
    input, weights, biases, generator = sparse_block(96, 160, -60, seed=4)
    input[1, 5, 4, 3] = value
    output, _ = forward_and_backward(input, weights, biases, "relu", generator)
    assert output[1].isnan().any()
    assert output[0].isfinite().all()


@pytest.mark.parametrize(("channels", "out"), [(96, 160), (160, 320)])
def test_is_as_exact_as_pytorch(channels, out):
    input, weights, biases = random_block((2, channels, 14, 14), 576, out, 3, torch.float32)
    arguments = (weights, 1, (1,) * 4, "relu6", False, True)
    compare_with_torch(ours(*arguments), stock(*arguments), [input, *biases])
