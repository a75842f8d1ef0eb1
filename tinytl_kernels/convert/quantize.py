"""Frozen weights of a converted model in 8 bits."""

from __future__ import annotations

from torch import nn

from tinytl_kernels.core.quantization import CENTROIDS, relative_error
from tinytl_kernels.nn import FrozenConvBias

from .report import Quantization

_FLOAT_BYTES = 4  # of a scale or a centroid


def quantize_weights(
    model: nn.Module, code: str, done: Quantization | None = None, *, prefix: str = ""
) -> Quantization:
    """Hold the weights of all frozen convolutions in 8 bits, layer by layer.

    Left in floating point are convolutions that 8 bits and their scales would make larger (a folded norm has one weight
    a channel), and everything that is no frozen convolution: linear layers, norms, whatever is trained.

    Args:
        model: Converted already; changed in place.
        code: ``"int8"`` or ``"kmeans"``.
        done: What was done to other parts of the same model, to go on from.
        prefix: Stands before the names of the layers.

    Returns:
        What it did, without the deviation of the outputs.

    Raises:
        ValueError: A weight holds NaN or inf; the message names the layer.
    """
    done = Quantization(code) if done is None else done
    for name, module in model.named_modules():
        if not isinstance(module, FrozenConvBias) or not _saves(module, code):
            continue
        exact = module.float_weight()
        try:
            module.quantize_(code)
        except ValueError as error:
            raise ValueError(f"{prefix}{name}.{error}") from error
        done.layers += 1
        done.elements += exact.numel()
        error = relative_error(exact, module.float_weight())
        if error >= done.error:
            done.error, done.worst = error, f"{prefix}{name}"
    return done


def _saves(module: FrozenConvBias, code: str) -> bool:
    weight = module.weight
    extra = _FLOAT_BYTES * (weight.size(0) if code == "int8" else CENTROIDS)
    return weight.numel() + extra < weight.numel() * weight.element_size()
