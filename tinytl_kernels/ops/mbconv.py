"""The block of MobileNetV3 and EfficientNet in one call, where a backend has one. No operator: a chain of them.

    h1 = act(frozen_conv(input, expand))
    h2 = act(frozen_conv(h1, depthwise))
    c  = gate(frozen_conv(act_s(frozen_conv(mean(h2), reduce)), restore))          squeeze-and-excite
    output = frozen_conv(c h2, project) [+ input]

MobileNetV3 (arXiv 1905.02244, figure 4), EfficientNet (arXiv 1905.11946, section 4), squeeze-and-excite (arXiv
1709.01507, section 3). Full values of h1 and h2 would have to be kept for an exact gradient; a backend that takes the
call keeps ``input`` and computes the block again in backward, without ever holding h1 and h2 of the whole batch.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from tinytl_kernels.core.activations import STAND_ALONE, check_activation
from tinytl_kernels.ops.library import fused_call

Layer = tuple[Tensor, Tensor | None, Tensor | None]
"""Weight, bias and the scale of a weight in 8 bits, as :func:`frozen_conv` takes them."""

_NO_LAYER = (None, None, None)


class SqueezeExcite(NamedTuple):
    """Two 1x1 convolutions of the mean of every channel.

    Args:
        reduce: from the expanded channels to fewer, behind it ``activation``.
        restore: back to the expanded channels, behind it ``gate``.
        activation, gate: None or the name of one.
    """

    reduce: Layer
    restore: Layer
    activation: str | None
    gate: str | None


def mbconv(
    input: Tensor,
    expand: Layer | None,
    depthwise: Layer,
    project: Layer,
    stride: tuple[int, int],
    padding: tuple[int, int, int, int],
    activation: str | None,
    squeeze_excite: SqueezeExcite | None = None,
    residual: bool = False,
    *,
    compute: bool = True,
) -> Tensor | None:
    """What the block's operators come to, or None: call them one by one.

    Args:
        input: (N, C, H, W), as :func:`autocast_input` gives it.
        expand, depthwise, project: the layers; an expansion and a projection are 1x1, and without the first the
            depthwise convolution reads ``input``.
        stride, padding: of the depthwise convolution; padding is (top, bottom, left, right).
        activation: behind expansion and depthwise convolution.
        squeeze_excite: between depthwise convolution and projection, or None.
        residual: add ``input``.
        compute: False for the output's history alone: a tensor of no particular values to call ``backward`` on.

    Returns:
        (N, O, H', W'), differentiable once with respect to ``input`` and the biases, of which only ``input`` is kept;
        None where no backend does it in one call: while compiling, on another device or in another layout. In half
        precision nothing inside is rounded.

    Raises:
        ValueError: an activation has no such name.
        RuntimeError: shapes do not fit, or a weight requires a gradient.
    """
    reduce, restore, squeeze_activation, gate = squeeze_excite or (_NO_LAYER, _NO_LAYER, None, None)
    layers = (expand or _NO_LAYER, depthwise, reduce, restore, project)
    tensors = [tensor for layer in layers for tensor in layer]
    fused = fused_call("mbconv", [input, *tensors], keeps_less=True)
    if fused is None or any(tensor is not None and tensor.device != input.device for tensor in tensors):
        return None
    names = {"activation": activation, "squeeze_activation": squeeze_activation, "gate": gate}
    for argument, name in names.items():
        check_activation(name, argument, STAND_ALONE)
    return fused(input, tensors, stride, padding, *(name or "none" for name in names.values()), residual, compute)


def offers_mbconv(input: Tensor) -> bool:
    """Whether there is a backend that computes such a block of ``input`` in one call."""
    return fused_call("mbconv", [input], keeps_less=True) is not None
