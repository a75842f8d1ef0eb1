"""Stand-alone activations on the GPU, and the edges of convolutions that another library computes.

Forward: f(input + bias) with the mask, in place if asked. Backward: f' * grad_output, the sums of it, or both.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from tinytl_kernels.backends.reference import activation as reference
from tinytl_kernels.backends.triton.derivative_code import activate_and_encode, decode_gradient
from tinytl_kernels.backends.triton.epilogue import load_gradient, save_and_activate, saved_kind, sum_over_pixels
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
from tinytl_kernels.core.activations import BIT_MASK, FULL_RESULT, LEAKY_SLOPE, mask_size


@triton.jit(do_not_specialize=ANY_SIZE)
def activation_kernel(
    input, bias, output, saved, pixels, image, width, channels, slope,
    input_n, input_h, input_w, input_c, output_n, output_h, output_w, output_c,
    DTYPE: tl.constexpr, ACTIVATION: tl.constexpr, SAVE: tl.constexpr, FLAT: tl.constexpr, WIDE: tl.constexpr,
    UNIT: tl.constexpr, ROWS: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """output[p, c] = f(input[p, c] + bias[c]), and the mask (or the value before f).

    A program computes ROWS pixels x BLOCK_C channels. Bytes an element: input + output + 1/8. ``input`` may be
    ``output``.
    """
    channels = channels * UNIT
    _, pixel, first_channel, c = pixel_tile(channels, WIDE, ROWS, BLOCK_C)
    inside = pixel < pixels
    valid = inside[:, None] & (c < channels)[None, :]
    rows = pixel_offset(pixel, image, width, input_n * UNIT, input_h * UNIT, input_w * UNIT, FLAT)
    x = tl.load(input + rows[:, None] + c[None, :] * input_c, mask=valid, other=0.0).to(tl.float32)
    if bias is not None:
        x += tl.load(bias + c, mask=c < channels, other=0.0).to(tl.float32)[None, :]
    rows = pixel_offset(pixel, image, width, output_n * UNIT, output_h * UNIT, output_w * UNIT, FLAT)
    offset = rows[:, None] + c[None, :] * output_c
    y = save_and_activate(
        x, saved, offset, pixel, inside, first_channel, channels, slope, DTYPE, ACTIVATION, SAVE, ROWS, BLOCK_C
    )
    tl.store(output + offset, y.to(DTYPE), mask=valid)


@triton.jit(do_not_specialize=ANY_SIZE)
def activation_backward_kernel(
    grad_output, saved, grad_input, grad_bias, pixels, image, width, channels, slope,
    grad_n, grad_h, grad_w, grad_c, saved_n, saved_h, saved_w, saved_c, input_n, input_h, input_w, input_c,
    DTYPE: tl.constexpr, ACTIVATION: tl.constexpr, SAVE: tl.constexpr, FLAT: tl.constexpr, WIDE: tl.constexpr,
    UNIT: tl.constexpr, ROWS: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """grad_input[p, c] = f' * grad_output[p, c], and partial sums of it over pixels.

    A program computes ROWS pixels x BLOCK_C channels and writes their sums to row p / ROWS of ``grad_bias`` (pixel
    tiles, C) float32, to be added up in a fixed order. Bytes an element: grad_output + grad_input + 1/8 + 4 / ROWS.
    """
    channels = channels * UNIT
    tile, pixel, first_channel, c = pixel_tile(channels, WIDE, ROWS, BLOCK_C)
    inside = pixel < pixels
    grad_row = pixel_offset(pixel, image, width, grad_n * UNIT, grad_h * UNIT, grad_w * UNIT, FLAT)
    saved_row = pixel_offset(pixel, image, width, saved_n * UNIT, saved_h * UNIT, saved_w * UNIT, FLAT)
    g = load_gradient(
        grad_output, grad_row[:, None] + c[None, :] * grad_c, saved, saved_row[:, None] + c[None, :] * saved_c,
        pixel, inside, first_channel, channels, slope, ACTIVATION, SAVE, ROWS, BLOCK_C,
    )  # fmt: skip
    if grad_bias is not None:
        tl.store(grad_bias + tile * channels + c, sum_over_pixels(g), mask=c < channels)
    if grad_input is not None:
        rows = pixel_offset(pixel, image, width, input_n * UNIT, input_h * UNIT, input_w * UNIT, FLAT)
        valid = inside[:, None] & (c < channels)[None, :]
        tl.store(grad_input + rows[:, None] + c[None, :] * input_c, g.to(DTYPE), mask=valid)


def activate_into(
    input: Tensor, bias: Tensor | None, activation: str | None, output: Tensor, saved: Tensor | None,
    slope: float = LEAKY_SLOPE,
) -> None:  # fmt: skip
    """``output = f(input + bias)``; ``output`` may be ``input``.

    Args:
        input, output: (N, C, H, W), any strides.
        bias: (C,) or None.
        saved: mask (N, H, W, ceil(C / 8)) uint8, or value like ``output`` with its strides, written; or None.
    """
    channels = input.size(1)
    rows, block, num_warps = tile_sizes(channels)
    flat = is_flat(input, output)
    unit = stride_unit(channels, flat, input, output)
    sizes = pixel_arguments(input, unit)
    start(
        Launch(
            activation_kernel,
            (triton.cdiv(sizes["pixels"], rows) * triton.cdiv(channels, block),),
            dict(
                input=input, bias=bias, output=output, saved=saved, **sizes, slope=float(slope),
                **stride_arguments("input", input, unit, flat), **stride_arguments("output", output, unit, flat),
            ),
            dict(
                DTYPE=TRITON_DTYPE[output.dtype], ACTIVATION=activation,
                SAVE=saved_kind(activation, saved is not None), FLAT=flat, WIDE=needs_wide_offsets(input, output),
                UNIT=unit, ROWS=rows, BLOCK_C=block,
            ),
            num_warps,
        )
    )  # fmt: skip


def gradient_tiles(pixels: int, channels: int) -> int:
    """Rows of the bias gradient's partial sums that :func:`gradient_into` writes."""
    return triton.cdiv(pixels, tile_sizes(channels, backward=True)[0])


def gradient_into(
    grad_output: Tensor, saved: Tensor | None, activation: str | None, grad_input: Tensor | None,
    grad_bias: Tensor | None, slope: float = LEAKY_SLOPE,
) -> None:  # fmt: skip
    """``grad_input = f' * grad_output`` and partial sums of it, whichever is given.

    Args:
        grad_output: (N, C, H, W), any strides.
        saved: what the forward saved; None if there is no activation.
        grad_input: like ``grad_output``, written; or None.
        grad_bias: (``gradient_tiles``, C) float32, written; or None.
    """
    channels = grad_output.size(1)
    rows, block, num_warps = tile_sizes(channels, backward=True)
    save = saved_kind(activation)
    value = saved if save == "value" else None
    flat = is_flat(grad_output, value, grad_input)
    unit = stride_unit(channels, flat, grad_output, value, grad_input)
    sizes = pixel_arguments(grad_output, unit)
    start(
        Launch(
            activation_backward_kernel,
            (triton.cdiv(sizes["pixels"], rows) * triton.cdiv(channels, block),),
            dict(
                grad_output=grad_output, saved=None if save == "nothing" else saved, grad_input=grad_input,
                grad_bias=grad_bias, **sizes, slope=float(slope),
                **stride_arguments("grad", grad_output, unit, flat), **stride_arguments("saved", value, unit, flat),
                **stride_arguments("input", grad_input, unit, flat),
            ),
            dict(
                DTYPE=TRITON_DTYPE[grad_output.dtype], ACTIVATION=activation, SAVE=save, FLAT=flat,
                WIDE=needs_wide_offsets(grad_output, value, grad_input), UNIT=unit, ROWS=rows, BLOCK_C=block,
            ),
            num_warps,
        )
    )  # fmt: skip


def as_image(tensor: Tensor) -> Tensor | None:
    """A view as (N, C, H, W) where C are the channels that share mask bytes; None if there is no such view."""
    if tensor.dim() == 4:
        return tensor
    if not tensor.is_contiguous():
        return None
    return tensor.view(-1, tensor.size(-1) if tensor.dim() else 1, 1, 1)


@on_device
def activation(
    input: Tensor, name: str, negative_slope: float, needs_mask: bool, needs_codes: bool = False
) -> tuple[Tensor, Tensor]:
    if needs_codes:
        return activate_and_encode(input, name)
    image = as_image(input) if input.numel() and name not in FULL_RESULT else None
    if image is None:
        return reference.activation(input, name, negative_slope, needs_mask)
    output = torch.empty_like(input)
    needs_mask = needs_mask and name in BIT_MASK
    mask = input.new_empty(mask_size(input.shape) if needs_mask else 0, dtype=torch.uint8)
    activate_into(image, None, name, image_like(output), mask if needs_mask else None, negative_slope)
    return output, mask


@on_device
def activation_backward(grad_output: Tensor, saved: Tensor, name: str, negative_slope: float) -> Tensor:
    if name not in BIT_MASK and saved.dtype == torch.uint8:
        return decode_gradient(grad_output, saved, name)
    image = value = None
    if grad_output.numel() and name not in FULL_RESULT:
        image, value = as_image(grad_output), saved if name in BIT_MASK else as_image(saved)
    if image is None or value is None:
        return reference.activation_gradient(grad_output, saved, name, negative_slope)
    grad_input = torch.empty_like(grad_output)
    gradient_into(image, value, name, image_like(grad_input), None, negative_slope)
    return grad_input


def image_like(output: Tensor) -> Tensor:
    """:func:`as_image` of what ``torch.empty_like`` made of a tensor that has such a view: it has one too."""
    image = as_image(output)
    assert image is not None
    return image


OPERATORS = {"activation": activation, "activation_backward": activation_backward}
