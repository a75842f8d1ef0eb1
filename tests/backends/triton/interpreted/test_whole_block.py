"""The forward of a block as one kernel; its backward is the chunked one's."""

from __future__ import annotations

import pytest
import torch

from tests.backends.triton.interpreted.against import DTYPES, LAYOUTS, compare, image, numbers
from tinytl_kernels.backends.triton import whole_block

# (N, C, H, W), hidden, out channels, kernel, stride, padding
SIZES = {
    "stride 1": ((2, 12, 7, 6), 24, 12, 3, (1, 1), (1, 1, 1, 1)),
    "stride 2": ((1, 12, 7, 6), 24, 12, 3, (2, 2), (1, 1, 1, 1)),
    "several tiles and chunks": ((1, 24, 9, 10), 40, 40, 3, (1, 1), (1, 1, 1, 1)),
    "odd channels": ((2, 13, 5, 6), 27, 19, 3, (1, 1), (1, 1, 1, 1)),
    "5 x 5, stride 2, TensorFlow SAME": ((1, 16, 8, 10), 32, 24, 5, (2, 2), (1, 2, 1, 2)),
    "empty batch": ((0, 8, 4, 4), 16, 8, 3, (1, 1), (1, 1, 1, 1)),
}


@pytest.fixture(autouse=True)
def launches(monkeypatch):
    """One element a launch of the kernel, which is always chosen."""
    monkeypatch.setenv(whole_block.ENVIRONMENT_VARIABLE, whole_block.ONE_KERNEL)
    times = []
    launcher = whole_block.whole_block
    monkeypatch.setattr(whole_block, "whole_block", lambda *args: (times.append(1), launcher(*args)))
    return times


def check(size, dtype=torch.float32, layout="channels_last", activation="relu6", residual=False, pooled=False):
    shape, hidden, out_channels, kernel, stride, padding = size
    # Small enough that float16 adds up exactly, so that masks agree in every bit.
    return compare(
        "frozen_inverted_residual", image(shape, dtype, layout), numbers(hidden, shape[1], 1, 1, dtype=dtype),
        numbers(hidden, dtype=dtype), numbers(hidden, 1, kernel, kernel, dtype=dtype), numbers(hidden, dtype=dtype),
        numbers(out_channels, hidden, 1, 1, dtype=dtype, step=1.0) / 16, numbers(out_channels, dtype=dtype),
        stride, padding, activation, residual, True, pooled,
    )  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES)
def test_every_size(size, dtype, launches):
    check(SIZES[size], dtype)
    assert len(launches) == 1


@pytest.mark.parametrize("layout", LAYOUTS)
def test_with_shortcut_and_pooled_port(layout, launches):
    check(SIZES["stride 1"], layout=layout, residual=True, pooled=True)
    assert len(launches) == 1


@pytest.mark.parametrize("activation", [None, "relu", "leaky_relu"])
def test_other_activations(activation, launches):
    check(SIZES["odd channels"], activation=activation)
    assert len(launches) == 1


def test_offsets_of_64_bits_and_weights_in_8(launches, monkeypatch):
    monkeypatch.setattr(whole_block, "needs_wide_offsets", lambda *tensors: True)
    expand, project = (torch.randint(-4, 5, size).to(torch.int8) for size in ((24, 12, 1, 1), (12, 24, 1, 1)))
    compare(
        "frozen_inverted_residual", image((1, 12, 7, 6), torch.float32), expand, None,
        numbers(24, 1, 3, 3, dtype=torch.float32), None, project, None, (1, 1), (1, 1, 1, 1), "relu", True, True, True,
        torch.full((24,), 0.25), None, torch.full((12,), 0.5),
    )  # fmt: skip
    assert len(launches) == 1


@pytest.mark.parametrize(
    "size",
    [
        ((1, 96, 4, 4), 24, 12, 3, (1, 1), (1, 1, 1, 1)),  # too wide
        ((1, 12, 4, 4), 24, 96, 3, (1, 1), (1, 1, 1, 1)),
        ((1, 12, 7, 7), 24, 12, 3, (2, 2), (0, 0, 0, 0)),  # the last row of the input is nobody's to mask
        ((1, 12, 4, 4), 24, 12, 3, (1, 1), (3, 3, 3, 3)),  # no tap of a window sees the pixel that it steps over
    ],
    ids=str,
)
def test_what_it_cannot_take_goes_chunk_by_chunk(size, launches):
    check(size)
    assert not launches
