"""Layers of real networks at batch 8: a convolution comes with its norm and activation."""

from __future__ import annotations

from functools import partial

from torch import nn

from benchmarks.cases import Case


def _conv(channels: int, out_channels: int, kernel: int, stride: int, groups: int, act: type[nn.Module] | None):
    conv = nn.Conv2d(channels, out_channels, kernel, stride, kernel // 2, groups=groups, bias=False)
    layers = [conv, nn.BatchNorm2d(out_channels)]
    return nn.Sequential(*layers, *([act(inplace=True)] if act else []))


def _dense(name: str, channels: int, out_channels: int, side: int, kernel: int, act, stride: int = 1) -> Case:
    make = partial(_conv, channels, out_channels, kernel, stride, 1, act)
    return Case(f"{name}_{channels}_{out_channels}_{side}", "layer", make, (8, channels, side, side))


def _depthwise(channels: int, side: int, kernel: int, stride: int) -> Case:
    name = f"depthwise_{kernel}x{kernel}_s{stride}_{channels}_{side}"
    make = partial(_conv, channels, channels, kernel, stride, channels, nn.ReLU6)
    return Case(name, "layer", make, (8, channels, side, side), limit="bytes")


def _bare(name: str, layer: type[nn.Module], channels: int, side: int, **arguments) -> Case:
    make = partial(_sequence, layer, arguments)
    return Case(f"{name}_{channels}_{side}", "layer", make, (8, channels, side, side), limit="bytes", has_norm=False)


def _sequence(layer: type[nn.Module], arguments: dict) -> nn.Module:
    return nn.Sequential(layer(**arguments))


LAYERS = (
    _dense("stem_3x3_s2", 3, 32, 224, 3, nn.ReLU6, stride=2),
    _dense("expand_1x1", 24, 144, 56, 1, nn.ReLU6),
    _dense("project_1x1", 144, 24, 56, 1, None),
    _dense("expand_1x1", 96, 576, 14, 1, nn.ReLU6),
    _dense("head_1x1", 320, 1280, 7, 1, nn.ReLU6),
    _depthwise(96, 112, 3, 2),
    _depthwise(144, 56, 3, 1),
    _depthwise(144, 56, 5, 2),
    _depthwise(240, 28, 5, 1),
    _dense("dense_3x3", 64, 64, 56, 3, nn.ReLU),
    _dense("dense_3x3_s2", 128, 128, 56, 3, nn.ReLU, stride=2),
    _dense("dense_3x3", 256, 256, 14, 3, nn.ReLU),
    _bare("relu6", nn.ReLU6, 96, 112),
    _bare("max_pool_3x3_s2", nn.MaxPool2d, 64, 112, kernel_size=3, stride=2, padding=1),
)
