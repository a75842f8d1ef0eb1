"""Memory and time by layer: one model and one method, beside stock PyTorch training the same parameters."""

from __future__ import annotations

import statistics
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..convert import conversion_report
from ..memory import MemoryReport, estimate_memory, format_bytes, measure_memory
from ..memory.report import render_table
from ..models import build_model, set_dropout
from .compare import device_name
from .prepare import prepare
from .recipe import Recipe


@dataclass(frozen=True)
class LayerTime:
    """Milliseconds of one module: forward, and backward from its output's gradient to the next module's."""

    forward: float
    backward: float


@dataclass(frozen=True)
class Profile:
    """One model measured: ``memory`` of a training step, ``times`` by layer name, and the whole step in ms."""

    memory: MemoryReport
    times: dict[str, LayerTime]
    step_ms: float


@dataclass(frozen=True)
class Pair:
    """Ours beside stock.

    Args:
        title: Model, method, shape and device.
        stock: The unconverted model.
        ours: The converted one.
        conversion: Its report.
        estimate: The paper's formula for it.
    """

    title: str
    stock: Profile
    ours: Profile
    conversion: str
    estimate: str

    def table(self, rows: int | None = 25) -> str:
        """By layer, largest saving of memory first; ``rows`` cuts the table, None prints all of it."""
        saved = [Counter({row.name: row.saved for row in side.memory.by_layer}) for side in (self.stock, self.ours)]
        names = list(dict.fromkeys([*saved[0], *saved[1], *self.stock.times, *self.ours.times]))
        names.sort(key=lambda name: -max(saved[0][name], saved[1][name]))
        header = ("layer", "saved stock", "ours", "forward ms stock", "ours", "backward ms stock", "ours")
        lines = [
            (
                name,
                *(_bytes(side[name]) for side in saved),
                *(_ms(side.times.get(name), "forward") for side in (self.stock, self.ours)),
                *(_ms(side.times.get(name), "backward") for side in (self.stock, self.ours)),
            )
            for name in names[:rows]
        ]
        if rows is not None and len(names) > rows:
            lines.append((f"... {len(names) - rows} more (--rows 0)", *[""] * 6))
        total = (
            "whole step",
            *(_bytes(side.memory.saved) for side in (self.stock, self.ours)),
            *(f"{side.step_ms:.1f}" for side in (self.stock, self.ours)),
            *[""] * 2,
        )
        return render_table(header, [*lines, total])

    def __str__(self) -> str:
        return self.text()

    def text(self, rows: int | None = 25) -> str:
        """Everything that ``tinytl profile`` prints; for ``rows`` see :meth:`table`."""
        memory = [
            *(
                (label, *(format_bytes(getattr(side.memory, field)) for side in (self.stock, self.ours)))
                for label, field in (
                    ("parameters", "parameters"),
                    ("  of them trained", "trained"),
                    ("gradients", "gradients"),
                    ("optimizer", "optimizer"),
                    ("saved for backward", "saved"),
                    ("peak beyond parameters", "peak"),
                    ("everything", "total"),
                )
            ),
            ("training step, ms", f"{self.stock.step_ms:.1f}", f"{self.ours.step_ms:.1f}"),
        ]
        totals = render_table(("memory", "stock", "ours"), memory)
        return "\n\n".join([self.title, totals, self.conversion, self.estimate, self.table(rows)])


def profile(
    model_name: str,
    method: str,
    recipe: Recipe,
    device: torch.device,
    *,
    num_classes: int = 10,
    pretrained: bool = True,
    weights: str | None = None,
    rounds: int = 5,
) -> Pair:
    """Measure a training step of ``model_name`` converted for ``method``, and of the stock model.

    The stock model trains what the method trains, as far as it has it: the same weights frozen by ``requires_grad``,
    and norms in evaluation mode where the method leaves their statistics alone. It has no lite residuals.

    Args:
        model_name: See :func:`tinytl_kernels.models.build_model`.
        method: One of ``prepare.METHODS``.
        recipe: Batch size, resolution, autocast and layout count here.
        device: Where to measure.
        num_classes: Outputs of the classifier.
        pretrained: Load the library's weights; numbers do not depend on them.
        weights: A local state_dict instead.
        rounds: Timed steps; medians are reported.
    """
    torch.manual_seed(recipe.seed)
    stock = build_model(model_name, pretrained=False, num_classes=num_classes)
    set_dropout(stock, recipe.dropout)
    train_as_stock(stock, method)
    ours = prepare(model_name, method, num_classes, recipe, pretrained=pretrained, weights=weights)
    ours.train()
    side = recipe.resolution
    conversion = str(conversion_report(ours))
    example = torch.randn(recipe.batch_size, 3, side, side, generator=torch.Generator().manual_seed(recipe.seed))
    estimate = str(estimate_memory(ours, example))
    title = (
        f"{model_name}, {method}, batch {recipe.batch_size}, {side}x{side}, "
        f"{recipe.amp or 'float32'}, {device_name(device)}; stock is PyTorch {torch.__version__} "
        "with the same parameters trained"
    )
    labels = torch.arange(recipe.batch_size) % num_classes
    measured = [measure(model, example, labels, recipe, device, rounds) for model in (stock, ours)]
    return Pair(title, *measured, conversion, estimate)


def train_as_stock(model: nn.Module, method: str) -> None:
    """Set ``requires_grad`` and the norms' mode of an unconverted model as a user of plain PyTorch would."""
    model.train()
    head = list(model.modules())[-1]
    linears = [module for module in model.modules() if isinstance(module, nn.Linear)]
    head = linears[-1] if linears else head
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm | nn.GroupNorm | nn.LayerNorm)]
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(method == "full" or ("bias" in method and name.rpartition(".")[2] == "bias"))
    for module in [head, *(norms if method == "norm+last" else [])]:
        module.requires_grad_(True)
    if method not in ("full", "norm+last"):
        for norm in norms:
            norm.eval()


def measure(
    model: nn.Module, example: torch.Tensor, labels: torch.Tensor, recipe: Recipe, device: torch.device, rounds: int
) -> Profile:
    """Memory of one step, then the median time of ``rounds`` steps, whole and by layer."""
    layout = torch.channels_last if recipe.channels_last else torch.contiguous_format
    model = model.to(device, memory_format=layout)
    images, labels = example.to(device).contiguous(memory_format=layout), labels.to(device)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.0)
    enabled = recipe.amp is not None
    dtype = getattr(torch, recipe.amp) if recipe.amp else None

    def autocast() -> torch.autocast:
        return torch.autocast(device.type, dtype=dtype, enabled=enabled)

    def step() -> None:
        with autocast():
            loss = F.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    with autocast():
        memory = measure_memory(model, images, labels, optimizer)
    clock = _clock(device)
    step()
    whole = []
    for _ in range(rounds):
        start = clock()
        step()
        whole.append(clock() - start)
    timed: dict[str, list[LayerTime]] = defaultdict(list)
    for _ in range(rounds):
        with timing_by_layer(model, clock) as times:
            step()
        for name, layer in times.items():
            timed[name].append(layer)
    medians = {
        name: LayerTime(statistics.median(t.forward for t in layers), statistics.median(t.backward for t in layers))
        for name, layers in timed.items()
    }
    return Profile(memory, medians, statistics.median(whole))


@contextmanager
def timing_by_layer(model: nn.Module, clock: Callable[[], float]) -> Iterator[dict[str, LayerTime]]:
    """Time one forward and backward pass inside the context; the dictionary is filled at its end.

    A module is a layer when it has parameters of its own or no other module runs inside it, so that a norm with its
    activation counts as one, and so does a fused block. The gradient of a layer's output marks the start of its
    backward; the next mark ends it. Work between layers (additions, functional calls) falls to a neighbouring layer.
    """
    running: list[tuple[str, bool, float]] = []  # name, whether it has parameters of its own, start
    composite: set[str] = set()
    forward: dict[str, float] = {}
    marks: list[tuple[float, str]] = []

    def enter(name: str) -> Callable:
        def hook(module: nn.Module, inputs: object) -> None:
            composite.update(outer for outer, _, _ in running)
            running.append((name, next(module.parameters(recurse=False), None) is not None, clock()))

        return hook

    def leave(module: nn.Module, inputs: tuple, output: object) -> None:
        name, has_parameters, start = running.pop()
        inside_a_layer = any(outer_has_parameters for _, outer_has_parameters, _ in running)
        if inside_a_layer or (name in composite and not has_parameters):
            return
        forward[name] = forward.get(name, 0.0) + clock() - start
        passed_through = any(output is one for one in inputs)
        if isinstance(output, torch.Tensor) and output.requires_grad and not passed_through:
            output.register_hook(lambda grad: marks.append((clock(), name)))

    handles = []
    for name, module in model.named_modules():
        handles.append(module.register_forward_pre_hook(enter(name)))
        handles.append(module.register_forward_hook(leave))
    times: dict[str, LayerTime] = {}
    try:
        yield times
        end = clock()
    finally:
        for handle in handles:
            handle.remove()
    backward: Counter[str] = Counter()
    for (start, name), (stop, _) in zip(marks, [*marks[1:], (end, "")], strict=True):
        backward[name] += stop - start
    times.update({name: LayerTime(forward[name], backward[name]) for name in forward})


def _clock(device: torch.device) -> Callable[[], float]:
    """Milliseconds, after all work on the device is done."""

    def clock() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() * 1e3

    return clock


def _bytes(count: int) -> str:
    return format_bytes(count) if count else "-"


def _ms(layer: LayerTime | None, part: str) -> str:
    return "" if layer is None else f"{getattr(layer, part):.2f}"
