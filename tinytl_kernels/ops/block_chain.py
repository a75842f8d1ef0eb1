"""Blocks in a row, with or without lite residuals, in one call, where a backend has one. No operator: a chain of them.

    [input = frozen_conv(image)]                                                                      a network's stem
    output = frozen_inverted_residual(input)                                                   for each block in turn
             [+ upsampled lite_branch(pooled input)]                                    TinyTL, section 3.2, figure 3
    [output = frozen_conv(output)]                                                                  1x1, in the end

A small block computes for less time than its operators take to be called, checked and differentiated one by one; the
more so as each block drives the interpreter's own memory out of the caches. A chain is looked at and checked first,
from its first block to its last, and then computed. What a stem makes is the largest tensor of many a network; computed
with the block behind it, it never reaches memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from tinytl_kernels.ops.block import Block, Branch, Described, Last, Stem
from tinytl_kernels.ops.frozen_conv import check_conv
from tinytl_kernels.ops.frozen_inverted_residual import block_output_size, check_block
from tinytl_kernels.ops.library import autocast_to, fused_call, gradient_needed
from tinytl_kernels.ops.lite_branch import check_branch


class _Link(NamedTuple):
    """A checked block, as backends take it."""

    convs: Sequence[Tensor | None]
    scales: Sequence[Tensor | None]
    stride: tuple[int, int]
    padding: tuple[int, int, int, int]
    activation: str | None
    residual: bool
    needs_masks: bool
    branch: Branch | None
    stem: Stem | None = None  # its weight, bias and scale stand in the place of an expansion's


def block_chain(
    input: Tensor, blocks: Sequence[Block], stem: Stem | None = None, last: Last | None = None
) -> Tensor | None:
    """What the blocks' operators and the counting of statistics come to, or None: call them one by one.

    Args:
        input: (N, C, H, W), as :func:`autocast_input` gives it.
        blocks: at least one, from the first to the last; the image of each but the first is :func:`block_output` of the
            one before.
        stem: a convolution in front of them; ``input`` is its image then, and that of the first block, which has no
            expansion, no shortcut and no branch, is ``stem.output(input)``. In half precision what the stem makes is
            not rounded.
        last: a convolution behind them.

    Returns:
        (N, O, H', W'), differentiable with respect to all that the operators are; None where no backend does it in one
        call: while compiling, on another device or in another layout; with a stem also where ``input`` wants a
        gradient.

    Raises:
        ValueError: as the operators do; nothing has been computed or counted then.
    """
    end, tensors = blocks[-1], [block.tensors for block in blocks]
    if stem is not None:
        if gradient_needed(input):
            return None
        tensors[0] += stem[:3]
    others = () if last is None else last[:3]
    fused = fused_call("block_chain", [input, *(t for some in tensors for t in some), *others])
    if fused is None or not all(map(_adds_up, blocks)):
        return None
    if torch.is_autocast_enabled(input.device.type):
        blocks = [_cast_branch(block, input.dtype) for block in blocks]
    links, input_wanted = [], gradient_needed(input)
    if stem is not None:
        links.append(_checked_stem(input, stem, blocks[0]))
        input_wanted = links[0].needs_masks
        blocks, tensors = blocks[1:], tensors[1:]
    for block, some in zip(blocks, tensors, strict=True):
        wanted = input_wanted or gradient_needed(*some)
        links.append(_checked(block, input_wanted or gradient_needed(*block.convs[1::2]), wanted))
        input_wanted = wanted
    if last is None:
        return fused(input, links, None, False)
    needs_saved = input_wanted or gradient_needed(last.bias)
    geometry = ((1, 1), (0, 0, 0, 0), (1, 1), 1)
    check_conv(block_output(end), last.weight, last.bias, *geometry, last.activation, needs_saved, last.scale)
    return fused(input, links, last, needs_saved)


def offers_block_chain(input: Tensor) -> bool:
    """Whether there is a backend that may compute a chain of ``input`` in one call: else nobody need look for one."""
    return fused_call("block_chain", [input]) is not None


def block_output(block: Block) -> Described:
    """What ``block`` makes."""
    image, convs = block.image, block.convs
    size = block_output_size(image.shape, convs[2].shape, block.stride, block.padding)
    return Described((image.shape[0], convs[4].shape[0], *size), image.dtype, image.device)


def _cast_branch(block: Block, dtype: torch.dtype) -> Block:
    # As lite_branch's own autocast rule: what is trained is rounded, and differentiated through that.
    if (branch := block.branch) is None:
        return block
    weight1, weight2 = autocast_to(dtype, branch.weight1), autocast_to(dtype, branch.weight2)
    return block._replace(branch=branch._replace(weight1=weight1, weight2=weight2))


def _adds_up(block: Block) -> bool:
    # Else upsample_add's own error says that channels differ.
    return block.branch is None or block.branch.weight2.size(0) == block.convs[4].size(0)


def _checked_stem(image: Tensor, stem: Stem, block: Block) -> _Link:
    weight, bias, scale, *geometry = stem
    needs_masks = gradient_needed(bias, *block.convs[3::2])
    check_conv(image, weight, bias, *geometry, (1, 1), 1, block.activation, needs_masks, scale)
    link = _checked(block, needs_masks, needs_masks)
    return link._replace(convs=(weight, bias, *block.convs[2:]), scales=(scale, *block.scales[1:]), stem=stem)


def _checked(block: Block, needs_masks: bool, wanted: bool) -> _Link:
    image, convs, scales, stride, padding, activation, residual, branch = block
    if branch is not None:
        norm1, norm2 = branch.norm1, branch.norm2
        keep_conv = branch.keep_conv and wanted
        check_branch(
            image, *branch.tensors, branch.stride, branch.groups, branch.activation,
            norm1.groups, norm2.groups, norm1.eps, norm2.eps, keep_conv,
        )  # fmt: skip
        branch = branch if keep_conv == branch.keep_conv else branch._replace(keep_conv=keep_conv)
    check_block(image, *convs, stride, padding, activation, residual, needs_masks, branch is not None, *scales)
    return _Link(convs, scales, stride, padding, activation, residual, needs_masks, branch)
