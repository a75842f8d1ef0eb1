"""Recognise blocks with smooth activations or squeeze-and-excite among those that are computed again in backward.

Such a block (MobileNetV3's, EfficientNet's) gets :class:`~tinytl_kernels.nn.mbconv.MBConv` mixed into its class, below
what makes it recompute: where the backend computes the whole block in one call it keeps its input by itself, and
everywhere else it is recomputed layer by layer.
"""

from __future__ import annotations

from torch import nn

from tinytl_kernels.core.activations import ACTIVATIONS
from tinytl_kernels.nn import LiteResidualBlock, MBConv, Recomputed, recompute, stop_recomputing
from tinytl_kernels.nn.frozen_inverted_residual import not_a_block, not_pointwise

from .fuse import class_with
from .read_block import BlockLayers, read_block
from .report import ConversionReport, Note


def fuse_mbconvs(model: nn.Module, report: ConversionReport) -> None:
    """Make every recomputed block that is an MBConv compute as one operator where there is one.

    Args:
        model: Converted, with its blocks recomputed; changed in place.
        report: Gets a note for each block.
    """
    for name, module in list(model.named_modules()):
        if not isinstance(module, Recomputed):
            continue
        if isinstance(module, LiteResidualBlock):
            name, module = f"{name}.main", module.main
        keep_input = getattr(module, "keep_input", None)
        stop_recomputing(module)
        layers = read_block(module)
        if layers is not None and _is_mbconv(layers):
            facts = {"mbconv_gate": layers.gate, "mbconv_residual": layers.residual}
            module.__class__ = class_with(MBConv, module, _children(layers), facts)
            report.done.append(Note(name, type(module).__name__, "on a CPU, whole block as one operator"))
        if keep_input is not None:
            recompute(module, keep_input=keep_input)


def _is_mbconv(layers: BlockLayers) -> bool:
    if not_a_block(*layers.chain, ACTIVATIONS) or any(conv.code_bits is not None for conv in layers.convs):
        return False
    return layers.reduce is None or _is_squeeze_and_excite(layers)


def _is_squeeze_and_excite(layers: BlockLayers) -> bool:
    """Whether the two convolutions beside are one of what the projection reads."""
    pair = {"reduce": layers.reduce, "restore": layers.restore}
    return (
        layers.gated == len(layers.convs) - 1
        and not any(not_pointwise(name, conv) or conv.code_bits is not None for name, conv in pair.items())
        and (layers.restore.activation is None or layers.gate is None)
    )


def _children(layers: BlockLayers) -> dict[str, nn.Module | None]:
    expand, depthwise, project = layers.chain
    return {
        "mbconv_expand": expand,
        "mbconv_depthwise": depthwise,
        "mbconv_reduce": layers.reduce,
        "mbconv_restore": layers.restore,
        "mbconv_project": project,
        "mbconv_drop": layers.drop,
    }
