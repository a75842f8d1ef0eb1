"""What a block of a network is to the chains of operators that compute several of them in one call.

A chain is checked before anything of it is computed, when all that there is of a block's input is its description.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from tinytl_kernels.ops.frozen_conv import conv_output_size
from tinytl_kernels.ops.lite_branch import Norm


class Described(NamedTuple):
    """What a tensor will look like; checks take it in the tensor's place."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device


class Running(NamedTuple):
    """The running statistics that a batch is counted in.

    Args:
        buffers: float32 mean and variance, (C,) each, and the int64 number of batches where it is kept; nothing for a
            norm that keeps none.
        momentum: the share of a new batch.
    """

    buffers: Sequence[Tensor] = ()
    momentum: float = 0.0


class Branch(NamedTuple):
    """A lite residual's branch: the arguments of :func:`lite_branch` after the pooled image, and what its two norms
    count a batch in."""

    weight1: Tensor
    norm1: Norm
    weight2: Tensor
    norm2: Norm
    stride: int = 1
    groups: int = 1
    activation: str = "relu"
    keep_conv: bool = True
    running1: Running = Running()
    running2: Running = Running()

    @property
    def operands(self) -> tuple:
        """The arguments of :func:`lite_branch`."""
        return self[:8]

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        """Weights and norms."""
        return (self.weight1, *self.norm1[:4], self.weight2, *self.norm2[:4])


class Stem(NamedTuple):
    """A network's first convolution: the arguments of :func:`frozen_conv`, of an image of few channels; it has no
    dilation and no groups, and the activation of the block behind it."""

    weight: Tensor
    bias: Tensor | None
    scale: Tensor | None
    stride: tuple[int, int]
    padding: tuple[int, int, int, int]

    def output(self, image: Tensor) -> Described:
        """What it makes of ``image``."""
        size = conv_output_size(image.shape, self.weight.shape, self.stride, self.padding, (1, 1))
        return Described((image.size(0), self.weight.size(0), *size), image.dtype, image.device)


class Last(NamedTuple):
    """The 1x1 convolution behind a network's last block: the arguments of :func:`frozen_conv`, with stride 1."""

    weight: Tensor
    bias: Tensor | None
    scale: Tensor | None
    activation: str | None


class Block(NamedTuple):
    """An inverted residual block.

    Args:
        image: its input, or a description of it.
        convs: weight and bias of its expansion (None, None without one), its depthwise convolution, its projection.
        scales: of the three weights, where they are in 8 bits.
        stride, padding: of the depthwise convolution, two and four numbers.
        activation, residual: as :func:`frozen_inverted_residual` takes them.
        branch: of its lite residual, which pools 2 x 2, if it has one.
    """

    image: Tensor | Described
    convs: tuple[Tensor | None, ...]
    scales: tuple[Tensor | None, Tensor | None, Tensor | None]
    stride: tuple[int, int]
    padding: tuple[int, int, int, int]
    activation: str | None
    residual: bool
    branch: Branch | None = None

    @property
    def arguments(self) -> tuple:
        """The arguments of :func:`frozen_inverted_residual` by position."""
        return (self.image, *self.convs, self.stride, self.padding, self.activation, self.residual)

    @property
    def named_scales(self) -> dict[str, Tensor | None]:
        """Those by name."""
        return dict(zip(("expand_scale", "depthwise_scale", "project_scale"), self.scales, strict=True))

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        """Every tensor but the image and the statistics to count in."""
        return (*self.convs, *self.scales, *(() if self.branch is None else self.branch.tensors))
