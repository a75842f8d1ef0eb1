"""Run a model once on an example input, to learn its shapes and its order of execution. Changes nothing in it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .report import unwrap

Shape = tuple[int, ...]


@dataclass
class Call:
    """How one module was called.

    Args:
        input: Shape of the only tensor argument, None if there was not exactly one.
        output: Shape of the tensor that came back, None if it was not one tensor.
        order: When the first call began, counted from 0.
        count: How many calls there were.
    """

    input: Shape | None
    output: Shape | None
    order: int
    count: int = 1


@dataclass
class Capture:
    """One run of a model.

    Args:
        calls: By module.
        output: What the model returned, flattened to tensors; None if it could not be run.
        error: Why it could not be run.
    """

    calls: dict[nn.Module, Call] = field(default_factory=dict)
    output: list[Tensor] | None = None
    error: str = ""


def example_for(model: nn.Module) -> Tensor:
    """A random picture such as the model was trained on: timm's configured size, else 224x224.

    Args:
        model: With at least one convolution, which tells the number of channels.

    Returns:
        (1, C, H, W) on the device and in the dtype of the model's parameters.
    """
    config = getattr(unwrap(model), "pretrained_cfg", None) or getattr(unwrap(model), "default_cfg", None)
    size = config.get("input_size") if isinstance(config, dict) else None
    convs = [module for module in model.modules() if isinstance(module, nn.Conv2d)]
    channels = convs[0].in_channels if convs else 3
    height, width = (size[1], size[2]) if size else (224, 224)
    parameter = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
    generator = torch.Generator().manual_seed(0)
    picture = torch.randn(1, channels, height, width, generator=generator)
    return picture.to(device=parameter.device, dtype=parameter.dtype)


def run_example(model: nn.Module, example_input: Any) -> Capture:
    """Run ``model`` in evaluation mode without gradients, noting every module's call.

    Args:
        model: Left as it was: modes, hooks and random state are restored.
        example_input: A tensor, a tuple of positional or a dict of keyword arguments.

    Returns:
        The calls and the outputs, or the reason why it could not be run.
    """
    capture = Capture()
    started: list[nn.Module] = []

    def before(module, args, kwargs):
        started.append(module)
        if module not in capture.calls:
            tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
            shape = tuple(tensors[0].shape) if len(tensors) == 1 else None
            capture.calls[module] = Call(shape, None, len(started), 0)

    def after(module, args, kwargs, output):
        call = capture.calls[module]
        call.count += 1
        call.output = tuple(output.shape) if isinstance(output, Tensor) else None

    handles = []
    for module in model.modules():
        handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
        handles.append(module.register_forward_hook(after, with_kwargs=True))
    try:
        with evaluating(model), torch.random.fork_rng(devices=accelerators(model)):
            torch.manual_seed(0)
            capture.output = [tensor.detach().clone() for tensor in _tensors(_call(model, example_input))]
    except Exception as error:  # the caller decides whether it needed the run
        capture.error = f"{type(error).__name__}: {error}"
    finally:
        for handle in handles:
            handle.remove()
    return capture


def deviation(actual: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """Largest difference over the tensors, each relative to its largest expected element."""
    if [t.shape for t in actual] != [t.shape for t in expected]:
        return float("inf")
    worst = 0.0
    for a, e in zip(actual, expected, strict=True):
        if e.numel() and e.is_floating_point():
            difference = (a.double() - e.double()).abs().amax() / e.double().abs().amax().clamp_min(1e-12)
            worst = max(worst, difference.item()) if difference == difference else float("inf")
    return worst


@contextmanager
def evaluating(model: nn.Module):
    """Every module in evaluation mode, no gradients; each module's own mode afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        for module, _ in modes:
            module.training = False
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes:
            module.training = mode


def _call(model: nn.Module, example_input: Any):
    if isinstance(example_input, Mapping):
        return model(**example_input)
    if isinstance(example_input, (tuple, list)):
        return model(*example_input)
    return model(example_input)


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, (tuple, list)):
        return [tensor for item in value for tensor in _tensors(item)]
    return []


def accelerators(model: nn.Module) -> list[int]:
    """Indices of the CUDA devices that ``model`` lies on, for ``torch.random.fork_rng``."""
    return sorted({p.device.index or 0 for p in model.parameters() if p.device.type == "cuda"})
