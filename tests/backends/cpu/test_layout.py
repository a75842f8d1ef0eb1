"""Copies between (N, C, H, W) and channels_last: the values, and the strides that PyTorch itself would give."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tinytl_kernels.backends.cpu.layout import channels_last, in_layout

pytestmark = pytest.mark.usefixtures("cpu_kernels")

LAYOUTS = (torch.contiguous_format, torch.channels_last)


def assert_copied(tensor: torch.Tensor, layout: torch.memory_format) -> None:
    copied, expected = in_layout(tensor, layout), tensor.contiguous(memory_format=layout)
    assert torch.equal(copied, expected)
    assert copied.stride() == expected.stride()
    assert (copied is tensor) == (expected is tensor)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.uint8], ids=str)
@given(sizes=st.tuples(*[st.integers(0, 3), st.integers(0, 150), st.integers(0, 20), st.integers(0, 20)]))
def test_as_pytorch_copies(sizes, dtype, layout) -> None:
    tensor = torch.arange(torch.Size(sizes).numel()).view(sizes).to(dtype)
    for given_layout in LAYOUTS:
        assert_copied(tensor.contiguous(memory_format=given_layout), layout)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_neither_layout(layout) -> None:
    tensor = torch.randn(2, 12, 9, 10)
    assert_copied(tensor[:, ::2], layout)
    assert_copied(tensor.permute(0, 1, 3, 2), layout)
    assert_copied(torch.randn(2, 12, 1, 1).expand(2, 12, 9, 10), layout)


def test_other_dimensions() -> None:
    assert_copied(torch.randn(5, 6).t(), torch.contiguous_format)
    assert channels_last(torch.randn(1, 3, 8, 8)).is_contiguous(memory_format=torch.channels_last)
