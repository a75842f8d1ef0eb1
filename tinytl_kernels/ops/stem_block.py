"""A network's stem and the block behind it in one call, where a backend has one. No operator: a chain of two.

    output = frozen_inverted_residual(frozen_conv(image))        the block without expansion and shortcut

What the stem makes is the largest tensor of many a network; computed with the block it never reaches memory.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tinytl_kernels.core.geometry import IntOrPair, four_paddings, pair
from tinytl_kernels.ops.frozen_conv import check_conv, conv_output_size
from tinytl_kernels.ops.frozen_inverted_residual import check_block
from tinytl_kernels.ops.library import fused_call, gradient_needed


def stem_block(
    image: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: IntOrPair,
    padding: IntOrPair,
    block: tuple,
    scales: dict[str, Tensor | None],
    *,
    weight_scale: Tensor | None = None,
) -> Tensor | None:
    """What the two operators come to, or None: call them one by one.

    Args:
        image: (N, C, H, W).
        weight, bias, stride, padding, weight_scale: of the stem, as :func:`frozen_conv` takes them; it has no dilation
            and no groups, and the activation of the block.
        block, scales: the arguments of :func:`frozen_inverted_residual`, by position and by name; in the place of its
            input :func:`stem_output`, no expansion, no shortcut.

    Returns:
        (N, O, H', W'), differentiable with respect to the biases; None where no backend does it in one call: where the
        image wants a gradient, while compiling or under autocast, on another device or in another layout. In half
        precision what the stem makes is not rounded.

    Raises:
        ValueError: as the operators do.
    """
    made, _, _, *convs, block_stride, block_padding, activation, _ = block
    tensors = (image, weight, bias, *convs, weight_scale, *scales.values())
    fused = None if gradient_needed(image) else fused_call("stem_block", "frozen_conv", tensors)
    if fused is None:
        return None
    geometry = pair(stride, "stride"), four_paddings(padding)
    block_geometry = pair(block_stride, "stride"), four_paddings(block_padding)
    needs_masks = gradient_needed(bias, *convs[1::2])
    check_conv(image, weight, bias, *geometry, (1, 1), 1, activation, needs_masks, weight_scale)
    check_block(made, None, None, *convs, *block_geometry, activation, False, needs_masks, False, *scales.values())
    return fused(
        image, weight, bias, *convs, *geometry, *block_geometry, activation, needs_masks,
        weight_scale, scales["depthwise_scale"], scales["project_scale"],
    )  # fmt: skip


def stem_output(image: Tensor, weight: Tensor, stride: IntOrPair, padding: IntOrPair) -> Tensor:
    """Stands for what the stem makes: its size, dtype and device, and no memory."""
    size = conv_output_size(image.shape, weight.shape, pair(stride, "stride"), four_paddings(padding), (1, 1))
    height, width = (max(length, 0) for length in size)  # an image that is too small is refused by the check
    return torch.empty((), dtype=image.dtype, device=image.device).expand(image.size(0), weight.size(0), height, width)
