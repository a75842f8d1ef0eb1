"""Chains convolution -> BatchNorm -> activation that may become one module, found in the traced graphs."""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx, nn

from .aliasing import safe_in_place
from .example import Capture
from .probe import looks_like_batchnorm, plain_activation, tampered
from .trace import Flow, Region


@dataclass
class Chain:
    """A convolution and what alone reads its result.

    Args:
        conv: The convolution.
        norm: The BatchNorm behind it, if any.
        activation: The activation module behind those, if any.
    """

    conv: nn.Conv2d
    norm: nn.Module | None = None
    activation: nn.Module | None = None


class Links:
    """Who alone reads whom, over all pieces of a model and both modes.

    Args:
        flow: The traced model.
        capture: Its run. Shows pieces that are not called as they were traced, as when an untraceable module calls
            the children of a ``Sequential`` one by one: such a piece says nothing about what feeds what.
    """

    def __init__(self, flow: Flow, capture: Capture) -> None:
        #: Modules that must stay apart from what feeds them: somebody is going to be put around them.
        self.unmerged: set[nn.Module] = set()
        self._read_directly: set[nn.Module] = set()
        self._ran = capture.output is not None
        self._next: dict[nn.Module, nn.Module | None] = {}
        self._unsafe: set[nn.Module] = set()
        self._seen: set[nn.Module] = set()
        self._calls = capture.calls
        for region in flow.regions:
            self._note_direct_reads(region)
            if not _called_as_traced(region, capture):
                continue
            for graph in region.graphs.values():
                self._read(graph)

    def after(self, module: nn.Module) -> nn.Module | None:
        """The only reader of the only call of ``module``, if that is itself called nowhere else and may be merged."""
        reader = self._next.get(module)
        if reader is None or reader in self.unmerged or reader in self._read_directly or tampered(reader):
            return None
        return reader if self._times(module) == self._times(reader) else None

    def _times(self, module: nn.Module) -> int | None:
        call = self._calls.get(module)
        return None if call is None else call.count

    def out_of_reach(self, module: nn.Module) -> str:
        """Why ``module`` must stay although its kind is known, else an empty string."""
        if module in self._read_directly:
            return "its tensors are read without calling it"
        if self._ran and module not in self._calls and module not in self._seen:
            return "it is never called"
        return ""

    def may_lose_in_place(self, activation: nn.Module) -> bool:
        """Whether ``activation`` may become out of place: nobody reads what it overwrites."""
        if not getattr(activation, "inplace", False):
            return True
        return activation in self._seen and activation not in self._unsafe

    def _note_direct_reads(self, region: Region) -> None:
        for graph in region.graphs.values():
            for node in graph.nodes:
                owner = node.target.rpartition(".")[0] if node.op == "get_attr" else ""
                if owner:
                    self._read_directly.add(region.root.get_submodule(owner))

    def _read(self, graph: fx.Graph) -> None:
        calls: dict[nn.Module, list[fx.Node]] = {}
        for node in graph.nodes:
            if node.op == "call_module":
                calls.setdefault(node.meta["module"], []).append(node)
        for module, nodes in calls.items():
            self._seen.add(module)
            if not all(safe_in_place(node) for node in nodes):
                self._unsafe.add(module)
            reader = _only_reader(nodes[0]) if len(nodes) == 1 else None
            if reader is not None and len(calls[reader]) != 1:
                reader = None
            # Both modes must agree; a module that only one mode calls (an auxiliary head) is told by that one.
            if self._next.setdefault(module, reader) is not reader:
                self._next[module] = None


def _only_reader(node: fx.Node) -> nn.Module | None:
    while len(node.users) == 1:
        (reader,) = node.users
        if reader.op != "call_module" or reader.args != (node,) or reader.kwargs:
            return None
        module = reader.meta["module"]
        if type(module) is not nn.Identity or tampered(module):
            return module
        node = reader
    return None


def _called_as_traced(region: Region, capture: Capture) -> bool:
    if not region.path:
        return True
    root = capture.calls.get(region.root)
    if root is None:
        return False
    counts: dict[nn.Module, int] = {}
    for node in region.graphs["eval"].nodes:
        if node.op == "call_module":
            counts[node.meta["module"]] = counts.get(node.meta["module"], 0) + root.count
    return all(module in capture.calls and capture.calls[module].count == n for module, n in counts.items())


def find_chains(convs: list[nn.Conv2d], links: Links, *, fold: bool) -> list[Chain]:
    """For each convolution, what may be merged into it.

    Args:
        convs: The convolutions that are going to be swapped.
        links: Who reads whom.
        fold: Whether BatchNorms may be folded; without it a chain ends before its norm.

    Returns:
        One chain a convolution, in the given order.
    """
    chains = []
    for conv in convs:
        chain = Chain(conv)
        reader = links.after(conv)
        if reader is not None and fold and looks_like_batchnorm(reader):
            chain.norm = reader
            reader = links.after(reader)
        if reader is not None and plain_activation(reader) is not None:
            chain.activation = reader
        chains.append(chain)
    return chains
