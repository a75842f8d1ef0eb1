"""What a frozen convolution inherits: the weight a Conv2d really applies, and the BatchNorm behind it, folded in."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from tinytl_kernels.core.geometry import tensorflow_same_padding, window_extent


@dataclass(frozen=True)
class AppliedConvolution:
    """What a ``Conv2d`` computes: its weight after any standardisation or parametrisation, and its padding."""

    weight: Tensor
    bias: Tensor | None
    padding: int | tuple[int, ...] | str


def applied_convolution(conv: nn.Conv2d) -> AppliedConvolution:
    """Find out what ``conv`` applies, also where a subclass has a forward of its own.

    Subclasses pad dynamically (TensorFlow's SAME) or standardise their weight. No class is known by name: the forward
    runs on small random images, the call to ``conv2d`` inside is watched for the weight that arrives there, and the
    padding is the candidate (the module's own, SAME) that reproduces the outputs.

    Raises:
        ValueError: the forward is not one convolution with a constant weight.
    """
    stock = type(conv).forward is nn.Conv2d.forward and type(conv)._conv_forward is nn.Conv2d._conv_forward
    # A hook before the forward may compute the weight (the older weight_norm does).
    if stock and not conv._forward_pre_hooks:
        return AppliedConvolution(conv.weight.detach(), _detached(conv.bias), conv.padding)
    probes = _probe_images(conv)
    calls = _ConvolutionCalls()
    try:
        with torch.no_grad(), calls:
            outputs = [conv(probe) for probe in probes]
    except Exception as error:
        raise ValueError(f"{type(conv).__name__}: its forward failed on a probe image: {error}") from error
    if len(calls.seen) == len(probes):
        weight, bias = calls.seen[0]
        for padding in (conv.padding, "tf_same") if conv.padding_mode == "zeros" else (conv.padding,):
            if all(_reproduces(conv, weight, bias, padding, x, y) for x, y in zip(probes, outputs, strict=True)):
                return AppliedConvolution(weight.detach(), _detached(bias), padding)
    raise ValueError(
        f"{type(conv).__name__}: its forward is not a convolution with a constant weight and zero or SAME padding"
    )


def fold_batch_norm(weight: Tensor, bias: Tensor | None, norm: nn.Module) -> tuple[Tensor, Tensor]:
    """Weight and bias of ``norm(conv(x))`` with the running statistics of ``norm``, computed in float64.

        y = gamma * (W x + b - mean) / sqrt(var + eps) + beta

    Args:
        weight: (O, C / groups, kH, kW).
        bias: (O,) or None.
        norm: a BatchNorm with running statistics over O channels.

    Returns:
        ((O, C / groups, kH, kW), (O,)) in the dtype of ``weight``.

    Raises:
        ValueError: ``norm`` is no BatchNorm, normalises with the statistics of each batch, or has other channels.
    """
    if not isinstance(norm, nn.modules.batchnorm._BatchNorm):
        raise ValueError(f"norm: expected a BatchNorm, got {type(norm).__name__}, which cannot be folded")
    if type(norm).forward not in (nn.modules.batchnorm._BatchNorm.forward, nn.SyncBatchNorm.forward):
        raise ValueError(
            f"norm: the forward of {type(norm).__name__} is its own and may do more than normalise; pass an "
            "nn.BatchNorm2d with its numbers, and what follows it as the activation"
        )
    if norm.running_mean is None or norm.running_var is None:
        raise ValueError("norm: without running statistics it normalises with those of each batch: cannot be folded")
    channels = norm.running_mean.numel()
    if channels != weight.size(0):
        raise ValueError(f"norm: expected {weight.size(0)} channels as the convolution gives, got {channels}")
    scale = (norm.running_var.double() + norm.eps).rsqrt()
    if norm.weight is not None:
        scale = scale * norm.weight.detach().double()
    shift = -norm.running_mean.double() * scale
    if norm.bias is not None:
        shift = shift + norm.bias.detach().double()
    if bias is not None:
        shift = shift + bias.detach().double() * scale
    folded = weight.detach().double() * scale.view(-1, 1, 1, 1)
    return folded.to(weight.dtype), shift.to(weight.dtype)


class _ConvolutionCalls(TorchFunctionMode):
    """Notes weight and bias of every ``conv2d`` that is called."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[Tensor, Tensor | None]] = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in (F.conv2d, torch.conv2d):
            weight = args[1] if len(args) > 1 else kwargs["weight"]
            self.seen.append((weight, args[2] if len(args) > 2 else kwargs.get("bias")))
        return func(*args, **kwargs)


def _probe_images(conv: nn.Conv2d) -> list[Tensor]:
    # Even and odd, so that SAME padding shows: it differs from any fixed padding on one of them.
    generator = torch.Generator().manual_seed(0)
    extent = max(window_extent(k, d) for k, d in zip(conv.kernel_size, conv.dilation, strict=True))
    least = extent + 2 * max(conv.stride)
    shapes = [(1, conv.in_channels, least + i, least + i + 1) for i in range(3)]
    return [torch.randn(shape, generator=generator).to(conv.weight) for shape in shapes]


def _reproduces(conv: nn.Conv2d, weight, bias, padding, image: Tensor, output: Tensor) -> bool:
    if conv.padding_mode != "zeros":
        # nn.Conv2d pads by itself then, before the convolution.
        image, padding = F.pad(image, conv._reversed_padding_repeated_twice, mode=conv.padding_mode), 0
    elif padding == "tf_same":
        height, width = (
            tensorflow_same_padding(*geometry)
            for geometry in zip(image.shape[2:], conv.kernel_size, conv.stride, conv.dilation, strict=True)
        )
        image, padding = F.pad(image, (*width, *height)), 0
    with torch.no_grad():
        candidate = F.conv2d(image, weight, bias, conv.stride, padding, conv.dilation, conv.groups)
    if candidate.shape != output.shape or candidate.dtype != output.dtype:
        return False
    # The same arithmetic on the same data: a few rounding errors apart, where another padding is off by O(1).
    allowed = 64 * torch.finfo(output.dtype).eps * output.abs().max()
    return bool((candidate - output).abs().max() <= allowed)


def _detached(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.detach()
