"""``nn.Sequential`` that computes the inverted residual blocks among its children as one operator each."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import Tensor, nn

from tinytl_kernels import ops
from tinytl_kernels.core.hooks import every_module_hooked, hooked, watched
from tinytl_kernels.nn.frozen_conv import FrozenConvBias
from tinytl_kernels.nn.frozen_inverted_residual import FrozenInvertedResidual, block_of, not_a_block, not_pointwise
from tinytl_kernels.nn.lite_residual import LiteResidualBlock

# A convolution of so few channels is of an image.
_IMAGE_CHANNELS = 4


class FusedSequential(nn.Sequential):
    """A ``nn.Sequential`` in which neighbours are computed together:

    * an optional 1x1 expansion, a depthwise convolution and a 1x1 projection as one
      :func:`tinytl_kernels.ops.frozen_inverted_residual`,
    * blocks in a row, with or without lite residuals, in one call, where the backend has one: they compute what they
      compute one by one, without the interpreter between them,
    * with them a stem (a dense convolution of an image, alone or in a ``Sequential``) in front of a block without
      expansion: what the stem makes never reaches memory then,
    * and a 1x1 convolution behind them that is the last layer.

    Networks whose layers stand in one long ``Sequential`` (torchvision's MNASNet begins with a depthwise and a 1x1
    convolution) have no module that :class:`FrozenInvertedResidual` could take the place of. The children keep their
    names and parameters, and a ``Sequential`` among them counts as its own children in its place; they are looked at in
    every forward, so that they can be replaced, sliced and deleted. With the attribute ``fused`` set to False, and
    where one of them has a hook, they are called one after the other.

    Example:
        >>> import torch, tinytl_kernels as tk
        >>> convs = tk.FrozenConvBias(8, 8, 3, padding=1, groups=8, activation="relu"), tk.FrozenConvBias(8, 4, 1)
        >>> FusedSequential(*convs)(torch.randn(1, 8, 6, 6)).shape
        torch.Size([1, 4, 6, 6])
    """

    fused = True

    def forward(self, input):
        return run_in_a_row(self._modules.values(), input) if self.fused else super().forward(input)


def run_in_a_row(modules: Iterable[nn.Module], input):
    """What ``modules`` make of ``input`` one after the other, as the children of a :class:`FusedSequential`."""
    if every_module_hooked():
        for module in modules:
            input = module(input)
        return input
    children = in_a_row(modules)
    at = looked_at = 0  # a chain that was refused is not looked at again from its second block on
    behind_chain = None  # where no block begins
    while at < len(children):
        output = None
        if at != behind_chain and isinstance(input, Tensor) and input.dim() == 4:
            output, after = _chain_from_stem(children, at, input)
            if output is None and at >= looked_at:
                output, after = _chain(children, at, input)
                looked_at = after
            if output is None:
                output, after = _block(children, at, input)
            else:
                behind_chain = after
        if output is None:
            output, after = children[at](input), at + 1
        input, at = output, after
    return input


def in_a_row(modules: Iterable[nn.Module]) -> list[nn.Module]:
    """``modules``; in the place of a ``Sequential`` among them that nobody watches, its children."""
    children = []
    for module in modules:
        plain = type(module) is nn.Sequential or (type(module) is FusedSequential and module.fused)
        children += in_a_row(module._modules.values()) if plain and not hooked(module) else (module,)
    return children


def _chain_from_stem(children: Sequence[nn.Module], at: int, image: Tensor) -> tuple[Tensor | None, int]:
    """What a stem that is ``children[at]`` makes of ``image`` with the blocks behind it, and the index of the child
    behind them; None where they are not computed in one call. So do the two functions below."""
    if image.size(1) > _IMAGE_CHANNELS:
        return None, at
    stem, *convs, after = stem_at(children, at)
    if stem is None or not ops.offers_block_chain(image):
        return None, at
    image = ops.autocast_input(image)
    stem = ops.Stem(*stem.operands(), stem.stride, stem.four_paddings(image))
    blocks, at = _links([((None, *convs), after), *chain_at(children, after)], stem.output(image))
    last, at = _last(children, at)
    return ops.block_chain(image, blocks, stem, last), at


def _chain(children: Sequence[nn.Module], at: int, image: Tensor) -> tuple[Tensor | None, int]:
    chain = chain_at(children, at)
    if len(chain) < 2 or not ops.offers_block_chain(image):
        return None, chain[-1][1] if chain else at
    image = ops.autocast_input(image)
    blocks, at = _links(chain, image)
    if len(blocks) < 2:
        return None, at
    last, at = _last(children, at)
    return ops.block_chain(image, blocks, None, last), at


def _links(
    chain: Sequence[tuple[nn.Module | tuple, int]], image: Tensor | ops.Described
) -> tuple[list[ops.Block], int]:
    """The blocks of ``chain`` up to the first that no chain computes, and the index of the child behind them."""
    blocks, at = [], 0
    for block, after in chain:
        block = block_of(*block, False, image) if isinstance(block, tuple) else block.chain_link(image)
        if block is None:
            break
        blocks.append(block)
        image, at = ops.block_output(block), after
    return blocks, at


def _last(children: Sequence[nn.Module], at: int) -> tuple[ops.Last | None, int]:
    """The 1x1 convolution that is ``children[at]``, with no other layer behind it, for a chain in front of it, and the
    index of the child behind it."""
    conv = _only_conv(children[at]) if at < len(children) else None
    if conv is None or not_pointwise("last", conv) or conv.code_bits is not None:
        return None, at
    if any(type(child) is not nn.Identity for child in children[at + 1 :]):
        return None, at
    return ops.Last(*conv.operands(), conv.activation), at + 1


def _block(children: Sequence[nn.Module], at: int, input: Tensor) -> tuple[Tensor | None, int]:
    block, after = block_at(children, at)
    if block is None:
        return None, at
    block = block_of(*block, False, input)
    return ops.frozen_inverted_residual(*block.arguments, **block.named_scales), after


_CHAINED = (FrozenInvertedResidual.forward, LiteResidualBlock.forward)


def chain_at(children: Sequence[nn.Module], at: int) -> list[tuple[nn.Module | tuple, int]]:
    """The blocks that stand in a row from ``children[at]`` on.

    Returns:
        For each the module, or its (expand or None, depthwise, project), and the index of the child behind it.
    """
    chain = []
    while at < len(children):
        child = children[at]
        if type(child) is nn.Identity and not hooked(child):
            at += 1
            continue
        if type(child).forward in _CHAINED and not hooked(child):
            block, after = child, at + 1
        else:
            block, after = block_at(children, at)
        if block is None:
            break
        chain.append((block, after))
        at = after
    return chain


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
