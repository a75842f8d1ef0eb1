"""Frozen 1x1 convolution on the GPU: a matrix product over (pixels, channels) with everything else at its edges."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from tinytl_kernels.backends.triton.configurations import tunable
from tinytl_kernels.backends.triton.epilogue import load_gradient, save_and_activate, saved_kind, sum_over_pixels
from tinytl_kernels.backends.triton.launch import (
    TRITON_DTYPE,
    Launch,
    alignment,
    dot_precision,
    is_flat,
    needs_wide_offsets,
    pixel_offset,
    power_of_two,
    start,
    stride_arguments,
    stride_unit,
)
from tinytl_kernels.backends.triton.weights import load_weight
from tinytl_kernels.core.activations import LEAKY_SLOPE

# Not specialised on being 1 or a multiple of 16: one compilation serves every batch and image size.
_ANY_SIZE = ["pixels", "image", "width"]


@triton.jit(do_not_specialize=_ANY_SIZE)
def pointwise_kernel(
    input, weight, scale, bias, residual, output, saved, pixels, image, width, channels, out_channels, slope,
    input_n, input_h, input_w, input_c, residual_n, residual_h, residual_w, residual_c,
    output_n, output_h, output_w, output_c, weight_o, weight_c,
    DTYPE: tl.constexpr, ACTIVATION: tl.constexpr, SAVE: tl.constexpr, FLAT: tl.constexpr, WIDE: tl.constexpr,
    IN_UNIT: tl.constexpr, OUT_UNIT: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_PIXELS: tl.constexpr, BLOCK_OUT: tl.constexpr, BLOCK_IN: tl.constexpr,
):  # fmt: skip
    """output[p, o] = f(sum over c of input[p, c] weight[o, c] + bias[o]) + residual[p, o]

    A program computes BLOCK_PIXELS x BLOCK_OUT. It reads its pixels' input in steps of BLOCK_IN channels and the
    weight (which stays in L2), and writes the output and one bit (or the value before f) an element. Programs of one
    pixel tile follow each other, so that only the first of them reads the input from memory.
    Bytes an output element: itself + 1/8 + input * C / O.
    Channel counts and strides come in units of IN_UNIT and OUT_UNIT, see ``launch.alignment``.
    """
    channels = channels * IN_UNIT
    out_channels = out_channels * OUT_UNIT
    columns = tl.cdiv(out_channels, BLOCK_OUT)
    program = tl.program_id(0)
    first_out = (program % columns) * BLOCK_OUT
    pixel = (program // columns) * BLOCK_PIXELS + tl.arange(0, BLOCK_PIXELS)
    inside = pixel < pixels
    out = first_out + tl.arange(0, BLOCK_OUT)
    step = tl.arange(0, BLOCK_IN)
    if WIDE:
        pixel, out, step = pixel.to(tl.int64), out.to(tl.int64), step.to(tl.int64)
    rows = pixel_offset(pixel, image, width, input_n * IN_UNIT, input_h * IN_UNIT, input_w * IN_UNIT, FLAT)
    total = tl.zeros((BLOCK_PIXELS, BLOCK_OUT), dtype=tl.float32)
    for first_in in range(0, channels, BLOCK_IN):
        c = first_in + step
        x = tl.load(
            input + rows[:, None] + c[None, :] * input_c, mask=inside[:, None] & (c < channels)[None, :], other=0.0
        )
        w = load_weight(
            weight, scale, out[None, :] * (weight_o * IN_UNIT) + c[:, None] * weight_c,
            out[None, :], (out < out_channels)[None, :], (c < channels)[:, None] & (out < out_channels)[None, :],
            x.dtype,
        )  # fmt: skip
        total = tl.dot(x, w, total, input_precision=PRECISION)
    if bias is not None:
        total += tl.load(bias + out, mask=out < out_channels, other=0.0).to(tl.float32)[None, :]
    rows = pixel_offset(pixel, image, width, output_n * OUT_UNIT, output_h * OUT_UNIT, output_w * OUT_UNIT, FLAT)
    offset = rows[:, None] + out[None, :] * output_c
    y = save_and_activate(
        total, saved, offset, pixel, inside, first_out, out_channels, slope,
        DTYPE, ACTIVATION, SAVE, BLOCK_PIXELS, BLOCK_OUT,
    )  # fmt: skip
    valid = inside[:, None] & (out < out_channels)[None, :]
    if residual is not None:
        rows = pixel_offset(
            pixel, image, width, residual_n * OUT_UNIT, residual_h * OUT_UNIT, residual_w * OUT_UNIT, FLAT
        )
        shortcut = tl.load(residual + rows[:, None] + out[None, :] * residual_c, mask=valid, other=0.0)
        y = y.to(DTYPE).to(tl.float32) + shortcut.to(tl.float32)
    tl.store(output + offset, y.to(DTYPE), mask=valid)


@triton.jit(do_not_specialize=_ANY_SIZE)
def pointwise_backward_kernel(
    grad_output, weight, scale, saved, residual, grad_pooled, grad_input, grad_bias, pixels, image, width,
    channels, out_channels, slope, grad_n, grad_h, grad_w, grad_c, saved_n, saved_h, saved_w, saved_c,
    residual_n, residual_h, residual_w, residual_c, pooled_n, pooled_h, pooled_w, pooled_c,
    input_n, input_h, input_w, input_c, weight_o, weight_c,
    DTYPE: tl.constexpr, ACTIVATION: tl.constexpr, SAVE: tl.constexpr, FLAT: tl.constexpr, WIDE: tl.constexpr,
    IN_UNIT: tl.constexpr, OUT_UNIT: tl.constexpr, PRECISION: tl.constexpr, SUM_FIRST: tl.constexpr,
    BLOCK_PIXELS: tl.constexpr, BLOCK_OUT: tl.constexpr, BLOCK_IN: tl.constexpr,
):  # fmt: skip
    """g = f' * grad_output;  grad_input[p, c] = sum over o of g[p, o] weight[o, c] + residual[p, c] + pooled's share

    A program computes BLOCK_PIXELS x BLOCK_IN of grad_input in steps of BLOCK_OUT, reading grad_output and the mask
    tile by tile. Those of the first column also write the sums of g over their pixels to row p / BLOCK_PIXELS of
    ``grad_bias`` (pixel tiles, O) float32, to be added up in a fixed order. ``grad_pooled`` is the gradient of the 2x2
    average of the input: a quarter of it belongs to each of four pixels.
    Bytes a grad_output element: itself + 1/8 + grad_input * C / O.
    """
    channels = channels * IN_UNIT
    out_channels = out_channels * OUT_UNIT
    columns = tl.cdiv(channels, BLOCK_IN)
    program = tl.program_id(0)
    column = program % columns
    tile = program // columns
    pixel = tile * BLOCK_PIXELS + tl.arange(0, BLOCK_PIXELS)
    inside = pixel < pixels
    c = column * BLOCK_IN + tl.arange(0, BLOCK_IN)
    step = tl.arange(0, BLOCK_OUT)
    if WIDE:
        tile = tile.to(tl.int64)
        pixel, c, step = pixel.to(tl.int64), c.to(tl.int64), step.to(tl.int64)
    grad_row = pixel_offset(pixel, image, width, grad_n * OUT_UNIT, grad_h * OUT_UNIT, grad_w * OUT_UNIT, FLAT)
    saved_row = pixel_offset(pixel, image, width, saved_n * OUT_UNIT, saved_h * OUT_UNIT, saved_w * OUT_UNIT, FLAT)
    total = tl.zeros((BLOCK_PIXELS, BLOCK_IN), dtype=tl.float32)
    for first_out in range(0, out_channels, BLOCK_OUT):
        out = first_out + step
        g = load_gradient(
            grad_output, grad_row[:, None] + out[None, :] * grad_c,
            saved, saved_row[:, None] + out[None, :] * saved_c, pixel, inside, first_out, out_channels, slope,
            ACTIVATION, SAVE, BLOCK_PIXELS, BLOCK_OUT,
        )  # fmt: skip
        if grad_bias is not None:
            sums = grad_bias + tile * out_channels + out
            # A branch at run time comes after the product in Triton's pipeline, and g lives in registers until then.
            if SUM_FIRST:  # noqa: SIM114 - decided at compile time, the next one at run time
                tl.store(sums, sum_over_pixels(g), mask=out < out_channels)
            elif column == 0:
                tl.store(sums, sum_over_pixels(g), mask=out < out_channels)
        w = load_weight(
            weight, scale, out[:, None] * (weight_o * IN_UNIT) + c[None, :] * weight_c,
            out[:, None], (out < out_channels)[:, None], (out < out_channels)[:, None] & (c < channels)[None, :], DTYPE,
        )  # fmt: skip
        total = tl.dot(g.to(DTYPE), w, total, input_precision=PRECISION)
    valid = inside[:, None] & (c < channels)[None, :]
    if residual is not None:
        rows = pixel_offset(pixel, image, width, residual_n * IN_UNIT, residual_h * IN_UNIT, residual_w * IN_UNIT, FLAT)
        total += tl.load(residual + rows[:, None] + c[None, :] * residual_c, mask=valid, other=0.0).to(tl.float32)
    if grad_pooled is not None:
        place = pixel % image
        # An odd last row or column is in no window.
        height, h, w = image // width, place // width, place % width
        window = inside & (h // 2 < height // 2) & (w // 2 < width // 2)
        rows = pixel // image * (pooled_n * IN_UNIT) + h // 2 * (pooled_h * IN_UNIT) + w // 2 * (pooled_w * IN_UNIT)
        share = tl.load(
            grad_pooled + rows[:, None] + c[None, :] * pooled_c,
            mask=window[:, None] & (c < channels)[None, :],
            other=0.0,
        )
        total += share.to(tl.float32) * 0.25
    rows = pixel_offset(pixel, image, width, input_n * IN_UNIT, input_h * IN_UNIT, input_w * IN_UNIT, FLAT)
    tl.store(grad_input + rows[:, None] + c[None, :] * input_c, total.to(DTYPE), mask=valid)


def _sizes(pixels: int, columns: int, depth: int, dtype: torch.dtype, backward: bool = False):
    """What ``tinytl tune`` tries: :func:`tile_sizes` with other pixels, columns, depths, warps and stages."""
    room = 128 * (128 if dtype != torch.float32 else 64)
    widest = power_of_two(columns, 16, 128)
    deepest = power_of_two(depth, 16, 128 if dtype != torch.float32 else 64)
    return [
        (block_pixels, block_columns, block_depth, num_warps, num_stages)
        for block_pixels in (32, 64, 128, 256)
        for block_columns in dict.fromkeys((widest, max(16, widest // 2)))
        # Wider than 64 x 128 a tile does not fit the registers of 4 warps, narrower it starves 8.
        if 32 * 16 <= block_pixels * block_columns <= room
        for num_warps in ((8,) if block_pixels * block_columns > room // 2 else (4,))
        for block_depth, num_stages in dict.fromkeys(((deepest, 2), (deepest, 3), (max(16, deepest // 2), 4)))
    ]


@tunable(_sizes)
def tile_sizes(
    pixels: int, columns: int, depth: int, dtype: torch.dtype, backward: bool = False
) -> tuple[int, int, int, int, int]:
    """(BLOCK_PIXELS, columns of a tile, depth of a step, num_warps, num_stages) of a product by its shape.

    Tiles as wide as the result, so that the pixels are read once, up to 128 columns: beyond, registers run out. Few
    pixels get small tiles, to have programs for all multiprocessors. Float32 takes twice the room.
    """
    half = dtype != torch.float32
    block_columns = power_of_two(columns, 16, 128 if half else 64)
    block_depth = power_of_two(depth, 16, 64 if half else 32)
    block_pixels = 128
    while block_pixels > 32 and pixels * columns < 132 * block_pixels * block_columns:
        block_pixels //= 2
    # The derivative of a tile of grad_output lives in registers beside the accumulator.
    num_warps = 8 if block_pixels >= 128 and (block_columns >= 128 or backward or not half) else 4
    return block_pixels, block_columns, block_depth, num_warps, 3


def pixel_tiles(pixels: int, channels: int, out_channels: int, dtype: torch.dtype) -> int:
    """Rows of the bias gradient's partial sums that :func:`pointwise_backward` writes."""
    return triton.cdiv(pixels, tile_sizes(pixels, channels, out_channels, dtype, backward=True)[0])


def pointwise(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str | None,
    output: Tensor,
    saved: Tensor | None,
    residual: Tensor | None = None,
    scale: Tensor | None = None,
) -> None:
    """``output = f(conv2d(input, weight) + bias) + residual`` with stride 1; a strided input serves stride 2.

    Args:
        input: (N, C, H, W), any strides.
        weight: (O, C, 1, 1).
        output: (N, O, H, W), written.
        saved: mask (N, H, W, ceil(O / 8)) uint8, or value like ``output`` with its strides, written; or None.
        residual: like ``output``, or None.
        scale: of a weight in 8 bits, else None.
    """
    n, channels, height, width = input.shape
    out_channels, pixels = weight.size(0), n * height * width
    block_pixels, block_out, block_in, num_warps, num_stages = tile_sizes(pixels, out_channels, channels, input.dtype)
    flat = is_flat(input, residual, output)
    in_unit = min(stride_unit(channels, flat, input), alignment(weight.stride(0)))
    out_unit = stride_unit(out_channels, flat, output, residual)
    start(
        Launch(
            pointwise_kernel,
            (triton.cdiv(pixels, block_pixels) * triton.cdiv(out_channels, block_out),),
            dict(
                input=input, weight=weight, scale=scale, bias=bias, residual=residual, output=output, saved=saved,
                pixels=pixels, image=height * width, width=width, channels=channels // in_unit,
                out_channels=out_channels // out_unit, slope=LEAKY_SLOPE,
                **stride_arguments("input", input, in_unit, flat),
                **stride_arguments("residual", residual, out_unit, flat),
                **stride_arguments("output", output, out_unit, flat),
                weight_o=weight.stride(0) // in_unit, weight_c=weight.stride(1),
            ),
            dict(
                DTYPE=TRITON_DTYPE[output.dtype], ACTIVATION=activation,
                SAVE=saved_kind(activation, saved is not None),
                FLAT=flat,
                WIDE=needs_wide_offsets(input, residual, output), IN_UNIT=in_unit, OUT_UNIT=out_unit,
                PRECISION=dot_precision(input.dtype),
                BLOCK_PIXELS=block_pixels, BLOCK_OUT=block_out, BLOCK_IN=block_in,
            ),
            num_warps, num_stages,
        )
    )  # fmt: skip


def pointwise_backward(
    grad_output: Tensor,
    weight: Tensor,
    saved: Tensor | None,
    activation: str | None,
    grad_input: Tensor,
    grad_bias: Tensor | None,
    residual: Tensor | None = None,
    grad_pooled: Tensor | None = None,
    scale: Tensor | None = None,
) -> None:
    """Input gradient and partial sums of the bias gradient of :func:`pointwise`, in one pass.

    Args:
        grad_output: (N, O, H, W), any strides.
        weight: (O, C, 1, 1).
        saved: what the forward saved; None if there is no activation.
        grad_input: (N, C, H, W), written.
        grad_bias: (``pixel_tiles``, O) float32, written; or None.
        residual: like ``grad_input``, added to it; or None.
        grad_pooled: (N, C, H // 2, W // 2), added as a quarter to each pixel of a window; or None.
        scale: of a weight in 8 bits, else None.
    """
    n, channels, height, width = grad_input.shape
    out_channels, pixels = weight.size(0), n * height * width
    block_pixels, block_in, block_out, num_warps, num_stages = tile_sizes(
        pixels, channels, out_channels, grad_input.dtype, backward=True
    )
    save = saved_kind(activation)
    value = saved if save == "value" else None
    flat = is_flat(grad_output, value, residual, grad_input)
    in_unit = min(
        stride_unit(channels, flat, grad_input, residual),
        stride_unit(channels, False, grad_pooled),
        alignment(weight.stride(0)),
    )
    out_unit = stride_unit(out_channels, flat, grad_output, value)
    start(
        Launch(
            pointwise_backward_kernel,
            (triton.cdiv(pixels, block_pixels) * triton.cdiv(channels, block_in),),
            dict(
                grad_output=grad_output, weight=weight, scale=scale, saved=None if save == "nothing" else saved,
                residual=residual, grad_pooled=grad_pooled, grad_input=grad_input, grad_bias=grad_bias,
                pixels=pixels, image=height * width, width=width, channels=channels // in_unit,
                out_channels=out_channels // out_unit, slope=LEAKY_SLOPE,
                **stride_arguments("grad", grad_output, out_unit, flat),
                **stride_arguments("saved", value, out_unit, flat),
                **stride_arguments("residual", residual, in_unit, flat),
                **stride_arguments("pooled", grad_pooled, in_unit),
                **stride_arguments("input", grad_input, in_unit, flat),
                weight_o=weight.stride(0) // in_unit, weight_c=weight.stride(1),
            ),
            dict(
                DTYPE=TRITON_DTYPE[grad_input.dtype], ACTIVATION=activation, SAVE=save,
                FLAT=flat,
                WIDE=needs_wide_offsets(grad_output, value, residual, grad_input, grad_bias),
                IN_UNIT=in_unit, OUT_UNIT=out_unit, PRECISION=dot_precision(grad_input.dtype),
                # Where 8 warps are at the limit of two programs. Of smaller tiles ptxas then makes room for more
                # programs than fit, and spills; float32 keeps its registers either way.
                SUM_FIRST=channels <= block_in and num_warps == 8 and grad_input.dtype != torch.float32,
                BLOCK_PIXELS=block_pixels, BLOCK_OUT=block_out, BLOCK_IN=block_in,
            ),
            num_warps, num_stages,
        )
    )  # fmt: skip
