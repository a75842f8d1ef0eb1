"""A network's stem and the block behind it in one call, where a backend has one. No operator: a chain of two.

    output = frozen_inverted_residual(frozen_conv(image))        the block without expansion and shortcut

What the stem makes is the largest tensor of many a network; computed with the block it never reaches memory.
"""

from __future__ import annotations

from torch import Tensor

from tinytl_kernels.core.geometry import IntOrPair, four_paddings, pair
from tinytl_kernels.ops.block import Block, Described
from tinytl_kernels.ops.frozen_conv import check_conv, conv_output_size
from tinytl_kernels.ops.frozen_inverted_residual import check_block
from tinytl_kernels.ops.library import fused_call, gradient_needed


def stem_block(
    image: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: IntOrPair,
    padding: IntOrPair,
    block: Block,
    *,
    weight_scale: Tensor | None = None,
) -> Tensor | None:
    """What the two operators come to, or None: call them one by one.

    Args:
        image: (N, C, H, W), as :func:`autocast_input` gives it.
        weight, bias, stride, padding, weight_scale: of the stem, as :func:`frozen_conv` takes them; it has no dilation
            and no groups, and the activation of the block.
        block: of :func:`stem_output`, without expansion, shortcut and branch.

    Returns:
        (N, O, H', W'), differentiable with respect to the biases; None where no backend does it in one call: where the
        image wants a gradient, while compiling, on another device or in another layout. In half precision what the
        stem makes is not rounded.

    Raises:
        ValueError: as the operators do.
    """
    tensors = (image, weight, bias, weight_scale, *block.tensors)
    fused = None if gradient_needed(image) else fused_call("stem_block", "frozen_conv", tensors)
    if fused is None:
        return None
    geometry = pair(stride, "stride"), four_paddings(padding)
    behind, activation = block.convs[2:], block.activation
    needs_masks = gradient_needed(bias, *behind[1::2])
    check_conv(image, weight, bias, *geometry, (1, 1), 1, activation, needs_masks, weight_scale)
    check_block(*block.arguments, needs_masks, False, *block.scales)
    return fused(
        image, weight, bias, *behind, *geometry, block.stride, block.padding, activation, needs_masks,
        weight_scale, *block.scales[1:],
    )  # fmt: skip


def offers_stem_block(image: Tensor) -> bool:
    """Whether there is a backend that may compute a stem of ``image`` and its block in one call."""
    return fused_call("stem_block", "frozen_conv", [image]) is not None


def stem_output(image: Tensor, weight: Tensor, stride: IntOrPair, padding: IntOrPair) -> Described:
    """What the stem makes."""
    size = conv_output_size(image.shape, weight.shape, pair(stride, "stride"), four_paddings(padding), (1, 1))
    return Described((image.size(0), weight.size(0), *size), image.dtype, image.device)
