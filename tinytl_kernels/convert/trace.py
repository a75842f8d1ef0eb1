"""What feeds what: a model's forward as ``torch.fx`` graphs, of as large pieces as can be traced.

A piece that fx cannot trace (control flow on data, a monkeypatched forward) becomes a leaf of the graph around it, and
its children are traced as pieces of their own. Every piece is traced in training and in evaluation mode, because fx
bakes in control flow on ``self.training``.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from torch import fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

MODES = ("train", "eval")

# Leaves beside those of torch.nn: what a graph must show as one call. Names, because these come from optional
# libraries (torchvision.ops, timm.layers) that need not be installed.
_LEAF_CLASSES = frozenset({"DropPath", "DropBlock2d", "StochasticDepth", "FrozenBatchNorm2d", "FrozenBatchNormAct2d"})
NORMS = (_BatchNorm, nn.GroupNorm, nn.LayerNorm, nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)


@dataclass
class Region:
    """One traced piece of a model.

    Args:
        root: The module that was traced.
        path: Its name in the model, empty for the model itself.
        graphs: ``{"train": graph, "eval": graph}``. A node's ``meta["owner"]`` is the module in whose forward the call
            stands; ``meta["module"]`` the module that is called.
    """

    root: nn.Module
    path: str
    graphs: dict[str, fx.Graph]


@dataclass
class Flow:
    """All traced pieces of a model, and what could not be traced.

    Args:
        regions: The pieces, outermost first.
        opaque: ``(module, why)`` for every module that fx could not see through.
    """

    regions: list[Region] = field(default_factory=list)
    opaque: list[tuple[nn.Module, str]] = field(default_factory=list)


class _Tracer(fx.Tracer):
    """Notes who calls, and where tracing failed."""

    def __init__(self, opaque: Collection[nn.Module], shallow: bool) -> None:
        super().__init__()
        self.opaque = opaque
        self.shallow = shallow
        self.stack: list[nn.Module] = []
        self.culprit: nn.Module | None = None

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return self.shallow or m in self.opaque or is_leaf(m)

    def trace(self, root: nn.Module, concrete_args=None) -> fx.Graph:
        self.stack = [root]
        if "forward" in vars(root):
            raise TypeError("its forward was replaced on the instance")
        return super().trace(root, concrete_args)

    def create_args_for_root(self, root_fn: Callable, is_module: bool, concrete_args=None):
        # Arguments with a default take it: as a proxy, `mask is not None` would be baked in as True.
        return super().create_args_for_root(_without_optional_arguments(root_fn), is_module, concrete_args)

    def call_module(self, m: nn.Module, forward: Callable, args: tuple, kwargs: dict):
        self.path_of_module(m)  # fails while the caller is on top of the stack: the caller is to blame
        self.stack.append(m)
        try:
            return super().call_module(m, forward, args, kwargs)
        except Exception:
            self.culprit = self.culprit or m
            raise
        finally:
            self.stack.pop()

    def create_node(self, kind, target, args, kwargs, name=None, type_expr=None) -> fx.Node:
        node = super().create_node(kind, target, args, kwargs, name, type_expr)
        leaf_call = kind == "call_module"
        node.meta["owner"] = self.stack[-2] if leaf_call and len(self.stack) > 1 else self.stack[-1]
        node.meta["module"] = self.stack[-1] if leaf_call else None
        return node


def is_leaf(module: nn.Module) -> bool:
    """Whether a graph shows a call of ``module`` as one node."""
    if isinstance(module, (nn.Sequential, nn.ModuleList, nn.ModuleDict)):
        return False
    if isinstance(module, (nn.Conv2d, nn.Linear, *NORMS)):
        return True
    cls = type(module)
    return (
        cls.__module__.startswith(("torch.nn.", "torch.ao.nn", "tinytl_kernels.nn", "timm.layers.activations"))
        or cls.__name__ in _LEAF_CLASSES
    )


def trace_model(model: nn.Module) -> Flow:
    """Trace ``model`` in both modes, in as large pieces as possible. Leaves no trace in the model itself.

    Args:
        model: Any module.

    Returns:
        The traced pieces and what stayed opaque.
    """
    flow = Flow()
    with _untouched(model):
        _trace_piece(model, "", flow)
    return flow


def trace_shallow(module: nn.Module) -> dict[str, fx.Graph]:
    """The graphs of one module's own forward, every submodule a leaf.

    Args:
        module: Any module.

    Returns:
        ``{"train": graph, "eval": graph}``.

    Raises:
        Exception: fx cannot see through it.
    """
    with _untouched(module):
        return _both_modes(module, (), shallow=True)


_PLAIN = (bool, int, float, str, type(None))


@contextmanager
def noting_attributes(module: nn.Module) -> Iterator[dict[str, bool | int | float | str | None]]:
    """Which plain Python attributes of ``module`` are read inside of the block, and their values; not ``training``, and
    not ``num_classes``, which goes with the head."""
    cls, read = type(module), {}

    def noting(self, name: str):
        value = cls.__getattribute__(self, name)
        public = not name.startswith("_") and name not in ("training", "num_classes")
        if self is module and public and name in vars(module) and isinstance(value, _PLAIN):
            read.setdefault(name, value)
        return value

    module.__class__ = type(cls.__name__, (cls,), {"__getattribute__": noting, "__module__": cls.__module__})
    try:
        yield read
    finally:
        module.__class__ = cls


def _trace_piece(root: nn.Module, path: str, flow: Flow) -> None:
    reasons: dict[nn.Module, str] = {}
    graphs = _trace_around(root, reasons)
    if graphs is not None:
        flow.regions.append(Region(root, path, graphs))
        called = {node.meta["module"] for graph in graphs.values() for node in graph.nodes}
        reasons = {module: why for module, why in reasons.items() if module in called}
    paths = {module: name for name, module in root.named_modules()}
    for module, why in sorted(reasons.items(), key=lambda item: paths[item[0]]):
        if has_forward(module):
            flow.opaque.append((module, why))
        for name, child in module.named_children():
            if not is_leaf(child):
                _trace_piece(child, ".".join(filter(None, (path, paths[module], name))), flow)


def _trace_around(root: nn.Module, reasons: dict[nn.Module, str]) -> dict[str, fx.Graph] | None:
    """Trace ``root``, turning what fails into leaves, noted in ``reasons``; None if ``root`` itself fails."""
    while has_forward(root):
        try:
            return _both_modes(root, reasons, shallow=False)
        except _TraceError as error:
            # A leaf that fails again fails where it is called.
            culprit = root if error.culprit in reasons else error.culprit
            if culprit is root:
                reasons.clear()
            reasons[culprit] = _first_line(error.__cause__)
            if culprit is root:
                return None
    reasons[root] = "it is a container without a forward"
    return None


class _TraceError(Exception):
    def __init__(self, culprit: nn.Module) -> None:
        super().__init__("torch.fx cannot trace a forward")
        self.culprit = culprit


def _both_modes(root: nn.Module, opaque: Collection[nn.Module], shallow: bool) -> dict[str, fx.Graph]:
    graphs = {}
    for mode in MODES:
        for module in root.modules():
            module.training = mode == "train"
        tracer = _Tracer(opaque, shallow)
        try:
            graphs[mode] = tracer.trace(root)
        except Exception as error:  # whatever a user's forward raises when it meets a proxy
            raise _TraceError(tracer.culprit or root) from error
    return graphs


@contextmanager
def _untouched(model: nn.Module) -> Iterator[None]:
    """Undo what running a forward symbolically may leave behind: modes, counters, constants that fx stores."""
    before = [(module, dict(vars(module))) for module in model.modules()]
    try:
        yield
    finally:
        for module, attributes in before:
            vars(module).clear()
            vars(module).update(attributes)


def _without_optional_arguments(fn: Callable) -> Callable:
    """``fn`` of its required positional arguments only."""
    required = required_arguments(fn)
    if len(required) == len(inspect.signature(fn).parameters):
        return fn
    arguments = ", ".join(required)
    namespace = {"fn": fn}
    exec(f"def forward({arguments}):\n    return fn({arguments})\n", namespace)
    return namespace["forward"]


def required_arguments(fn: Callable) -> list[str]:
    """Names of the positional arguments of ``fn`` without a default, ``self`` included for a plain function."""
    parameters = inspect.signature(fn).parameters.values()
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return [p.name for p in parameters if p.kind in positional and p.default is inspect.Parameter.empty]


def has_forward(module: nn.Module) -> bool:
    """Whether calling ``module`` means anything (a ``ModuleList`` has no forward)."""
    return type(module).forward is not nn.Module.forward


def _first_line(error: BaseException | None) -> str:
    text = str(error).strip().splitlines()
    return text[0][:160] if text else type(error).__name__
