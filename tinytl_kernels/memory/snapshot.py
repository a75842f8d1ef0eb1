"""A training step without consequences: everything it changes is put back, bit for bit."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


@contextmanager
def restored(model: nn.Module, optimizer: torch.optim.Optimizer | None) -> Iterator[None]:
    """Puts back what training steps inside change, also after an exception.

    Covers trained parameters, buffers (running statistics), gradients (the same tensors with the same values; inside,
    every ``.grad`` starts as ``None``), the optimizer's state and hyper-parameters, and torch's random generators on
    the CPU and on the model's CUDA devices. Copies of CUDA tensors are kept on the host, so that what is measured
    inside is the step alone.
    """
    parameters = list(model.parameters())
    values = trained_values(model)
    gradients = [(p, p.grad) for p in parameters]
    buffers = [
        (module, name, buffer, _copy(buffer))
        for module in model.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None
    ]
    optimizer_before = None if optimizer is None else _optimizer_copy(optimizer)
    devices = sorted({p.device.index for p in parameters if p.device.type == "cuda"})
    with torch.random.fork_rng(devices=devices):
        for parameter in parameters:
            parameter.grad = None
        try:
            yield
        finally:
            with torch.no_grad():
                write_back(values)
                for module, name, buffer, value in buffers:
                    buffer.copy_(value)
                    module._buffers[name] = buffer
                for parameter, gradient in gradients:
                    parameter.grad = gradient
                if optimizer is not None:
                    _optimizer_restore(optimizer, *optimizer_before)


def trained_values(model: nn.Module) -> list[tuple[Tensor, Tensor]]:
    """(parameter, copy of its value) for every trained parameter; see :func:`write_back`."""
    return [(p, _copy(p)) for p in model.parameters() if p.requires_grad]


@torch.no_grad()
def write_back(values: list[tuple[Tensor, Tensor]]) -> None:
    """Copies values back in place: optimizers, DDP and tied modules keep their references."""
    for tensor, value in values:
        tensor.copy_(value)


def _copy(tensor: Tensor) -> Tensor:
    value = tensor.detach()
    return value.cpu() if value.device.type != "cpu" else value.clone()


def _freeze(value: Any) -> Any:
    return _copy(value) if isinstance(value, Tensor) else copy.deepcopy(value)


def _thaw(original: Any, value: Any) -> Any:
    return original.copy_(value) if isinstance(original, Tensor) else value


_Frozen = list[tuple[dict[Any, Any], dict[Any, tuple[Any, Any]]]]


def _optimizer_copy(optimizer: torch.optim.Optimizer) -> tuple[dict[Any, dict[Any, tuple[Any, Any]]], _Frozen]:
    states = {p: {k: (v, _freeze(v)) for k, v in state.items()} for p, state in optimizer.state.items()}
    groups = [
        (group, {k: (v, _freeze(v)) for k, v in group.items() if k != "params"}) for group in optimizer.param_groups
    ]
    return states, groups


def _optimizer_restore(
    optimizer: torch.optim.Optimizer, states: dict[Any, dict[Any, tuple[Any, Any]]], groups: _Frozen
) -> None:
    for parameter in [p for p in optimizer.state if p not in states]:
        del optimizer.state[parameter]
    for parameter, state in states.items():
        optimizer.state[parameter] = {k: _thaw(original, value) for k, (original, value) in state.items()}
    for group, settings in groups:
        group.update({k: _thaw(original, value) for k, (original, value) in settings.items()})
