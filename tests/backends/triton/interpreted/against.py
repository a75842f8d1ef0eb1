"""An operator of the Triton backend beside the reference's, on the same arguments."""

from __future__ import annotations

import torch
from torch import Tensor

from tests.checks import assert_as_exact_as_torch
from tinytl_kernels.backends import reference
from tinytl_kernels.backends.triton.operators import OPERATORS

# bfloat16 is left to a GPU: the interpreter's tl.dot is wrong in it (Triton 3.9).
DTYPES = (torch.float32, torch.float16)
LAYOUTS = ("channels_last", "contiguous", "sliced")


def image(size: tuple[int, int, int, int], dtype: torch.dtype, layout: str = "channels_last") -> Tensor:
    """Small whole numbers, of which every sum is exact, so that masks must agree in every bit."""
    n, c, h, w = size
    if layout == "sliced":
        return torch.randint(-3, 4, (n, c + 3, 2 * h, w + 1)).to(dtype)[:, 1:-2, ::2, 1:]
    values = torch.randint(-3, 4, size).to(dtype)
    return values.contiguous(memory_format=torch.channels_last) if layout == "channels_last" else values


def numbers(*size: int, dtype: torch.dtype, step: float = 0.5) -> Tensor:
    """Multiples of ``step`` between -2 and 2."""
    return (torch.randint(-int(2 / step), int(2 / step) + 1, size) * step).to(dtype)


def compare(name: str, *args) -> tuple[Tensor, ...]:
    """Run ``name`` on both backends; outputs must agree, masks in every bit. Returns the Triton backend's outputs.

    Numbers may be off from float64's by twice what the reference's are, plus 4 ulp of the largest.
    """
    ours, stock = _outputs(OPERATORS[name], args), _outputs(reference.OPERATORS[name], args)
    exact = _outputs(reference.OPERATORS[name], [_double(a) for a in args])
    for index, (a, b, c) in enumerate(zip(ours, stock, exact, strict=True)):
        label = f"{name}, output {index}"
        assert a.stride() == b.stride(), f"{label}: strides {a.stride()}, expected {b.stride()}"
        if a.dtype == torch.uint8:
            assert torch.equal(a, b), f"{label}: {(a != b).sum()} of {a.numel()} bytes differ"
        else:
            assert_as_exact_as_torch(label, a, b, c)
    return ours


def check_convolution(
    geometry: tuple, dtype: torch.dtype, layout: str = "channels_last", activation: str | None = "relu6",
    need: tuple[bool, bool] = (True, True), weight: Tensor | None = None, scale: Tensor | None = None,
) -> None:  # fmt: skip
    """Forward and backward of a frozen convolution agree with the reference.

    Args:
        geometry: (N, C, H, W), (O, C / groups, kH, kW), stride, (top, bottom, left, right), dilation, groups.
        weight, scale: in place of random numbers, in 8 bits.
    """
    size, weight_size, *shape = geometry
    x = image(size, dtype, layout)
    weight = numbers(*weight_size, dtype=dtype) if weight is None else weight
    bias = numbers(weight_size[0], dtype=dtype)
    output, saved = compare("frozen_conv", x, weight, bias, *shape, activation, True, scale)
    grad = torch.randn(output.shape).to(dtype)
    if layout == "channels_last":
        grad = grad.contiguous(memory_format=torch.channels_last)
    last = layout == "channels_last"
    compare("frozen_conv_backward", grad, weight, saved, size, *shape, activation, last, *need, scale)


def _outputs(function, args) -> tuple[Tensor, ...]:
    outputs = function(*args)
    return outputs if isinstance(outputs, tuple) else (outputs,)


def _double(value):
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value
