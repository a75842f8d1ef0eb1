"""Recognise inverted residual blocks by their structure and compute each as one operator."""

from __future__ import annotations

import operator
from collections.abc import Collection

import torch
from torch import fx, nn

from tinytl_kernels.nn import FrozenConvBias, FrozenInvertedResidual
from tinytl_kernels.nn.frozen_inverted_residual import not_a_block

from .probe import tampered
from .report import ConversionReport, Note
from .trace import trace_model

_ADDITIONS = {operator.add, operator.iadd, torch.add}


def fuse_blocks(model: nn.Module, report: ConversionReport, apart: Collection[str] = ()) -> None:
    """Put a :class:`FrozenInvertedResidual` in the place of every block that is one, outermost module first.

    A block is a module of which nothing is left, after its layers were swapped, but an optional 1x1 expansion, a
    depthwise convolution, a 1x1 projection and an optional addition of its input, in training and in evaluation.

    Args:
        model: Converted layer by layer already; changed in place.
        report: Gets a note for each block.
        apart: Names of modules that something is going to be put around: no block swallows one of them.
    """
    done: list[str] = []
    for name, module in list(model.named_modules()):
        if not name or any(name.startswith(f"{block}.") for block in done):
            continue
        if any(path.startswith(f"{name}.") for path in apart):
            continue
        block = _as_block(module)
        if block is None:
            continue
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, block)
        done.append(name)
        report.done.append(Note(name, type(module).__name__, "whole block as one operator"))


def _as_block(module: nn.Module) -> FrozenInvertedResidual | None:
    convs = [m for m in module.modules() if isinstance(m, FrozenConvBias)]
    if len(convs) not in (2, 3) or not any(conv.groups > 1 for conv in convs) or module in convs:
        return None
    if isinstance(module, nn.Sequential) and not any(conv in module.children() for conv in convs):
        return None  # a stage that holds one block: the block inside is replaced, the stage stays
    owned = {id(p) for conv in convs for p in conv.parameters()}
    if any(id(p) not in owned for p in module.parameters()) or next(module.buffers(), None) is not None:
        return None
    if any(tampered(m) for m in module.modules()):
        return None
    flow = trace_model(module)
    if flow.opaque or len(flow.regions) != 1:
        return None
    found = {mode: _read(graph) for mode, graph in flow.regions[0].graphs.items()}
    if None in found.values() or len(set(found.values())) != 1:
        return None
    *chain, residual = found["eval"]
    if len(chain) != len(convs):
        return None
    expand, depthwise, project = chain if len(chain) == 3 else (None, *chain)
    if not_a_block(expand, depthwise, project) is not None:
        return None
    return FrozenInvertedResidual.from_convs(expand, depthwise, project, residual).train(module.training)


def _read(graph: fx.Graph) -> tuple | None:
    """(convolutions in order ..., whether the input is added) if the graph is nothing but that."""
    same: dict[fx.Node, fx.Node] = {}  # a node that computes nothing -> what it passes on

    def source(node) -> fx.Node | None:
        return same.get(node, node) if isinstance(node, fx.Node) else None

    inputs = [node for node in graph.nodes if node.op == "placeholder"]
    if not inputs:
        return None
    last, convs, residual = inputs[0], [], False
    for node in graph.nodes:
        if node.op == "placeholder":
            continue
        if node.op == "output":
            return (*convs, residual) if source(node.args[0]) is last else None
        if node.op == "call_module" and _passes_on(node.meta["module"]) and source(node.args[0]) is not None:
            same[node] = source(node.args[0])
        elif node.op == "call_module" and isinstance(node.meta["module"], FrozenConvBias):
            if residual or source(node.args[0]) is not last:
                return None
            convs.append(node.meta["module"])
            last = node
        elif _is_addition(node) and not residual and convs:
            if {source(node.args[0]), source(node.args[1])} != {inputs[0], last}:
                return None
            residual, last = True, node
        else:
            return None
    return None


def _passes_on(module: nn.Module) -> bool:
    if isinstance(module, nn.Identity):
        return True
    if isinstance(module, nn.Dropout):
        return module.p == 0
    # timm's DropPath and torchvision's StochasticDepth, by what they have in common.
    return type(module).__name__ in ("DropPath", "StochasticDepth") and not (
        getattr(module, "drop_prob", None) or getattr(module, "p", None)
    )


def _is_addition(node: fx.Node) -> bool:
    plain = len(node.args) == 2 and not node.kwargs
    if node.op == "call_function":
        return plain and node.target in _ADDITIONS
    return node.op == "call_method" and plain and node.target in ("add", "add_")
