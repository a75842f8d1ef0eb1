"""Which results share memory with an input: an in-place call may become out of place only if nobody else reads it."""

from __future__ import annotations

import operator

import torch
from torch import fx, nn

from .trace import NORMS

_FRESH_MODULES = ("torch.nn.modules.pooling", "torch.nn.modules.activation", "torch.nn.modules.upsampling")
_VIEW_METHODS = frozenset(
    (
        *("view", "reshape", "flatten", "unflatten", "transpose", "permute", "contiguous", "expand", "squeeze"),
        *("unsqueeze", "chunk", "split", "narrow", "select", "detach", "view_as", "reshape_as", "expand_as", "unfold"),
        *("to", "float", "half", "bfloat16", "double", "type_as", "t", "swapaxes", "movedim", "unbind", "diagonal"),
    )
)
_FRESH_FUNCTIONS = frozenset(
    (
        *(operator.add, operator.mul, operator.sub, operator.truediv),
        *(torch.add, torch.mul, torch.sub, torch.cat, torch.matmul, torch.conv2d, torch.relu, torch.sigmoid),
        *(nn.functional.linear, nn.functional.interpolate, nn.functional.batch_norm),
        *(nn.functional.max_pool2d, nn.functional.avg_pool2d, nn.functional.adaptive_avg_pool2d),
    )
)


def returns_its_input(node: fx.Node) -> bool:
    """Whether a node's result may share memory with its first argument. In doubt, yes."""
    module = node.meta.get("module")
    if module is not None:
        if getattr(module, "inplace", False):
            return True
        fresh = isinstance(module, (nn.Conv2d, nn.Linear, *NORMS)) or any(True for _ in module.parameters())
        return not fresh and not type(module).__module__.startswith(_FRESH_MODULES)
    if node.op == "call_method":
        return node.target.endswith("_") or node.target in _VIEW_METHODS
    return node.op != "call_function" or node.target not in _FRESH_FUNCTIONS


def safe_in_place(node: fx.Node) -> bool:
    """Whether an in-place call writes only into memory that nobody else reads, so that it may become out of place.

    Walks back from the call through everything that may share memory, up to the node that made it: each on the way
    must have one reader.
    """
    source = node.args[0] if node.args else None
    while isinstance(source, fx.Node):
        if len(source.users) != 1 or source.op not in ("call_module", "call_function", "call_method"):
            return False
        if not returns_its_input(source):
            return True
        source = source.args[0] if source.args else None
    return False
