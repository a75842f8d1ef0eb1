"""Functional activations, pools and dropout, and the lean operators that stand in for them."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx
from torch.nn import functional as F

from tinytl_kernels import ops
from tinytl_kernels.core.activations import BIT_MASK, LEAKY_SLOPE

_REQUIRED = object()

# A string is a method of a tensor, anything else a function.
IN_PLACE_ADDITIONS = {operator.iadd, "add_"}
ADDITIONS = {operator.add, torch.add, "add", *IN_PLACE_ADDITIONS}


def is_addition(node: fx.Node) -> bool:
    """Whether ``node`` adds two things, neither of them scaled."""
    calls = node.op in ("call_function", "call_method")
    return calls and node.target in ADDITIONS and len(node.args) == 2 and not node.kwargs


def arguments_of(node: fx.Node, **defaults: Any) -> dict[str, Any] | None:
    """The arguments of a call by name, or None where it does not fit; ``_REQUIRED`` marks those without a default."""
    names = list(defaults)
    if len(node.args) > len(names) or not set(node.kwargs) <= set(names):
        return None
    bound = {**defaults, **dict(zip(names, node.args, strict=False)), **node.kwargs}
    return None if _REQUIRED in bound.values() else bound


def activation_call(node: fx.Node) -> tuple[str, float] | None:
    """``(name, negative_slope)`` if ``node`` is a functional activation this package knows, else None."""
    for targets, name in _ACTIVATIONS.items():
        if node.target in targets:
            return (name, LEAKY_SLOPE) if arguments_of(node, input=_REQUIRED, inplace=False) else None
    if node.target in _LEAKY:
        bound = arguments_of(node, input=_REQUIRED, negative_slope=LEAKY_SLOPE, inplace=False)
        slope = bound and bound["negative_slope"]
        return ("leaky_relu", slope) if isinstance(slope, float) and slope >= 0 else None
    if node.target in _HARDTANH:
        bound = arguments_of(node, input=_REQUIRED, min_val=-1.0, max_val=1.0, inplace=False)
        return ("relu6", LEAKY_SLOPE) if bound and (bound["min_val"], bound["max_val"]) == (0.0, 6.0) else None
    if node.target in _GELU:
        bound = arguments_of(node, input=_REQUIRED, approximate="none")
        return bound and ("gelu_tanh" if bound["approximate"] == "tanh" else "gelu", LEAKY_SLOPE)
    return None


# A string is a method of a tensor, anything else a function.
_ACTIVATIONS: dict[tuple, str] = {
    (F.relu, torch.relu, torch.relu_, F.relu_, "relu", "relu_"): "relu",
    (F.relu6,): "relu6",
    (F.hardsigmoid,): "hardsigmoid",
    (F.hardswish,): "hardswish",
    (F.silu,): "silu",
}
_LEAKY = (F.leaky_relu, F.leaky_relu_)
_HARDTANH = (F.hardtanh, F.hardtanh_)
_GELU = (F.gelu,)


def lean_call(node: fx.Node) -> tuple[Callable, tuple] | None:
    """The operator and arguments that compute what ``node`` computes and keep less, or None."""
    known = activation_call(node)
    if known is not None:
        name, slope = known
        return (ops.activation, (node.args[0], name, slope)) if name in BIT_MASK and node.args else None
    for targets, (defaults, build) in _OTHERS.items():
        if node.target in targets:
            bound = arguments_of(node, **defaults)
            return bound and build(bound)
    return None


def _max_pool(a: dict[str, Any]) -> tuple[Callable, tuple] | None:
    if a.pop("return_indices"):
        return None
    return ops.max_pool2d, tuple(a.values())


_OTHERS: dict[tuple, tuple[dict[str, Any], Callable]] = {
    (F.max_pool2d, torch.max_pool2d): (
        {
            "input": _REQUIRED,
            "kernel_size": _REQUIRED,
            "stride": None,
            "padding": 0,
            "dilation": 1,
            "ceil_mode": False,
            "return_indices": False,
        },
        _max_pool,
    ),
    (F.avg_pool2d,): (
        {
            "input": _REQUIRED,
            "kernel_size": _REQUIRED,
            "stride": None,
            "padding": 0,
            "ceil_mode": False,
            "count_include_pad": True,
            "divisor_override": None,
        },
        lambda a: (ops.avg_pool2d, tuple(a.values())),
    ),
    (F.adaptive_avg_pool2d,): (
        {"input": _REQUIRED, "output_size": _REQUIRED},
        # To a single pixel PyTorch takes the mean, which keeps nothing already.
        lambda a: None if a["output_size"] in (1, (1, 1)) else (ops.adaptive_avg_pool2d, tuple(a.values())),
    ),
    (F.dropout,): (
        {"input": _REQUIRED, "p": 0.5, "training": True, "inplace": False},
        lambda a: (ops.dropout, (a["input"], a["p"], a["training"])) if a["p"] else None,
    ),
}


def writes_in_place(node: fx.Node) -> bool:
    """Whether the functional ``node`` overwrites its input."""
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    # Any of F's functions that takes `inplace` takes it last, or second where there is nothing else.
    positional = node.op == "call_function" and any(argument is True for argument in node.args[1:])
    return name.endswith("_") or bool(node.kwargs.get("inplace")) or positional
