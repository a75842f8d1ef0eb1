"""Blocks at batch 8: the inverted residuals of MobileNetV2, and ResNet's two."""

from __future__ import annotations

from functools import partial

from torch import nn

from benchmarks.cases import Case
from tinytl_kernels.models import import_torchvision


def _inverted_residual(channels: int, out_channels: int, stride: int, expand_ratio: int) -> nn.Module:
    return import_torchvision().models.mobilenetv2.InvertedResidual(channels, out_channels, stride, expand_ratio)


def _basic(channels: int) -> nn.Module:
    return import_torchvision().models.resnet.BasicBlock(channels, channels)


def _bottleneck(channels: int, width: int, stride: int) -> nn.Module:
    resnet = import_torchvision().models.resnet
    if stride == 1:
        return resnet.Bottleneck(channels, width)
    downsample = nn.Sequential(resnet.conv1x1(channels, 4 * width, stride), nn.BatchNorm2d(4 * width))
    return resnet.Bottleneck(channels, width, stride, downsample)


def _inverted(channels: int, out_channels: int, stride: int, side: int, expand_ratio: int = 6) -> Case:
    name = f"inverted_residual_{channels}x{expand_ratio}_{out_channels}_s{stride}_{side}"
    make = partial(_inverted_residual, channels, out_channels, stride, expand_ratio)
    return Case(name, "block", make, (8, channels, side, side))


BLOCKS = (
    _inverted(32, 16, 1, 112, expand_ratio=1),
    _inverted(16, 24, 2, 112),
    _inverted(24, 24, 1, 56),
    _inverted(32, 32, 1, 28),
    _inverted(64, 64, 1, 14),
    _inverted(96, 160, 2, 14),
    _inverted(160, 160, 1, 7),
    Case("basic_block_64_56", "block", partial(_basic, 64), (8, 64, 56, 56)),
    Case("bottleneck_256_56", "block", partial(_bottleneck, 256, 64, 1), (8, 256, 56, 56)),
    Case("bottleneck_512_s2_28", "block", partial(_bottleneck, 512, 256, 2), (8, 512, 28, 28)),
)
