"""Modules whose own forward calls functional activations or pools, one activation module again and again (the
``self.relu`` of torchvision's ResNet), or layers in a row: that forward is generated anew from its fx graph.

The instance gets a subclass of its own class, so that ``isinstance``, methods, attributes and names stay. Only the
smallest enclosing module is touched. As with any code from an fx graph, plain Python attributes that forward reads
(a dropout rate, a flag) are fixed at the time of the conversion; ``self.training`` is not. Where the original forward
computes the same, no activation having been fused, it is taken once one of them has changed; and in a call with an
optional argument.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import linecache
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from torch import fx, nn

from tinytl_kernels.core.activations import BIT_MASK, LEAKY_SLOPE
from tinytl_kernels.nn import FrozenConvBias, activation_name

from .aliasing import safe_in_place
from .functional import IN_PLACE_ADDITIONS, activation_call, is_addition, lean_call, writes_in_place
from .probe import looks_like_batchnorm, plain_activation, tampered
from .rows import join_rows
from .trace import MODES, noting_attributes, required_arguments, trace_shallow

_ATTRIBUTE = "_tinytl_rewrite"


@dataclass(frozen=True)
class Rewrite:
    """All that is needed to make the generated class again, here or in another process.

    Args:
        original: The class whose forward was replaced.
        sources: The generated code, by mode.
        names: What that code refers to: ``(name, object)``, a module as ``(name, ("module", its name))``.
        fused: ``(path, activation)`` of the convolutions that took over an activation of this forward.
        read: ``(attribute, value)`` of the plain Python attributes that it was generated for.
    """

    original: type[nn.Module]
    sources: tuple[tuple[str, str], ...]
    names: tuple[tuple[str, Any], ...]
    fused: tuple[tuple[str, str], ...]
    read: tuple[tuple[str, bool | int | float | str | None], ...]


def owners_of_functions(graphs: list[fx.Graph]) -> list[nn.Module]:
    """Modules whose own forward calls something that a lean operator can stand in for, or that a convolution can take
    over: an activation that is called elsewhere too, or a sum and the activation behind it; in order of execution."""
    owners: dict[nn.Module, None] = {}
    for graph in graphs:
        calls = Counter(node.meta["module"] for node in graph.nodes if node.op == "call_module")
        for node in graph.nodes:
            if node.op in ("call_function", "call_method"):
                found = lean_call(node) or activation_call(node)
            elif found := _activation_module(node) is not None:
                shared = calls[node.meta["module"]] > 1
                found = (shared and _convolution_before(node, _is_going_to_be_identity)) or _sum_before(
                    node, _is_going_to_be_identity
                )
            if found:
                owners.setdefault(node.meta["owner"])
    return list(owners)


def rewrite_forward(module: nn.Module, may_fuse: Callable[[nn.Module], bool]) -> tuple[list[str], list[str]]:
    """Replace the functional calls of ``module``'s own forward by lean operators, and join the layers that it calls in
    a row.

    Args:
        module: Changed in place: its class becomes a generated subclass.
        may_fuse: Whether a convolution may take over the activation behind it.

    Returns:
        What was done, and what had to stay and why, as short texts.
    """
    refusal = _refusal(module)
    if refusal:
        return [], [refusal]
    try:
        with noting_attributes(module) as read:
            graphs = trace_shallow(module)
    except Exception as error:  # whatever a user's forward raises when it meets a proxy
        return [], [f"functional calls stay: torch.fx cannot trace its forward ({type(error).__name__})"]
    if any(node.op == "get_attr" and not _exists(module, node.target) for g in graphs.values() for node in g.nodes):
        return [], ["functional calls stay: its forward makes constant tensors"]
    done: dict[str, None] = {}
    kept: dict[str, None] = {}
    kinds = _fuse(module, graphs, may_fuse)
    for path, (name, added) in kinds.items():
        done[f"{'sum and ' if added else ''}{name} fused into {path}"] = None
    fused = {path: name for path, (name, _) in kinds.items()}
    for graph in graphs.values():
        _replace_calls(graph, done, kept)
        done |= dict.fromkeys(join_rows(graph))
    if done:
        module.__class__ = generated_class(_describe(type(module), graphs, fused, read))
        for path, name in fused.items():
            module.get_submodule(path).activation = name
    return list(done), list(kept)


def rewrite_of(cls: type[nn.Module]) -> Rewrite | None:
    """What a generated class was made from; None for any other class."""
    return vars(cls).get(_ATTRIBUTE)


def restore_forward(module: nn.Module) -> None:
    """Undo :func:`rewrite_forward`: the original class, and convolutions without its activations."""
    rewrite = getattr(type(module), _ATTRIBUTE, None)
    if rewrite is None:
        return
    for path, _ in rewrite.fused:
        module.get_submodule(path).activation = None
    module.__class__ = rewrite.original


def _refusal(module: nn.Module) -> str:
    if isinstance(module, fx.GraphModule):
        return "functional calls stay: its forward is already generated code"
    parameters = inspect.signature(type(module).forward).parameters.values()
    if any(p.kind is p.KEYWORD_ONLY and p.default is p.empty for p in parameters):
        return "functional calls stay: its forward needs keyword-only arguments"
    return ""


def _exists(module: nn.Module, path: str) -> bool:
    try:
        functools.reduce(getattr, path.split("."), module)
    except AttributeError:
        return False
    return True


def _fuse(
    module: nn.Module, graphs: dict[str, fx.Graph], may_fuse: Callable[[nn.Module], bool]
) -> dict[str, tuple[str, bool]]:
    """Let convolutions take over the activation that alone reads them, or their sum with something else, where both
    modes agree; edits the graphs.

    Returns:
        By the convolution's name, the activation and whether something is added before it.
    """
    if len(inspect.signature(type(module).forward).parameters) != len(required_arguments(type(module).forward)):
        return {}  # the original forward stays reachable, and would apply the activation again
    found: dict[str, dict[str, _Fusion]] = {}
    for mode, graph in graphs.items():
        targets = [node.target for node in graph.nodes if node.op == "call_module"]
        found[mode] = {}
        for node in graph.nodes:
            name = _activation_module(node) if node.op == "call_module" else _activation_function(node)
            fusion = name and _fusion_into_convolution(node, name)
            if fusion and targets.count(fusion.conv.target) == 1:
                conv = module.get_submodule(fusion.conv.target)
                if type(conv) is FrozenConvBias and conv.activation is None and may_fuse(conv):
                    found[mode][fusion.conv.target] = fusion
    fused: dict[str, tuple[str, bool]] = {}
    for path in {**found["train"], **found["eval"]}:
        kinds = {
            found[mode][path].kind if path in found[mode] else None for mode in MODES if _calls(graphs[mode], path)
        }
        if len(kinds) == 1 and None not in kinds:
            fused[path] = kinds.pop()
            for mode in MODES:
                if path in found[mode]:
                    found[mode][path].apply()
    return fused


@dataclass
class _Fusion:
    """An activation that a convolution can take over.

    Args:
        name: The activation.
        activation, conv: The calls.
        sum: The addition between them, if there is one.
        shortcut: Which of its two summands is not the convolution.
    """

    name: str
    activation: fx.Node
    conv: fx.Node
    sum: fx.Node | None = None
    shortcut: int = 1

    @property
    def kind(self) -> tuple[str, bool]:
        """What has to be the same in training and in evaluation: the activation, and whether something is added."""
        return self.name, self.sum is not None

    def apply(self) -> None:
        graph = self.activation.graph
        if self.sum is None:
            self.activation.replace_all_uses_with(self.activation.args[0])
            graph.erase_node(self.activation)
            return
        # Called where the sum was: what is added may be made after the convolution's old place. The arguments are read
        # now, for other fusions have put theirs in.
        with graph.inserting_before(self.sum):
            result = graph.call_module(self.conv.target, (self.conv.args[0], self.sum.args[self.shortcut]))
        result.meta = dict(self.conv.meta)
        self.activation.replace_all_uses_with(result)
        unused = [self.activation, self.sum]
        source = self.sum.args[1 - self.shortcut]
        while source is not self.conv:  # identities
            unused.append(source)
            source = source.args[0]
        for node in (*unused, self.conv):
            graph.erase_node(node)


def _fusion_into_convolution(node: fx.Node, name: str) -> _Fusion | None:
    if conv := _convolution_before(node):
        return _Fusion(name, node, conv)
    return _Fusion(name, node, *found) if name in BIT_MASK and (found := _sum_before(node)) else None


def _calls(graph: fx.Graph, path: str) -> bool:
    return any(node.op == "call_module" and node.target == path for node in graph.nodes)


def _activation_function(node: fx.Node) -> str | None:
    known = activation_call(node)
    return known[0] if known and known[1] == LEAKY_SLOPE else None


def _activation_module(node: fx.Node) -> str | None:
    """The activation that a module called by ``node`` is, where one bit an element is enough for its derivative."""
    module = node.meta.get("module")
    if module is None or tampered(module) or node.kwargs or len(node.args) != 1:
        return None
    plain = plain_activation(module)
    name = None if plain is None else activation_name(plain)
    return name if name in BIT_MASK else None


def _is_identity(module: nn.Module) -> bool:
    return type(module) is nn.Identity


def _is_going_to_be_identity(module: nn.Module) -> bool:
    return _is_identity(module) or looks_like_batchnorm(module)


def _convolution_before(node: fx.Node, passes_on: Callable[[nn.Module], bool] = _is_identity) -> fx.Node | None:
    """The call of the convolution that ``node`` alone reads, through modules that pass their input on."""
    return _convolution_at(node.args[0] if node.args else None, passes_on)


def _sum_before(
    node: fx.Node, passes_on: Callable[[nn.Module], bool] = _is_identity
) -> tuple[fx.Node, fx.Node, int] | None:
    """(convolution, sum, which summand is the other one) if ``node`` alone reads the sum, and that the convolution."""
    added = node.args[0] if node.args else None
    if not (isinstance(added, fx.Node) and is_addition(added) and len(added.users) == 1):
        return None
    summands = added.args
    if not all(isinstance(summand, fx.Node) for summand in summands) or summands[0] is summands[1]:
        return None
    # What an addition in place overwrites must be the convolution's.
    for side in (0,) if added.target in IN_PLACE_ADDITIONS else (0, 1):
        conv = _convolution_at(summands[side], passes_on)
        if conv is None or len(conv.args) != 1 or conv.kwargs:
            continue
        # Called later, it must find its input as it was: nobody else reads that, and so nobody overwrites it.
        if isinstance(conv.args[0], fx.Node) and len(conv.args[0].users) == 1:
            return conv, added, 1 - side
    return None


def _convolution_at(source: Any, passes_on: Callable[[nn.Module], bool]) -> fx.Node | None:
    while isinstance(source, fx.Node) and source.op == "call_module" and len(source.users) == 1:
        module = source.meta["module"]
        if isinstance(module, nn.Conv2d):
            return source
        if not passes_on(module):
            return None
        source = source.args[0]
    return None


def _replace_calls(graph: fx.Graph, done: dict[str, None], kept: dict[str, None]) -> None:
    for node in list(graph.nodes):
        if node.op not in ("call_function", "call_method"):
            continue
        lean = lean_call(node)
        if lean is None:
            if activation_call(node):
                kept.setdefault(f"{_name(node)} keeps a full value: its derivative is smooth")
            continue
        if writes_in_place(node) and not safe_in_place(node):
            kept.setdefault(f"{_name(node)} overwrites a tensor that may be read again: left alone")
            continue
        with graph.inserting_before(node):
            replacement = graph.call_function(*lean)
        replacement.meta = dict(node.meta)
        node.replace_all_uses_with(replacement)
        graph.erase_node(node)
        done.setdefault(f"{_name(node)} by the lean operator")


def _name(node: fx.Node) -> str:
    return node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))


def _describe(
    original: type[nn.Module], graphs: dict[str, fx.Graph], fused: dict[str, str], read: dict[str, Any]
) -> Rewrite:
    sources, names = [], {}
    for mode in MODES:
        for node in graphs[mode].nodes:
            node.type = None  # the dispatcher has the annotations
        code = graphs[mode].python_code("self")
        sources.append((mode, code.src.strip() + "\n"))
        used = set(_code_names(compile(code.src, "<generated>", "exec")))
        for name, value in code.globals.items():
            if name in used:
                names[name] = ("module", value.__name__) if isinstance(value, ModuleType) else value
    names, read = (tuple(sorted(d.items())) for d in (names, read))
    return Rewrite(original, tuple(sources), names, tuple(fused.items()), read)


def _code_names(code) -> list[str]:
    return [*code.co_names, *(name for c in code.co_consts if hasattr(c, "co_names") for name in _code_names(c))]


_DISPATCH = """\
def forward({signature}):
    {guard}if self.training:
        return self._forward_in_training({required})
    return self._forward_in_evaluation({required})
"""


@functools.cache
def generated_class(rewrite: Rewrite) -> type[nn.Module]:
    """The subclass of ``rewrite.original`` with the generated forward; equal rewrites share one class."""
    original = rewrite.original
    names = {
        name: importlib.import_module(value[1]) if isinstance(value, tuple) and value[0] == "module" else value
        for name, value in rewrite.names
    }
    functions = {mode: _execute(source, dict(names), original, mode) for mode, source in rewrite.sources}
    attributes = {
        "__module__": original.__module__,
        "__qualname__": original.__qualname__,
        "__doc__": original.__doc__,
        "__reduce_ex__": _reduce_ex,
        "forward": _dispatcher(original, () if rewrite.fused else rewrite.read),
        "_forward_in_training": functions["train"],
        "_forward_in_evaluation": functions["eval"],
        _ATTRIBUTE: rewrite,
    }
    return type(original.__name__, (original,), attributes)


def _dispatcher(original: type[nn.Module], read: tuple[tuple[str, Any], ...]) -> Callable:
    """A forward with the original signature that picks the code of the mode; the original one with an optional argument
    and where an attribute is no longer what was ``read``."""
    forward = original.forward
    names: dict[str, Any] = {"_stock": original}
    signature, passed, given = ["self"], ["self"], []
    required = required_arguments(forward)
    keyword_only = False
    for p in list(inspect.signature(forward).parameters.values())[1:]:
        star = {p.VAR_POSITIONAL: "*", p.VAR_KEYWORD: "**"}.get(p.kind, "")
        if p.kind is p.KEYWORD_ONLY and not keyword_only and "*" not in "".join(signature):
            signature.append("*")
        keyword_only |= p.kind is p.KEYWORD_ONLY
        passed.append(f"{p.name}={p.name}" if p.kind is p.KEYWORD_ONLY else star + p.name)
        if star:
            signature.append(star + p.name)
            given.append(p.name)
        elif p.name in required:
            signature.append(p.name)
        else:
            names[f"_default_{p.name}"] = p.default
            signature.append(f"{p.name}=_default_{p.name}")
            same = "!=" if isinstance(p.default, (int, float, str)) and not isinstance(p.default, bool) else "is not"
            given.append(f"{p.name} {same} _default_{p.name}")
    for name, value in read:
        names[f"_read_{name}"] = value
        given.append(f"self.__dict__.get({name!r}) != _read_{name}")  # not getattr: an argument may be called that
    guard = f"if {' or '.join(given)}:\n        return _stock.forward({', '.join(passed)})\n    " if given else ""
    source = _DISPATCH.format(signature=", ".join(signature), required=", ".join(required[1:]), guard=guard)
    dispatcher = _execute(source, names, original, "dispatch")
    dispatcher.__annotations__ = dict(getattr(forward, "__annotations__", {}))
    dispatcher.__doc__ = forward.__doc__
    return dispatcher


def _execute(source: str, names: dict[str, Any], original: type, part: str) -> Callable:
    filename = f"<tinytl_kernels.convert {original.__module__}.{original.__qualname__} {part} {hash(source):x}>"
    # Tracebacks and debuggers show the generated lines.
    linecache.cache[filename] = (len(source), None, source.splitlines(keepends=True), filename)
    exec(compile(source, filename, "exec"), names)
    return names["forward"]


def _reduce_ex(self: nn.Module, protocol: int):
    # The generated class cannot be imported by name: it is made again from its description.
    state = object.__reduce_ex__(self, 2)[2]
    return _rebuild, (getattr(type(self), _ATTRIBUTE),), state


def _rebuild(rewrite: Rewrite) -> nn.Module:
    cls = generated_class(rewrite)
    return cls.__new__(cls)
