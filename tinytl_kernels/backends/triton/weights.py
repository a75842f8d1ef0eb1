"""Frozen weights on their way into a product: cast, or dequantised from 8 bits, as they are loaded."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def load_weight(weight, scale, offset, out, inside_out, valid, DTYPE: tl.constexpr):
    """A tile of a weight in DTYPE; 0 where not ``valid``.

    Codes in 8 bits (``core.quantization``) are read as such, a quarter of float32's bytes, and rounded to DTYPE as the
    reference rounds them: int8 times the scale (O,) of output channel ``out``, uint8 by the codebook (256,).
    ``scale`` is None for a floating point weight. ``out`` and ``inside_out`` have one row or one column, of output
    channels and where there are any.
    """
    tile = tl.load(weight + offset, mask=valid, other=0)
    if scale is not None:
        if weight.dtype.element_ty == tl.int8:
            tile = tile.to(tl.float32) * tl.load(scale + out, mask=inside_out, other=0.0)
        else:
            tile = tl.load(scale + tile.to(tl.int32), mask=valid, other=0.0)
    return tile.to(DTYPE)
