"""Several processes: the steps of one, every test picture once, and one checkpoint."""

from __future__ import annotations

import signal
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from tinytl_kernels.errors import TinyTLError
from tinytl_kernels.finetune import Interrupted, Options, Process, Training, choose_device, process_group
from tinytl_kernels.models import InputConfig

from .conftest import RECIPE, make_data, torchrun


def plain_model() -> nn.Module:
    """No dropout and no batch statistics, which rightly differ between processes."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))


def run_pair(folder: Path) -> None:
    """What each of the two processes does: one run from end to end, and one that is interrupted and resumed."""
    torch.set_num_threads(1)
    with process_group("cpu") as process:
        run_one(process, folder / "whole")
        try:
            run_one(process, folder / "parts", stop_after=4)
        except Interrupted:
            (folder / f"interrupted-{process.rank}").touch()
        run_one(process, folder / "parts", resume=folder / "parts" / "last.pt")


def run_one(process: Process, folder: Path, *, stop_after: int = 0, resume: Path | None = None) -> None:
    """Train; write the history and the weights that this process ends with."""
    options = Options(folder=folder, progress=False, tensorboard=False, resume=resume)
    training = Training(plain_model(), make_data(test=7), RECIPE, InputConfig(), process=process, options=options)
    if stop_after and process.rank == 1:  # the signal reaches one process only
        original = training.optimizer.step

        def step(*args: object) -> object:
            if training.progress.steps == stop_after - 1:
                signal.raise_signal(signal.SIGTERM)
            return original(*args)

        training.optimizer.step = step
    training.run()
    torch.save(training.progress.history, folder / f"history-{process.rank}.pt")
    torch.save(training.model.state_dict(), folder / f"model-{process.rank}.pt")


def alone(batch: int) -> Training:
    options = Options(checkpoints=False, progress=False, tensorboard=False)
    recipe = replace(RECIPE, batch_size=batch)
    training = Training(plain_model(), make_data(test=7), recipe, InputConfig(), options=options)
    training.run()
    return training


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What ``run_pair`` leaves."""
    folder = tmp_path_factory.mktemp("pair")
    code = f"from tests.finetune.test_distributed import run_pair, Path; run_pair(Path({str(folder)!r}))"
    status, _, errors = torchrun("--no-python", sys.executable, "-c", code)
    assert status == 0, errors
    return folder


def test_two_processes_train_as_one_with_twice_the_batch(folder: Path) -> None:
    """22 pictures in steps of 8, 8 and 6: the last process has fewer in the last step."""
    models = [torch.load(folder / "whole" / f"model-{rank}.pt") for rank in (0, 1)]
    for name, value in alone(batch=8).model.state_dict().items():
        assert torch.equal(models[0][name], models[1][name]), name
        torch.testing.assert_close(models[0][name], value, rtol=1e-4, atol=1e-5, msg=name)


def test_two_processes_report_every_picture_once(folder: Path) -> None:
    """7 test pictures do not divide by two."""
    histories = [torch.load(folder / "whole" / f"history-{rank}.pt") for rank in (0, 1)]
    for first, second, single in zip(*histories, alone(batch=8).progress.history, strict=True):
        assert first["images"] == single["images"] == 22
        assert first["test_accuracy"] == second["test_accuracy"] == single["test_accuracy"]
        assert first["test_loss"] == pytest.approx(single["test_loss"], rel=1e-4)
        assert first["train_loss"] == second["train_loss"] == pytest.approx(single["train_loss"], rel=1e-4)


def test_a_signal_to_one_process_stops_both_and_they_resume_to_the_same_bits(folder: Path) -> None:
    assert (folder / "interrupted-0").exists()
    assert (folder / "interrupted-1").exists()
    for rank in (0, 1):
        whole = torch.load(folder / "whole" / f"model-{rank}.pt")
        for name, value in torch.load(folder / "parts" / f"model-{rank}.pt").items():
            assert torch.equal(value, whole[name]), name
    losses = [[row["train_loss"] for row in torch.load(folder / part / "history-0.pt")] for part in ("whole", "parts")]
    assert losses[1] == pytest.approx(losses[0])


def test_a_device_that_is_not_there_is_one_line() -> None:
    for name in ("nonsense", "cuda:77"):
        with pytest.raises(TinyTLError, match=f"device '{name}'") as caught:
            choose_device(name)
        assert "\n" not in str(caught.value)


def test_alone_there_is_no_group() -> None:
    with process_group("cpu") as process:
        assert (process.rank, process.world_size, process.is_first) == (0, 1, True)
        assert not torch.distributed.is_initialized()


def test_only_the_first_process_writes(tmp_path: Path) -> None:
    process = Process(torch.device("cpu"), rank=1, world_size=1)
    options = Options(folder=tmp_path / "out", progress=False)
    Training(plain_model(), make_data(), RECIPE, InputConfig(), process=process, options=options).run()
    assert not (tmp_path / "out").exists()
