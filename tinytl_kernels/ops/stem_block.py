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
    stem_weight: Tensor,
    stem_bias: Tensor | None,
    depthwise_weight: Tensor,
    depthwise_bias: Tensor | None,
    project_weight: Tensor,
    project_bias: Tensor | None,
    stem_stride: IntOrPair = 1,
    stem_padding: IntOrPair = 0,
    stride: IntOrPair = 1,
    padding: IntOrPair = 1,
    activation: str | None = "relu6",
    *,
    stem_scale: Tensor | None = None,
    depthwise_scale: Tensor | None = None,
    project_scale: Tensor | None = None,
) -> Tensor | None:
    """What the two operators come to, or None: call them one by one.

    Args:
        image: (N, C, H, W).
        stem_weight, stem_bias, stem_stride, stem_padding, stem_scale: of :func:`frozen_conv`, without dilation and
            groups.
        depthwise_weight, depthwise_bias, project_weight, project_bias, stride, padding, depthwise_scale, project_scale:
            of :func:`frozen_inverted_residual`.
        activation: of both.

    Returns:
        (N, O, H', W'), differentiable with respect to the biases; None where no backend does it in one call: where the
        image wants a gradient, while compiling or under autocast, on another device or in another layout. In half
        precision what the stem makes is not rounded.

    Raises:
        ValueError: as the operators do.
    """
    weights = (stem_weight, stem_bias, depthwise_weight, depthwise_bias, project_weight, project_bias)
    scales = (stem_scale, depthwise_scale, project_scale)
    fused = None if gradient_needed(image) else fused_call("stem_block", "frozen_conv", (image, *weights, *scales))
    if fused is None:
        return None
    stem_stride, stem_padding = pair(stem_stride, "stem_stride"), four_paddings(stem_padding)
    stride, padding = pair(stride, "stride"), four_paddings(padding)
    needs_masks = gradient_needed(*weights[1::2])
    check_conv(image, stem_weight, stem_bias, stem_stride, stem_padding, (1, 1), 1, activation, needs_masks, stem_scale)
    made = stem_output(image, stem_weight, stem_stride, stem_padding)
    check_block(
        made, None, None, *weights[2:], stride, padding, activation, False, needs_masks, False, None, *scales[1:]
    )
    return fused(image, *weights, stem_stride, stem_padding, stride, padding, activation, needs_masks, *scales)


def stem_output(image: Tensor, weight: Tensor, stride: IntOrPair, padding: IntOrPair) -> Tensor:
    """Stands for what the stem makes: its size, dtype and device, and no memory."""
    size = conv_output_size(image.shape, weight.shape, pair(stride, "stride"), four_paddings(padding), (1, 1))
    height, width = (max(length, 0) for length in size)  # an image that is too small is refused by the check
    return torch.empty((), dtype=image.dtype, device=image.device).expand(image.size(0), weight.size(0), height, width)
