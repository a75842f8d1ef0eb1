"""Frozen weights in 8 bits, dequantised as they are loaded."""

from __future__ import annotations

import pytest
import torch

from tests.backends.triton.interpreted.against import DTYPES, check_convolution, compare, image, numbers
from tinytl_kernels.backends.triton import choice

GEOMETRIES = {
    "pointwise": ((2, 24, 5, 7), (40, 24, 1, 1), (1, 1), (0, 0, 0, 0), (1, 1), 1),
    "depthwise": ((2, 24, 6, 5), (24, 1, 3, 3), (1, 1), (1, 1, 1, 1), (1, 1), 24),
    "dense": ((1, 12, 6, 5), (20, 12, 3, 3), (2, 2), (1, 1, 1, 1), (1, 1), 1),
    "grouped": ((1, 24, 6, 5), (48, 8, 3, 3), (1, 1), (1, 1, 1, 1), (1, 1), 3),
}


def coded(code, *size):
    """A weight of few small numbers, of which every sum is exact, and its scale."""
    if code == "int8":
        return torch.randint(-4, 5, size).to(torch.int8), torch.randint(1, 4, size[:1]) / 4
    return torch.randint(0, 256, size, dtype=torch.uint8), numbers(256, dtype=torch.float32)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("code", ["int8", "kmeans"])
@pytest.mark.parametrize(
    ("geometry", "by"),
    [(g, by) for g in GEOMETRIES for by in (choice.DENSE if g in ("dense", "grouped") else (g,))],
)
def test_convolutions(geometry, by, code, dtype, monkeypatch):
    if by in choice.DENSE:
        monkeypatch.setenv(choice.ENVIRONMENT_VARIABLE, by)
    weight, scale = coded(code, *GEOMETRIES[geometry][1])
    check_convolution(GEOMETRIES[geometry], dtype, weight=weight, scale=scale)


@pytest.mark.parametrize("codes", [("int8", "int8", "int8"), ("kmeans", None, "int8")], ids=str)
def test_a_block(codes):
    sizes = [(24, 12, 1, 1), (24, 1, 3, 3), (12, 24, 1, 1)]
    weights, scales = zip(
        *(
            coded(c, *size) if c else (numbers(*size, dtype=torch.float32), None)
            for c, size in zip(codes, sizes, strict=True)
        ),
        strict=True,
    )
    expand, depthwise, project = weights
    biases = [numbers(size[0], dtype=torch.float32) for size in sizes]
    options = ((1, 1), (1, 1, 1, 1), "relu6", True)
    x = image((3, 12, 7, 6), torch.float32)
    output, *masks, _ = compare(
        "frozen_inverted_residual", x, expand, biases[0], depthwise, biases[1], project, biases[2],
        *options, True, True, *scales,
    )  # fmt: skip
    compare(
        "frozen_inverted_residual_backward", torch.randn(output.shape), None, expand, depthwise, project, *masks,
        x.shape, *options, True, [True] * 4, *scales,
    )  # fmt: skip
