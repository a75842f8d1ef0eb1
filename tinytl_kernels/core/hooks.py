"""Hooks of a module: who would notice that it is not called, because it is computed together with its neighbours."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

_REGISTRIES = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def hooks_of(module: nn.Module) -> list[Callable]:
    """Every hook that is registered on ``module`` itself."""
    return [hook for registry in _REGISTRIES for hook in getattr(module, registry).values()]


def hooked(module: nn.Module) -> bool:
    """Whether ``module`` has hooks, also such that only listen, or a ``forward`` of its own."""
    # Asked of every block in every forward, so not by way of a list.
    return bool(
        has_own_forward(module)
        or module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )


def every_module_hooked() -> bool:
    """Whether there are hooks that every call of any module runs."""
    return any(getattr(nn.modules.module, f"_global{registry}") for registry in _REGISTRIES)


def listens_only(hook: Callable) -> Callable:
    """Marks a hook that need not run for a layer that is computed with its neighbours: what measures a model must not
    change what it computes."""
    hook.listens_only = True
    return hook


def has_own_forward(module: nn.Module) -> bool:
    """Whether ``forward`` was replaced on this very instance."""
    return "forward" in module.__dict__


def watched(module: nn.Module) -> bool:
    """Whether somebody would notice that ``module`` is not called."""
    if not hooked(module):
        return False
    return has_own_forward(module) or not all(getattr(hook, "listens_only", False) for hook in hooks_of(module))
