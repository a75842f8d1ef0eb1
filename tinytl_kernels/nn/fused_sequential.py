"""``nn.Sequential`` that computes the inverted residual blocks among its children as one operator each."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from tinytl_kernels import ops
from tinytl_kernels.core.hooks import watched
from tinytl_kernels.nn.frozen_conv import FrozenConvBias
from tinytl_kernels.nn.frozen_inverted_residual import FrozenInvertedResidual, block_arguments, not_a_block

# A convolution of so few channels is of an image.
_IMAGE_CHANNELS = 4


class FusedSequential(nn.Sequential):
    """A ``nn.Sequential`` in which neighbours are computed together:

    * an optional 1x1 expansion, a depthwise convolution and a 1x1 projection as one
      :func:`tinytl_kernels.ops.frozen_inverted_residual`,
    * a stem (a dense convolution of an image, alone or in a ``Sequential``) and the block without expansion behind it
      in one call, where the backend has one: what the stem makes never reaches memory then.

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
            output, after = self._together(children, at, input)
            if output is None:
                output, after = children[at](input), at + 1
            input, at = output, after
        return input

    def _together(self, children: Sequence[nn.Module], at: int, input) -> tuple[Tensor | None, int]:
        """What the children from ``at`` on make of ``input``, and the index of the one behind them; None and ``at``
        where they are to be called one after the other."""
        if not (self.fused and isinstance(input, Tensor) and input.dim() == 4):
            return None, at
        stem, *convs, after = stem_at(children, at)
        if stem is not None and (output := _stem_block(stem, *convs, input)) is not None:
            return output, after
        block, after = block_at(children, at)
        if block is None:
            return None, at
        arguments, scales = block_arguments(*block, False, input)
        return ops.frozen_inverted_residual(*arguments, **scales), after


def _stem_block(
    stem: FrozenConvBias, depthwise: FrozenConvBias, project: FrozenConvBias, image: Tensor
) -> Tensor | None:
    stem.refuse_trained_weight()
    padding = stem.four_paddings(image)
    made = ops.stem_output(image, stem.weight, stem.stride, padding)
    block, scales = block_arguments(None, depthwise, project, False, made)
    return ops.stem_block(
        image, stem.weight, stem.bias, stem.stride, padding, block, scales, weight_scale=stem.weight_scale
    )


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


def stem_at(children: Sequence[nn.Module], at: int) -> tuple[FrozenConvBias | None, ...]:
    """The stem that is ``children[at]``, if a block without expansion and shortcut is behind it.

    Returns:
        stem, depthwise, project and the index of the child behind them, or (None, at).
    """
    stem, after = _only_conv(children[at]), at + 1
    if stem is None or not _of_an_image(stem):
        return None, at
    while after < len(children) and type(children[after]) is nn.Identity and not watched(children[after]):
        after += 1
    if after == len(children):
        return None, at
    block = children[after]
    if isinstance(block, FrozenInvertedResidual):
        as_usual = type(block).forward is FrozenInvertedResidual.forward and block.fused and not watched(block)
        if not as_usual or block.residual:
            return None, at
        expand, depthwise, project, after = block.expand, block.depthwise, block.project, after + 1
    else:
        convs, after = block_at(children, after)
        if convs is None:
            return None, at
        expand, depthwise, project = convs
    if expand is not None or depthwise.activation != stem.activation or depthwise.in_channels != stem.out_channels:
        return None, at
    return stem, depthwise, project, after


def _only_conv(child: nn.Module) -> FrozenConvBias | None:
    """The convolution that ``child`` is, or that it holds and nothing else, if nobody watches it."""
    if watched(child):
        return None
    if isinstance(child, nn.Sequential) and type(child).forward is nn.Sequential.forward:
        layers = [layer for layer in child if type(layer) is not nn.Identity or watched(layer)]
        return _only_conv(layers[0]) if len(layers) == 1 else None
    return child if type(child) is FrozenConvBias else None


def _of_an_image(conv: FrozenConvBias) -> bool:
    return (
        conv.in_channels <= _IMAGE_CHANNELS
        and conv.groups == 1
        and conv.kernel_size != (1, 1)
        and conv.dilation == (1, 1)
        and conv.padding_mode == "zeros"
    )
