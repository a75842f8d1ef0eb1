"""What is benchmarked: a stock module, the size of its input, and weights that behave like trained ones."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

SEED = 20260101


@dataclass(frozen=True)
class Case:
    """One thing to run.

    Args:
        name: Unique; names the rows of tables and the pytest parameter.
        level: ``"layer"`` and ``"block"`` lie inside a network: their input asks for a gradient, the gradient of
            their output is given. A ``"network"`` starts from pictures and ends in a cross entropy.
        make: Builds the stock module.
        input_size: (N, C, H, W).
        limit: What bounds it on the hardware, and so which rate is reported: ``"flops"`` or ``"bytes"``.
        has_norm: Whether there is a BatchNorm that can be folded.
        recomputed: Whether ``convert`` makes its blocks compute themselves again in backward.
    """

    name: str
    level: Literal["layer", "block", "network"]
    make: Callable[[], nn.Module]
    input_size: tuple[int, int, int, int]
    limit: Literal["flops", "bytes"] = "flops"
    has_norm: bool = True
    recomputed: bool = False

    @property
    def batch(self) -> int:
        """Images in a step."""
        return self.input_size[0]

    @property
    def inner(self) -> bool:
        """Whether it lies inside a network, and so its input asks for a gradient."""
        return self.level != "network"

    def quick(self) -> Case:
        """The same with a few small images, to try the suite rather than the code under test."""
        batch, channels, height, width = self.input_size
        # Networks shrink images 32 times, lite residuals twice more, and a norm in training needs two values.
        side = 12 if self.inner else 128 if batch == 1 else 64
        return replace(self, input_size=(min(batch, 2), channels, min(height, side), min(width, side)))

    def stock(self) -> nn.Module:
        """The stock module in eval mode and ``channels_last``, the same weights at every call."""
        torch.manual_seed(SEED)
        module = self.make().eval()
        _calibrate(module, (max(self.batch, 4), *self.input_size[1:]))
        return module.to(memory_format=torch.channels_last)

    def input(self) -> Tensor:
        """(N, C, H, W), float32, ``channels_last``, standard normal, the same at every call."""
        generator = torch.Generator().manual_seed(SEED)
        return torch.randn(self.input_size, generator=generator).contiguous(memory_format=torch.channels_last)


@torch.no_grad()
def _calibrate(module: nn.Module, size: tuple[int, ...]) -> None:
    """Give every BatchNorm an uneven scale and shift, and the statistics of a random batch.

    A freshly built network is no stand-in for a trained one: with statistics of 0 and 1 its activations fade layer by
    layer, until ReLU masks are trivial and arithmetic is slowed by denormal numbers; with a scale of 1 and a shift of
    0 a wrongly folded norm would pass unseen.
    """
    norms = [m for m in module.modules() if isinstance(m, _BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.weight.uniform_(0.5, 1.5)
        norm.bias.normal_(0, 0.2)
        norm.momentum = 1.0
        norm.train()
    module(torch.randn(size))
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
        norm.eval()
