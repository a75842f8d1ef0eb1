"""How a kernel is launched: grid, arguments, compile-time constants and options in one object that can be inspected.

Launchers build :class:`Launch` objects from shapes alone (tensors on the meta device will do) and start them with
:func:`start`. Inside :func:`record` nothing is started: the launches are collected, so that what would run on a GPU
can be compiled ahead of time and its bytes counted on a machine without one.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

# Triton's names of the dtypes that kernels round to.
TRITON_DTYPE = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}

# Offsets are computed in 32 bits below this many elements, and in 64 from there on.
_LARGEST_NARROW_OFFSET = 2**31 - 1

# What the L2 cache is taken for where no GPU can be asked (interpreter, ahead-of-time compilation): an A100's.
_ASSUMED_L2_BYTES = 40 << 20


@dataclass(frozen=True)
class Launch:
    """One kernel launch.

    Attributes:
        kernel: the ``@triton.jit`` function.
        grid: programs along each axis; nothing is started if there are none.
        arguments: run-time arguments (tensors, numbers, None) by parameter name.
        constants: ``tl.constexpr`` arguments by parameter name.
        num_warps: in warps of 32 threads; see :meth:`warps_of`.
    """

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    constants: dict[str, Any]
    num_warps: int = 4
    num_stages: int = 2

    def warps_of(self, lanes: int) -> int:
        """As many warps of ``lanes`` threads (64 on AMD) as have the same number of threads."""
        return max(1, self.num_warps * 32 // lanes)


_recorded: list[Launch] | None = None

# Each takes what Triton made of the kernels that are started.
_compiled: list[list[Any]] = []


@contextlib.contextmanager
def record() -> Iterator[list[Launch]]:
    """Collect the launches of the ``with`` block instead of starting them. For one thread, not nested."""
    global _recorded
    if _recorded is not None:
        raise RuntimeError("record() cannot be nested")
    _recorded = []
    try:
        yield _recorded
    finally:
        _recorded = None


def recording() -> bool:
    """Whether a :func:`record` block is open."""
    return _recorded is not None


@contextlib.contextmanager
def compiled() -> Iterator[list[Any]]:
    """Collect what Triton made of every kernel that is started in the ``with`` block; nothing if it interprets them."""
    kernels: list[Any] = []
    _compiled.append(kernels)
    try:
        yield kernels
    finally:
        # Not remove(): two lists of the same kernels are equal.
        del _compiled[next(i for i, seen in enumerate(_compiled) if seen is kernels)]


def start(launch: Launch) -> None:
    """Start a launch on the device of its tensors, or collect it inside :func:`record`."""
    if math.prod(launch.grid) == 0:
        return
    if _recorded is not None:
        _recorded.append(launch)
        return
    kernel = launch.kernel[launch.grid](
        **launch.arguments,
        **launch.constants,
        num_warps=launch.warps_of(32 if torch.version.hip is None else 64),
        num_stages=launch.num_stages,
    )
    for kernels in _compiled:
        if kernel is not None:
            kernels.append(kernel)


# Told of every call of an operator: (operator, positional arguments, keyword arguments).
Observer = Callable[[Callable, tuple, dict[str, Any]], None]
_observers: list[Observer] = []


@contextlib.contextmanager
def observe(observer: Observer) -> Iterator[None]:
    """Tell ``observer`` of every operator that is called in the ``with`` block, by whatever thread, before it runs."""
    _observers.append(observer)
    try:
        yield
    finally:
        _observers.remove(observer)


def named(name: str) -> contextlib.AbstractContextManager[None]:
    """An NVTX range (roctx on AMD), where this PyTorch was built with them."""
    return torch.cuda.nvtx.range(name) if _has_ranges() else contextlib.nullcontext()


@functools.cache
def _has_ranges() -> bool:
    try:
        torch.cuda.nvtx.mark("tinytl")
    except RuntimeError:
        return False
    return True


def on_device(operator: Callable) -> Callable:
    """Run ``operator(tensor, ...)`` with the tensor's GPU as the current one, in an NVTX range of its name."""
    name = f"tinytl::{operator.__name__}"

    @functools.wraps(operator)
    def wrapped(tensor: Tensor, *args, **kwargs):
        for observer in _observers:
            observer(wrapped, (tensor, *args), kwargs)
        if tensor.device.type != "cuda":
            return operator(tensor, *args, **kwargs)
        with torch.cuda.device(tensor.device), named(name):
            return operator(tensor, *args, **kwargs)

    return wrapped


def power_of_two(at_least: int, least: int, most: int) -> int:
    """The smallest power of two that is ``at_least``, between ``least`` and ``most`` (powers of two themselves)."""
    return min(most, max(least, triton.next_power_of_2(max(1, at_least))))


def alignment(*numbers: int) -> int:
    """The largest power of two, up to 16, that divides every number.

    Triton knows that an argument is a multiple of 16 but not that it is one of 8 (24, 40, 56 channels), and without
    that loads one element at a time. Kernels get such numbers in units of this and multiply.
    """
    return math.gcd(16, *numbers)


def needs_wide_offsets(*tensors: Tensor | None) -> bool:
    """Whether an offset into one of the tensors does not fit 32 bits.

    Masked-off lanes may compute an offset a tile beyond the end, so a margin is kept.
    """
    margin = 1 << 24
    return any(t is not None and last_offset(t) + margin > _LARGEST_NARROW_OFFSET for t in tensors)


def last_offset(tensor: Tensor) -> int:
    """Offset of the last element from the first, in elements."""
    return sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if size > 1)


def pixel_stride(tensor: Tensor) -> int | None:
    """Distance of neighbouring pixels of a (N, C, H, W) tensor if all lie at equal distances, else None."""
    n, _, h, w = tensor.shape
    stride_n, _, stride_h, stride_w = tensor.stride()
    step = expected = None
    for size, stride in ((w, stride_w), (h, stride_h), (n, stride_n)):
        if size == 1:  # its stride says nothing
            continue
        if step is None:
            step = stride
        elif stride != expected:
            return None
        expected = stride * size
    return step or 0


def is_flat(*tensors: Tensor | None) -> bool:
    """Whether the pixels of every tensor lie at equal distances, so that (N, H, W) counts as one dimension."""
    return all(t is None or pixel_stride(t) is not None for t in tensors)


def pixel_strides(tensor: Tensor | None, flat: bool) -> tuple[int, int, int]:
    """Strides over (N, H, W) in elements; only the last one counts where ``flat``."""
    if tensor is None:
        return 0, 0, 0
    if flat:
        return 0, 0, pixel_stride(tensor) or 0
    return tensor.stride(0), tensor.stride(2), tensor.stride(3)


@triton.jit
def pixel_offset(pixel, image, width, stride_n, stride_h, stride_w, FLAT: tl.constexpr):
    """Offset of flat pixel indices (n * image + h * width + w), where ``image`` is H * W."""
    if FLAT:
        offset = pixel * stride_w
    else:
        place = pixel % image
        offset = (pixel // image) * stride_n + (place // width) * stride_h + (place % width) * stride_w
    return offset


def stride_unit(channels: int, flat: bool, *tensors: Tensor | None) -> int:
    """:func:`alignment` of a channel count and of the pixel strides of tensors that have so many channels."""
    return alignment(channels, *(stride for t in tensors for stride in pixel_strides(t, flat)))


def stride_arguments(name: str, tensor: Tensor | None, unit: int, flat: bool = False) -> dict[str, int]:
    """Kernel arguments ``name_n, name_h, name_w`` in units and ``name_c`` in elements; zeros for None."""
    n, h, w = pixel_strides(tensor, flat)
    channel = 0 if tensor is None else tensor.stride(1)
    return {f"{name}_n": n // unit, f"{name}_h": h // unit, f"{name}_w": w // unit, f"{name}_c": channel}


def dot_precision(dtype: torch.dtype) -> str:
    """``input_precision`` of ``tl.dot``: TF32 for float32 only where PyTorch's switch for convolutions allows it."""
    if dtype != torch.float32:
        return "tf32"  # not looked at for half precision
    # ROCm ignores the switch, as AMD's matrix units compute float32 in full.
    return "tf32" if torch.backends.cudnn.conv.fp32_precision == "tf32" and torch.version.hip is None else "ieee"


@functools.cache
def l2_bytes(device: torch.device) -> int:
    """Size of the L2 cache of ``device`` in bytes."""
    if device.type != "cuda":
        return _ASSUMED_L2_BYTES
    return getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 0) or _ASSUMED_L2_BYTES
