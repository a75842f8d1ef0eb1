"""Several methods side by side: the table says what the runs were, the figures show it."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from tinytl_kernels.errors import TinyTLError
from tinytl_kernels.finetune import Comparison, Options, Recipe, Run, compare, draw
from tinytl_kernels.memory import measure_memory

from .conftest import RECIPE, make_data, make_tiny

QUIET = Options(progress=False, tensorboard=False)
SHORT = replace(RECIPE, epochs=1)
MODEL = "timm:test_efficientnet"  # its normalisation; the network is make_tiny's


def build(name: str, method: str, num_classes: int, recipe: Recipe, **options: object) -> nn.Module:
    """Stands for ``prepare``: "last" trains the head alone."""
    model = make_tiny(num_classes, recipe.seed)
    if method == "last":
        model.requires_grad_(False)
        model[8].requires_grad_(True)
    return model


def run(folder: Path, methods=("full", "last"), seeds=(0, 1), recipe: Recipe = SHORT, **options) -> Comparison:
    return compare(MODEL, make_data(), methods, seeds, recipe, folder, options=QUIET, build=build, **options)


def example_run(method: str, seed: int, accuracy: float, memory: int = 10_000_000) -> Run:
    return Run(method, seed, accuracy, 1234, 5_000_000, memory, {"weights": memory // 2, "saved": memory // 2}, 2e-3)


def test_one_run_a_method_and_seed_in_the_order_asked_for(tmp_path: Path) -> None:
    runs = run(tmp_path, methods=("last", "full"), seeds=(3, 1)).runs
    assert [(one.method, one.seed) for one in runs] == [("last", 1), ("last", 3), ("full", 1), ("full", 3)]


def test_bytes_are_those_of_a_real_step(tmp_path: Path) -> None:
    full, last = run(tmp_path, seeds=(0,)).runs
    images, labels = torch.zeros(4, 3, 12, 12).contiguous(memory_format=torch.channels_last), torch.zeros(4).long()
    model = build("", "last", 3, SHORT).to(memory_format=torch.channels_last).train()
    report = measure_memory(model, images, labels)
    assert (last.saved_bytes, last.total_bytes, last.stack_bytes) == (report.saved, report.total, report.stack())
    assert sum(last.stack_bytes.values()) == last.total_bytes
    assert full.saved_bytes > last.saved_bytes
    assert (full.trained_parameters, last.trained_parameters) == (8 + 16 + 16 * 8 * 9 + 16 + 51, 51)


def test_measuring_does_not_change_the_run(tmp_path: Path) -> None:
    from tinytl_kernels.finetune import Training
    from tinytl_kernels.models import input_config

    measured = run(tmp_path, methods=("full",), seeds=(0,)).runs[0]
    alone = Training(build("", "full", 3, SHORT), make_data(), SHORT, input_config(MODEL), options=QUIET)
    assert alone.run().accuracy == measured.accuracy


def test_mean_and_spread_over_seeds() -> None:
    runs = [example_run("bias", 0, 0.90), example_run("bias", 1, 0.94), example_run("last", 0, 0.5)]
    comparison = Comparison({}, runs)
    bias, last = comparison.summaries()
    assert (bias.accuracy, bias.spread) == (pytest.approx(0.92), pytest.approx(0.02 * 2**0.5))
    assert (last.accuracy, last.spread) == (0.5, None)
    lines = comparison.table().splitlines()
    assert lines[0].split() == ["method", "accuracy", "trained", "saved", "memory", "ms/image"]
    assert lines[2].split() == ["bias", "92.00%", "±", "2.83%", "1,234", "5.00", "MB", "10.00", "MB", "2.00"]
    assert lines[3].split() == ["last", "50.00%", "1,234", "5.00", "MB", "10.00", "MB", "2.00"]


def test_results_are_on_disk_in_both_forms(tmp_path: Path) -> None:
    comparison = run(tmp_path)
    content = json.loads((tmp_path / "results.json").read_text())
    assert content["recipe"]["learning_rate"] == SHORT.learning_rate
    assert content["pictures"] == [22, 7]
    assert [entry["accuracy"] for entry in content["runs"]] == [one.accuracy for one in comparison.runs]
    with open(tmp_path / "results.csv") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["total_bytes"]) for row in rows] == [one.total_bytes for one in comparison.runs]
    assert (tmp_path / "last" / "seed-1" / "log.csv").exists()


def test_resume_trains_only_what_is_missing(tmp_path: Path) -> None:
    first = run(tmp_path, methods=("full",))
    built = []

    def counting(name: str, method: str, *args: object, **options: object) -> nn.Module:
        built.append(method)
        return build(name, method, *args, **options)

    both = compare(
        MODEL, make_data(), ("last", "full"), (0, 1), SHORT, tmp_path, options=QUIET, build=counting, resume=True
    )
    assert built == ["last", "last"]
    assert both.runs[2:] == first.runs


def test_results_of_another_comparison_are_not_mixed_in(tmp_path: Path) -> None:
    run(tmp_path, methods=("last",), seeds=(0,))
    with pytest.raises(TinyTLError, match="of another comparison: its recipe"):
        run(tmp_path, recipe=replace(SHORT, epochs=2), resume=True)


@pytest.mark.parametrize("content", ["", "{}", '{"runs": [{"method": "bias"}]}', '{"runs": 3}'])
def test_damaged_results_are_one_line(content: str, tmp_path: Path) -> None:
    (tmp_path / "results.json").write_text(content)
    with pytest.raises(TinyTLError, match=r"cannot read the results in .*results\.json"):
        run(tmp_path, resume=True)


def test_the_figures_are_pictures_with_every_method_in_its_place(tmp_path: Path, monkeypatch) -> None:
    figure_module = pytest.importorskip("matplotlib.figure")
    image = pytest.importorskip("PIL.Image")
    drawn = []
    original = figure_module.Figure.savefig
    monkeypatch.setattr(
        figure_module.Figure, "savefig", lambda self, *args, **more: drawn.append(self) or original(self, *args, **more)
    )
    about = {"model": "m", "data": "d", "recipe": {"batch_size": 8, "resolution": 64}}
    runs = [example_run("full", 0, 0.9, 100_000_000), example_run("bias", 0, 0.8), example_run("bias", 1, 0.9)]
    paths = draw(Comparison(about, runs), tmp_path)
    assert [path.name for path in paths] == ["accuracy.png", "memory.png"]
    for path in paths:
        with image.open(path) as picture:
            picture.load()
            assert picture.format == "PNG"
    containers = drawn[0].axes[0].containers
    points = [tuple(container.lines[0].get_xydata()[0]) for container in containers]
    assert points == [(100.0, pytest.approx(90)), (10.0, pytest.approx(85))]
    markers = {container.lines[0].get_marker() for container in containers}
    assert len(markers) == 2


def test_weights_in_8_bits_run_beside_floating_point_ones(tmp_path: Path) -> None:
    built = []

    def recording(name: str, method: str, num_classes: int, recipe: Recipe, **options: object) -> nn.Module:
        built.append((method, recipe.weight_bits, recipe.weight_code))
        return build(name, method, num_classes, recipe)

    recipe = replace(SHORT, weight_bits=8, weight_code="kmeans")
    arguments = (MODEL, make_data(), ("full", "last"), (0,), recipe, tmp_path)
    result = compare(*arguments, options=QUIET, build=recording)
    assert [run.method for run in result.runs] == ["full", "last", "last-kmeans"]
    assert built == [("full", 32, "kmeans"), ("last", 32, "kmeans"), ("last", 8, "kmeans")]
    assert [row.split()[0] for row in result.table().splitlines()[-3:]] == ["full", "last", "last-kmeans"]
    compare(*arguments, options=QUIET, build=recording, resume=True)
    assert len(built) == 3
