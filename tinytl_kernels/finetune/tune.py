"""``tinytl tune``: the GPU's own best launch configurations for one model, batch size and dtype, kept on disk."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from ..backends import backend_module, use_backend
from ..errors import TinyTLError
from .prepare import prepare
from .recipe import Recipe


@dataclass(frozen=True)
class Tuned:
    """What tuning found.

    Args:
        path: The table, which the launchers read from now on.
        calls: Distinct calls of operators in a step.
        choices: Distinct questions that their launchers ask.
        changed: In how many of them another configuration than the rule's won.
        saved_ms: Milliseconds of a step that the changes save, by the sum of the calls timed alone.
        failed: Candidate configurations that failed or answered wrong, and so were left out.
    """

    path: Path
    calls: int
    choices: int
    changed: int
    saved_ms: float
    failed: int

    def __str__(self) -> str:
        return (
            f"{self.calls} calls, {self.choices} choices of a configuration: {self.changed} differ from the rule's and "
            f"save {self.saved_ms:.3f} ms a step, calls timed alone; {self.failed} candidates left out\n{self.path}"
        )


def tune(
    model_name: str,
    method: str,
    recipe: Recipe,
    device: torch.device,
    *,
    num_classes: int = 10,
    progress: Callable[[str], None] = print,
) -> Tuned:
    """Time the candidate configurations of every kernel that a training step launches, and keep the best.

    Args:
        model_name: See :func:`tinytl_kernels.models.build_model`.
        method: One of ``prepare.METHODS``.
        recipe: Batch size, resolution, autocast and layout count here: shapes and dtypes are what is tuned for.
        device: The GPU.
        num_classes: Outputs of the classifier.
        progress: Told of every distinct call, in a line.

    Raises:
        TinyTLError: There is no GPU that the Triton backend runs on, or the model cannot be built.
        OSError: The table cannot be written.
    """
    reason = backend_module("triton").unavailable_reason()
    if reason is None and device.type != "cuda":
        reason = f"the kernels run on a GPU, and the device is {device}"
    if reason is not None:
        raise TinyTLError(f"tune: there is nothing to tune here: {reason}")
    from ..backends.triton import configurations
    from ..backends.triton.timing import Stopwatch, captured
    from ..backends.triton.tune import record, search, winners

    model = prepare(model_name, method, num_classes, recipe, pretrained=False)
    with torch.cuda.device(device), use_backend("triton"):
        calls = record(training_step(model, recipe, device, num_classes))
        del model
        stopwatch = Stopwatch(device)
        trials = search(calls, lambda run: stopwatch.median(captured(run)), device, progress)
        here = configurations.target(device)
        path = configurations.table_path(here)
        found = winners(trials)
        # A rule that is right after all takes the place of what an earlier run found.
        configurations.write(path, here, {choice: trial.best for choice, trial in trials.items()})
    return Tuned(
        path,
        len(calls),
        len(trials),
        len(found),
        sum(trial.gain for trial in trials.values()) * 1e3,
        sum(len(trial.failed) for trial in trials.values()),
    )


def training_step(model: nn.Module, recipe: Recipe, device: torch.device, num_classes: int) -> Callable[[], object]:
    """Forward, cross entropy and backward of random pictures, as the recipe has them."""
    layout = torch.channels_last if recipe.channels_last else torch.contiguous_format
    model = model.to(device, memory_format=layout).train()
    side = recipe.resolution
    images = torch.randn(recipe.batch_size, 3, side, side, device=device).contiguous(memory_format=layout)
    labels = torch.arange(recipe.batch_size, device=device) % num_classes
    dtype = getattr(torch, recipe.amp) if recipe.amp else None

    def step() -> None:
        with torch.autocast(device.type, dtype=dtype, enabled=dtype is not None):
            loss = F.cross_entropy(model(images), labels)
        loss.backward()

    return step
