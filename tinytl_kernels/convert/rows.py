"""Layers that a forward calls one after the other: a stem, a ``Sequential`` of blocks, a last convolution.

torchvision's networks have them in one ``Sequential``, which computes neighbours together
(:class:`~tinytl_kernels.nn.FusedSequential`); timm's call them by name.
"""

from __future__ import annotations

from torch import fx, nn

from tinytl_kernels.nn import FrozenConvBias
from tinytl_kernels.nn.frozen_inverted_residual import not_pointwise
from tinytl_kernels.nn.fused_sequential import run_in_a_row

from .read_block import BlockLayers, read_inverted_residual
from .trace import has_forward


def owners_of_rows(model: nn.Module) -> list[nn.Module]:
    """Modules whose own forward may call such layers, once they are swapped."""
    return [
        module
        for module in model.modules()
        if has_forward(module)
        and not isinstance(module, nn.Sequential)
        and any(isinstance(child, FrozenConvBias) for child in module.children())
        and any(map(_first_block, module.children()))
    ]


def join_rows(graph: fx.Graph) -> list[str]:
    """Make every row of such calls in ``graph`` one call.

    Args:
        graph: Of one module's own forward, every submodule a leaf; edited.

    Returns:
        For each row its first and last module, as a short text.
    """
    done = []
    for row in _rows(graph):
        with graph.inserting_before(row[0]):
            modules = tuple(graph.get_attr(node.target) for node in row)
            joined = graph.call_function(run_in_a_row, (modules, row[0].args[0]))
        joined.meta = {"owner": row[0].meta["owner"], "module": None}
        row[-1].replace_all_uses_with(joined)
        for node in reversed(row):
            graph.erase_node(node)
        done.append(f"{row[0].target} to {row[-1].target} in a row")
    return done


def _rows(graph: fx.Graph) -> list[list[fx.Node]]:
    rows: list[list[fx.Node]] = []
    row: list[fx.Node] = []
    for node in graph.nodes:
        if not _is_link(node):
            continue
        if row and node.args[0] is row[-1] and len(row[-1].users) == 1:
            row.append(node)
        else:
            row = [node]
            rows.append(row)
    return [row for row in map(_without_identities, rows) if _is_worth_it(row)]


def _is_link(node: fx.Node) -> bool:
    if node.op != "call_module" or node.kwargs or len(node.args) != 1 or not isinstance(node.args[0], fx.Node):
        return False
    return type(node.meta["module"]) in (FrozenConvBias, nn.Identity, nn.Sequential)


def _without_identities(row: list[fx.Node]) -> list[fx.Node]:
    while row and type(row[-1].meta["module"]) is nn.Identity:
        row = row[:-1]
    return row


def _is_worth_it(row: list[fx.Node]) -> bool:
    """Whether there are blocks, and a convolution that is computed with the first or behind the last of them."""
    modules = [node.meta["module"] for node in row if type(node.meta["module"]) is not nn.Identity]
    for before, module, after in zip([None, *modules], modules, [*modules[1:], None], strict=False):
        block = _first_block(module)
        if block is None:
            continue
        expand, depthwise, _ = block.chain
        if type(before) is FrozenConvBias and expand is None and before.activation == depthwise.activation:
            return True
        if type(after) is FrozenConvBias and after is modules[-1] and not not_pointwise("last", after):
            return True
    return False


def _first_block(module: nn.Module) -> BlockLayers | None:
    if type(module) is not nn.Sequential:
        return None
    return next(filter(None, map(read_inverted_residual, module.modules())), None)
