"""Smooth activations with their derivative in 8 bits, one pass each way over dense memory in whatever order."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from tinytl_kernels.backends.triton.epilogue import activate, gradient_by_value
from tinytl_kernels.backends.triton.launch import TRITON_DTYPE, Launch, needs_wide_offsets, start
from tinytl_kernels.core.derivative_code import DERIVATIVE_CODES, NAN_CODE
from tinytl_kernels.core.layout import with_strides_of

# Elements of a program: 16 a thread at 4 warps, so that a thread's codes are 16 bytes.
_BLOCK = 2048


@triton.jit
def encode_kernel(
    input, output, codes, elements,
    DTYPE: tl.constexpr, ACTIVATION: tl.constexpr, ZERO: tl.constexpr, STEPS: tl.constexpr, NAN: tl.constexpr,
    WIDE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """output[i] = f(input[i]), codes[i] = round(ZERO + STEPS f'(input[i])), NAN where input[i] or that is NaN.

    A program computes BLOCK elements. Bytes an element: input + output + 1.
    """
    i = block_of_elements(WIDE, BLOCK)
    x = tl.load(input + i, mask=i < elements, other=0.0).to(tl.float32)
    # Half up, where the other backends round half to even: either is half a step off.
    code = tl.floor(ZERO + 0.5 + STEPS * gradient_by_value(1.0, x, ACTIVATION))
    code = tl.where((code == code) & (x == x), code, NAN)
    tl.store(codes + i, code.to(tl.int32).to(tl.uint8), mask=i < elements)
    tl.store(output + i, activate(x, 0.0, ACTIVATION).to(DTYPE), mask=i < elements)


@triton.jit
def decode_kernel(
    grad_output, codes, grad_input, elements,
    DTYPE: tl.constexpr, ZERO: tl.constexpr, STEPS: tl.constexpr, NAN: tl.constexpr, WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """grad_input[i] = grad_output[i] (codes[i] - ZERO) / STEPS; NaN where the code is NAN.

    A program computes BLOCK elements. Bytes an element: grad_output + grad_input + 1.
    """
    i = block_of_elements(WIDE, BLOCK)
    code = tl.load(codes + i, mask=i < elements, other=ZERO).to(tl.float32)
    derivative = tl.where(code == NAN, float("nan"), tl.div_rn(code - ZERO, STEPS * 1.0))
    grad = tl.load(grad_output + i, mask=i < elements, other=0.0).to(tl.float32) * derivative
    tl.store(grad_input + i, grad.to(DTYPE), mask=i < elements)


@triton.jit
def block_of_elements(WIDE: tl.constexpr, BLOCK: tl.constexpr):
    """The elements that this program computes."""
    block = tl.program_id(0)
    if WIDE:
        block = block.to(tl.int64)
    return block * BLOCK + tl.arange(0, BLOCK)


def activate_and_encode(input: Tensor, name: str) -> tuple[Tensor, Tensor]:
    """A smooth activation and its derivative's codes, uint8, both in the strides of ``torch.empty_like(input)``."""
    output = torch.empty_like(input)
    codes = torch.empty_like(input, dtype=torch.uint8)
    _start(
        encode_kernel,
        output,
        dict(ACTIVATION=name),
        name,
        input=with_strides_of(output, input),
        output=output,
        codes=codes,
    )
    return output, codes


def decode_gradient(grad_output: Tensor, codes: Tensor, name: str) -> Tensor:
    """``grad_output`` times the coded derivative, in the strides of ``torch.empty_like(grad_output)``."""
    grad_input = torch.empty_like(grad_output)
    tensors = dict(
        grad_output=with_strides_of(grad_input, grad_output),
        codes=with_strides_of(grad_input, codes),
        grad_input=grad_input,
    )
    _start(decode_kernel, grad_input, {}, name, **tensors)
    return grad_input


def _start(kernel, like: Tensor, constants: dict, name: str, **tensors: Tensor) -> None:
    code = DERIVATIVE_CODES[name]
    constants |= dict(
        DTYPE=TRITON_DTYPE[like.dtype], ZERO=code.zero, STEPS=code.steps, NAN=NAN_CODE,
        WIDE=needs_wide_offsets(like), BLOCK=_BLOCK,
    )  # fmt: skip
    elements = like.numel()
    start(Launch(kernel, (triton.cdiv(elements, _BLOCK),), dict(**tensors, elements=elements), constants))
