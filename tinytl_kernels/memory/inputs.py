"""What a model is called with, and what it hides behind: the shapes of input that the memory tools accept."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves


def as_arguments(example_input: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """``example_input`` as positional and keyword arguments: a tuple or list is the former, a dict the latter.

    Raises:
        TypeError: there is no tensor in ``example_input``.
    """
    if not input_tensors(example_input):
        raise TypeError(
            "example_input: expected a tensor (N, ...), a tuple of positional arguments or a dict of keyword arguments "
            f"with at least one tensor, got {type(example_input).__name__}"
        )
    if isinstance(example_input, dict):
        return (), example_input
    if isinstance(example_input, (tuple, list)):
        return tuple(example_input), {}
    return (example_input,), {}


def input_tensors(value: Any) -> list[Tensor]:
    """All tensors in a nest of tuples, lists and dicts."""
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]


def batch_size(tensors: list[Tensor]) -> int:
    """First dimension of the first tensor; 1 if it has none."""
    return tensors[0].shape[0] if tensors[0].dim() else 1


def unwrap(model: nn.Module) -> nn.Module:
    """The module behind ``torch.compile`` and (Distributed)DataParallel, however they are stacked."""
    while True:
        if isinstance(model, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
            model = model.module
        elif isinstance(getattr(model, "_orig_mod", None), nn.Module):
            model = model._orig_mod
        else:
            return model
