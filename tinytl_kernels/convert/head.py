"""The classifier: the last linear layer in order of execution, or a final 1x1 convolution as in SqueezeNet."""

from __future__ import annotations

from torch import nn

from .chains import Links
from .example import Capture
from .probe import looks_like_batchnorm


def find_head(model: nn.Module, capture: Capture, links: Links) -> nn.Module | None:
    """The layer that gives the class scores, None for a model without one.

    Args:
        model: The stock model.
        capture: Its run, which tells the order; without one the order of registration serves.
        links: Tells a classifying convolution from one with a norm behind it.
    """
    layers = [m for m in model.modules() if isinstance(m, (nn.Linear, nn.Conv2d))]
    if capture.output is not None:
        layers = sorted((m for m in layers if m in capture.calls), key=lambda m: capture.calls[m].order)
    if not layers:
        return None
    last = layers[-1]
    if isinstance(last, nn.Linear):
        return last
    follower = links.after(last)
    classifies = (
        last.kernel_size == (1, 1)
        and last.bias is not None
        and last.groups == 1
        and not (follower is not None and looks_like_batchnorm(follower))
    )
    return last if classifies else None


def new_head(head: nn.Module, num_classes: int) -> nn.Module:
    """A fresh classifier with the inputs of ``head``, on its device and in its dtype."""
    to = {"device": head.weight.device, "dtype": head.weight.dtype, "bias": head.bias is not None}
    if isinstance(head, nn.Linear):
        return nn.Linear(head.in_features, num_classes, **to).train(head.training)
    return nn.Conv2d(head.in_channels, num_classes, 1, **to).train(head.training)


def resize_head(head: nn.Module, num_classes: int) -> None:
    """Give ``head`` new parameters for ``num_classes`` outputs, in place."""
    fresh = new_head(head, num_classes)
    head.weight, head.bias = fresh.weight, fresh.bias
    if isinstance(head, nn.Linear):
        head.out_features = num_classes
    else:
        head.out_channels = num_classes


def outputs_of(head: nn.Module) -> int:
    """How many classes ``head`` tells apart."""
    return head.weight.size(0)


def set_num_classes(model: nn.Module, num_classes: int) -> None:
    """Keep timm's ``model.num_classes`` true."""
    if isinstance(getattr(model, "num_classes", None), int):
        model.num_classes = num_classes
