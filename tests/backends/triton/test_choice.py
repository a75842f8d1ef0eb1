"""Who computes a frozen convolution, and a block, on the GPU."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from tinytl_kernels.backends.triton import choice, whole_block
from tinytl_kernels.backends.triton.configurations import trying, watch

UNPADDED, PADDED = (0, 0, 0, 0), (1, 1, 1, 1)


def choose(*weight_size, padding=PADDED, groups=1, **kwargs):
    return choice.choose(torch.empty(weight_size), (1, 1), padding, groups, 1000, torch.float16, **kwargs)


@pytest.fixture(autouse=True)
def nothing_forced(monkeypatch):
    monkeypatch.delenv(choice.ENVIRONMENT_VARIABLE, raising=False)
    monkeypatch.delenv(whole_block.ENVIRONMENT_VARIABLE, raising=False)


def test_by_shape():
    assert choose(16, 8, 1, 1, padding=UNPADDED) == choice.POINTWISE
    assert choose(16, 1, 3, 3, groups=16) == choice.DEPTHWISE
    assert choose(16, 8, 3, 3) == choice.LIBRARY
    assert choose(16, 8, 1, 1) == choice.LIBRARY  # padded
    assert choose(32, 8, 3, 3, groups=4) == choice.IMPLICIT_GEMM
    assert choose(12, 8, 3, 3, groups=3) == choice.LIBRARY  # 4 channels a group share a byte of the mask


@pytest.mark.parametrize("forced", choice.DENSE)
def test_the_environment_forces_what_can_be_forced(monkeypatch, forced):
    monkeypatch.setenv(choice.ENVIRONMENT_VARIABLE, forced)
    assert choose(16, 8, 3, 3) == forced
    assert choose(32, 8, 3, 3, groups=4, backward=True) == forced
    assert choose(16, 8, 1, 1, padding=UNPADDED) == choice.POINTWISE
    assert choose(12, 8, 3, 3, groups=3) == choice.LIBRARY


def test_an_unknown_name_in_the_environment_is_an_error(monkeypatch):
    monkeypatch.setenv(choice.ENVIRONMENT_VARIABLE, "cudnn")
    with pytest.raises(ValueError, match="TINYTL_TRITON_DENSE: expected 'library' or 'implicit_gemm', got 'cudnn'"):
        choose(16, 8, 3, 3)


def test_a_measured_table_overrules_forward_and_backward_one_by_one():
    with watch() as asked:
        choose(16, 8, 3, 3)
    (question,) = asked
    assert set(asked[question]) == {(0,), (1,)}
    with trying({question: (choice.DENSE.index(choice.IMPLICIT_GEMM),)}):
        assert choose(16, 8, 3, 3) == choice.IMPLICIT_GEMM
        assert choose(16, 8, 3, 3, backward=True) == choice.LIBRARY


def test_a_block_goes_chunk_by_chunk_unless_it_is_forced_or_measured(monkeypatch):
    block = (128, 32, 192, 32, (28, 28), (1, 1), torch.float16)
    assert whole_block.choose(*block) == whole_block.CHUNKED
    with watch() as asked:
        whole_block.choose(*block)
    with trying(dict.fromkeys(asked, (1,))):
        assert whole_block.choose(*block) == whole_block.ONE_KERNEL
    monkeypatch.setenv(whole_block.ENVIRONMENT_VARIABLE, whole_block.ONE_KERNEL)
    assert whole_block.choose(*block) == whole_block.ONE_KERNEL
    monkeypatch.setenv(whole_block.ENVIRONMENT_VARIABLE, "both")
    with pytest.raises(ValueError, match="TINYTL_TRITON_BLOCK: expected 'chunked' or 'one_kernel', got 'both'"):
        whole_block.choose(*block)
