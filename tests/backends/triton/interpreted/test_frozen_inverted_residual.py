"""The whole block in chunks of the batch, with both ports of the lite residual."""

from __future__ import annotations

import pytest
import torch

from tests.backends.triton.interpreted.against import DTYPES, compare, image, numbers
from tinytl_kernels.backends.triton import frozen_inverted_residual as kernels

# expand, stride, activation, residual
BLOCKS = {
    "residual": (True, 1, "relu6", True),
    "strided": (True, 2, "relu", False),
    "no activation": (True, 1, None, False),
    "no expansion": (False, 2, "relu6", False),
    "no expansion, residual": (False, 1, "relu6", True),
}


@pytest.fixture(autouse=True)
def chunks_of_two(monkeypatch):
    """Three images are then a whole chunk and a half."""
    monkeypatch.setattr(kernels, "chunk_images", lambda images, elements, like: 2)


def check(block, dtype=torch.float32, layout="channels_last", needed=(True, True, True, True), pooled=True):
    expand, stride, activation, residual = BLOCKS[block]
    channels, hidden = 12, 24 if expand else 12
    x = image((3, channels, 7, 6), dtype, layout)
    expand_weight = numbers(hidden, channels, 1, 1, dtype=dtype) if expand else None
    expand_bias = numbers(hidden, dtype=dtype) if expand else None
    depthwise = numbers(hidden, 1, 3, 3, dtype=dtype)
    project = numbers(12, hidden, 1, 1, dtype=dtype, step=1.0) / 16
    numbers_of = ((stride, stride), (1, 1, 1, 1), activation, residual)
    output, expand_mask, depthwise_mask, pooled_image = compare(
        "frozen_inverted_residual", x, expand_weight, expand_bias, depthwise, numbers(hidden, dtype=dtype), project,
        numbers(12, dtype=dtype), *numbers_of, True, pooled,
    )  # fmt: skip
    grad_pooled = torch.randn(pooled_image.shape).to(dtype) if pooled else None
    compare(
        "frozen_inverted_residual_backward", torch.randn(output.shape).to(dtype), grad_pooled, expand_weight,
        depthwise, project, expand_mask, depthwise_mask, x.shape, *numbers_of, layout == "channels_last", list(needed),
    )  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("block", BLOCKS)
def test_every_block(block, dtype):
    check(block, dtype)


def test_contiguous_layout_without_the_ports():
    check("residual", layout="contiguous", pooled=False)


@pytest.mark.parametrize("needed", [(0, 0, 0, 1), (0, 0, 1, 0), (0, 1, 1, 1), (1, 0, 0, 0)], ids=str)
def test_only_what_is_needed_is_computed(needed):
    check("residual", needed=tuple(map(bool, needed)))
