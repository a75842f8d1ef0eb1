"""The kernels of the CPU backend, each at shapes of real networks at batch 8, and the operations that it has to do."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.gpu.operators import (
    Sample,
    Size,
    block,
    conv,
    group_norm,
    max_pool,
    mbconv,
    stem_block,
    unary,
    upsample_add,
)
from tinytl_kernels import ops
from tinytl_kernels.ops.lite_branch import Norm

Build = Callable[[torch.dtype, torch.device], Sample]


class Work(NamedTuple):
    """A kernel at one shape.

    Args:
        build: Draws the arguments.
        forward_flops, backward_flops: Operations of its convolutions, 2 a multiply-add, zeros of the padding included
            as PyTorch's FlopCounterMode counts them. Norms, activations, pooling and sums count nothing: bytes bound
            them. What a backward computes again counts nothing either.
    """

    build: Build
    forward_flops: int = 0
    backward_flops: int = 0


@dataclass(frozen=True)
class KernelCase:
    """One row of the table, forward and backward.

    Args:
        name: Unique; the pytest parameter.
        size: (N, C, H, W) of the input.
        make: ``make(size) -> Work``.
    """

    name: str
    size: Size
    make: Callable[[Size], Work]

    def quick(self) -> KernelCase:
        """The same with a few small images."""
        n, c, h, w = self.size
        return replace(self, size=(min(n, 2), c, min(h, 8), min(w, 8)))

    def tiny(self) -> KernelCase:
        """The same with next to no work: what is left of its time is the call's."""
        return replace(self, size=(1, self.size[1], 2, 2))


def _frozen(
    out_channels: int, kernel: int, stride: int, groups: int, activation: str | None, int8: bool, size: Size
) -> Work:
    n, c, h, w = size
    # "Same" padding of an odd kernel.
    pixels = n * math.ceil(h / stride) * math.ceil(w / stride)
    flops = 2 * pixels * out_channels * c // groups * kernel**2
    # A frozen convolution has no gradient of its weight: backward is as much work as forward.
    return Work(conv(size, out_channels, kernel, stride, groups, activation, int8=int8), flops, flops)


def _conv(
    name: str, channels: int, out_channels: int, side: int, kernel: int = 1, *, stride: int = 1, groups: int = 1,
    activation: str | None = "relu6", int8: bool = False,
) -> KernelCase:  # fmt: skip
    shape = f"{kernel}x{kernel}" + (f"_s{stride}" if stride > 1 else "") + (f"_g{groups}" if groups > 1 else "")
    case = f"{name}_{shape}_{channels}_{out_channels}_{side}"
    make = partial(_frozen, out_channels, kernel, stride, groups, activation, int8)
    return KernelCase(case, (8, channels, side, side), make)


def _depthwise(
    channels: int, side: int, kernel: int, stride: int, *, name: str = "depthwise", activation: str = "relu6",
    int8: bool = False,
) -> KernelCase:  # fmt: skip
    case = f"{name}_{kernel}x{kernel}_s{stride}_{channels}_{side}"
    make = partial(_frozen, channels, kernel, stride, channels, activation, int8)
    return KernelCase(case, (8, channels, side, side), make)


def _inverted_residual(out_channels: int, ratio: int, kernel: int, stride: int, pooled: bool, size: Size) -> Work:
    n, c, h, w = size
    hidden = c * ratio
    before, after = n * h * w, n * math.ceil(h / stride) * math.ceil(w / stride)
    expand = before * c * hidden if ratio > 1 else 0
    flops = 2 * (expand + after * hidden * (kernel**2 + out_channels))
    return Work(block(size, out_channels, ratio, kernel, stride, pooled), flops, flops)


def _block(
    channels: int, out_channels: int, side: int, *, ratio: int = 6, kernel: int = 3, stride: int = 1,
    pooled: bool = False,
) -> KernelCase:  # fmt: skip
    name = "inverted_residual" + (f"_{kernel}x{kernel}" if kernel != 3 else "") + ("_pooled" if pooled else "")
    make = partial(_inverted_residual, out_channels, ratio, kernel, stride, pooled)
    return KernelCase(f"{name}_{channels}x{ratio}_{out_channels}_s{stride}_{side}", (8, channels, side, side), make)


def _stem_block(hidden: int, out_channels: int, side: int) -> KernelCase:
    def make(size: Size) -> Work:
        n, c, h, w = size
        pixels = n * math.ceil(h / 2) * math.ceil(w / 2)
        behind = 2 * pixels * hidden * (9 + out_channels)
        # The image has no gradient.
        return Work(stem_block(size, hidden, out_channels), behind + 2 * pixels * hidden * 9 * c, behind)

    return KernelCase(f"stem_block_3_{hidden}_{out_channels}_{side}", (8, 3, side, side), make)


def _mbconv(
    channels: int, hidden: int, out_channels: int, side: int, *, kernel: int = 3, stride: int = 1, squeezed: int = 0,
    activation: str = "silu", gate: str = "sigmoid",
) -> KernelCase:  # fmt: skip
    def make(size: Size) -> Work:
        n, c, h, w = size
        before, after = n * h * w, n * math.ceil(h / stride) * math.ceil(w / stride)
        flops = 2 * hidden * (before * c + after * (kernel**2 + out_channels) + 2 * n * squeezed)
        return Work(mbconv(size, out_channels, hidden, kernel, stride, squeezed, activation, gate), flops, flops)

    name = f"mbconv_{activation}" + (f"_{kernel}x{kernel}" if kernel != 3 else "") + ("_se" if squeezed else "")
    case = f"{name}_{channels}_{hidden}_{out_channels}_s{stride}_{side}"
    return KernelCase(case, (8, channels, side, side), make)


def _without_arithmetic(name: str, channels: int, side: int, build: Callable[[Size], Build]) -> KernelCase:
    return KernelCase(f"{name}_{channels}_{side}", (8, channels, side, side), lambda size: Work(build(size)))


def _unary(name: str, channels: int, side: int, function: Callable[[Tensor], Tensor]) -> KernelCase:
    return _without_arithmetic(name, channels, side, partial(unary, function=function))


def _activation(name: str, channels: int, side: int) -> KernelCase:
    return _unary(name, channels, side, partial(ops.activation, name=name))


def _lite_branch(channels: int, out_channels: int, side: int, groups: int = 2, kernel: int = 5) -> KernelCase:
    """The branch of a lite residual behind its pooling, with GroupNorms: all of it is trained."""

    def make(size: Size) -> Work:
        n, c, h, w = size

        def build(dtype: torch.dtype, device: torch.device) -> Sample:
            def normal(*shape: int, scale: float = 1.0) -> Tensor:
                return (torch.randn(shape, device=device) * scale).to(dtype)

            def function(x, weight1, scale1, bias1, weight2, scale2, bias2) -> Tensor:
                norm1, norm2 = Norm(scale1, bias1, groups=c // 8), Norm(scale2, bias2, groups=out_channels // 8)
                return ops.lite_branch(x, weight1, norm1, weight2, norm2, groups=groups)[0]

            image = normal(*size).contiguous(memory_format=torch.channels_last)
            weight1 = normal(c, c // groups, kernel, kernel, scale=(c // groups * kernel**2) ** -0.5)
            weight2 = normal(out_channels, c, 1, 1, scale=c**-0.5)
            scale1, bias1, scale2, bias2 = map(normal, (c, c, out_channels, out_channels))
            return Sample(function, (image, weight1, scale1, bias1, weight2, scale2, bias2))

        flops = 2 * n * h * w * c * (c // groups * kernel**2 + out_channels)
        # Gradients of the input and of the weights.
        return Work(build, flops, 2 * flops)

    return KernelCase(f"lite_branch_{channels}_{out_channels}_{side}", (8, channels, side, side), make)


def _linear(inputs: int, outputs: int) -> KernelCase:
    """A classifier of a row an image, trained."""

    def make(size: Size) -> Work:
        n, c = size[:2]

        def build(dtype: torch.dtype, device: torch.device) -> Sample:
            x, weight = torch.randn(n, c, device=device), torch.randn(outputs, c, device=device) * c**-0.5
            return Sample(ops.linear, (x.to(dtype), weight.to(dtype), torch.randn(outputs, device=device).to(dtype)))

        flops = 2 * n * c * outputs
        return Work(build, flops, 2 * flops)

    return KernelCase(f"linear_{inputs}_{outputs}", (8, inputs, 1, 1), make)


KERNELS = (
    _conv("pointwise", 24, 144, 56),
    _conv("pointwise", 144, 24, 56, activation=None),
    _conv("pointwise", 96, 576, 14),
    _conv("pointwise", 320, 1280, 7),
    _conv("pointwise", 256, 512, 56, stride=2, activation=None),
    _conv("pointwise_int8", 320, 1280, 7, int8=True),
    _depthwise(144, 56, 3, 1),
    _depthwise(96, 112, 3, 2),
    _depthwise(240, 28, 5, 1),
    _depthwise(144, 56, 5, 2),
    _depthwise(192, 28, 7, 1),
    _depthwise(144, 56, 7, 2),
    _depthwise(144, 56, 3, 1, name="depthwise_int8", int8=True),
    _conv("pointwise_hardswish", 112, 672, 14, activation="hardswish"),
    _conv("pointwise_silu", 112, 672, 14, activation="silu"),
    _depthwise(672, 14, 5, 1, name="depthwise_hardswish", activation="hardswish"),
    _depthwise(672, 14, 5, 1, name="depthwise_silu", activation="silu"),
    _conv("stem", 3, 32, 224, 3, stride=2),
    _conv("dense", 64, 64, 56, 3, activation="relu"),
    _conv("dense", 128, 128, 56, 3, stride=2, activation="relu"),
    _conv("dense", 256, 256, 14, 3, activation="relu"),
    _conv("dense", 512, 512, 7, 3, activation="relu"),
    _conv("dense", 48, 12, 28, 3, activation="relu"),  # narrow: oneDNN's arithmetic, with our pass over its output
    _conv("dense_int8", 64, 64, 56, 3, activation="relu", int8=True),
    _conv("grouped", 128, 128, 56, 3, groups=4, activation="relu"),
    _conv("grouped", 96, 96, 14, 5, groups=2, activation="relu"),
    _stem_block(32, 16, 224),
    _block(32, 16, 112, ratio=1),
    _block(16, 24, 112, stride=2),
    _block(24, 24, 56),
    _block(32, 32, 28),
    _block(64, 64, 14),
    _block(96, 160, 14, stride=2),
    _block(160, 160, 7),
    _block(40, 40, 28, kernel=5),
    _block(32, 32, 28, pooled=True),
    _mbconv(40, 120, 40, 28, kernel=5, squeezed=32, activation="relu", gate="hardsigmoid"),
    _mbconv(80, 200, 80, 14, activation="hardswish"),
    _mbconv(160, 960, 160, 7, kernel=5, squeezed=240, activation="hardswish", gate="hardsigmoid"),
    _mbconv(16, 96, 24, 112, stride=2, squeezed=4),
    _mbconv(112, 672, 112, 14, kernel=5, squeezed=28),
    _activation("relu6", 96, 112),
    _activation("relu", 64, 56),
    _activation("leaky_relu", 64, 56),
    _activation("hardsigmoid", 64, 56),
    _unary("silu_code_bits_8", 96, 56, partial(ops.activation, name="silu", code_bits=8)),
    _without_arithmetic("max_pool_3x3_s2", 64, 112, max_pool),
    _without_arithmetic("max_pool_2x2_s2", 64, 56, partial(max_pool, kernel=2)),
    _unary("avg_pool_2x2_s2", 24, 56, lambda x: ops.avg_pool2d(x, 2)),
    _unary("avg_pool_2x2_s2", 256, 56, lambda x: ops.avg_pool2d(x, 2)),
    _unary("avg_pool_3x3_s1", 64, 28, lambda x: ops.avg_pool2d(x, 3, 1, 1)),
    _unary("global_avg_pool", 1280, 7, lambda x: ops.adaptive_avg_pool2d(x, 1)),  # ATen's
    _without_arithmetic("upsample_add", 24, 56, upsample_add),
    _without_arithmetic("upsample_add", 256, 56, upsample_add),
    _without_arithmetic("group_norm_relu6", 144, 56, partial(group_norm, groups=18, activation="relu6")),
    _without_arithmetic("group_norm_silu", 96, 28, partial(group_norm, groups=12, activation="silu")),
    _without_arithmetic("group_norm", 64, 56, partial(group_norm, groups=8, activation=None)),
    _lite_branch(24, 24, 28),
    _lite_branch(96, 96, 7),
    _linear(1280, 1000),
)
