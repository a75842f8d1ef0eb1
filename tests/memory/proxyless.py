"""ProxylessNAS-Mobile with lite residuals in plain torch.nn, for checking the formula against the paper's Table 2.

Written from the architecture alone, not with the package's own modules: the formula must come out right on somebody
else's model. Weights are random; only shapes and requires_grad matter here.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

# (output channels, stride, kernels, expand ratios); the stride belongs to a stage's first block.
STAGES = [
    (16, 1, (3,), (1,)),
    (32, 2, (5, 3), (3, 3)),
    (40, 2, (7, 3, 5, 5), (3, 3, 3, 3)),
    (80, 2, (7, 5, 5, 5), (6, 3, 3, 3)),
    (96, 1, (5, 5, 5, 5), (6, 3, 3, 3)),
    (192, 2, (7, 7, 7, 7), (6, 6, 3, 3)),
    (320, 1, (7,), (6,)),
]

METHODS = ("full", "norm+last", "last", "bias", "lite_residual", "lite_residual+bias")


def norm(channels: int) -> nn.Module:
    return nn.GroupNorm(channels // 8, channels, eps=1e-3)


def conv_norm(cin: int, cout: int, kernel: int, stride: int = 1, groups: int = 1, act: bool = True) -> list[nn.Module]:
    conv = nn.Conv2d(cin, cout, kernel, stride, kernel // 2, groups=groups, bias=False)
    return [conv, norm(cout), *([nn.ReLU6()] if act else [])]


class LiteResidual(nn.Module):
    def __init__(self, cin: int, cout: int, stride: int, resolution: int) -> None:
        super().__init__()
        kernel = 5
        while kernel > max(1, resolution // 2):  # inside the branch, after 2x2 pooling
            kernel -= 2
        self.pool = nn.AvgPool2d(2, 2)
        self.conv = nn.Conv2d(cin, cin, kernel, stride, kernel // 2, groups=2, bias=False)
        self.norm = norm(cin)
        self.relu = nn.ReLU()
        self.point = nn.Conv2d(cin, cout, 1, bias=False)
        self.final_norm = norm(cout)

    def forward(self, x: Tensor, size: torch.Size) -> Tensor:
        out = self.final_norm(self.point(self.relu(self.norm(self.conv(self.pool(x))))))
        return nn.functional.interpolate(out, size, mode="bilinear", align_corners=False)


class Block(nn.Module):
    def __init__(self, cin: int, cout: int, kernel: int, expand: int, stride: int, resolution: int | None) -> None:
        super().__init__()
        mid = cin * expand
        self.main = nn.Sequential(
            *(conv_norm(cin, mid, 1) if expand > 1 else []),
            *conv_norm(mid, mid, kernel, stride, groups=mid),
            *conv_norm(mid, cout, 1, act=False),
        )
        self.lite = None if resolution is None else LiteResidual(cin, cout, stride, resolution)
        self.shortcut = stride == 1 and cin == cout

    def forward(self, x: Tensor) -> Tensor:
        out = self.main(x)
        if self.lite is not None:
            out = out + self.lite(x, out.shape[-2:])
        return out + x if self.shortcut else out


class Proxyless(nn.Module):
    def __init__(self, num_classes: int = 102) -> None:
        super().__init__()
        self.first = nn.Sequential(*conv_norm(3, 32, 3, 2))
        blocks: list[nn.Module] = []
        channels, resolution = 32, 128  # the authors' fixed figure, whatever the real image size
        for index, (cout, stage_stride, kernels, expands) in enumerate(STAGES):
            for position, (kernel, expand) in enumerate(zip(kernels, expands, strict=True)):
                stride = stage_stride if position == 0 else 1
                blocks.append(Block(channels, cout, kernel, expand, stride, resolution if index else None))
                channels, resolution = cout, resolution // stride
        self.blocks = nn.Sequential(*blocks)
        self.last = nn.Sequential(*conv_norm(320, 1280, 1))
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(1280, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.pool(self.last(self.blocks(self.first(x)))).flatten(1))

    def train_only(self, method: str) -> Proxyless:
        """Sets requires_grad as the authors' code does for ``method``."""
        self.requires_grad_(method == "full")
        self.classifier.requires_grad_(True)
        lites = [m for m in self.modules() if isinstance(m, LiteResidual)]
        for module in self.modules():
            if isinstance(module, nn.GroupNorm):
                if method == "norm+last":
                    module.requires_grad_(True)
                elif method in ("bias", "lite_residual+bias"):
                    module.bias.requires_grad_(True)
        for lite in lites:
            if method in ("lite_residual", "lite_residual+bias"):
                lite.requires_grad_(True)
            if method == "lite_residual+bias":  # the block's last bias does the same
                lite.final_norm.bias.requires_grad_(False)
        return self
