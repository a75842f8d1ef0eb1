"""What a forward computes by plain operations that keep full values for backward, for the report."""

from __future__ import annotations

import operator

import torch
from torch import fx, nn
from torch.nn import functional as F

from .report import ConversionReport, Note
from .trace import Flow

_MULTIPLIES = {operator.mul, operator.imul, torch.mul, "mul", "mul_", operator.truediv, torch.div, "div"}
_KEEPS = {
    "matmul keeps both its inputs": {operator.matmul, torch.matmul, torch.bmm, torch.einsum, "matmul", "bmm"},
    "softmax keeps its result": {F.softmax, torch.softmax, "softmax", F.log_softmax, torch.log_softmax, "log_softmax"},
    "a sigmoid or tanh keeps its result": {torch.sigmoid, torch.tanh, F.sigmoid, F.tanh, "sigmoid", "tanh"},
    "a functional convolution keeps its input: use nn.Conv2d": {torch.conv2d, torch.conv1d, torch.conv3d},
    "a functional norm keeps its input": {F.batch_norm, F.group_norm, F.layer_norm, F.instance_norm, F.normalize},
    "attention keeps its inputs": {F.scaled_dot_product_attention},
}


def note_operations(flow: Flow, report: ConversionReport, names: dict[nn.Module, str]) -> None:
    """Add a note to ``report`` for each module whose own forward keeps full values.

    Args:
        flow: The traced model.
        report: Gets the notes.
        names: Names of the modules.
    """
    found: dict[tuple[str, str, str], None] = {}
    for region in flow.regions:
        for graph in region.graphs.values():
            for node in graph.nodes:
                text = _text(node)
                if text:
                    owner = node.meta["owner"]
                    found.setdefault((names[owner], type(owner).__name__, text))
    report.kept += [Note(*key) for key in found]


def _text(node: fx.Node) -> str:
    if node.op not in ("call_function", "call_method"):
        return ""
    if node.target in _MULTIPLIES:
        tensors = [argument for argument in node.args if isinstance(argument, fx.Node) and _is_tensor(argument)]
        return "a multiplication keeps both its inputs (squeeze-and-excite)" if len(tensors) == 2 else ""
    return next((text for text, targets in _KEEPS.items() if node.target in targets), "")


def _is_tensor(node: fx.Node) -> bool:
    """Whether ``node`` is a tensor rather than a number computed from a shape."""
    if node.op == "call_method" and node.target in ("size", "dim", "numel"):
        return False
    if node.op == "call_function" and node.target in (getattr, operator.getitem, operator.floordiv):
        first = node.args[0]
        shape = node.target is getattr and len(node.args) > 1 and node.args[1] in ("shape", "ndim", "dtype", "device")
        return not shape and not (isinstance(first, fx.Node) and not _is_tensor(first))
    return True
