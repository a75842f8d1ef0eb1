"""The GPU backend: Triton kernels for NVIDIA and AMD. Operators that it lacks are the reference's.

It also runs through Triton's interpreter on CPU tensors (``TRITON_INTERPRET=1``, set before Triton's import), slowly:
this is how the kernels are tested without a GPU.
"""

from __future__ import annotations

import functools
import importlib.util
import os

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@functools.cache
def interpreting() -> bool:
    """Whether Triton interprets kernels on the CPU instead of compiling them."""
    # Asked of Triton only where it may say yes: importing it takes a second.
    if "TRITON_INTERPRET" not in os.environ or importlib.util.find_spec("triton") is None:
        return False
    from triton import knobs

    return bool(knobs.runtime.interpret)


@functools.cache
def unavailable_reason() -> str | None:
    """Why the kernels cannot run here, or None."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed (it comes with PyTorch's CUDA and ROCm builds for Linux)"
    if not torch.cuda.is_available() and not interpreting():
        return "PyTorch sees no GPU (TRITON_INTERPRET=1 runs the kernels on the CPU, slowly)"
    return None


def cannot_take(tensor: Tensor) -> str | None:
    """Why the kernels cannot take ``tensor``, or None."""
    if tensor.device.type != "cuda" and not (interpreting() and tensor.device.type == "cpu"):
        return f"expected a tensor on a GPU, got one on {tensor.device}"
    if tensor.dtype not in DTYPES:
        return f"expected float32, float16 or bfloat16, got {tensor.dtype}"
    return None


def __getattr__(name: str):
    # Kernels are only imported where they can run: Triton takes a second to import.
    if name != "OPERATORS":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if unavailable_reason() is not None:
        return {}
    from tinytl_kernels.backends.triton.operators import OPERATORS

    return OPERATORS
