"""What one real training step allocates."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from os import PathLike
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._pytree import tree_map

from tinytl_kernels.backends.cpu import reset_scratch_bytes, scratch_bytes
from tinytl_kernels.memory.inputs import as_arguments, batch_size, input_tensors, unwrap
from tinytl_kernels.memory.ledger import ModuleStack, StorageLedger, storage_of
from tinytl_kernels.memory.process import high_water_mark, reset_high_water_mark
from tinytl_kernels.memory.report import format_bytes, largest, plot_memory, render_table
from tinytl_kernels.memory.saved import LayerMemory, SavedTensors, class_names
from tinytl_kernels.memory.snapshot import restored, trained_values, write_back

_STATE = "optimizer state"


@dataclass(frozen=True)
class MemoryReport:
    """Memory of one training step. Every figure in bytes.

    Attributes:
        trained: parameters with ``requires_grad``.
        frozen: all other parameters.
        buffers: the model's buffers (running statistics, scales of weights in 8 bits).
        gradients: ``.grad`` of all parameters, where most of them are alive at once: after backward; or, where the
            optimizer steps in backward, when a gradient arrives that is freed before the next.
        optimizer: the optimizer's state, as it is from the second step on.
        saved: alive between the end of forward and the start of backward, beyond parameters, buffers, optimizer state,
            input, target and the loss itself. The model's output counts only if something keeps it for backward.
        saved_input: the part of the input that autograd keeps as well; no extra memory as long as the caller holds it.
        scratch: working memory that the threads of the CPU kernels keep from call to call, all of it from the second
            step on: a part of the temporaries at any moment.
        peak: the most bytes alive at once during the step beyond parameters, buffers, input and target: optimizer
            state, gradients, saved tensors and temporaries of forward, backward and optimizer step.
        activations: the most bytes of saved tensors and temporaries alive at once in forward and backward: the paper's
            peak of activations, measured. It may occur at another moment than :attr:`peak`. On CUDA a lower bound: all
            gradients are taken as alive throughout backward.
        peak_phase: ``"forward"`` (with the loss), ``"backward"`` or ``"optimizer"`` (also of one that steps in
            backward): where the peak occurs.
        peak_layer: the module at the peak, in backward the one whose gradient is computed; ``""`` outside of modules,
            and on CUDA, where the allocator does not say.
        at_peak: the peak by part: optimizer, gradients, saved, temporaries. On CUDA ``saved`` is the smaller of
            :attr:`saved` and what the other parts leave.
        process_peak: growth of the process's resident memory to its high-water mark in the step, on Linux without CUDA,
            else ``None``. It sees what libraries allocate by themselves, and misses what fits in memory the process has
            freed but not handed back: compare it only in a fresh process, with large activations.
        batch: first dimension of the example input.
        device: where the step ran.
        source: ``"storages"`` or ``"cuda allocator"``: who counted.
        by_layer: :attr:`saved` by module, in execution order.
    """

    trained: int
    frozen: int
    buffers: int
    gradients: int
    optimizer: int
    saved: int
    saved_input: int
    scratch: int
    peak: int
    activations: int
    peak_phase: str
    peak_layer: str
    at_peak: dict[str, int]
    process_peak: int | None
    batch: int
    device: str
    source: str
    by_layer: list[LayerMemory] = field(repr=False)

    @property
    def parameters(self) -> int:
        """Bytes of all parameters: ``trained + frozen``."""
        return self.trained + self.frozen

    @property
    def total(self) -> int:
        """Bytes of training as a whole, input and target aside: ``parameters + buffers + peak``."""
        return self.parameters + self.buffers + self.peak

    @property
    def paper(self) -> int:
        """Bytes of training as the paper counts them, without gradients and optimizer state: ``parameters + buffers +
        activations``."""
        return self.parameters + self.buffers + self.activations

    def stack(self) -> dict[str, int]:
        """The bytes at the peak by part, for :func:`plot_memory`; they add up to :attr:`total`."""
        return {"weights": self.frozen + self.buffers, "trained": self.trained, **self.at_peak}

    def plot(self, path: str | PathLike[str]) -> None:
        """Draw this report as one stacked bar; see :func:`plot_memory`."""
        plot_memory({"measured": self}, path)

    def __str__(self) -> str:
        where = f" at {self.peak_layer}" if self.peak_layer else ""
        parts = [
            ("parameters", self.parameters),
            ("  trained", self.trained),
            ("  frozen", self.frozen),
            ("buffers", self.buffers),
            ("gradients", self.gradients),
            ("optimizer", self.optimizer),
            ("saved for backward", self.saved),
            (f"peak of the step, in {self.peak_phase}{where}", self.peak),
            *((f"  {part}", size) for part, size in self.at_peak.items()),
            *([("    scratch of the CPU kernels", self.scratch)] if self.scratch else []),
            ("parameters + buffers + peak", self.total),
            ("parameters + buffers + activations, the paper's count", self.paper),
        ]
        if self.process_peak is not None:
            parts.append(("growth of the process (resident)", self.process_peak))
        shown, omitted = largest(self.by_layer, lambda row: row.saved)
        layers = [(row.name, row.kind, row.dtypes, str(row.tensors), format_bytes(row.saved)) for row in shown]
        tables = [
            f"one training step, batch {self.batch}, {self.device}, counted by {self.source}",
            render_table(("memory", "bytes", ""), [(name, f"{size:,}", format_bytes(size)) for name, size in parts]),
            "",
            render_table(("saved by layer", "kind", "dtypes", "tensors", "saved"), layers),
        ]
        if omitted:
            tables.append(f"... and {omitted} smaller layers, all in by_layer")
        return "\n".join(tables)


def measure_memory(
    model: nn.Module,
    example_input: Any,
    target: Tensor | None = None,
    optimizer: torch.optim.Optimizer | None = None,
) -> MemoryReport:
    """Runs one real training step of ``model`` and reports what it allocates.

    The step is forward, loss, backward, ``optimizer.step()``, in the mode (train or eval) and under the autocast that
    the caller has set. Afterwards everything is as before, bit for bit: parameters, buffers, gradients, optimizer and
    torch's random generators. The optimizer's state is in place before the step, as it is from the second step of a
    training loop on: a fresh optimizer first takes one step on gradients of zero, whose effect is taken back.

    **What is counted.** On CUDA, the caching allocator's own statistics, after one warm-up step so that libraries have
    their workspaces and compiled code is compiled. Elsewhere, the storages that operators allocate, each from its
    allocation until it is freed, and the scratch memory of this package's kernels; custom operators are looked into,
    ATen's own are not, so im2col columns and oneDNN scratchpads are missing (:attr:`MemoryReport.process_peak` has
    them). Compiled models run eagerly there, because
    compiled code allocates past the dispatcher. Checkpointed regions need no special care in either.

    Args:
        model: the module to train, on any device; may be wrapped in DistributedDataParallel (then every rank must
            call this) or compiled.
        example_input: what the model is called with: a tensor ``(N, ...)``, a tuple of positional or a dict of keyword
            arguments.
        target: for the cross entropy of the model's output: class indices ``(N,)`` or probabilities ``(N, classes)``.
            ``None``: class 0 for a two-dimensional output, otherwise the loss is the sum of all outputs.
        optimizer: over the model's parameters. ``None``: a fresh ``torch.optim.Adam`` over the trained ones. It may
            step in backward (:func:`tinytl_kernels.finetune.step_in_backward`), and keep its state in any dtype.

    Returns:
        A :class:`MemoryReport`; print it for the tables.

    Raises:
        ValueError: no parameter of ``model`` is trained, its output does not depend on one, or ``optimizer`` holds
            none of them or needs a closure.
        TypeError: ``example_input`` holds no tensor.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.Sigmoid(), nn.Linear(8, 2))
        >>> report = measure_memory(model, torch.randn(16, 4))
        >>> report.trained, report.gradients  # 58 floats
        (232, 232)
        >>> report.saved  # the sigmoid's output, which the second linear shares, and log-probabilities for the loss
        644
    """
    args, kwargs = as_arguments(example_input)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not trained:
        raise ValueError(
            "measure_memory: `model` has no trained parameter (requires_grad is False on all of them), so there is no "
            "training step to measure; unfreeze some, for example with tinytl_kernels.convert(model, method)"
        )
    if optimizer is not None and not {id(p) for p in trained} & set(map(id, _optimized(optimizer))):
        raise ValueError(
            "measure_memory: `optimizer` holds none of the trained parameters of `model`; build it from "
            "model.parameters() after converting the model"
        )
    # The caller's tensors stay out of the graph: their .grad, and whatever they were computed from.
    args, kwargs = tree_map(_detached, (args, kwargs))
    with restored(model, optimizer), torch.enable_grad():
        step = _Step(model, args, kwargs, target, optimizer or torch.optim.Adam(trained))
        if trained[0].device.type == "cuda":
            return step.by_allocator(trained[0].device)
        return step.by_storages()


class _Step:
    """One training step in three parts, and the two ways to watch it."""

    def __init__(
        self,
        model: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        target: Tensor | None,
        optimizer: torch.optim.Optimizer,
    ) -> None:
        self.model, self.args, self.kwargs, self.target, self.optimizer = model, args, kwargs, target, optimizer
        self.module = unwrap(model)
        self.gradient_bytes = 0
        self.gradient_serials: set[int] = set()
        self.inputs = input_tensors((args, kwargs))
        self.stack = ModuleStack(self.module)
        self.saved = SavedTensors(self.stack)

    def forward(self) -> Tensor:
        with self.saved.attached(), self.stack.attached():
            output = self.model(*self.args, **self.kwargs)
            if self.target is None:
                self.target = _class_zero(output)
            loss = _loss(output, self.target)
        if not loss.requires_grad:
            raise ValueError(
                "measure_memory: the output of `model` does not depend on any trained parameter, so there is no "
                "gradient to compute; is its forward under torch.no_grad(), or its output detached?"
            )
        return loss

    def backward(self, loss: Tensor) -> None:
        with self.stack.attached():  # checkpointed regions run their modules again
            loss.backward()

    def optimize(self) -> None:
        try:
            self.optimizer.step()
        except TypeError as error:
            raise ValueError(
                f"measure_memory: `optimizer` ({type(self.optimizer).__name__}) cannot take a step by itself: {error}; "
                "pass one whose step() needs no closure"
            ) from error

    @contextmanager
    def gradients_watched(self, ledger: StorageLedger | None = None) -> Iterator[None]:
        """Looks at the gradients whenever the optimizer is about to use them, in backward or after it."""
        interrupted: list[str] = []

        def before(*_: Any) -> None:
            gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
            self.gradient_bytes = max(self.gradient_bytes, _bytes(gradients))
            if ledger is not None:
                self.gradient_serials |= ledger.serials(gradients)
                interrupted.append(ledger.phase)
                ledger.phase = "optimizer"

        def after(*_: Any) -> None:
            if ledger is not None:
                ledger.phase = interrupted.pop()

        handles = [self.optimizer.register_step_pre_hook(before), self.optimizer.register_step_post_hook(after)]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def state(self) -> list[Tensor]:
        return input_tensors([dict(state) for state in self.optimizer.state.values()])

    def prime_optimizer(self) -> None:
        """Gives a fresh optimizer its state: a step on gradients of zero, whose effect on the parameters is undone."""
        if self.optimizer.state:
            return
        values = trained_values(self.model)
        parameters = _optimized(self.optimizer)
        for parameter in parameters:
            parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
        self.optimize()
        for parameter in parameters:
            parameter.grad = None
        write_back(values)

    def by_storages(self) -> MemoryReport:
        resident = reset_high_water_mark()
        self.prime_optimizer()
        reset_high_water_mark()  # priming holds all gradients, and a copy of the parameters
        ledger = StorageLedger(self.stack, self._existing())
        try:
            with torch.compiler.set_stance("force_eager"):
                ledger.phase = _STATE
                ledger.adopt(self.state())
                reset_scratch_bytes()
                with ledger, self.gradients_watched(ledger):
                    ledger.phase = "forward"
                    loss = self.forward()
                    before = {*map(_address, self._existing()), _address(loss)}
                    alive = {
                        address: block
                        for address, block in ledger.live().items()
                        if block.phase != _STATE and address not in before
                    }
                    layers = self.saved.layers(class_names(self.module), before, alive)
                    saved_input = self._saved_input()
                    kept = {id(block) for block in alive.values()}
                    ledger.phase = "backward"
                    self.backward(loss)
                    del loss
                    ledger.phase = "optimizer"
                    self.optimize()
                    state_serials = ledger.serials(self.state())
            most = high_water_mark()
            scratch = scratch_bytes()
        finally:
            ledger.close()

        def part(serial: int) -> str:
            if serial in state_serials:
                return "optimizer"
            if serial in self.gradient_serials:
                return "gradients"
            return "saved" if id(ledger.blocks[serial]) in kept else "temporaries"

        peak, phase, layer, blocks = ledger.peak()
        activations = ledger.most(
            serial
            for serial, block in enumerate(ledger.blocks)
            if part(serial) in ("saved", "temporaries") and block.phase in ("forward", "backward")
        )
        at_peak = Counter({"optimizer": 0, "gradients": 0, "saved": 0, "temporaries": 0})
        for serial, size in blocks.items():
            at_peak[part(serial)] += size
        at_peak["temporaries"] += scratch
        return self._report(
            saved=sum(row.saved for row in layers),
            saved_input=saved_input,
            scratch=scratch,
            peak=peak + scratch,
            activations=activations + scratch,
            peak_phase=phase,
            peak_layer=layer,
            at_peak=dict(at_peak),
            process_peak=None if resident is None or most is None else most - resident,
            source="storages",
            by_layer=layers,
        )

    def by_allocator(self, device: torch.device) -> MemoryReport:
        self.backward(self.forward())  # warm-up
        for parameter in self.model.parameters():
            parameter.grad = None
        base = torch.cuda.memory_allocated(device) - _bytes(self.state())
        self.prime_optimizer()
        state = torch.cuda.memory_allocated(device) - base
        peaks: dict[str, int] = {}

        @contextmanager
        def phase(name: str) -> Iterator[None]:
            torch.cuda.reset_peak_memory_stats(device)
            yield
            peaks[name] = torch.cuda.max_memory_allocated(device) - base

        self.saved = SavedTensors(self.stack)
        with phase("forward"):
            loss = self.forward()
        saved = torch.cuda.memory_allocated(device) - base - state - _bytes([loss])
        before = {*map(_address, self._existing()), _address(loss)}
        layers = self.saved.layers(class_names(self.module), before, None)
        saved_input = self._saved_input()
        with self.gradients_watched():
            with phase("backward"):
                self.backward(loss)
                del loss
            with phase("optimizer"):
                self.optimize()
        worst = max(peaks, key=lambda name: peaks[name])
        at_peak = {"optimizer": state, "gradients": 0 if worst == "forward" else self.gradient_bytes}
        left = max(0, peaks[worst] - sum(at_peak.values()))
        at_peak["saved"] = 0 if worst == "optimizer" else min(saved, left)
        at_peak["temporaries"] = left - at_peak["saved"]
        return self._report(
            saved=saved,
            saved_input=saved_input,
            scratch=0,
            peak=peaks[worst],
            activations=max(peaks["forward"], peaks["backward"] - self.gradient_bytes) - state,
            peak_phase=worst,
            peak_layer="",
            at_peak=at_peak,
            process_peak=None,
            source="cuda allocator",
            by_layer=layers,
        )

    def _report(self, **measured: Any) -> MemoryReport:
        parameters = list(self.model.parameters())
        return MemoryReport(
            trained=_bytes(p for p in parameters if p.requires_grad),
            frozen=_bytes(p for p in parameters if not p.requires_grad),
            buffers=_bytes(self.model.buffers()),
            gradients=self.gradient_bytes,
            optimizer=_bytes(self.state()),
            batch=batch_size(self.inputs),
            device=str(parameters[0].device),
            **measured,
        )

    def _existing(self) -> list[Tensor]:
        target = [] if self.target is None else [self.target]
        return [*self.model.parameters(), *self.model.buffers(), *self.inputs, *target]

    def _saved_input(self) -> int:
        addresses = set(map(_address, self.inputs))
        return sum(size for address, (size, _, _) in self.saved.by_storage().items() if address in addresses)


def _class_zero(output: Any) -> Tensor | None:
    """The target where the caller gave none: class 0 if the output looks like logits."""
    if isinstance(output, Tensor) and output.dim() == 2:
        return torch.zeros(len(output), dtype=torch.long, device=output.device)
    return None


def _loss(output: Any, target: Tensor | None) -> Tensor:
    outputs = [tensor for tensor in input_tensors(output) if tensor.is_floating_point()]
    if not outputs:
        raise ValueError(f"measure_memory: `model` returned no floating-point tensor, got {type(output).__name__}")
    if target is not None:
        return functional.cross_entropy(outputs[0], target)
    return torch.stack([tensor.sum().float() for tensor in outputs]).sum()


def _detached(value: Any) -> Any:
    return value.detach().requires_grad_(value.requires_grad) if isinstance(value, Tensor) else value


def _optimized(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _address(tensor: Tensor) -> int:
    storage = storage_of(tensor)
    return 0 if storage is None else storage._cdata
