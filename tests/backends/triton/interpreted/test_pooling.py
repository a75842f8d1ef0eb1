"""Average, adaptive average and max pooling, both ways."""

from __future__ import annotations

import pytest
import torch

from tests.backends.triton.interpreted.against import DTYPES, LAYOUTS, compare, image
from tinytl_kernels.backends import reference
from tinytl_kernels.backends.triton import adaptive_avg_pool, avg_pool, max_pool
from tinytl_kernels.backends.triton.operators import OPERATORS

# kernel, stride, padding, ceil_mode, count_include_pad, divisor_override
AVERAGES = {
    "2 x 2": ((2, 2), (2, 2), (0, 0), False, True, None),
    "overlapping, padding not counted": ((3, 2), (2, 1), (1, 1), False, False, None),
    "ceil mode": ((3, 3), (2, 2), (1, 1), True, True, None),
    "ceil mode drops the last window": ((2, 2), (3, 3), (1, 1), True, False, None),
    "divisor": ((3, 3), (1, 2), (1, 0), False, True, 5),
}
# kernel, stride, padding, dilation, ceil_mode
MAXIMA = {
    "3 x 3, stride 2": ((3, 3), (2, 2), (1, 1), (1, 1), False),
    "dilated, ceil mode": ((2, 3), (2, 1), (1, 1), (2, 1), True),
    "a byte a position": ((5, 5), (3, 2), (2, 2), (1, 1), True),
    "stride beyond the kernel": ((2, 2), (3, 3), (0, 0), (1, 1), True),
}
SIZE = (2, 13, 7, 8)


def check_average(window, x):
    (output,) = compare("avg_pool2d", x, *window)
    last = output.is_contiguous(memory_format=torch.channels_last)
    compare("avg_pool2d_backward", torch.randn(output.shape).to(x.dtype), x.shape, *window, last)


def check_max(window, x):
    output, positions = compare("max_pool2d", x, *window, True)
    last = output.is_contiguous(memory_format=torch.channels_last)
    grad = torch.randn(output.shape).to(x.dtype)
    compare("max_pool2d_backward", grad, positions, x.shape, *window[:4], last)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("window", AVERAGES)
def test_average(window, dtype):
    check_average(AVERAGES[window], image(SIZE, dtype))


def check_adaptive(x, size):
    (output,) = compare("adaptive_avg_pool2d", x, list(size))
    last = output.is_contiguous(memory_format=torch.channels_last)
    compare("adaptive_avg_pool2d_backward", torch.randn(output.shape).to(x.dtype), x.shape, last)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [(1, 1), (3, 8), (7, 3), (9, 11), (14, 4)], ids=str)  # fewer, as many and more
def test_adaptive_average(size, dtype):
    check_adaptive(image(SIZE, dtype), size)


def test_adaptive_average_of_a_window_of_several_tiles():
    check_adaptive(image((1, 70, 19, 17), torch.float32), (2, 1))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("window", MAXIMA)
def test_max_with_ties(window, dtype):
    check_max(MAXIMA[window], image(SIZE, dtype))  # seven different values: nearly every window has a tie


@pytest.mark.parametrize("layout", LAYOUTS[1:])
def test_every_layout(layout):
    check_average(AVERAGES["ceil mode"], image(SIZE, torch.float32, layout))
    check_max(MAXIMA["3 x 3, stride 2"], image(SIZE, torch.float32, layout))
    check_adaptive(image(SIZE, torch.float32, layout), (2, 3))


def test_empty_batch():
    check_average(AVERAGES["2 x 2"], image((0, 8, 4, 4), torch.float32))
    check_max(MAXIMA["3 x 3, stride 2"], image((0, 8, 4, 4), torch.float32))
    check_adaptive(image((0, 8, 4, 4), torch.float32), (1, 1))


def test_offsets_of_64_bits_give_the_same_answers(monkeypatch):
    for module in (adaptive_avg_pool, avg_pool, max_pool):
        monkeypatch.setattr(module, "needs_wide_offsets", lambda *tensors: True)
    check_average(AVERAGES["ceil mode"], image(SIZE, torch.float32))
    check_max(MAXIMA["3 x 3, stride 2"], image(SIZE, torch.float32))
    check_adaptive(image(SIZE, torch.float32), (2, 3))


def test_nan_wins_and_a_window_of_minus_infinity_has_a_winner():
    x = image(SIZE, torch.float32)
    x[0, 3, 4, 4] = x[0, 3, 4, 5] = float("nan")
    x[1, 2] = -float("inf")
    window = MAXIMA["3 x 3, stride 2"]
    output, positions = OPERATORS["max_pool2d"](x, *window, True)
    expected, expected_positions = reference.OPERATORS["max_pool2d"](x, *window, True)
    torch.testing.assert_close(output, expected, equal_nan=True)
    assert torch.equal(positions, expected_positions)


def test_no_positions_where_none_are_asked_for():
    _, positions = compare("max_pool2d", image(SIZE, torch.float32), *MAXIMA["3 x 3, stride 2"], False)
    assert positions.numel() == 0
