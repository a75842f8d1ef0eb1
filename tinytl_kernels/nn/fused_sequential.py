"""``nn.Sequential`` that computes the inverted residual blocks among its children as one operator each."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from tinytl_kernels import ops
from tinytl_kernels.core.hooks import watched
from tinytl_kernels.nn.frozen_conv import FrozenConvBias
from tinytl_kernels.nn.frozen_inverted_residual import block_arguments, not_a_block


class FusedSequential(nn.Sequential):
    """A ``nn.Sequential`` in which an optional 1x1 expansion, a depthwise convolution and a 1x1 projection, one behind
    the other, are one :func:`tinytl_kernels.ops.frozen_inverted_residual`.

    Networks whose layers stand in one long ``Sequential`` (torchvision's MNASNet begins with a depthwise and a 1x1
    convolution) have no module that :class:`FrozenInvertedResidual` could take the place of. The children keep their
    names and parameters; they are looked at in every forward, so that they can be replaced, sliced and deleted. With
    the attribute ``fused`` set to False, and where one of them has a hook, they are called one after the other.

    Example:
        >>> import torch, tinytl_kernels as tk
        >>> convs = tk.FrozenConvBias(8, 8, 3, padding=1, groups=8, activation="relu"), tk.FrozenConvBias(8, 4, 1)
        >>> FusedSequential(*convs)(torch.randn(1, 8, 6, 6)).shape
        torch.Size([1, 4, 6, 6])
    """

    fused = True

    def forward(self, input):
        children = list(self._modules.values())
        at = 0
        while at < len(children):
            batched = isinstance(input, Tensor) and input.dim() == 4
            convs, after = block_at(children, at) if self.fused and batched else (None, at)
            if convs is not None:
                arguments, scales = block_arguments(*convs, False, input)
                input, at = ops.frozen_inverted_residual(*arguments, **scales), after
            else:
                input, at = children[at](input), at + 1
        return input


def block_at(children: Sequence[nn.Module], at: int) -> tuple[tuple | None, int]:
    """The block that begins with ``children[at]``.

    Returns:
        (expand or None, depthwise, project) and the index of the child behind them, or (None, at).
    """
    convs, ends = [], []  # convolutions with nothing between them, and the index behind each
    for i in range(at, len(children)):
        child = children[i]
        if type(child) is FrozenConvBias and not watched(child):
            convs.append(child)
            ends.append(i + 1)
        elif not convs or type(child) is not nn.Identity or watched(child):
            break
        if len(convs) == 3:
            break
    candidates = (None, *convs[:2]), tuple(convs)  # of two convolutions, of three
    for block, after in zip(candidates, ends[1:], strict=False):
        if block[1].groups > 1 and not_a_block(*block) is None:
            return block, after
    return None, at
