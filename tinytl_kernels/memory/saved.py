"""Who keeps what for backward: autograd's saved tensors, by the module that saved them."""

from __future__ import annotations

import weakref
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from tinytl_kernels.memory.ledger import MODEL, Block, ModuleStack, storage_of

LOSS = "(loss)"


@dataclass(frozen=True)
class LayerMemory:
    """What one module keeps alive between forward and backward.

    Attributes:
        name: the module's name; ``"(model)"`` for the model itself, ``"(loss)"`` for the loss function.
        kind: the module's class.
        saved: bytes; a storage kept by several modules counts for the first.
        tensors: number of storages.
        dtypes: their element types, such as ``"uint8"`` for a bit mask.
    """

    name: str
    kind: str
    saved: int
    tensors: int
    dtypes: str


@dataclass(frozen=True)
class _Kept:
    storage: weakref.ref[torch.UntypedStorage]
    layer: str
    dtype: str


class SavedTensors:
    """Notes every tensor that autograd saves; keeps nothing alive itself."""

    def __init__(self, stack: ModuleStack) -> None:
        self.stack = stack
        self._kept: list[_Kept] = []

    @contextmanager
    def attached(self) -> Iterator[None]:
        with torch.autograd.graph.saved_tensors_hooks(self._pack, lambda tensor: tensor):
            yield

    def _pack(self, tensor: Tensor) -> Tensor:
        storage = storage_of(tensor)
        if storage is not None:
            dtype = str(tensor.dtype).removeprefix("torch.")
            self._kept.append(_Kept(weakref.ref(storage), self.stack.current, dtype))
        # Without its history: a node that keeps its own output (sigmoid, softmax) would keep itself alive.
        return tensor.detach()

    def by_storage(self) -> dict[int, tuple[int, str, str]]:
        """Storages alive now: address -> (bytes, layer that saved it first, dtype)."""
        found: dict[int, tuple[int, str, str]] = {}
        for kept in self._kept:
            storage = kept.storage()
            if storage is not None:
                found.setdefault(storage._cdata, (storage.nbytes(), kept.layer, kept.dtype))
        return found

    def layers(
        self, classes: Mapping[str, str], existing: Collection[int], alive: Mapping[int, Block] | None
    ) -> list[LayerMemory]:
        """One row a module, in the order in which the modules first saved something.

        Args:
            classes: class name by module name.
            existing: addresses of storages that lived before the step.
            alive: everything made since and still alive, less ``existing``, where that is known. What autograd does
                not account for (an attribute of a custom function) goes to the module that made it.
        """
        rows: dict[str, tuple[int, int, set[str]]] = {}

        def add(layer: str, size: int, dtype: str) -> None:
            total, count, dtypes = rows.get(layer, (0, 0, set()))
            rows[layer] = (total + size, count + 1, dtypes | {dtype})

        saved = self.by_storage()
        for address, (size, layer, dtype) in saved.items():
            if size and address not in existing and (alive is None or address in alive):
                add(layer, size, dtype)
        for address, block in (alive or {}).items():
            if block.size and address not in saved:
                add(block.layer, block.size, "?")
        return [
            LayerMemory(name or LOSS, classes.get(name, ""), size, count, " ".join(sorted(dtypes)))
            for name, (size, count, dtypes) in rows.items()
        ]


def class_names(model: torch.nn.Module) -> dict[str, str]:
    """Class name of every module by the name that :class:`ModuleStack` gives it."""
    return {name or MODEL: type(module).__name__ for name, module in model.named_modules()}
