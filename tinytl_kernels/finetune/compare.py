"""Several methods on one model and one data set: accuracy beside measured memory and time."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import nn

from ..errors import TinyTLError
from ..memory import format_bytes, measure_memory
from ..memory.report import render_table
from ..models import input_config
from ..version import __version__
from .checkpoint import atomic_write
from .data import Data, PictureDataset
from .distributed import Process
from .logs import write_csv
from .loop import Options, Training
from .prepare import prepare
from .recipe import Recipe


@dataclass(frozen=True)
class Run:
    """One method trained once.

    Args:
        method: The method; ``METHOD-CODE`` where its frozen weights were in 8 bits.
        seed: Of the recipe.
        accuracy: Test accuracy after the last epoch, 0 to 1.
        trained_parameters: Numbers that the optimizer changes.
        saved_bytes: Kept from forward to backward by one training step.
        total_bytes: Weights and buffers, and what is alive beyond them at the worst moment of that step.
        stack_bytes: The parts of ``total_bytes``.
        seconds_per_image: Of training, data loading included.
    """

    method: str
    seed: int
    accuracy: float
    trained_parameters: int
    saved_bytes: int
    total_bytes: int
    stack_bytes: dict[str, int]
    seconds_per_image: float


@dataclass(frozen=True)
class Summary:
    """One method over all seeds: the mean, and the sample standard deviation where there are two seeds or more."""

    method: str
    accuracy: float
    spread: float | None
    trained_parameters: int
    saved_bytes: int
    total_bytes: int
    stack_bytes: dict[str, int]
    seconds_per_image: float

    def stack(self) -> dict[str, int]:
        """The parts of the memory, as :func:`tinytl_kernels.memory.plot_memory` draws them."""
        return self.stack_bytes


@dataclass(frozen=True)
class Comparison:
    """All runs, and what they were runs of."""

    about: dict
    runs: list[Run]

    def summaries(self) -> list[Summary]:
        """One a method, in the order the methods were run."""
        return [summarise([run for run in self.runs if run.method == name]) for name in dict.fromkeys(self._methods())]

    def _methods(self) -> list[str]:
        return [run.method for run in self.runs]

    def table(self) -> str:
        """The table that ``tinytl compare`` prints."""
        header = ("method", "accuracy", "trained", "saved", "memory", "ms/image")
        rows = [
            (
                row.method,
                f"{row.accuracy:.2%}" + ("" if row.spread is None else f" ± {row.spread:.2%}"),
                f"{row.trained_parameters:,}",
                format_bytes(row.saved_bytes),
                format_bytes(row.total_bytes),
                f"{row.seconds_per_image * 1e3:.2f}",
            )
            for row in self.summaries()
        ]
        return render_table(header, rows)


def summarise(runs: Sequence[Run]) -> Summary:
    """Mean and spread of the runs of one method; bytes do not depend on the seed and come from the first."""
    accuracies = [run.accuracy for run in runs]
    first = runs[0]
    return Summary(
        first.method,
        statistics.fmean(accuracies),
        statistics.stdev(accuracies) if len(runs) > 1 else None,
        first.trained_parameters,
        first.saved_bytes,
        first.total_bytes,
        first.stack_bytes,
        statistics.fmean(run.seconds_per_image for run in runs),
    )


def compare(
    model_name: str,
    data: Data,
    methods: Sequence[str],
    seeds: Sequence[int],
    recipe: Recipe,
    folder: Path,
    *,
    process: Process | None = None,
    options: Options | None = None,
    pretrained: bool = True,
    weights: str | None = None,
    resume: bool = False,
    build: Callable[..., nn.Module] = prepare,
) -> Comparison:
    """Train every method with every seed, measure one step of each, and keep ``results.json`` after every run.

    Args:
        model_name: See :func:`tinytl_kernels.models.build_model`.
        data: The pictures.
        methods: Any of ``prepare.METHODS``.
        seeds: One run a method and seed.
        recipe: For all of them; its seed is replaced. With weights in 8 bits every method that freezes some runs twice,
            as ``METHOD`` with floating point weights and as ``METHOD-CODE``, so that the accuracies stand side by side.
        folder: ``results.json``, ``results.csv`` and ``METHOD/seed-N/log.csv`` go here.
        process: The device.
        options: Output and workers; no checkpoints are written.
        pretrained: Load the library's weights.
        weights: A local state_dict instead.
        resume: Take over the runs that ``results.json`` of the same comparison holds.
        build: Makes the converted model.

    Raises:
        TinyTLError: See :class:`~tinytl_kernels.finetune.Training`; or ``results.json`` is of another comparison.
    """
    process, options = process or Process(torch.device("cpu")), options or Options()
    about = describe(model_name, data, recipe, process, pretrained, weights)
    about["step_in_backward"] = options.step_in_backward  # the memory is with it or without
    runs = read_runs(folder / "results.json", about) if resume else []
    folder.mkdir(parents=True, exist_ok=True)
    rows = variants(methods, recipe)
    for name, method, variant in rows:
        for seed in seeds:
            if any((run.method, run.seed) == (name, seed) for run in runs):
                continue
            seeded = replace(variant, seed=seed)
            model = build(model_name, method, len(data.classes), seeded, pretrained=pretrained, weights=weights)
            title = name if len(seeds) == 1 else f"{name}, seed {seed},"
            own = replace(options, folder=folder / name / f"seed-{seed}", checkpoints=False, title=title)
            runs.append(run_once(model, name, data, seeded, model_name, process, own))
            write_results(folder, Comparison(about, runs))
    order = {name: position for position, (name, _, _) in enumerate(rows)}
    chosen = [run for run in runs if run.method in order and run.seed in seeds]
    return Comparison(about, sorted(chosen, key=lambda run: (order[run.method], run.seed)))


def variants(methods: Sequence[str], recipe: Recipe) -> list[tuple[str, str, Recipe]]:
    """(name in the table, method, recipe) of what is run for ``methods``."""
    if recipe.weight_bits != 8:
        return [(method, method, recipe) for method in methods]
    rows = []
    for method in methods:
        rows.append((method, method, replace(recipe, weight_bits=32)))
        if method != "full":  # which freezes no weight
            rows.append((f"{method}-{recipe.weight_code}", method, recipe))
    return rows


def run_once(
    model: nn.Module, method: str, data: Data, recipe: Recipe, model_name: str, process: Process, options: Options
) -> Run:
    """Measure one training step of ``model``, then train it."""
    training = Training(model, data, recipe, input_config(model_name), process=process, options=options)
    images, labels = example_batch(data, recipe, training, model_name)
    model.train()
    with training.autocast(), training.stepping():
        report = measure_memory(model, images, labels, training.optimizer)
    result = training.run()
    return Run(
        method,
        recipe.seed,
        result.accuracy,
        sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad),
        report.saved,
        report.total,
        report.stack(),
        result.seconds_per_image,
    )


def example_batch(data: Data, recipe: Recipe, training: Training, model_name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """The first batch of training pictures, on the device and in the layout of ``training``."""
    dataset = PictureDataset(data.train, recipe, input_config(model_name), training=True)
    count = min(recipe.batch_size, len(dataset))
    pairs = [dataset[0, index] for index in range(count)]
    images = torch.stack([picture for picture, _ in pairs])
    labels = torch.tensor([label for _, label in pairs])
    return training.to_device((images, labels))


def describe(
    model_name: str, data: Data, recipe: Recipe, process: Process, pretrained: bool, weights: str | None
) -> dict:
    """What makes two comparisons the same, plus the machine they ran on."""
    fields = {key: value for key, value in asdict(recipe).items() if key != "seed"}
    return {
        "model": model_name,
        "weights": weights or ("pretrained" if pretrained else "random"),
        "data": data.name,
        "pictures": [len(data.train.labels), len(data.test.labels)],
        "classes": len(data.classes),
        "recipe": fields,
        "device": device_name(process.device),
        "torch": torch.__version__,
        "tinytl_kernels": __version__,
    }


def device_name(device: torch.device) -> str:
    """The device as a reader knows it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU, {torch.get_num_threads()} threads" if device.type == "cpu" else device.type


def write_results(folder: Path, comparison: Comparison) -> None:
    """``results.json`` (everything) and ``results.csv`` (one line a run), each atomically."""
    content = {
        **comparison.about,
        "runs": [asdict(run) for run in comparison.runs],
        "methods": [asdict(summary) for summary in comparison.summaries()],
    }
    text = json.dumps(content, indent=2) + "\n"
    atomic_write(folder / "results.json", lambda file: file.write(text.encode()))
    columns = tuple(name for name in Run.__dataclass_fields__ if name != "stack_bytes")
    write_csv(folder / "results.csv", columns, [asdict(run) for run in comparison.runs])


def read_runs(path: Path, about: dict) -> list[Run]:
    """The runs in an earlier ``results.json`` of the comparison ``about``; none where there is no such file."""
    if not path.exists():
        return []
    try:
        content = json.loads(path.read_text())
        runs = [Run(**run) for run in content["runs"]]
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise TinyTLError(f"cannot read the results in {path} ({type(error).__name__})") from error
    for key, value in about.items():
        if content.get(key) != value:
            raise TinyTLError(
                f"{path} is of another comparison: its {key} is {content.get(key)!r}, this one's is {value!r}; "
                "choose another --out"
            )
    if not all(math.isfinite(run.accuracy) for run in runs):
        raise TinyTLError(f"cannot read the results in {path} (an accuracy is not a number)")
    return runs
