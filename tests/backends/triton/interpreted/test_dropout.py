"""Dropout: what is drawn, how it is packed, and that forward and backward follow it."""

from __future__ import annotations

import pytest
import torch

from tests.backends.triton.interpreted.against import DTYPES, LAYOUTS, compare, image
from tinytl_kernels.backends import reference
from tinytl_kernels.backends.triton import dropout as kernels
from tinytl_kernels.backends.triton.operators import OPERATORS

SIZE = (2, 13, 7, 8)


def check(x, p):
    """The output is the reference's for the bits that were drawn."""
    output, mask = OPERATORS["dropout"](x, p)
    expected = reference.OPERATORS["dropout_backward"](x, mask, p)
    assert torch.equal(output, expected)
    assert output.stride() == expected.stride()
    compare("dropout_backward", torch.randn(x.shape).to(x.dtype), mask, p)
    return mask


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_output_and_gradient_follow_the_bits(layout, dtype):
    check(image(SIZE, dtype, layout), 0.3)


@pytest.mark.parametrize("size", [(5, 1280), (3, 4, 20), (9,), (), (0, 8)], ids=str)
def test_other_shapes(size):
    check(torch.randn(size), 0.5)


def test_what_is_not_contiguous_is_the_references():
    check(torch.randn(6, 8).t(), 0.5)


def test_bits_beyond_the_last_channel_are_zero():
    _, mask = OPERATORS["dropout"](image(SIZE, torch.float32), 0.0)
    assert torch.equal(mask, torch.tensor([255, 31], dtype=torch.uint8).expand(2, 7, 8, 2))


def test_all_is_dropped_at_one():
    output, mask = OPERATORS["dropout"](torch.randn(4, 40), 1.0)
    assert not output.any()
    assert not mask.any()


def test_so_many_are_kept_and_neighbours_are_independent():
    torch.manual_seed(0)
    output, _ = OPERATORS["dropout"](torch.ones(64, 1024), 0.2)
    kept = (output != 0).double()
    assert abs(kept.mean().item() - 0.8) < 5 * (0.2 * 0.8 / kept.numel()) ** 0.5
    # Five standard deviations of a product of independent centred bits.
    for neighbour in (kept.roll(1, 0), kept.roll(1, 1)):
        assert abs(((kept - 0.8) * (neighbour - 0.8)).mean().item()) < 5 * 0.16 / kept.numel() ** 0.5


def test_the_seed_governs_and_every_call_draws_anew():
    x = torch.ones(8, 40)
    torch.manual_seed(5)
    first, second = OPERATORS["dropout"](x, 0.5)[1], OPERATORS["dropout"](x, 0.5)[1]
    torch.manual_seed(5)
    assert torch.equal(OPERATORS["dropout"](x, 0.5)[1], first)
    assert not torch.equal(first, second)


def test_layout_does_not_change_the_bits():
    masks = []
    for layout in ("channels_last", "contiguous"):
        torch.manual_seed(3)
        masks.append(OPERATORS["dropout"](image(SIZE, torch.float32, layout), 0.5)[1])
    assert torch.equal(*masks)


def test_offsets_of_64_bits_give_the_same_answers(monkeypatch):
    torch.manual_seed(3)
    mask = check(image(SIZE, torch.float32), 0.5)
    monkeypatch.setattr(kernels, "needs_wide_offsets", lambda *tensors: True)
    torch.manual_seed(3)
    assert torch.equal(check(image(SIZE, torch.float32), 0.5), mask)


def test_a_dropped_nan_stays_a_nan():
    output, _ = OPERATORS["dropout"](torch.full((8,), float("nan")), 0.5)
    assert output.isnan().all()
