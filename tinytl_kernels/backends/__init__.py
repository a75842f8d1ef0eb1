"""Who computes an operator: the registry of backends and the rule that picks one.

Arrows run one way: ``ops`` asks :func:`implementation` for a function by operator name, a backend never imports
``ops`` or ``nn``. A backend is a subpackage with

* ``unavailable_reason() -> str | None``: why it cannot run on this machine, or None;
* ``cannot_take(tensor) -> str | None``: why it cannot take this tensor, or None;
* ``OPERATORS: dict[str, Callable]``: its implementations, with the signature of the operator's schema;
* ``DIFFERENTIABLE: dict[str, Callable]``, if it has any: operators that it differentiates by itself, faster than Python
  does. Same arguments; the outputs with their history, or None where it leaves these arguments to the operator;
* ``FUSED: dict[str, Callable]``, if it has any: chains of operators that it runs and differentiates in one call, to the
  same result; None again where it leaves these arguments to the operators.

Operators that a backend does not define are computed by ``reference``, which defines every one.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import sys
from collections.abc import Callable, Iterator
from types import ModuleType

import torch

BACKENDS = ("cpu", "triton", "reference")

# Asked in this order for every tensor; reference takes everything and comes last. The Triton kernels are right through
# the interpreter and compile for every target, but no GPU has run them: until one has, they have to be asked for.
AUTOMATIC = ("cpu", "reference")

ENVIRONMENT_VARIABLE = "TINYTL_BACKEND"


class _Choice:
    """One ``use_backend`` block; told from another of the same name by identity."""

    def __init__(self, name: str) -> None:
        self.name = name


# Process-wide and not thread-local on purpose: backward runs in autograd's own threads and must follow the choice
# that its forward saw.
_forced: list[_Choice] = []


def backend_module(name: str) -> ModuleType:
    """The subpackage of a backend; raises ``ValueError`` with the known names for an unknown one."""
    if name not in BACKENDS:
        raise ValueError(f"unknown backend {name!r}: expected one of {', '.join(map(repr, BACKENDS))}")
    path = f"{__name__}.{name}"
    # Asked for by every operator: importlib takes longer to find a module that is loaded than the choice itself.
    return sys.modules.get(path) or importlib.import_module(path)


def available_backends() -> dict[str, str]:
    """What there is to compute with: backend name -> ``"available"`` or the reason why it is not.

    Example:
        >>> import tinytl_kernels as tk
        >>> tk.available_backends()["reference"]
        'available'
    """
    return {name: backend_module(name).unavailable_reason() or "available" for name in BACKENDS}


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Force one backend inside the ``with`` block, for debugging and benchmarks. Process-wide, not per thread.

    A backend that cannot run here is refused on entry; one that cannot take a tensor (float64 for a native one,
    say) is an error at the operator that was to take it. The environment variable ``TINYTL_BACKEND`` does the same
    for a whole process.

    Args:
        name: one of :func:`available_backends`.

    Raises:
        ValueError: unknown backend.
        RuntimeError: the backend is not available on this machine; the message says why.

    Example:
        >>> import tinytl_kernels as tk
        >>> with tk.use_backend("reference"):
        ...     pass
    """
    _require_available(name)
    choice = _Choice(name)
    _forced.append(choice)
    try:
        yield
    finally:
        # Not pop(): two threads may leave in another order than they came.
        _forced.remove(choice)


def implementation(operator: str, tensor: torch.Tensor) -> Callable:
    """The function that computes ``operator`` for ``tensor``, by device, dtype and what is forced."""
    return backend_of(operator, tensor).OPERATORS[operator]


def backend_of(operator: str, tensor: torch.Tensor) -> ModuleType:
    """The backend that computes ``operator`` for ``tensor``, by device, dtype and what is forced."""
    if forced := forced_backend():
        _require_available(forced)
        module = backend_module(forced)
        if reason := module.cannot_take(tensor):
            raise RuntimeError(f"backend {forced!r} is forced but cannot take this tensor: {reason}")
        return module if operator in module.OPERATORS else backend_module("reference")
    for name in AUTOMATIC:
        module = backend_module(name)
        if operator in module.OPERATORS and _takes(module, tensor):
            return module
    raise AssertionError(f"no backend implements {operator!r}")  # reference implements all, by its tests


def fused_implementation(chain: str, tensor: torch.Tensor) -> Callable | None:
    """The function that computes ``chain`` in one call for ``tensor``, None where the backend picked has none."""
    for name in (forced,) if (forced := forced_backend()) else AUTOMATIC:
        module = backend_module(name)
        compute = getattr(module, "FUSED", {}).get(chain)
        if compute is not None and _takes(module, tensor):
            return compute
    return None


def forced_backend() -> str | None:
    """The name of the backend that is forced, None where each tensor's is picked."""
    return _forced[-1].name if _forced else os.environ.get(ENVIRONMENT_VARIABLE) or None


def _takes(module: ModuleType, tensor: torch.Tensor) -> bool:
    return not module.cannot_take(tensor) and not module.unavailable_reason()


def _require_available(name: str) -> None:
    if reason := backend_module(name).unavailable_reason():
        raise RuntimeError(f"backend {name!r} is not available here: {reason}")
