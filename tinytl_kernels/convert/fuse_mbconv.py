"""Recognise blocks with smooth activations or squeeze-and-excite among those that are computed again in backward.

Such a block (MobileNetV3's, EfficientNet's) gets :class:`~tinytl_kernels.nn.mbconv.MBConv` mixed into its class, below
what makes it recompute: where the backend computes the whole block in one call it keeps its input by itself, and
everywhere else it is recomputed layer by layer.
"""

from __future__ import annotations

import operator
from typing import NamedTuple

import torch
from torch import fx, nn
from torch.nn import functional as F

from tinytl_kernels.core.activations import ACTIVATIONS, FULL_RESULT
from tinytl_kernels.nn import FrozenConvBias, LiteResidualBlock, Recomputed, recompute, stop_recomputing
from tinytl_kernels.nn.activation import activation_name
from tinytl_kernels.nn.frozen_inverted_residual import not_a_block
from tinytl_kernels.nn.mbconv import MBConv

from .functional import activation_call, is_addition
from .fuse import class_with, drops_paths, passes_on
from .probe import tampered
from .report import ConversionReport, Note
from .trace import trace_model


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
        found = _read(module)
        if found is not None:
            module.__class__ = class_with(MBConv, module, found.children, found.facts)
            report.done.append(Note(name, type(module).__name__, "on a CPU, whole block as one operator"))
        if keep_input is not None:
            recompute(module, keep_input=keep_input)


class _Layers(NamedTuple):
    """What a block was found to be; see :class:`MBConv`."""

    convs: tuple[FrozenConvBias, ...]
    reduce: FrozenConvBias | None = None
    restore: FrozenConvBias | None = None
    gate: str | None = None
    drop: nn.Module | None = None
    residual: bool = False
    gated: int = 0  # how many of the convolutions come before the product with the gate

    @property
    def chain(self) -> tuple[FrozenConvBias | None, ...]:
        """(expand or None, depthwise, project)."""
        return self.convs if len(self.convs) == 3 else (None, *self.convs)

    @property
    def children(self) -> dict[str, nn.Module | None]:
        """By the names of :class:`MBConv`'s attributes, as the ``facts`` are."""
        expand, depthwise, project = self.chain
        return {
            "mbconv_expand": expand,
            "mbconv_depthwise": depthwise,
            "mbconv_reduce": self.reduce,
            "mbconv_restore": self.restore,
            "mbconv_project": project,
            "mbconv_drop": self.drop,
        }

    @property
    def facts(self) -> dict[str, str | bool | None]:
        return {"mbconv_gate": self.gate, "mbconv_residual": self.residual}


def _read(module: nn.Module) -> _Layers | None:
    """The layers of the block, or None if it is anything else."""
    convs = [m for m in module.modules() if isinstance(m, FrozenConvBias)]
    if not 2 <= len(convs) <= 5 or module in convs or any(tampered(m) for m in module.modules()):
        return None
    owned = {id(t) for conv in convs for t in (*conv.parameters(), *conv.buffers())}
    if any(id(t) not in owned for t in (*module.parameters(), *module.buffers())):
        return None
    flow = trace_model(module)
    if flow.opaque or len(flow.regions) != 1:
        return None
    found = {_Reader().read(graph) for graph in flow.regions[0].graphs.values()}
    layers = found.pop()
    if found or layers is None or len(layers.convs) not in (2, 3):
        return None
    used = [*layers.convs, *(conv for conv in (layers.reduce, layers.restore) if conv is not None)]
    if len(used) != len(convs) or any(conv.code_bits is not None for conv in convs):
        return None
    return None if not_a_block(*layers.chain, ACTIVATIONS) or _not_a_gate(layers) else layers


def _not_a_gate(layers: _Layers) -> str | None:
    """Why the two convolutions between depthwise and projection are no squeeze-and-excite of it, or None."""
    if layers.reduce is None:
        return None
    if layers.gated != len(layers.convs) - 1:
        return "the gate is not right before the projection"
    for conv in (layers.reduce, layers.restore):
        plain = conv.kernel_size == conv.stride == (1, 1) and conv.groups == 1
        if not plain or (not isinstance(conv.padding, str) and any(conv.padding)):
            return f"expected a 1x1 convolution of stride 1, groups 1, no padding, got {conv}"
    if layers.restore.activation is not None and layers.gate is not None:
        return "two activations behind the second convolution"
    return None


class _Reader:
    """Goes through a graph from the block's input to its output."""

    def __init__(self) -> None:
        self.same: dict[fx.Node, fx.Node] = {}  # a node that computes nothing -> what it passes on
        self.layers = _Layers(())
        self.last: fx.Node | None = None  # what the block has come to
        self.scale: fx.Node | None = None  # what squeeze-and-excite has come to, beside it

    def source(self, node) -> fx.Node | None:
        return self.same.get(node, node) if isinstance(node, fx.Node) else None

    def read(self, graph: fx.Graph) -> _Layers | None:
        inputs = [node for node in graph.nodes if node.op == "placeholder"]
        if not inputs:
            return None
        self.last = inputs[0]
        for node in graph.nodes:
            if node.op == "placeholder":
                continue
            if node.op == "output":
                whole = self.source(node.args[0]) is self.last and self.scale is None
                return self.layers if whole else None
            if node.op not in ("call_module", "call_function", "call_method") or not node.args:
                return None
            module = node.meta["module"] if node.op == "call_module" else None
            if module is not None and passes_on(module):
                self.same[node] = self.source(node.args[0])
            elif not self._takes(node, module, inputs[0]):
                return None
        return None

    def _takes(self, node: fx.Node, module: nn.Module | None, input: fx.Node) -> bool:
        layers, of = self.layers, self.source(node.args[0])
        ended = layers.residual or layers.drop is not None
        if isinstance(module, FrozenConvBias):
            if len(node.args) > 1 or node.kwargs:  # a shortcut
                return False
            if self.scale is not None and of is self.scale and layers.gate is None:
                if layers.restore is not None:
                    return False
                self.layers = layers._replace(**{"reduce" if layers.reduce is None else "restore": module})
                self.scale = node
                return True
            if ended or self.scale is not None or of is not self.last:
                return False
            self.layers = layers._replace(convs=(*layers.convs, module))
            self.last = node
            return True
        if _is_mean(node, module):
            if self.scale is not None or layers.reduce is not None or of is not self.last or not layers.convs or ended:
                return False
            self.scale = node
            return True
        if (gate := _gate(node, module)) is not None:
            if layers.restore is None or layers.gate is not None or self.scale is None or of is not self.scale:
                return False
            self.layers, self.scale = layers._replace(gate=gate), node
            return True
        if node.op != "call_module" and node.target in _PRODUCTS and len(node.args) == 2 and not node.kwargs:
            if layers.restore is None or {of, self.source(node.args[1])} != {self.last, self.scale}:
                return False
            self.layers, self.last, self.scale = layers._replace(gated=len(layers.convs)), node, None
            return True
        if module is not None and drops_paths(module):
            if ended or of is not self.last or len(layers.convs) < 2 or self.scale is not None:
                return False
            self.layers, self.last = layers._replace(drop=module), node
            return True
        if is_addition(node) and not layers.residual and self.scale is None:
            if {of, self.source(node.args[1])} != {input, self.last}:
                return False
            self.layers, self.last = layers._replace(residual=True), node
            return True
        return False


_PRODUCTS = {operator.mul, operator.imul, torch.mul, "mul", "mul_"}
_SIDES = ((2, 3), (-2, -1), [2, 3], [-2, -1])


def _is_mean(node: fx.Node, module: nn.Module | None) -> bool:
    """Whether ``node`` takes the mean of every channel of an image, as a picture of one pixel."""
    if module is not None:
        return isinstance(module, nn.AdaptiveAvgPool2d) and module.output_size in (1, (1, 1))
    if node.target is F.adaptive_avg_pool2d:
        return len(node.args) == 2 and node.args[1] in (1, (1, 1)) and not node.kwargs
    if node.target not in ("mean", torch.mean):
        return False
    arguments = dict(zip(("input", "dim", "keepdim"), node.args, strict=False)) | node.kwargs
    return set(arguments) == {"input", "dim", "keepdim"} and arguments["dim"] in _SIDES and arguments["keepdim"] is True


def _gate(node: fx.Node, module: nn.Module | None) -> str | None:
    """The name of the activation that ``node`` is, if squeeze-and-excite may end with it."""
    if module is not None:
        return FULL_RESULT[0] if type(module).__name__ == "Sigmoid" else activation_name(module)
    if node.target in (torch.sigmoid, F.sigmoid, "sigmoid", "sigmoid_"):
        return FULL_RESULT[0]
    known = activation_call(node)
    return known[0] if known is not None and known[0] != "leaky_relu" else None
