"""Sizes: pairs, paddings and output sizes of windows that slide over an image."""

from __future__ import annotations

from collections.abc import Sequence

IntOrPair = int | Sequence[int]


def pair(value: IntOrPair, name: str) -> tuple[int, int]:
    """``value`` for height and width; raises ``ValueError`` naming the argument if it is neither one nor two."""
    if not isinstance(value, Sequence):
        return (value, value)
    if len(value) == 1:
        return (value[0], value[0])
    if len(value) != 2:
        raise ValueError(f"{name}: expected an int or a pair (height, width), got {tuple(value)}")
    return (value[0], value[1])


def four_paddings(padding: IntOrPair) -> tuple[int, int, int, int]:
    """Padding as (top, bottom, left, right) from an int, a pair (height, width) or those four."""
    if isinstance(padding, Sequence) and len(padding) == 4:
        top, bottom, left, right = padding
        return (top, bottom, left, right)
    if isinstance(padding, Sequence) and len(padding) not in (1, 2):
        raise ValueError(
            "padding: expected an int, a pair (height, width) or four numbers (top, bottom, left, right), "
            f"got {tuple(padding)}"
        )
    height, width = pair(padding, "padding")
    return (height, height, width, width)


def window_extent(kernel: int, dilation: int) -> int:
    """How many pixels a dilated window of ``kernel`` taps spans."""
    return dilation * (kernel - 1) + 1


def output_length(length: int, kernel: int, stride: int, before: int, after: int, dilation: int) -> int:
    """Positions of a window over ``length`` pixels with ``before`` and ``after`` padding."""
    return (length + before + after - window_extent(kernel, dilation)) // stride + 1


def window_reaches(length: int, kernel: int, stride: int, before: int, after: int, dilation: int) -> bool:
    """Whether at least one tap of one position of a window falls on one of the ``length`` pixels."""
    if length >= max(stride, dilation):  # neither steps from one position nor those from one tap to the next jump over
        return True
    positions = output_length(length, kernel, stride, before, after, dilation)
    return any(
        before <= position * stride + tap * dilation < before + length
        for position in range(positions)
        for tap in range(kernel)
    )


def same_padding(kernel: int, dilation: int) -> tuple[int, int]:
    """PyTorch's ``padding="same"`` (stride 1): (before, after); an even kernel gets the odd pixel after."""
    total = window_extent(kernel, dilation) - 1
    return (total // 2, total - total // 2)


def tensorflow_same_padding(length: int, kernel: int, stride: int, dilation: int) -> tuple[int, int]:
    """TensorFlow's SAME: (before, after) such that the output has ``ceil(length / stride)`` positions."""
    positions = (length + stride - 1) // stride
    total = max((positions - 1) * stride + window_extent(kernel, dilation) - length, 0)
    return (total // 2, total - total // 2)
