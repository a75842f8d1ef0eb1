"""What half precision rounds: every product of two of its numbers is exact in float32, so that one rounding is left."""

from __future__ import annotations

import pytest
import torch

import tinytl_kernels as tk
from tinytl_kernels import ops

pytestmark = pytest.mark.usefixtures("cpu_kernels")


def any_numbers(shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator) -> torch.Tensor:
    """Any of its bit patterns, infinities and NaN among them, but for denormals."""
    numbers = torch.randint(-(2**15), 2**15, shape, dtype=torch.int16, generator=generator).view(dtype)
    return torch.where(numbers.abs() < torch.finfo(dtype).smallest_normal, 1, numbers)


@pytest.mark.parametrize("outputs", [1, 3, 16, 17, 40, 49])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_results_are_rounded_to_nearest_even(dtype, outputs):
    generator = torch.Generator().manual_seed(outputs)
    input = any_numbers((2, 1, 40, 41), dtype, generator).contiguous(memory_format=torch.channels_last)
    weight = any_numbers((outputs, 1, 1, 1), dtype, generator)
    weight[0] = 2.0**-10  # some results are denormals
    with tk.use_backend("cpu"):
        output = ops.frozen_conv(input, weight, None)
    exact = input.float() * weight.float().view(1, -1, 1, 1)
    expected = exact.to(dtype)
    # Some processors' bfloat16 instructions know no denormals.
    tiny = exact.abs() < torch.finfo(dtype).smallest_normal
    flushed = tiny & (output == 0) if dtype == torch.bfloat16 else torch.zeros_like(tiny)
    assert torch.equal(output.isnan(), expected.isnan())
    assert torch.equal(output.nan_to_num()[~flushed], expected.nan_to_num()[~flushed])
    assert tiny.any()


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("channels", [2, 7, 64, 66, 130])
def test_weights_in_either_precision_are_packed_alike(channels, stored):
    """One output picks one input channel at a time: each value must arrive where it belongs."""
    generator = torch.Generator().manual_seed(channels)
    weight = torch.randn(50, channels, 1, 1, generator=generator).to(torch.bfloat16).to(stored)
    # The channels of each pixel but one are zero.
    input = torch.eye(channels).view(channels, channels, 1, 1).repeat(1, 1, 3, 5).to(torch.bfloat16)
    input = input.contiguous(memory_format=torch.channels_last).requires_grad_()
    with tk.use_backend("cpu"):
        output = ops.frozen_conv(input, weight, None)
        grad = torch.eye(50).view(50, 50, 1, 1).expand(50, 50, 3, 5)[:channels]
        if channels <= 50:
            (grad_input,) = torch.autograd.grad(output, input, grad.to(torch.bfloat16))
            assert torch.equal(grad_input[:, :, 1, 2].float(), weight[:channels, :, 0, 0].float())
    assert torch.equal(output[:, :, 1, 2].float(), weight[:, :, 0, 0].T.float())
