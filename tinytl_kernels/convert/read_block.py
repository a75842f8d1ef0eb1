"""Read a block's layers off its structure: convolutions in a row, squeeze-and-excite, drop path, shortcut."""

from __future__ import annotations

import operator
from typing import NamedTuple

import torch
from torch import fx, nn
from torch.nn import functional as F

from tinytl_kernels.core.activations import FULL_RESULT
from tinytl_kernels.nn import FrozenConvBias, FrozenInvertedResidual
from tinytl_kernels.nn.activation import activation_name
from tinytl_kernels.nn.frozen_inverted_residual import not_a_block

from .functional import activation_call, is_addition
from .probe import tampered
from .trace import trace_model


class BlockLayers(NamedTuple):
    """What a block was found to be.

    Args:
        convs: Expansion, depthwise convolution, projection, as far as they are there.
        reduce, restore: The convolutions of a squeeze-and-excite.
        gate: The activation behind ``restore`` that is no part of it.
        drop: Drops paths between projection and addition.
        residual: Whether the input is added.
        gated: How many of ``convs`` come before the product with the gate.
    """

    convs: tuple[FrozenConvBias, ...]
    reduce: FrozenConvBias | None = None
    restore: FrozenConvBias | None = None
    gate: str | None = None
    drop: nn.Module | None = None
    residual: bool = False
    gated: int = 0

    @property
    def chain(self) -> tuple[FrozenConvBias | None, ...]:
        """(expand or None, depthwise, project)."""
        return self.convs if len(self.convs) == 3 else (None, *self.convs)


def read_block(module: nn.Module) -> BlockLayers | None:
    """The layers of ``module``, if nothing is left in it, after its layers were swapped, but two or three frozen
    convolutions in a row, an optional squeeze-and-excite, drop path and addition of its input, in training as in
    evaluation; None if it is anything else."""
    convs = [m for m in module.modules() if isinstance(m, FrozenConvBias)]
    if not 2 <= len(convs) <= 5 or not any(conv.groups > 1 for conv in convs) or module in convs:
        return None
    if any(tampered(m) for m in module.modules()):
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
    used = len(layers.convs) + sum(conv is not None for conv in (layers.reduce, layers.restore))
    return layers if used == len(convs) else None


def read_inverted_residual(module: nn.Module) -> BlockLayers | None:
    """The layers of ``module``, if it is an inverted residual block and nothing else."""
    if isinstance(module, FrozenInvertedResidual) or sum(isinstance(m, FrozenConvBias) for m in module.modules()) > 3:
        return None
    if isinstance(module, nn.Sequential) and not any(isinstance(m, FrozenConvBias) for m in module.children()):
        return None  # a stage that holds one block: the block inside is what is meant
    layers = read_block(module)
    if layers is None or layers.reduce is not None or layers.drop is not None or not_a_block(*layers.chain):
        return None
    return layers


class _Reader:
    """Goes through a graph from the block's input to its output."""

    def __init__(self) -> None:
        self.same: dict[fx.Node, fx.Node] = {}  # a node that computes nothing -> what it passes on
        self.layers = BlockLayers(())
        self.last: fx.Node | None = None  # what the block has come to
        self.scale: fx.Node | None = None  # what squeeze-and-excite has come to, beside it

    def source(self, node) -> fx.Node | None:
        return self.same.get(node, node) if isinstance(node, fx.Node) else None

    def read(self, graph: fx.Graph) -> BlockLayers | None:
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
            if module is not None and _passes_on(module):
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
        if module is not None and _drops_paths(module):
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


def _passes_on(module: nn.Module) -> bool:
    """Whether ``module`` returns what it gets, in training and in evaluation."""
    if isinstance(module, nn.Identity):
        return True
    if isinstance(module, nn.Dropout):
        return module.p == 0
    return _drops_paths(module) and not (getattr(module, "drop_prob", None) or getattr(module, "p", None))


def _drops_paths(module: nn.Module) -> bool:
    """Whether ``module`` is timm's ``DropPath`` or torchvision's ``StochasticDepth``."""
    return type(module).__name__ in ("DropPath", "StochasticDepth")
