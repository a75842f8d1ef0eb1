"""The loop: one result whatever interrupts it, and one clear line when it cannot go on."""

from __future__ import annotations

import csv
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from tinytl_kernels.errors import TinyTLError
from tinytl_kernels.finetune import Data, Interrupted, Options, Recipe, Training, load_data
from tinytl_kernels.finetune.logs import COLUMNS
from tinytl_kernels.finetune.sources import ArraySource
from tinytl_kernels.models import InputConfig

from .conftest import ENVIRONMENT, RECIPE, make_data, make_tiny

QUIET = Options(checkpoints=False, progress=False, tensorboard=False)


def train(recipe: Recipe = RECIPE, data: Data | None = None, model: nn.Module | None = None, **options) -> Training:
    """A finished training; options as in ``Options``."""
    training = build(recipe, data, model, **options)
    training.run()
    return training


def build(recipe: Recipe = RECIPE, data: Data | None = None, model: nn.Module | None = None, **options) -> Training:
    options = replace(QUIET, **options)
    return Training(model or make_tiny(), data or make_data(), recipe, InputConfig(), options=options)


def assert_same_bits(one: Training, other: Training) -> None:
    """Weights, batch statistics, Adam's state, accuracy and loss of every epoch."""
    for name, value in one.model.state_dict().items():
        assert torch.equal(value, other.model.state_dict()[name]), name
    states = [training.optimizer.state_dict()["state"] for training in (one, other)]
    assert states[0].keys() == states[1].keys()
    for index, state in states[0].items():
        for name, value in state.items():
            assert torch.equal(value, states[1][index][name]), (index, name)
    timeless = [
        [{key: value for key, value in row.items() if "second" not in key} for row in training.progress.history]
        for training in (one, other)
    ]
    assert timeless[0] == timeless[1]


class Interrupting(ArraySource):
    """Sends a signal to the process when the n-th picture is read."""

    def arm(self, number: int, after: int) -> Interrupting:
        self.number, self.left = number, after
        return self

    def load(self, index: int):
        self.left -= 1
        if self.left == 0:
            signal.raise_signal(self.number)
        return super().load(index)


def interrupting(data: Data, number: int, after: int) -> Data:
    source = Interrupting(data.classes, data.train.labels, data.train.pictures)
    return replace(data, train=source.arm(number, after))


def test_it_learns_and_freezes() -> None:
    before = make_tiny().state_dict()
    training = train(replace(RECIPE, epochs=6), data=make_data(train=60, test=30))
    history = training.progress.history
    assert history[-1]["train_loss"] < history[0]["train_loss"]
    assert history[-1]["test_accuracy"] > 0.6
    assert torch.equal(training.model[0].weight, before["0.weight"])  # requires_grad is False
    assert not torch.equal(training.model[3].weight, before["3.weight"])


def test_the_same_seed_gives_the_same_bits_and_another_does_not() -> None:
    first = train()
    assert_same_bits(first, train())
    other = train(replace(RECIPE, seed=1))
    assert not torch.equal(first.model[8].weight, other.model[8].weight)


def test_workers_give_the_same_bits() -> None:
    assert_same_bits(train(), train(workers=2))


@pytest.mark.parametrize("after", [1, 7, 23, 51])  # the first batch, mid-epoch, between epochs, the last epoch
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_resumes_to_the_same_bits(number: int, after: int, tmp_path: Path) -> None:
    data = make_data()
    stopped = build(data=interrupting(data, number, after), folder=tmp_path, checkpoints=True)
    with pytest.raises(Interrupted, match="--resume") as caught:
        stopped.run()
    assert caught.value.number == number
    resumed = train(data=data, folder=tmp_path, checkpoints=True, resume=tmp_path / "last.pt")
    assert_same_bits(train(data=data), resumed)
    with open(tmp_path / "log.csv") as file:
        assert [row["epoch"] for row in csv.DictReader(file)] == ["1", "2", "3"]


def test_an_interrupt_during_evaluation_keeps_the_epoch(tmp_path: Path) -> None:
    data = make_data(test=40)
    source = Interrupting(data.classes, data.test.labels, data.test.pictures).arm(signal.SIGTERM, 3)
    stopped = build(data=replace(data, test=source), folder=tmp_path, checkpoints=True)
    with pytest.raises(Interrupted):
        stopped.run()
    resumed = build(data=data, folder=tmp_path, checkpoints=True, resume=tmp_path / "last.pt")
    loads = []
    original = resumed.train_loader.dataset.dataset.source.load
    resumed.train_loader.dataset.dataset.source.load = lambda index: loads.append(index) or original(index)
    resumed.run()
    assert len(loads) == 2 * 22  # two epochs of three: the first was not repeated
    assert_same_bits(train(data=make_data(test=40)), resumed)


@pytest.mark.parametrize("steps", [1, 4])
def test_a_checkpoint_between_steps_resumes_to_the_same_bits(steps: int, tmp_path: Path) -> None:
    """As after kill -9: last.pt is of some step, and everything after it is lost."""
    data = make_data()
    broken = replace(data, train=Failing(data.classes, data.train.labels, data.train.pictures, left=30))
    with pytest.raises(ZeroDivisionError):
        train(data=broken, folder=tmp_path, checkpoints=True, checkpoint_steps=steps)
    resumed = train(data=data, folder=tmp_path, checkpoints=True, resume=tmp_path / "last.pt")
    assert_same_bits(train(data=data), resumed)


class Failing(ArraySource):
    """Fails at the n-th picture."""

    def __init__(self, *args: object, left: int) -> None:
        super().__init__(*args)
        self.left = left

    def load(self, index: int):
        self.left -= 1
        if self.left == 0:
            raise ZeroDivisionError
        return super().load(index)


def test_a_resumed_float16_run_keeps_its_loss_scale(tmp_path: Path) -> None:
    recipe = replace(RECIPE, amp="float16")
    stopped = build(recipe, data=interrupting(make_data(), signal.SIGTERM, 7), folder=tmp_path, checkpoints=True)
    stopped.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**7)
    with pytest.raises(Interrupted):
        stopped.run()
    resumed = build(recipe, folder=tmp_path, checkpoints=True, resume=tmp_path / "last.pt")
    resumed.run()
    assert resumed.scaler.get_scale() == 2.0**7


def test_accumulation_is_a_larger_batch() -> None:
    """Without batch statistics and dropout the two differ by rounding; the short last step included."""

    def plain() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))

    # 22 pictures: steps of 8, 8 and 6, the last as 4 + 2
    large = train(replace(RECIPE, batch_size=8), model=plain())
    small = train(replace(RECIPE, batch_size=4, accumulate=2), model=plain())
    assert large.progress.steps == small.progress.steps == 9
    for name, value in large.model.state_dict().items():
        torch.testing.assert_close(small.model.state_dict()[name], value, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_autocast_computes_in_the_dtype_and_keeps_float32_weights(dtype: str) -> None:
    model, seen = make_tiny(), set()
    model[3].register_forward_hook(lambda module, inputs, output: seen.add(output.dtype))
    training = train(replace(RECIPE, amp=dtype, epochs=1), model=model)
    assert seen == {getattr(torch, dtype)}
    assert {parameter.dtype for parameter in training.model.parameters()} == {torch.float32}


def test_pictures_arrive_in_channels_last() -> None:
    model, seen = make_tiny(), set()
    model[0].register_forward_pre_hook(
        lambda module, inputs: seen.add(inputs[0].is_contiguous(memory_format=torch.channels_last))
    )
    train(replace(RECIPE, epochs=1), model=model)
    assert seen == {True}


def test_the_learning_rate_follows_the_cosine_at_every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    training, rates = build(), []
    original = training.optimizer.step
    training.optimizer.step = lambda *args: rates.append(training.optimizer.param_groups[0]["lr"]) or original(*args)
    training.run()
    assert rates == [RECIPE.learning_rate_at(step, 18) for step in range(18)]


def test_evaluation_counts_every_picture_once_and_changes_nothing() -> None:
    training = build(data=make_data(test=37))
    before = {name: value.clone() for name, value in training.model.state_dict().items()}
    loss, accuracy = training.evaluate()
    assert accuracy * 37 == pytest.approx(round(accuracy * 37))
    for name, value in training.model.state_dict().items():
        assert torch.equal(value, before[name]), name
    training.model.eval()
    images, labels = zip(*(training.test_loader.dataset[0, index] for index in range(37)), strict=True)
    with torch.no_grad():
        logits = training.model(torch.stack(images))
    labels = torch.tensor(labels)
    assert loss == pytest.approx(nn.functional.cross_entropy(logits, labels).item(), rel=1e-5)
    assert accuracy == pytest.approx((logits.argmax(1) == labels).float().mean().item())


def test_last_and_best_hold_what_they_say(tmp_path: Path) -> None:
    training = train(replace(RECIPE, epochs=4), folder=tmp_path, checkpoints=True)
    last = torch.load(tmp_path / "last.pt", weights_only=True)
    best = torch.load(tmp_path / "best.pt", weights_only=True)
    accuracies = [row["test_accuracy"] for row in training.progress.history]
    assert last["progress"]["epoch"] == 4
    assert best["progress"]["epoch"] == accuracies.index(max(accuracies)) + 1
    assert best["progress"]["best"] == max(accuracies)
    assert last["class_names"] == ["class 0", "class 1", "class 2"]
    training.model.load_state_dict(best["model"])
    assert training.evaluate()[1] == max(accuracies)


def test_logs_hold_every_epoch(tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    training = train(folder=tmp_path, tensorboard=True)
    with open(tmp_path / "log.csv") as file:
        rows = list(csv.DictReader(file))
    assert tuple(rows[0]) == COLUMNS
    assert [float(row["test_accuracy"]) for row in rows] == [row["test_accuracy"] for row in training.progress.history]
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    points = [(event.step, event.value) for event in events.Scalars("train_loss")]
    assert points == [(row["step"], pytest.approx(row["train_loss"])) for row in training.progress.history]


def test_a_full_disk_under_tensorboard_is_one_error_and_no_traceback(tmp_path: Path) -> None:
    code = f"""
import resource
from pathlib import Path
import torch.utils.tensorboard
from tinytl_kernels.errors import TinyTLError
from tinytl_kernels.finetune.logs import Log
resource.setrlimit(resource.RLIMIT_FSIZE, (20, 20))
try:
    Log(Path({str(tmp_path)!r}), tensorboard=True)
except TinyTLError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], env=ENVIRONMENT, capture_output=True, text=True, timeout=60)
    assert done.stdout == f"cannot write TensorBoard's events in {tmp_path}: File too large\n"
    assert "Traceback" not in done.stderr


def test_without_a_folder_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    train(checkpoints=True, tensorboard=True)
    assert list(tmp_path.iterdir()) == []


def test_an_epochs_line_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    train(replace(RECIPE, epochs=1), progress=True, title="bias")
    assert capsys.readouterr().err.startswith("bias epoch 1/1: loss ")


@pytest.mark.parametrize("workers", [0, 2])
def test_a_corrupt_picture_stops_the_run_in_one_line(workers: int, pictures, tmp_path: Path) -> None:
    root = pictures({"train/ant": 6, "train/bee": 6, "val/ant": 1, "val/bee": 1})
    path = root / "train" / "bee" / "03.png"
    path.write_bytes(path.read_bytes()[:-30])
    data = load_data(str(root))
    message = ""
    try:  # pytest.raises would keep the traceback, and with it the workers, alive
        train(data=data, model=make_tiny(classes=2), workers=workers)
    except TinyTLError as error:
        message = str(error)
    assert message.startswith(f"data: cannot read the image {path} (")
    assert "Traceback" not in message


def test_a_loss_that_is_not_a_number_stops_the_run_unsaved(tmp_path: Path) -> None:
    model = make_tiny()
    with torch.no_grad():
        model[8].bias.fill_(float("nan"))
    with pytest.raises(TinyTLError, match="the loss became nan in epoch 1; try a lower learning rate"):
        train(model=model, folder=tmp_path, checkpoints=True)
    assert not (tmp_path / "last.pt").exists()


def test_a_checkpoint_of_another_recipe_is_refused(tmp_path: Path) -> None:
    train(folder=tmp_path, checkpoints=True)
    with pytest.raises(TinyTLError, match="its epochs is 3, this one's is 5"):
        train(replace(RECIPE, epochs=5), folder=tmp_path, resume=tmp_path / "last.pt")


def test_a_run_that_is_over_resumes_to_its_result(tmp_path: Path) -> None:
    first = build(folder=tmp_path, checkpoints=True)
    done = first.run()
    again = build(folder=tmp_path, checkpoints=True, resume=tmp_path / "last.pt").run()
    assert again == done


def test_signals_work_as_before_once_the_run_is_over() -> None:
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    train(replace(RECIPE, epochs=1))
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before


def test_two_interrupts_end_it_at_once() -> None:
    class Impatient(Interrupting):
        def load(self, index: int):
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)
            raise AssertionError("the second Ctrl-C was swallowed")

    data = make_data()
    source = Impatient(data.classes, data.train.labels, data.train.pictures)
    with pytest.raises(KeyboardInterrupt):
        train(data=replace(data, train=source))


def test_one_epoch_leaves_no_gradient_behind() -> None:
    training = train(replace(RECIPE, epochs=1))
    assert all(parameter.grad is None for parameter in training.model.parameters())
    assert np.isfinite(training.progress.history[0]["train_loss"])
