"""Which storages are alive, operator by operator: the count that process size is too blunt for."""

from __future__ import annotations

import weakref
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, UntypedStorage, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tinytl_kernels.core.hooks import listens_only

_CPU = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)


MODEL = "(model)"  # name of the model itself, whose name among its modules is empty


@dataclass
class Block:
    """One storage, dead or alive.

    Attributes:
        size: bytes, the last while it lived.
        layer: name of the module that was running (forward) or whose gradient was being computed (backward).
        operator: name of the operator that made it.
        phase: part of the step it was made in.
    """

    size: int
    layer: str
    operator: str
    phase: str


class ModuleStack:
    """The module that is running now, by name, through forward hooks; and which module made which autograd node."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._running: list[str] = []
        # (sequence number of the next autograd node, module that will make it), ascending: backward looks up its owner.
        self._numbers: list[int] = [0]
        self._owners: list[str] = [""]

    @property
    def current(self) -> str:
        """Name of the innermost running module; in backward, of the one that made the running node; else ``""``."""
        if self._running:
            return self._running[-1]
        node = torch._C._current_autograd_node()
        return self.owner(node) if node is not None else ""

    def owner(self, node: torch.autograd.graph.Node) -> str:
        """Name of the module during whose forward ``node`` was made."""
        number = node._sequence_nr()
        if number >= 2**63:  # AccumulateGrad runs as early as it can; it has no place in the order
            return ""
        return self._owners[bisect_right(self._numbers, number) - 1]

    @contextmanager
    def attached(self) -> Iterator[None]:
        handles = []
        try:
            for name, module in self.model.named_modules():
                handles.append(module.register_forward_pre_hook(self._enter(name or MODEL), prepend=True))
                handles.append(module.register_forward_hook(self._leave, always_call=True))
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _enter(self, name: str) -> Callable[[nn.Module, Any], None]:
        @listens_only
        def hook(module: nn.Module, args: Any) -> None:
            self._running.append(name)
            self._mark()

        return hook

    @listens_only
    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        self._running.pop()
        self._mark()

    def _mark(self) -> None:
        self._numbers.append(torch.autograd._get_sequence_nr())
        self._owners.append(self._running[-1] if self._running else "")


class StorageLedger(TorchDispatchMode):
    """Books every storage that an operator allocates, and strikes it out when it is freed.

    Sees the outputs of every operator and, for custom operators on the CPU, what they allocate inside through the
    dispatcher, in Python and in C++: the mode stays active in them, so a hidden full copy counts. It does not see what
    ATen's own kernels and libraries allocate for themselves (im2col columns, oneDNN scratchpads), nor compiled code.

    Args:
        stack: says which module is running.
        existing: tensors that lived before; their storages, and views of them, are never counted.
    """

    listens_only = True  # changes nothing of what it sees

    def __init__(self, stack: ModuleStack, existing: Iterable[Tensor]) -> None:
        super().__init__()
        self.stack = stack
        self.phase = ""
        self.blocks: list[Block] = []  # by serial number
        self.events: list[tuple[int, int, str, str]] = []  # (serial, +size | -size, phase, layer), in order
        self._serials: dict[int, int] = {}  # address of a live StorageImpl -> serial; -1: not ours
        self._finalizers: list[weakref.finalize] = []
        self._depth = 0
        for tensor in existing:
            self._see_foreign(tensor)

    def serials(self, tensors: Iterable[Tensor]) -> set[int]:
        """Serial numbers of the tensors' storages, those that are in the books."""
        storages = [storage for tensor in tensors if (storage := storage_of(tensor)) is not None]
        return {self._serials.get(storage._cdata, -1) for storage in storages} - {-1}

    def adopt(self, tensors: Iterable[Tensor]) -> None:
        """Books tensors made before the ledger opened (optimizer state), in the current phase."""
        for tensor in tensors:
            self._see(tensor, "adopted")

    def live(self) -> dict[int, Block]:
        """Address -> block of all storages alive now."""
        return {address: self.blocks[serial] for address, serial in self._serials.items() if serial >= 0}

    def close(self) -> None:
        """Forget everything that is still alive; later frees are nobody's business."""
        for finalizer in self._finalizers:
            finalizer.detach()
        self._finalizers.clear()

    def peak(self) -> tuple[int, str, str, Counter[int]]:
        """Replays the books: (bytes, phase, layer, bytes by serial) at the first moment of most bytes."""
        total = best = 0
        at = -1
        for index, (_, change, _, _) in enumerate(self.events):
            total += change
            if total > best:
                best, at = total, index
        alive: Counter[int] = Counter()
        for serial, change, _, _ in self.events[: at + 1]:
            alive[serial] += change
        _, _, phase, layer = self.events[at] if at >= 0 else (0, 0, "", "")
        return best, phase, layer, +alive

    def most(self, serials: Iterable[int]) -> int:
        """Replays the books for some blocks alone: the most bytes of theirs alive at once."""
        chosen = set(serials)
        total = best = 0
        for serial, change, _, _ in self.events:
            if serial in chosen:
                total += change
                best = max(best, total)
        return best

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        operator = str(func.overloadpacket)
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        for tensor in given:
            # An unknown input was made where we cannot see: before the step if the model holds it, or inside the
            # kernel that is running, past the dispatcher; only the latter is a temporary.
            if self._depth:
                self._see(tensor, operator)
            else:
                self._see_foreign(tensor)
        output = self._call(func, given, args, kwargs)
        for leaf in tree_leaves(output):
            if isinstance(leaf, Tensor):
                self._see(leaf, operator)
        return output

    def _call(self, func: Any, given: list[Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not _opens(func, given, kwargs):
            return func(*args, **kwargs)
        # Straight to the kernel, under this mode again: calling `func` itself would come back here for ever.
        self._depth += 1
        try:
            with self:
                return func.redispatch(_CPU, *args, **kwargs)
        finally:
            self._depth -= 1

    def _see_foreign(self, tensor: Tensor) -> None:
        storage = storage_of(tensor)
        if storage is not None and storage._cdata not in self._serials:
            self._remember(storage, -1)

    def _see(self, tensor: Tensor, operator: str) -> None:
        storage = storage_of(tensor)
        if storage is None:
            return
        serial = self._serials.get(storage._cdata)
        if serial is None:
            serial = len(self.blocks)
            self.blocks.append(Block(0, self.stack.current, operator, self.phase))
            self._remember(storage, serial)
        if serial >= 0:
            self._resized(serial, storage.nbytes())

    def _remember(self, storage: UntypedStorage, serial: int) -> None:
        self._serials[storage._cdata] = serial
        self._finalizers.append(weakref.finalize(storage, self._freed, storage._cdata))

    def _resized(self, serial: int, size: int) -> None:
        """Kernels make an empty tensor first and grow it later (`resize_`): the size is what it is now."""
        block = self.blocks[serial]
        if size != block.size:
            self.events.append((serial, size - block.size, self.phase, self.stack.current))
            block.size = size

    def _freed(self, address: int) -> None:
        serial = self._serials.pop(address, -1)
        if serial >= 0:
            self.events.append((serial, -self.blocks[serial].size, self.phase, ""))
            # `size` stays: the books are read after the step, when most blocks are gone.


def storage_of(tensor: Tensor) -> UntypedStorage | None:
    """The tensor's storage; ``None`` for sparse, oneDNN and wrapper tensors, which have none."""
    try:
        return tensor.untyped_storage()
    except (NotImplementedError, RuntimeError):
        return None


def _opens(func: Any, given: list[Tensor], kwargs: dict[str, Any]) -> bool:
    """Whether to look inside ``func``: a custom operator whose kernel the dispatcher would take from the CPU's row.

    Not ATen's own: some of its kernels come back to the dispatcher under their own name, which would go round for ever.
    """
    if func.namespace in ("aten", "prim", "prims", "c10d", "profiler") or not given:
        return False
    for tensor in given:
        if type(tensor) not in (Tensor, nn.Parameter) or tensor.layout != torch.strided or tensor.device.type != "cpu":
            return False
        if tensor.is_quantized or tensor.is_neg() or tensor.is_conj():
            return False
    return torch._C._dispatch_has_computed_kernel_for_dispatch_key(func.name(), "CPU")
