"""Where in its window a maximum stood: 4 bits where the window has at most 16 elements, else a byte."""

from __future__ import annotations


def fits_in_4_bits(kernel_size) -> bool:
    """Whether positions in a window of ``kernel_size`` are packed two a byte."""
    return kernel_size[0] * kernel_size[1] <= 16


def positions_size(output_size, kernel_size) -> tuple[int, ...]:
    """Shape of the uint8 positions of a pooled (N, C, H, W): (N, H, W, ceil(C / 2)), or (N, H, W, C) in bytes."""
    n, c, h, w = output_size
    return (n, h, w, (c + 1) // 2 if fits_in_4_bits(kernel_size) else c)
