"""The derivative of a smooth activation in 8 bits: one byte an element in place of the value that it follows from.

    code = round(zero + steps f'(x)),  0 <= code < 255          f'(x) ~ (code - zero) / steps, off by <= 1 / (2 steps)

Uniform: a gradient is off by at most that part of grad_output, wherever x is. ``zero`` and ``steps`` are whole numbers,
so the derivatives 0 and 1 (sigmoid: 0 and 1/4) are exact: far from the bend an element gets its exact gradient.
``steps`` is the largest such number with which the derivatives fit. Code 255 says NaN.
"""

from __future__ import annotations

from dataclasses import dataclass

NAN_CODE = 255


@dataclass(frozen=True)
class DerivativeCode:
    """Where the codes of one activation lie.

    Args:
        zero: the code of the derivative 0.
        steps: codes from the derivative 0 to the derivative 1.
    """

    zero: int
    steps: int

    @property
    def error(self) -> float:
        """The most by which a derivative in 8 bits is off: half a step."""
        return 1 / (2 * self.steps)


# Derivatives lie in [-1/2, 3/2] (hardswish), [-0.0999, 1.0999], [-0.1290, 1.1290] and [0, 1/4].
DERIVATIVE_CODES = {
    "hardswish": DerivativeCode(zero=63, steps=127),
    "silu": DerivativeCode(zero=21, steps=212),
    "gelu": DerivativeCode(zero=26, steps=202),
    "gelu_tanh": DerivativeCode(zero=26, steps=202),
    "sigmoid": DerivativeCode(zero=0, steps=1016),
}


def check_code_bits(code_bits: int | None) -> None:
    """Raise ``ValueError`` unless ``code_bits`` is None or 8."""
    if code_bits is not None and (isinstance(code_bits, bool) or code_bits != 8):
        raise ValueError(f"code_bits: expected None (exact gradients) or 8, got {code_bits!r}")
