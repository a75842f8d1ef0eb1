"""``tinytl tune``: what it records of a model, what it keeps, and what it says where there is no GPU."""

from __future__ import annotations

import pytest
import torch

from tinytl_kernels import cli
from tinytl_kernels.errors import TinyTLError
from tinytl_kernels.finetune import Recipe, Tuned, tune
from tinytl_kernels.finetune.tune import training_step


def test_without_a_gpu_it_is_one_line(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert cli.main(["tune", "--model", "timm:test_efficientnet", "--device", "cpu"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("tinytl: error: tune: there is nothing to tune here: ")


def test_a_cpu_is_refused_also_where_kernels_run(monkeypatch):
    from tinytl_kernels.backends import triton

    monkeypatch.setattr(triton, "unavailable_reason", lambda: None)
    with pytest.raises(TinyTLError, match="the device is cpu"):
        tune("timm:test_efficientnet", "bias", Recipe(), torch.device("cpu"))


def test_the_number_of_classes_is_checked(capsys):
    assert cli.main(["tune", "--num-classes", "0"]) == 2
    assert "--num-classes: expected at least 1, got 0" in capsys.readouterr().err


def test_help_explains_where_it_keeps_things(capsys):
    with pytest.raises(SystemExit):
        cli.main(["tune", "--help"])
    assert "TINYTL_TUNE_CACHE" in capsys.readouterr().out


def test_a_step_has_the_recipes_batch_layout_and_precision():
    seen = []

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = torch.nn.Linear(3, 4)

        def forward(self, x):
            seen.append(
                (tuple(x.shape), x.is_contiguous(memory_format=torch.channels_last), torch.is_autocast_enabled("cpu"))
            )
            return self.head(x.mean((2, 3)))

    model = Model()
    training_step(model, Recipe(batch_size=6, resolution=32, amp="bfloat16"), torch.device("cpu"), 4)()
    assert seen == [((6, 3, 32, 32), True, True)]
    assert model.head.bias.grad is not None


def test_what_was_found_is_told_in_two_lines(tmp_path):
    text = str(Tuned(tmp_path / "gpu.json", calls=60, choices=40, changed=7, saved_ms=1.25, failed=3))
    first, second = text.splitlines()
    assert "7 differ from the rule's and save 1.250 ms a step" in first
    assert second == str(tmp_path / "gpu.json")
