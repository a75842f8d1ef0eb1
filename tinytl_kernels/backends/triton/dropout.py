"""Dropout on the GPU: drawn, applied and packed to bits in one pass."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from tinytl_kernels.backends.reference import dropout as reference
from tinytl_kernels.backends.triton.activation import as_image, image_like
from tinytl_kernels.backends.triton.bitmask import load_bits, store_bits
from tinytl_kernels.backends.triton.launch import (
    TRITON_DTYPE,
    Launch,
    is_flat,
    needs_wide_offsets,
    on_device,
    pixel_offset,
    start,
    stride_arguments,
    stride_unit,
)
from tinytl_kernels.backends.triton.pixels import ANY_SIZE, pixel_arguments, pixel_tile, tile_sizes
from tinytl_kernels.core.activations import mask_size


@triton.jit(do_not_specialize=ANY_SIZE)
def dropout_kernel(
    input, output, mask, seed, pixels, image, width, channels, p, scale,
    input_n, input_h, input_w, input_c, output_n, output_h, output_w, output_c,
    DTYPE: tl.constexpr, FLAT: tl.constexpr, WIDE: tl.constexpr, UNIT: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """output[p, c] = input[p, c] * bit[p, c] * scale

    With a ``seed`` (a tensor of one number) the bits are drawn, 1 with probability 1 - p, and written to ``mask``;
    without one they are read from it. Element p * C + c has the same bit however the tensor lies in memory.
    A program computes ROWS pixels x BLOCK_C channels. Bytes an element: input + output + 1/8.
    """
    channels = channels * UNIT
    _, pixel, first_channel, c = pixel_tile(channels, WIDE, ROWS, BLOCK_C)
    inside = pixel < pixels
    valid = inside[:, None] & (c < channels)[None, :]
    if seed is None:
        bits = load_bits(mask, pixel, inside, first_channel, channels, ROWS, BLOCK_C)
    else:
        bits = (tl.rand(tl.load(seed), pixel[:, None] * channels + c[None, :]) >= p) & valid
        store_bits(mask, bits, pixel, inside, first_channel, channels, ROWS, BLOCK_C)
    rows = pixel_offset(pixel, image, width, input_n * UNIT, input_h * UNIT, input_w * UNIT, FLAT)
    x = tl.load(input + rows[:, None] + c[None, :] * input_c, mask=valid, other=0.0).to(tl.float32)
    # A product, as in PyTorch: a dropped NaN stays a NaN.
    x = x * bits.to(tl.float32) * scale
    rows = pixel_offset(pixel, image, width, output_n * UNIT, output_h * UNIT, output_w * UNIT, FLAT)
    tl.store(output + rows[:, None] + c[None, :] * output_c, x.to(DTYPE), mask=valid)


def drop_into(input: Tensor, p: float, mask: Tensor, seed: Tensor | None, output: Tensor) -> None:
    """``output = input * bits / (1 - p)``.

    Args:
        input: (N, C, H, W), any strides.
        mask: (N, H, W, ceil(C / 8)) uint8, written if there is a seed, else read.
        seed: (1,) int64, or None.
        output: like ``input``, written.
    """
    channels = input.size(1)
    rows, block, num_warps = tile_sizes(channels)
    flat = is_flat(input, output)
    unit = stride_unit(channels, flat, input, output)
    sizes = pixel_arguments(input, unit)
    start(
        Launch(
            dropout_kernel,
            (triton.cdiv(sizes["pixels"], rows) * triton.cdiv(channels, block),),
            dict(
                input=input, output=output, mask=mask, seed=seed, **sizes, p=float(p),
                scale=0.0 if p == 1.0 else 1.0 / (1.0 - p),
                **stride_arguments("input", input, unit, flat), **stride_arguments("output", output, unit, flat),
            ),
            dict(
                DTYPE=TRITON_DTYPE[output.dtype], FLAT=flat,
                WIDE=needs_wide_offsets(input, output) or input.numel() >= 2**31, UNIT=unit, ROWS=rows, BLOCK_C=block,
            ),
            num_warps,
        )
    )  # fmt: skip


@on_device
def dropout(input: Tensor, p: float) -> tuple[Tensor, Tensor]:
    image = as_image(input) if input.numel() else None
    if image is None:
        return reference.dropout(input, p)
    output = torch.empty_like(input)
    mask = input.new_empty(mask_size(input.shape), dtype=torch.uint8)
    # From PyTorch's generator of the device, on the device: no synchronisation, and a CUDA graph draws anew.
    seed = torch.randint(2**62, (1,), dtype=torch.int64, device=input.device)
    drop_into(image, p, mask, seed, image_like(output))
    return output, mask


@on_device
def dropout_backward(grad_output: Tensor, mask: Tensor, p: float) -> Tensor:
    image = as_image(grad_output) if grad_output.numel() else None
    if image is None:
        return reference.OPERATORS["dropout_backward"](grad_output, mask, p)
    grad_input = torch.empty_like(grad_output)
    drop_into(image, p, mask, None, image_like(grad_input))
    return grad_input


OPERATORS = {"dropout": dropout, "dropout_backward": dropout_backward}
