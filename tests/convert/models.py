"""Models to convert: the libraries' families with statistics worth folding, and small ones with one trait each."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tinytl_kernels.models import import_timm, import_torchvision


def zoo_model(name: str) -> nn.Module:
    """``"torchvision:NAME"`` or ``"timm:NAME"`` with random weights, in evaluation mode."""
    library, _, short = name.partition(":")
    if library == "timm":
        model = import_timm().create_model(short, num_classes=10)
    else:
        model = getattr(import_torchvision().models, short)(num_classes=10)
    return with_statistics(model).eval()


def with_statistics(model: nn.Module, size: int = 64) -> nn.Module:
    """Give every BatchNorm random affine parameters and the statistics of a random batch.

    Real statistics keep signals and gradients at scale through fifty layers; with made-up ones they vanish, and
    rounding is all that a comparison sees.
    """
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.track_running_stats]
    for norm in norms:
        if norm.affine:
            nn.init.uniform_(norm.weight, 0.5, 1.5)
            nn.init.normal_(norm.bias, 0, 0.1)
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 1.0
    with torch.no_grad():
        model.train()(torch.randn(4, 3, size, size))
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    return model


def conv_norm(c_in: int, c_out: int, activation: nn.Module | None = None, **options) -> nn.Sequential:
    """Convolution 3x3, BatchNorm, activation."""
    options = {"kernel_size": 3, "padding": 1, **options}
    layers = [nn.Conv2d(c_in, c_out, bias=False, **options), nn.BatchNorm2d(c_out)]
    return nn.Sequential(*layers, *([] if activation is None else [activation]))


class Residual(nn.Module):
    """A basic block with one shared activation."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels)
        self.conv2, self.bn2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += x
        return self.relu(out)


class SmallNet(nn.Module):
    """Stem, two residual blocks, head: every method has something to do here."""

    def __init__(self, num_classes: int = 10) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.stem = conv_norm(3, 8, nn.ReLU6(inplace=True), stride=2)
        self.blocks = nn.Sequential(Residual(8), Residual(8))
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.dropout = nn.Dropout(0.2)
        self.fc = nn.Linear(8, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(self.blocks(self.stem(x))).flatten(1)
        return self.fc(self.dropout(x))


class FunctionalNet(nn.Module):
    """Functional activations, pools and dropout, a branch on the mode, an optional argument."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 12, 3, padding=1)
        self.conv3 = nn.Conv2d(12, 12, 3, stride=2, padding=1)
        self.fc = nn.Linear(12, 5)

    def forward(self, input: Tensor, features: bool = False, *, scale: float = 1.0) -> Tensor:
        x = F.relu(self.bn1(self.conv1(input)))
        x = F.max_pool2d(x, 2)
        x = F.leaky_relu(self.conv2(x), 0.2)
        x = F.avg_pool2d(torch.relu_(self.conv3(x)), 2, ceil_mode=True)
        x = F.hardtanh(x, 0.0, 6.0)
        if self.training:
            x = F.dropout(x, 0.1)
        x = F.adaptive_avg_pool2d(x, (1, 1)).flatten(1) * scale
        return x if features else self.fc(x)


class FusableNet(nn.Module):
    """Functional activations right behind convolutions, each of which may be fused."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 8, 3)
        self.conv3 = nn.Conv2d(8, 8, 3)
        self.fc = nn.Linear(8, 5)

    def forward(self, input: Tensor) -> Tensor:
        x = F.relu6(self.bn1(self.conv1(input)))
        x = self.conv2(x).relu()
        x = F.leaky_relu(self.conv3(x))
        return self.fc(x.mean((2, 3)))


class SharedNet(nn.Module):
    """One in-place activation module behind two convolutions, behind a sum, and on what is read again."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 8, 3, padding=1)
        self.conv3 = nn.Conv2d(8, 8, 1)
        self.conv4 = nn.Conv2d(8, 8, 1)
        self.act = nn.ReLU6(inplace=True)
        self.fc = nn.Linear(8, 5)

    def forward(self, input: Tensor) -> Tensor:
        x = self.act(self.bn1(self.conv1(input)))
        y = self.act(self.conv2(x))
        y = self.act(self.conv3(y) + x)
        z = self.conv4(y)
        return self.fc((self.act(z) + z).mean((2, 3)))
