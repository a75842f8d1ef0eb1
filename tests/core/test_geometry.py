"""Sizes of sliding windows against windows that slide."""

from __future__ import annotations

import itertools

from tinytl_kernels.core.geometry import output_length, window_reaches


def test_a_window_reaches_the_image_where_one_of_its_taps_does():
    missed = 0
    for length, kernel, stride, before, after, dilation in itertools.product(
        range(1, 5), range(1, 4), range(1, 5), range(6), range(6), range(1, 4)
    ):
        arguments = (length, kernel, stride, before, after, dilation)
        positions = range(output_length(*arguments))
        seen = {position * stride + tap * dilation - before for position in positions for tap in range(kernel)}
        reaches = not seen.isdisjoint(range(length))
        if positions:
            assert window_reaches(*arguments) == reaches, arguments
        missed += bool(positions) and not reaches
    assert missed > 100
