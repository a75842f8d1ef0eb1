"""Adding an upsampled image, and its adjoint."""

from __future__ import annotations

import pytest
import torch

from tests.backends.triton.interpreted.against import DTYPES, LAYOUTS, compare, image
from tinytl_kernels.backends.triton import upsample_add as kernels

SIZE = (1, 13, 8, 6)


def check(main, branch):
    compare("upsample_add", main, branch)
    last = branch.is_contiguous(memory_format=torch.channels_last)
    compare("upsample_add_backward", torch.randn(main.shape).to(main.dtype), branch.shape[2:], last)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [(4, 3), (8, 6), (3, 4), (11, 7), (7, 2), (1, 1)], ids=str)
def test_every_ratio(size, dtype):
    check(image(SIZE, dtype), image((1, 13, *size), dtype))


@pytest.mark.parametrize("layout", LAYOUTS[1:])
def test_every_layout(layout):
    check(image(SIZE, torch.float32, layout), image((1, 13, 4, 3), torch.float32, layout))


@pytest.mark.parametrize("size", [(2, 2), (1, 1)], ids=str)
def test_ratios_beyond_those_of_the_kernel(size):
    check(image((1, 8, 29, 3), torch.float32), image((1, 8, *size), torch.float32))


def test_empty_batch():
    check(image((0, 8, 4, 4), torch.float32), image((0, 8, 2, 2), torch.float32))


def test_offsets_of_64_bits_give_the_same_answers(monkeypatch):
    monkeypatch.setattr(kernels, "needs_wide_offsets", lambda *tensors: True)
    check(image(SIZE, torch.float32), image((1, 13, 4, 3), torch.float32))
