"""What is compiled: the operators of MobileNetV2 and ResNet-50 as TinyTL fine-tunes them, run without memory."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from tinytl_kernels.backends.triton import choice, whole_block
from tinytl_kernels.backends.triton.launch import Launch, record
from tinytl_kernels.backends.triton.operators import OPERATORS

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
BATCH = 128


@dataclass(frozen=True)
class Layer:
    """A frozen convolution of a network: (C, H, H) -> (O, H / stride, H / stride). ``first``: no gradient below it."""

    channels: int
    out_channels: int
    kernel: int
    stride: int
    groups: int
    size: int
    activation: str | None
    first: bool = False


def mobilenet_v2() -> list[Layer]:
    """The convolutions of MobileNetV2 (Sandler et al. 2018, table 2)."""
    layers, channels, size = [Layer(3, 32, 3, 2, 1, 224, "relu6", first=True)], 32, 112
    blocks = [(1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1)]
    for expand, out_channels, count, first_stride in blocks:
        for stride in [first_stride] + [1] * (count - 1):
            hidden = channels * expand
            if expand > 1:
                layers.append(Layer(channels, hidden, 1, 1, 1, size, "relu6"))
            layers.append(Layer(hidden, hidden, 3, stride, hidden, size, "relu6"))
            size //= stride
            layers.append(Layer(hidden, out_channels, 1, 1, 1, size, None))
            channels = out_channels
    return [*layers, Layer(320, 1280, 1, 1, 1, 7, "relu6")]


def resnet50() -> list[Layer]:
    """The convolutions of ResNet-50 (He et al. 2016, table 1); the stride is in the 3x3."""
    layers, channels, size = [Layer(3, 64, 7, 2, 1, 224, "relu", first=True)], 64, 56
    for width, count, first_stride in [(64, 3, 1), (128, 4, 2), (256, 6, 2), (512, 3, 2)]:
        for stride in [first_stride] + [1] * (count - 1):
            layers.append(Layer(channels, width, 1, 1, 1, size, "relu"))
            layers.append(Layer(width, width, 3, stride, 1, size, "relu"))
            if channels != 4 * width:
                layers.append(Layer(channels, 4 * width, 1, stride, 1, size, None))
            size //= stride
            layers.append(Layer(width, 4 * width, 1, 1, 1, size, None))
            channels = 4 * width
    return layers


def image(dtype: torch.dtype, *size: int) -> Tensor:
    """(N, C, H, W), channels_last, without memory."""
    return torch.empty(size, dtype=dtype, device="meta", memory_format=torch.channels_last)


def numbers(*size: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """A parameter without memory."""
    return torch.empty(size, dtype=dtype, device="meta")


@contextlib.contextmanager
def forced(variable: str, name: str | None) -> Iterator[None]:
    """An environment variable that picks kernels, inside the ``with`` block; None: as shipped."""
    before = os.environ.pop(variable, None)
    if name is not None:
        os.environ[variable] = name
    try:
        yield
    finally:
        os.environ.pop(variable, None)
        if before is not None:
            os.environ[variable] = before


def launches(
    layer: Layer, dtype: torch.dtype, batch: int = BATCH, *, by: str | None = None, int8: bool = False
) -> list[Launch]:
    """The launches of a layer's forward and backward.

    Args:
        by: who computes a dense convolution, one of ``choice.DENSE``; None: as shipped.
        int8: a weight in 8 bits.
    """
    x = image(dtype, batch, layer.channels, layer.size, layer.size)
    weight = numbers(
        layer.out_channels, layer.channels // layer.groups, layer.kernel, layer.kernel,
        dtype=torch.int8 if int8 else dtype,
    ).contiguous(memory_format=torch.channels_last)  # fmt: skip
    scale = numbers(layer.out_channels) if int8 else None
    geometry = ([layer.stride] * 2, [layer.kernel // 2] * 4, [1, 1], layer.groups)
    with forced(choice.ENVIRONMENT_VARIABLE, by), record() as recorded:
        output, saved = OPERATORS["frozen_conv"](
            x, weight, numbers(layer.out_channels), *geometry, layer.activation, True, scale
        )
        OPERATORS["frozen_conv_backward"](
            torch.empty_like(output), weight, saved, x.shape, *geometry, layer.activation, True, not layer.first, True,
            scale,
        )  # fmt: skip
    return recorded


Run = Callable[[torch.dtype], object]


def block(channels: int, hidden: int, out_channels: int, stride: int, size: int) -> Run:
    """A whole inverted residual block, its forward both ways, with both ports of its lite residual, and
    the branch's way back into it."""

    def run(dtype: torch.dtype) -> None:
        weights = [numbers(hidden, channels, 1, 1, dtype=dtype), numbers(hidden, 1, 3, 3, dtype=dtype),
                   numbers(out_channels, hidden, 1, 1, dtype=dtype)]  # fmt: skip
        options = ([stride] * 2, [1] * 4, "relu6", stride == 1 and channels == out_channels)
        x = image(dtype, BATCH, channels, size, size)
        biases = (numbers(hidden), numbers(hidden), numbers(out_channels))
        both = [tensor for pair in zip(weights, biases, strict=True) for tensor in pair]
        for by in whole_block.FORWARDS:
            with forced(whole_block.ENVIRONMENT_VARIABLE, by):
                output, *masks, pooled = OPERATORS["frozen_inverted_residual"](x, *both, *options, True, True)
        half = image(dtype, BATCH, out_channels, (size // 2 + 1) // stride, (size // 2 + 1) // stride)
        output = OPERATORS["upsample_add"](output, half)
        OPERATORS["upsample_add_backward"](output, half.shape[2:], True)
        OPERATORS["frozen_inverted_residual_backward"](
            torch.empty_like(output), torch.empty_like(pooled), *weights, *masks, x.shape, *options, True, [True] * 4
        )

    return run


def lite_branch(channels: int, out_channels: int, stride: int, size: int) -> Run:
    """The lite residual of a block, ``size`` of its pooled input: BatchNorms of the batch, then GroupNorms; backward
    with the first convolution kept, and computed again."""

    def run(dtype: torch.dtype) -> None:
        pooled = image(dtype, BATCH, channels, size, size)
        weights = [image(dtype, channels, channels // 2, 5, 5), image(dtype, out_channels, channels, 1, 1)]
        affine = [numbers(c) for c in (channels, channels, out_channels, out_channels)]
        for keep, groups in ((True, (0, 0)), (False, (channels // 8, out_channels // 8))):
            options = (stride, 2, "relu", *groups, 1e-5, 1e-5)
            output, conv, *statistics = OPERATORS["lite_branch"](
                pooled, weights[0], *affine[:2], None, None, weights[1], *affine[2:], None, None, *options, keep
            )
            OPERATORS["lite_branch_backward"](
                output, pooled, conv, *statistics, weights[0], *affine[:2], weights[1], affine[2], *options, True, True,
                [True] * 7,
            )  # fmt: skip

    return run


def group_norm(channels: int, size: int) -> Run:
    """A GroupNorm of 8 channels a group with its ReLU6, from the kept input and from codes in 8 bits."""

    def run(dtype: torch.dtype) -> None:
        x, affine = image(dtype, BATCH, channels, size, size), (numbers(channels), numbers(channels))
        options = (channels // 8, 1e-5, "relu6")
        for codes in (False, True):
            _, mean, rstd, coded, _ = OPERATORS["group_norm_activation"](x, *affine, *options, codes)
            OPERATORS["group_norm_activation_backward"](
                torch.empty_like(x),
                coded if codes else x,
                mean,
                rstd,
                rstd,
                *affine,
                channels // 8,
                "relu6",
                [True] * 3,
            )

    return run


def relu(channels: int, size: int) -> Run:
    """The ReLU behind a shortcut."""

    def run(dtype: torch.dtype) -> None:
        x = image(dtype, BATCH, channels, size, size)
        output, mask = OPERATORS["activation"](x, "relu", 0.0, True)
        OPERATORS["activation_backward"](output, mask, "relu", 0.0)

    return run


def max_pool(channels: int, size: int) -> Run:
    """The pooling behind ResNet's stem."""

    def run(dtype: torch.dtype) -> None:
        x, window = image(dtype, BATCH, channels, size, size), ([3, 3], [2, 2], [1, 1], [1, 1])
        output, positions = OPERATORS["max_pool2d"](x, *window, False, True)
        OPERATORS["max_pool2d_backward"](output, positions, x.shape, *window, True)

    return run


def head(channels: int, size: int) -> Run:
    """Global average pooling and dropout."""

    def run(dtype: torch.dtype) -> None:
        x = image(dtype, BATCH, channels, size, size)
        pooled = OPERATORS["adaptive_avg_pool2d"](x, [1, 1])
        dropped, mask = OPERATORS["dropout"](pooled.flatten(1), 0.2)
        OPERATORS["dropout_backward"](dropped, mask, 0.2)
        OPERATORS["adaptive_avg_pool2d_backward"](pooled, x.shape, True)

    return run


@dataclass(frozen=True)
class Network:
    """The frozen convolutions of a network, its other operators, and convolutions with weights in 8 bits."""

    layers: list[Layer]
    others: list[Run] = field(default_factory=list)
    eight_bits: list[Layer] = field(default_factory=list)


def _mobilenet_v2() -> Network:
    layers = mobilenet_v2()
    shapes = [
        (expand.channels, expand.out_channels, project.out_channels, filtered.stride, expand.size)
        for expand, filtered, project in zip(layers, layers[1:], layers[2:], strict=False)
        if expand.kernel == 1 and filtered.groups == filtered.channels and filtered.kernel == 3
    ]
    blocks = [block(*shape) for shape in shapes]
    branches = sorted({(channels, out, stride, size // 2) for channels, _, out, stride, size in shapes})
    # The widths of the hidden layers: 32 to 960 channels.
    norms = [group_norm(c, size) for c, size in sorted({(x.channels, x.size) for x in layers if x.groups > 1})]
    at_14 = [x for x in layers if x.size == 14 and x.kernel == 1 and x.channels * x.out_channels == 96 * 576]
    return Network(layers, [*blocks, *(lite_branch(*branch) for branch in branches), *norms, head(1280, 7)], at_14)


def _resnet50() -> Network:
    layers = resnet50()
    sums = sorted({(x.out_channels, x.size // x.stride) for x in layers if x.activation is None})
    at_14 = [x for x in layers if x.size == 14 and x.kernel == 3]
    return Network(layers, [max_pool(64, 112), *(relu(*size) for size in sums), head(2048, 7)], at_14)


def _resnext50() -> Network:
    """The grouped convolutions of ResNeXt-50 32x4d (Xie et al. 2017, table 1)."""
    layers, size = [], 56
    for width, count, first_stride in [(128, 3, 1), (256, 4, 2), (512, 6, 2), (1024, 3, 2)]:
        for stride in [first_stride] + [1] * (count - 1):
            layers.append(Layer(width, width, 3, stride, 32, size, "relu"))
            size //= stride
    return Network(layers, eight_bits=layers[-1:])


NETWORKS = {"mobilenet_v2": _mobilenet_v2, "resnet50": _resnet50, "resnext50": _resnext50}


def workload(network: str, dtype: torch.dtype) -> Iterator[Launch]:
    """Every launch of a network's training step, dense convolutions both ways."""
    what = NETWORKS[network]()
    for layer in what.layers:
        for by in choice.DENSE if layer.kernel > 1 and layer.groups != layer.channels else (None,):
            yield from launches(layer, dtype, by=by)
    for layer in what.eight_bits:
        yield from launches(layer, dtype, by=choice.IMPLICIT_GEMM, int8=True)
    for run in what.others:
        with record() as recorded:
            run(dtype)
        yield from recorded
