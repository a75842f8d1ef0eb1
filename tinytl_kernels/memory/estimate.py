"""The paper's memory formula, byte for byte (TinyTL, NeurIPS 2020, section 4.1)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from os import PathLike
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from tinytl_kernels.memory.inputs import as_arguments, batch_size, input_tensors, unwrap
from tinytl_kernels.memory.report import format_bytes, largest, plot_memory, render_table
from tinytl_kernels.nn import FrozenInvertedResidual, FusedSequential, LiteResidual

ACTIVATION_BYTES = 4
TRAINED_BYTES = 4
FROZEN_BYTES = 1  # the authors' recipe keeps frozen weights in 8 bits

_CONVOLUTIONS = (nn.modules.conv._ConvNd,)
_NORMS = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm)

# Activations by class name, along the MRO: the class in torch.nn, ours derived from it and timm's namesake are one row.
_ONE_BIT_MODULES = {"ReLU", "ReLU6", "LeakyReLU", "Hardtanh", "Threshold", "RReLU", "Hardsigmoid", "HardSigmoid"}
_VALUE_MODULES = {
    *("Sigmoid", "Tanh", "Hardswish", "HardSwish", "SiLU", "Swish", "GELU", "GELUTanh", "QuickGELU", "ELU", "SELU"),
    *("CELU", "Mish", "HardMish", "Softplus", "Softsign", "LogSigmoid", "Hardshrink", "PReLU"),
}
_ONE_BIT_NAMES = {"relu", "relu6", "leaky_relu", "hardsigmoid"}  # FrozenConvBias.activation

# The same, written as functions: what reaches the dispatcher. relu6 arrives as hardtanh.
_ONE_BIT_OPERATORS = {"relu", "relu6", "leaky_relu", "hardtanh", "hardsigmoid", "threshold"}
_VALUE_OPERATORS = {"sigmoid", "tanh", "hardswish", "silu", "gelu", "elu", "mish", "softplus"}


@dataclass(frozen=True)
class LayerEstimate:
    """One layer in execution order; bytes for the whole batch.

    Attributes:
        name: the module's name; ``.activation`` is appended for the activation fused into a convolution, the
            operator's name for an activation called as a function.
        kind: ``"conv"``, ``"linear"``, ``"norm"`` or ``"activation"``.
        temporaries: alive only while the layer runs.
        saved: kept for backward from this layer on.
        saved_before: what all earlier layers keep.
        shortcut: inputs of the enclosing residual blocks, held for their identity shortcuts.
    """

    name: str
    kind: str
    temporaries: int
    saved: int
    saved_before: int = 0
    shortcut: int = 0

    @property
    def total(self) -> int:
        """Activation bytes while this layer runs."""
        return self.temporaries + self.saved_before + self.shortcut


@dataclass(frozen=True)
class MemoryEstimate:
    """Training memory by the paper's formula. Every figure in bytes.

    Attributes:
        trained: parameters with ``requires_grad``, 4 bytes each.
        frozen: all other parameters, 1 byte each.
        activations: the largest :attr:`LayerEstimate.total` over the layers, whole batch.
        batch: images in the example input.
        by_layer: one :class:`LayerEstimate` a layer, in execution order.
    """

    trained: int
    frozen: int
    activations: int
    batch: int
    by_layer: list[LayerEstimate] = field(repr=False)

    @property
    def parameters(self) -> int:
        """Bytes of all parameters: ``trained + frozen``."""
        return self.trained + self.frozen

    @property
    def peak(self) -> int:
        """The paper's training memory: ``parameters + activations``."""
        return self.parameters + self.activations

    @property
    def saved(self) -> int:
        """Bytes kept for backward by all layers together."""
        return sum(row.saved for row in self.by_layer)

    @property
    def peak_layer(self) -> LayerEstimate | None:
        """The layer at which :attr:`activations` occurs; ``None`` for a model without counted layers."""
        return max(self.by_layer, key=lambda row: row.total, default=None)

    def stack(self) -> dict[str, int]:
        """The bytes at the peak by part, for :func:`plot_memory`; the shortcut is among the temporaries."""
        at = self.peak_layer
        return {
            "weights": self.frozen,
            "trained": self.trained,
            "saved": at.saved_before if at else 0,
            "temporaries": at.temporaries + at.shortcut if at else 0,
        }

    def plot(self, path: str | PathLike[str]) -> None:
        """Draw this estimate as one stacked bar; see :func:`plot_memory`."""
        plot_memory({"estimate": self}, path)

    def __str__(self) -> str:
        header = ("layer", "kind", "temporaries", "saved", "saved before", "shortcut", "total")
        at = self.peak_layer
        shown, omitted = largest(self.by_layer, lambda row: row.total, limit=40)
        rows = [
            (
                row.name + (" <- peak" if row is at else ""),
                row.kind,
                *map(format_bytes, (row.temporaries, row.saved, row.saved_before, row.shortcut, row.total)),
            )
            for row in shown
        ]
        summary = (
            f"peak {format_bytes(self.peak)} = parameters {format_bytes(self.parameters)} "
            f"(trained {format_bytes(self.trained)}, frozen {format_bytes(self.frozen)}) "
            f"+ activations {format_bytes(self.activations)}, batch {self.batch}"
        )
        rest = f"... and {omitted} smaller layers, all in by_layer\n" if omitted else ""
        return f"{render_table(header, rows)}\n{rest}{summary}"


def estimate_memory(model: nn.Module, example_input: Any) -> MemoryEstimate:
    """Training memory of ``model`` by the formula of the TinyTL paper, byte for byte.

    ``peak = parameters + max over layers in execution order (temporaries + saved so far + shortcut)``, with 4 bytes an
    activation element, 4 a trained parameter and 1 a frozen one, whatever the tensors' real dtypes.

    ====================  ====================  =================================================
    layer                 temporaries           saved
    ====================  ====================  =================================================
    convolution           input + output/groups input, if the weight is trained
    linear                input + output        input, if the weight is trained
    norm                  input                 input, if the weight is trained
    ReLU family           input                 1 bit an element
    smooth activation     input                 input
    everything else       0                     0
    ====================  ====================  =================================================

    The formula is the authors', with its habits. Activations keep nothing when no gradient flows through any of them
    (the method ``last``); as soon as one does, all are counted, also those before the first trained parameter. Left out
    are gradients, optimizer state and the backward pass's own temporaries, and a GroupNorm with a frozen weight counts
    0 although its input gradient needs its input. :func:`measure_memory` says what is really allocated.

    **Shortcut rule.** A module has an identity shortcut when, while it runs, its own input, unchanged (same storage and
    shape), is added to another tensor of that shape, and no module inside it that received the same input is running.
    Its input then counts as *shortcut* for every layer inside it; nested shortcuts add up. A shortcut through a
    convolution or pooling is no identity and counts nothing. Found by running, so control flow in ``forward`` is
    followed.

    **Converted models.** ``FrozenConvBias`` is a convolution with a frozen weight, followed by a row for its fused
    activation; so is a norm with one. In a ``LiteResidualBlock`` the main branch comes first, then the lite residual.

    Args:
        model: any ``torch.nn.Module``; left exactly as it was. Runs once, in eval mode and without gradients; on the
            ``meta`` device this costs no arithmetic.
        example_input: what the model is called with: a tensor ``(N, ...)``, a tuple of positional or a dict of keyword
            arguments. Its first tensor's first dimension is the batch.

    Returns:
        A :class:`MemoryEstimate`; print it for the table.

    Raises:
        TypeError: ``example_input`` holds no tensor.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 4, 10))
        >>> _ = model[0].requires_grad_(False)
        >>> estimate = estimate_memory(model, torch.randn(1, 3, 2, 2))
        >>> estimate.trained, estimate.frozen, estimate.activations
        (1320, 224, 176)
    """
    model = unwrap(model)
    args, kwargs = as_arguments(example_input)
    recorder = _Recorder(model)
    with _evaluating(model), torch.no_grad(), recorder.attached(), recorder:
        model(*args, **kwargs)
    rows = recorder.rows(count_activations=_gradient_reaches_an_activation(recorder.events))
    parameters = list(model.parameters())
    return MemoryEstimate(
        trained=TRAINED_BYTES * sum(p.numel() for p in parameters if p.requires_grad),
        frozen=FROZEN_BYTES * sum(p.numel() for p in parameters if not p.requires_grad),
        activations=max((row.total for row in rows), default=0),
        batch=batch_size(input_tensors(example_input)),
        by_layer=rows,
    )


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode, so that the run leaves no trace in running statistics, and operators of several layers one by one, so
    that the layers are seen; every module's own flags come back."""
    modes = {module: module.training for module in model.modules()}
    several = (FrozenInvertedResidual, FusedSequential, LiteResidual)
    blocks = [m for m in model.modules() if isinstance(m, several) and m.fused]
    try:
        model.eval()
        for block in blocks:
            block.fused = False
        yield
    finally:
        for module, training in modes.items():
            module.training = training
        for block in blocks:
            del block.fused  # back to the class's own


@dataclass
class _Frame:
    """A module that is running."""

    module: nn.Module
    name: str
    inputs: tuple[Tensor, ...]
    start: int  # index of its first event
    held: int = 0  # bytes of the input held for an identity shortcut


@dataclass
class _Event:
    """A layer that ran, before anything is known about the whole."""

    name: str
    kind: str
    temporaries: int
    saved: int
    trained: bool
    shortcut: int = 0


def _gradient_reaches_an_activation(events: list[_Event]) -> bool:
    trained = False
    for event in events:
        if trained and event.kind == "activation":
            return True
        trained = trained or event.trained
    return False


def _bytes(tensor: Tensor) -> int:
    return ACTIVATION_BYTES * tensor.numel()


def _bits(tensor: Tensor) -> int:
    return (tensor.numel() + 7) // 8


def _class_names(module: nn.Module) -> set[str]:
    return {cls.__name__ for cls in type(module).__mro__}


def _kind(module: nn.Module) -> str | None:
    if isinstance(module, _CONVOLUTIONS):
        return "conv"
    if isinstance(module, nn.Linear):
        return "linear"
    if isinstance(module, _NORMS):
        return "norm"
    if _class_names(module) & (_ONE_BIT_MODULES | _VALUE_MODULES):
        return "activation"
    return None


class _Recorder(TorchDispatchMode):
    """Listens to a forward pass: layers through module hooks, additions and bare activations through the dispatcher."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.events: list[_Event] = []
        self.frames: list[_Frame] = []

    @contextmanager
    def attached(self) -> Iterator[None]:
        handles = []
        try:
            for name, module in self.model.named_modules():
                handles.append(module.register_forward_pre_hook(self._enter(name), with_kwargs=True))
                handles.append(module.register_forward_hook(self._leave))
            yield
        finally:
            for handle in handles:
                handle.remove()

    def rows(self, *, count_activations: bool) -> list[LayerEstimate]:
        rows: list[LayerEstimate] = []
        saved_before = 0
        for event in self.events:
            saved = event.saved if count_activations or event.kind != "activation" else 0
            rows.append(LayerEstimate(event.name, event.kind, event.temporaries, saved, saved_before, event.shortcut))
            saved_before += saved
        return rows

    def _enter(self, name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            inputs = tuple(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
            self.frames.append(_Frame(module, name, inputs, start=len(self.events)))
            kind = _kind(module)
            # Before their own children: BatchNormAct2d is a norm that calls its activation.
            if kind in ("norm", "activation") and inputs:
                self._count(module, name, kind, inputs[0], None)

        return hook

    def _leave(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        frame = self.frames.pop()
        kind = _kind(module)
        if kind in ("conv", "linear") and frame.inputs and isinstance(output, Tensor):
            self._count(module, frame.name, kind, frame.inputs[0], output)
        for event in self.events[frame.start :]:
            event.shortcut += frame.held

    def _count(self, module: nn.Module, name: str, kind: str, given: Tensor, output: Tensor | None) -> None:
        weight = getattr(module, "weight", None)
        trained = any(parameter.requires_grad for parameter in module.parameters(recurse=False))
        saved = _bytes(given) if weight is not None and weight.requires_grad else 0
        temporaries = _bytes(given)
        if kind == "conv":
            temporaries += _bytes(output) // module.groups
        elif kind == "linear":
            temporaries += _bytes(output)
        elif kind == "activation":
            saved = _bits(given) if _class_names(module) & _ONE_BIT_MODULES else _bytes(given)
        self.events.append(_Event(name, kind, temporaries, saved, trained))
        fused = getattr(module, "activation", None)
        if kind in ("conv", "norm") and isinstance(fused, str):
            result = given if output is None else output  # a norm is counted before it has run, and keeps the shape
            saved = _bits(result) if fused in _ONE_BIT_NAMES else _bytes(result)
            self.events.append(_Event(f"{name}.activation", "activation", _bytes(result), saved, trained=False))

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        operator = func._schema.name.removeprefix("aten::").removesuffix("_")
        if operator == "add":
            self._note_shortcut(args[0], args[1])
        elif operator == "tinytl::activation":
            self._count_function(args[1], args[0])
        elif operator in _ONE_BIT_OPERATORS | _VALUE_OPERATORS:
            self._count_function(operator, args[0])
        return func(*args, **(kwargs or {}))

    def _count_function(self, activation: str, given: Tensor) -> None:
        if any(_kind(frame.module) for frame in self.frames):
            return  # the module's own arithmetic
        name = f"{self.frames[-1].name}.{activation}".lstrip(".") if self.frames else activation
        saved = _bits(given) if activation in _ONE_BIT_OPERATORS else _bytes(given)
        self.events.append(_Event(name, "activation", _bytes(given), saved, trained=False))

    def _note_shortcut(self, one: Any, other: Any) -> None:
        if not (isinstance(one, Tensor) and isinstance(other, Tensor) and one.shape == other.shape):
            return
        for frame in reversed(self.frames):
            for given in frame.inputs:
                if _is_same(one, given) or _is_same(other, given):
                    frame.held = max(frame.held, _bytes(given))
                    return


def _is_same(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and one.untyped_storage()._cdata == other.untyped_storage()._cdata
