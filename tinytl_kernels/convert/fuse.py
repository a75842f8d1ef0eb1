"""Recognise inverted residual blocks by their structure and compute each as one operator.

The block stays where it is, with its class, its names and its children: the instance gets a subclass of its own class
and of :class:`~tinytl_kernels.nn.FrozenInvertedResidual`, whose forward is the operator. A block that is no module but
a run of children of a longer ``nn.Sequential`` makes that a :class:`~tinytl_kernels.nn.FusedSequential`; so do a stem
with a block behind it and blocks in a row.
"""

from __future__ import annotations

import functools
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from torch import nn

from tinytl_kernels.nn import FrozenInvertedResidual, FusedSequential
from tinytl_kernels.nn.fused_sequential import block_at, chain_at, in_a_row, stem_at

from .probe import tampered
from .read_block import read_inverted_residual
from .report import ConversionReport, Note
from .rewrite import Rewrite, generated_class, rewrite_of


def fuse_blocks(model: nn.Module, report: ConversionReport, apart: Collection[str] = ()) -> None:
    """Make every block that is an inverted residual compute as one operator, outermost module first.

    A block is a module of which nothing is left, after its layers were swapped, but an optional 1x1 expansion, a
    depthwise convolution, a 1x1 projection and an optional addition of its input, in training and in evaluation.

    Args:
        model: Converted layer by layer already; changed in place.
        report: Gets a note for each block.
        apart: Names of modules that something is going to be put around: no block swallows one of them.
    """
    done: list[str] = []
    for name, module in list(model.named_modules()):
        if any(name.startswith(f"{block}.") for block in done):
            continue
        holds_a_place = any(path.startswith(f"{name}.") for path in apart)
        layers = None if not name or holds_a_place else read_inverted_residual(module)
        if layers is None:
            prefix = f"{name}." if name else ""
            if rows := _blocks_in_a_row(module, {path.removeprefix(prefix) for path in apart}):
                module.__class__ = FusedSequential
                report.done.extend(Note(prefix + row, "Sequential", "whole block as one operator") for row in rows)
            continue
        children = dict(zip(("expand", "depthwise", "project"), layers.chain, strict=True))
        module.__class__ = class_with(FrozenInvertedResidual, module, children, {"residual": layers.residual})
        done.append(name)
        report.done.append(Note(name, type(module).__name__, "whole block as one operator"))
    _join_stems(model, report, apart)
    _join_chains(model, report)


def _sequentials(model: nn.Module) -> Iterator[tuple[str, nn.Sequential]]:
    """By name, those whose children can be computed together."""
    for name, module in model.named_modules():
        if type(module) in (nn.Sequential, FusedSequential) and not tampered(module):
            yield name, module


def _join_stems(model: nn.Module, report: ConversionReport, apart: Collection[str]) -> None:
    """Compute a stem and the block behind it in one call, where they are children of one ``nn.Sequential``."""
    for name, module in _sequentials(model):
        prefix = f"{name}." if name else ""
        names, children = list(module._modules), list(module._modules.values())
        for at in range(len(children)):
            stem, *_, after = stem_at(children, at)
            if stem is not None and not any(prefix + child in apart for child in names[at:after]):
                module.__class__ = FusedSequential
                row = f"{prefix}{names[at]} to {names[after - 1]}"
                report.done.append(Note(row, "Sequential", "stem and block in one call"))


def _join_chains(model: nn.Module, report: ConversionReport) -> None:
    """Compute blocks that stand in a row in one call, also those of neighbouring ``nn.Sequential`` modules."""
    for name, module in _sequentials(model):
        children, at, longest = in_a_row(module._modules.values()), 0, 0
        while at < len(children):
            chain = chain_at(children, at)
            longest = max(longest, len(chain))
            at = chain[-1][1] if chain else at + 1
        if longest > 1:
            module.__class__ = FusedSequential
            report.done.append(Note(name, "Sequential", f"up to {longest} blocks in one call"))


def _blocks_in_a_row(module: nn.Module, apart: Collection[str]) -> list[str]:
    """Where the blocks among the children of a plain ``nn.Sequential`` are: ``"3 to 6"``."""
    if type(module) is not nn.Sequential or tampered(module):
        return []
    names, children = list(module._modules), list(module._modules.values())
    found, at = [], 0
    while at < len(children):
        convs, after = block_at(children, at)
        if convs is not None and not any(name in apart for name in names[at:after]):
            found.append(f"{names[at]} to {names[after - 1]}")
        at = max(after, at + 1)
    return found


def restore_block(module: nn.Module) -> None:
    """Undo :func:`fuse_blocks` for one module: the class it had."""
    if type(module) is FusedSequential:
        module.__class__ = nn.Sequential
    if "_layer_by_layer_class" in vars(type(module)):
        module.__class__ = type(module)._layer_by_layer_class


def class_with(
    block: type[nn.Module], module: nn.Module, children: Mapping[str, nn.Module | None], facts: Mapping[str, Any]
) -> type[nn.Module]:
    """The subclass of the class of ``module`` and of ``block``, which finds its layers and facts by these names."""
    paths = {id(child): path for path, child in module.named_modules()}
    found = tuple((name, None if child is None else paths[id(child)]) for name, child in children.items())
    return _fused_class(type(module), block, found, tuple(facts.items()))


@functools.cache
def _fused_class(
    base: type[nn.Module],
    block: type[nn.Module],
    paths: tuple[tuple[str, str | None], ...],
    facts: tuple[tuple[str, Any], ...],
) -> type[nn.Module]:
    def child(path: str | None) -> property:
        steps = () if path is None else tuple(path.split("."))

        def get(self: nn.Module) -> nn.Module | None:
            # Several times a forward: get_submodule, which asks hasattr and getattr at every step, takes 9 us.
            module = self if steps else None
            for step in steps:
                module = module._modules[step]
            return module

        return property(get)

    def fact(value: Any) -> property:
        return property(lambda self: value)

    attributes = {name: child(path) for name, path in paths}
    attributes |= {name: fact(value) for name, value in facts}
    attributes |= {
        "__module__": base.__module__,
        "__qualname__": base.__qualname__,
        "__doc__": base.__doc__,
        "__reduce_ex__": _reduce_ex,
        "_layer_by_layer_class": base,
        "_description": (block, paths, facts),
    }
    return type(base.__name__, (block, base), attributes)


def _reduce_ex(self: nn.Module, protocol: int):
    # The class cannot be imported by name: it is made again from what it was made of.
    base = type(self)._layer_by_layer_class
    state = object.__reduce_ex__(self, 2)[2]
    return _rebuild, (rewrite_of(base) or base, *type(self)._description), state


def _rebuild(base: type[nn.Module] | Rewrite, *description) -> nn.Module:
    cls = _fused_class(generated_class(base) if isinstance(base, Rewrite) else base, *description)
    return cls.__new__(cls)
