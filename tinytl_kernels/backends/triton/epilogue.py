"""What happens to a tile between arithmetic and memory: bias, activation and mask on the way out, derivative on the
way back in. Shared by all kernels; a tile is (ROWS pixels, CHANNELS).

Comparisons and choices instead of min and max, because those instructions swallow NaN.
"""

from __future__ import annotations

import triton
import triton.language as tl

from tinytl_kernels.backends.triton.bitmask import load_bits, store_bits
from tinytl_kernels.core.activations import BIT_MASK

# What a kernel stores, or finds, beside the output: nothing, the bit mask, the value before the activation.
NOTHING, MASK, VALUE = "nothing", "mask", "value"


def saved_kind(activation: str | None, needs_saved: bool = True) -> str:
    """Which of ``"nothing"``, ``"mask"``, ``"value"`` the derivative of ``activation`` needs."""
    if activation is None or not needs_saved:
        return NOTHING
    return MASK if activation in BIT_MASK else VALUE


@triton.jit
def activate(x, slope, ACTIVATION: tl.constexpr):
    """f(x) in float32, as PyTorch defines it. ``slope`` is leaky_relu's."""
    if ACTIVATION == "relu":
        x = tl.where(x <= 0, 0.0, x)
    elif ACTIVATION == "relu6":
        x = tl.where(x <= 0, 0.0, tl.where(x >= 6, 6.0, x))
    elif ACTIVATION == "leaky_relu":
        x = tl.where(x > 0, x, x * slope)
    elif ACTIVATION == "hardsigmoid":
        x = tl.where(x <= -3, 0.0, tl.where(x >= 3, 6.0, x + 3)) / 6
    elif ACTIVATION == "hardswish":
        x = x * tl.where(x <= -3, 0.0, tl.where(x >= 3, 6.0, x + 3)) / 6
    elif ACTIVATION == "silu":
        x = x * tl.sigmoid(x)
    elif ACTIVATION == "gelu":
        x = 0.5 * x * (1 + tl.erf(x * 0.7071067811865476))
    elif ACTIVATION == "gelu_tanh":
        # (1 + tanh u) / 2 = sigmoid(2 u)
        x = x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    elif ACTIVATION == "sigmoid":
        x = tl.sigmoid(x)
    return x


@triton.jit
def passes(x, ACTIVATION: tl.constexpr):
    """Where the gradient passes a ReLU-family activation at x. A NaN passes ReLU and no other, as in PyTorch."""
    if ACTIVATION == "relu":
        bits = (x <= 0) == 0
    elif ACTIVATION == "relu6":
        bits = (x > 0) & (x < 6)
    elif ACTIVATION == "leaky_relu":
        bits = x > 0
    else:
        bits = (x > -3) & (x < 3)
    return bits


@triton.jit
def gradient_by_bits(grad, bits, slope, ACTIVATION: tl.constexpr):
    """f' * grad of a ReLU-family activation from its mask. A choice: a stopped infinity is 0, not NaN."""
    if ACTIVATION == "leaky_relu":
        grad = tl.where(bits, grad, grad * slope)
    elif ACTIVATION == "hardsigmoid":
        grad = tl.where(bits, grad / 6, 0.0)
    else:
        grad = tl.where(bits, grad, 0.0)
    return grad


@triton.jit
def gradient_by_value(grad, x, ACTIVATION: tl.constexpr):
    """f'(x) * grad of a smooth activation."""
    if ACTIVATION == "hardswish":
        grad = tl.where(x <= -3, 0.0, tl.where(x < 3, grad * (x / 3 + 0.5), grad))
    elif ACTIVATION == "silu":
        s = tl.sigmoid(x)
        grad = grad * s * (1 + x * (1 - s))
    elif ACTIVATION == "gelu":
        density = 0.3989422804014327 * tl.exp(-0.5 * x * x)
        grad = grad * (0.5 * (1 + tl.erf(x * 0.7071067811865476)) + x * density)
    elif ACTIVATION == "sigmoid":
        s = tl.sigmoid(x)
        grad = grad * s * (1 - s)
    else:
        s = tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
        grad = grad * (s + x * s * (1 - s) * 1.5957691216057308 * (1 + 0.134145 * x * x))
    return grad


@triton.jit
def save_and_activate(
    x, saved, saved_offset, pixel, inside, first_channel, channels, slope,
    DTYPE: tl.constexpr, ACTIVATION: tl.constexpr, SAVE: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr,
    mask_channels=None,
):  # fmt: skip
    """f(x) of a float32 tile x, after storing what the derivative needs.

    x is rounded to the output's dtype first: mask and value must be those of the number that PyTorch would have stored.
    ``saved_offset`` (ROWS, CHANNELS) is for a saved value, ``pixel`` (ROWS,) for a mask; ``inside`` (ROWS,). Where the
    tile is of one group of channels, ``channels`` is the group's end and ``mask_channels`` all groups' channels.
    """
    x = x.to(DTYPE).to(tl.float32)
    valid = (first_channel + tl.arange(0, CHANNELS) < channels)[None, :]
    if SAVE == "mask":
        bits = passes(x, ACTIVATION) & valid
        store_bits(saved, bits, pixel, inside, first_channel, channels, ROWS, CHANNELS, mask_channels)
    elif SAVE == "value":
        tl.store(saved + saved_offset, x.to(DTYPE), mask=inside[:, None] & valid)
    return activate(x, slope, ACTIVATION)


@triton.jit
def load_gradient(
    grad_output, grad_offset, saved, saved_offset, pixel, inside, first_channel, channels, slope,
    ACTIVATION: tl.constexpr, SAVE: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr,
    mask_channels=None,
):  # fmt: skip
    """f' * grad_output, 0 outside. Arguments as in :func:`save_and_activate`.

    Float32; where f' is 0 or 1 of grad_output's own dtype, which is exact and takes half the registers.
    """
    valid = inside[:, None] & (first_channel + tl.arange(0, CHANNELS) < channels)[None, :]
    grad = tl.load(grad_output + grad_offset, mask=valid, other=0.0)
    if SAVE == "value" or ACTIVATION == "leaky_relu" or ACTIVATION == "hardsigmoid":
        grad = grad.to(tl.float32)
    if SAVE == "mask":
        bits = load_bits(saved, pixel, inside, first_channel, channels, ROWS, CHANNELS, mask_channels)
        grad = gradient_by_bits(grad, bits, slope, ACTIVATION)
    elif SAVE == "value":
        x = tl.load(saved + saved_offset, mask=valid, other=0.0).to(tl.float32)
        grad = gradient_by_value(grad, x, ACTIVATION)
    return grad


@triton.jit
def sum_over_pixels(tile):
    """(CHANNELS,) float32, the sums of a tile of any dtype."""
    return tl.sum(tile.to(tl.float32), axis=0)
