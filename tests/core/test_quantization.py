"""Weights in 8 bits: the nearest code, the promised error, and what cannot be coded."""

from __future__ import annotations

import math

import pytest
import torch

from tinytl_kernels.core.quantization import CODES, dequantize, quantize, relative_error

FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_int8_is_the_nearest_multiple_of_the_channels_scale(dtype):
    weight = torch.randn(13, 5, 3, 3).mul(torch.logspace(-3, 1, 13).view(-1, 1, 1, 1)).to(dtype)
    codes, scale = quantize(weight)
    assert (codes.dtype, scale.dtype, scale.shape) == (torch.int8, torch.float32, (13,))
    assert codes.amin() >= -127
    torch.testing.assert_close(scale, weight.abs().amax((1, 2, 3)).float() / 127)
    error = (weight.double() - dequantize(codes, scale).double()).abs().amax((1, 2, 3))
    assert (error <= scale.double() * (0.5 + 1e-4)).all()


def test_the_largest_value_of_a_channel_gets_the_largest_code():
    codes, _ = quantize(torch.tensor([[1.0, -2.0, 0.5], [0.25, 0.0, 0.125]]))
    assert codes.tolist() == [[64, -127, 32], [127, 0, 64]]


@pytest.mark.parametrize("code", CODES)
def test_zeros_stay_zeros(code):
    weight = torch.randn(4, 3, 3, 3)
    weight[2] = 0
    codes, scale = quantize(weight, code)
    back = dequantize(codes, scale)
    assert back.isfinite().all()
    assert not back[2].any()


def test_a_channel_below_float32s_smallest_scale_is_zero():
    codes, scale = quantize(torch.full((2, 4), 1e-44))
    assert not dequantize(codes, scale).any()
    assert scale.tolist() == [1.0, 1.0]


@pytest.mark.parametrize("distinct", [1, 2, 200, 256])
def test_kmeans_keeps_up_to_256_distinct_values_exactly(distinct):
    values = torch.randn(distinct)
    weight = values[torch.randint(distinct, (64, 16, 3, 3))]
    codes, codebook = quantize(weight, "kmeans")
    assert (codes.dtype, codebook.dtype, codebook.shape) == (torch.uint8, torch.float32, (256,))
    assert torch.equal(dequantize(codes, codebook), weight)


def test_kmeans_gives_every_value_its_nearest_centroid_and_every_centroid_its_mean():
    weight = torch.randn(64, 40, 3, 3)
    codes, codebook = quantize(weight, "kmeans")
    nearest = (weight.flatten()[:, None] - codebook).abs().amin(1)
    torch.testing.assert_close((weight - dequantize(codes, codebook)).abs().flatten(), nearest)
    # Lloyd's iterations have not quite come to rest: most centroids are the mean of their values to a hundredth.
    sums = torch.zeros(256).index_add_(0, codes.flatten().long(), weight.flatten())
    counts = codes.flatten().long().bincount(minlength=256)
    off = (sums / counts - codebook)[counts > 0].abs()
    assert off.median() < 0.01 * weight.std()


@pytest.mark.parametrize("tail", [2.0, 30.0])
def test_kmeans_is_close_to_the_least_squares_that_256_values_allow(tail):
    # Panter and Dite's bound for a normal distribution: |w - w8| / |w| = sqrt(sqrt(3) pi / 2) / 256 = 0.0064.
    weight = torch.distributions.StudentT(tail).sample((128, 64, 3, 3))
    codes, codebook = quantize(weight, "kmeans")
    error = relative_error(weight, dequantize(codes, codebook))
    int8 = relative_error(weight, dequantize(*quantize(weight)))
    assert error < 0.012
    assert error < int8


def test_kmeans_is_deterministic_and_ascending():
    weight = torch.randn(32, 32, 3, 3)
    (codes, codebook), (again, same) = quantize(weight, "kmeans"), quantize(weight, "kmeans")
    assert torch.equal(codes, again)
    assert torch.equal(codebook, same)
    assert (codebook.diff() >= 0).all()


@pytest.mark.parametrize("code", CODES)
@pytest.mark.parametrize("format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_codes_and_what_they_stand_for_keep_the_memory_layout(code, format):
    weight = torch.randn(12, 8, 3, 3).contiguous(memory_format=format)
    codes, scale = quantize(weight, code)
    assert codes.stride() == weight.stride()
    assert dequantize(codes, scale, torch.bfloat16).stride() == weight.stride()


@pytest.mark.parametrize("code", CODES)
def test_the_value_is_rounded_once_from_float32(code):
    codes, scale = quantize(torch.randn(9, 4, 3, 3), code)
    exact = dequantize(codes, scale)
    for dtype in FLOATS:
        assert torch.equal(dequantize(codes, scale, dtype), exact.to(dtype))


def test_relative_error_is_the_euclidean_norms():
    weight = torch.tensor([3.0, 4.0])
    assert relative_error(weight, torch.tensor([3.0, 3.0])) == pytest.approx(1 / 5)
    assert relative_error(torch.zeros(3), torch.zeros(3)) == 0


@pytest.mark.parametrize("code", CODES)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_nan_and_inf_are_refused(code, value):
    weight = torch.randn(4, 3)
    weight[1, 2] = value
    with pytest.raises(ValueError, match="weight: NaN or inf cannot be coded"):
        quantize(weight, code)


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="code: expected one of 'int8', 'kmeans', got 'int4'"):
        quantize(torch.randn(2, 2), "int4")
    with pytest.raises(ValueError, match="weight: expected a floating point dtype, got torch"):
        quantize(torch.zeros(2, 2, dtype=torch.int8))
