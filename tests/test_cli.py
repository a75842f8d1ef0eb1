"""The command: what it prints, what it leaves, and how it fails."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import tinytl_kernels
from tinytl_kernels import cli
from tinytl_kernels.finetune.arguments import parse

from .finetune.conftest import ENVIRONMENT, torchrun

TINY = ["--model", "timm:test_efficientnet", "--no-pretrained", "--resolution", "32", "--no-tensorboard"]
DIGITS = [*TINY, "--data", "digits", "--limit-train", "48", "--limit-test", "20", "--epochs", "2"]


pytestmark = pytest.mark.usefixtures("one_thread")


def fails(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line that ``tinytl`` prints when it fails with status 2."""
    assert cli.main(arguments) == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines[-1].startswith("tinytl: error: ")
    assert len(lines) == 1, lines
    return lines[0]


def command(*arguments: str, prefix: str = "pass") -> list[str]:
    """``tinytl`` in a process of its own; ``prefix`` is Python run before it."""
    code = f"import sys; {prefix}; from tinytl_kernels.cli import main; sys.exit(main())"
    return [sys.executable, "-c", code, *arguments]


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["fintune"], "did you mean finetune"),
        (["finetune", "--epoch", "3"], "unknown argument --epoch; did you mean --epochs"),
        (["finetune", "--leraning-rate=3"], "unknown argument --leraning-rate=3; "),
        (["finetune", "--method", "biass"], "did you mean bias"),
        (["compare", "--methods", "last,ful"], "did you mean full?"),
        (["compare", "--seeds", "0,x"], "'0,x' is not a list of whole numbers"),
        (["finetune", "--epochs", "many"], "--epochs: invalid int value: 'many'"),
        (["finetune", "--amp", "fp8"], "'fp8' is not known; choose from bfloat16, float16"),
        (["finetune", "stray"], "unknown argument stray"),
        (["profile", "--method"], "--method: expected one argument"),
    ],
)
def test_what_is_typed_wrong_is_told_with_the_closest(arguments: list[str], told: str, capsys) -> None:
    assert told in fails(arguments, capsys)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--model", "timm:mobilnetv2_100"], "did you mean timm:mobilenetv2_100"),
        (["--data", "no/such/folder"], "no folder 'no/such/folder'"),
        (["--data", "torchvision:CIFAR"], "torchvision:CIFAR10"),
        (["--epochs", "0"], "epochs: expected at least 1, got 0"),
        (["--lr", "nan"], "learning_rate: expected a positive number"),
        (["--device", "cuda:99"], "device 'cuda:99' cannot be used here"),
        (["--threads", "0"], "--threads: expected at least 1"),
        (["--workers", "-1"], "--workers: expected 0 or more"),
        (["--weights", "no.pt", *TINY], "no such file: no.pt"),
        (["--resume", "no.pt"], "--resume: no such file: no.pt"),
        (["--resume"], "--resume: no such file"),
        (["--limit-train", "0"], "at least one picture"),
    ],
)
def test_what_cannot_be_done_is_one_line(arguments: list[str], told: str, capsys, tmp_path: Path) -> None:
    assert told in fails(["finetune", *arguments, "--out", str(tmp_path / "out")], capsys)


def test_debug_shows_the_traceback() -> None:
    with pytest.raises(tinytl_kernels.errors.TinyTLError):
        cli.main(["finetune", "--data", "no/such/folder", "--debug"])


def test_defaults_are_the_demo() -> None:
    options = parse(["compare"])
    assert (options.model, options.data) == ("demo:efficientnet_lite0", "digits")
    assert options.methods == ["full", "norm+last", "last", "bias", "lite_residual", "lite_residual+bias"]
    assert parse(["compare", "--methods", "all"]).methods == options.methods
    assert parse(["finetune"]).method == "lite_residual+bias"


@pytest.mark.parametrize("name", ["finetune", "compare", "profile", "doctor"])
def test_help_explains_every_option(name: str, capsys) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main([name, "--help"])
    assert stopped.value.code == 0
    text = capsys.readouterr().out
    assert "--debug" in text
    assert "==SUPPRESS==" not in text


def test_doctor_prints_the_environment_report(capsys) -> None:
    assert cli.main(["doctor"]) == 0
    assert capsys.readouterr().out.strip() == tinytl_kernels.env_report()


def test_profile_prints_memory_and_time(capsys) -> None:
    arguments = ["--method", "bias", "--batch-size", "2", "--rounds", "1", "--device", "cpu", "--rows", "4"]
    assert cli.main(["profile", *TINY[:-1], *arguments]) == 0
    text = capsys.readouterr().out
    assert "saved for backward" in text
    assert re.search(r"^whole step +\d", text, re.MULTILINE)
    assert "converted for 'bias'" in text


def test_finetune_leaves_logs_checkpoints_and_an_adapter(tmp_path: Path, capsys) -> None:
    out = tmp_path / "out"
    assert cli.main(["finetune", *DIGITS, "--method", "bias", "--out", str(out)]) == 0
    printed = capsys.readouterr()
    assert "bias: test accuracy" in printed.out
    assert "epoch 2/2" in printed.err
    assert {path.name for path in out.iterdir()} == {"log.csv", "last.pt", "best.pt", "adapter.safetensors"}
    again = fails(["finetune", *DIGITS, "--method", "bias", "--out", str(out)], capsys)
    assert "holds a run: go on with --resume" in again
    for change, told in (
        (["--method", "last"], "its method is 'bias', this one's is 'last'"),
        (["--method", "bias", "--model", "timm:test_byobnet"], "its model is 'timm:test_efficientnet'"),
        (["--method", "bias", "--data", str(two_classes(tmp_path))], "its classes is 10, this one's is 2"),
    ):
        before = (out / "last.pt").read_bytes()
        assert told in fails(["finetune", *DIGITS, "--out", str(out), "--resume", *change], capsys)
        assert (out / "last.pt").read_bytes() == before


def two_classes(folder: Path) -> Path:
    from PIL import Image

    for name, level in (("dark", 20), ("light", 220)):
        (folder / "pictures" / name).mkdir(parents=True)
        for index in range(4):
            Image.new("RGB", (24, 24), (level, level, 10 * index)).save(folder / "pictures" / name / f"{index}.png")
    return folder / "pictures"


def test_a_corrupt_picture_is_one_line(tmp_path: Path, capsys) -> None:
    root = two_classes(tmp_path)
    (root / "dark" / "0.png").write_bytes(b"GIF89a but not really")
    (root / "dark" / "1.png").write_bytes(b"")
    line = fails(["finetune", *TINY, "--data", str(root), "--no-progress", "--out", str(tmp_path / "out")], capsys)
    assert str(root / "dark") in line


def test_compare_prints_the_table_and_draws(tmp_path: Path, capsys) -> None:
    out = tmp_path / "out"
    assert cli.main(["compare", *DIGITS, "--methods", "last,bias", "--epochs", "1", "--out", str(out)]) == 0
    text = capsys.readouterr().out
    assert re.search(r"^last +\d+\.\d\d%", text, re.MULTILINE)
    assert re.search(r"^bias +\d+\.\d\d%", text, re.MULTILINE)
    for name in ("accuracy.png", "memory.png", "results.json", "results.csv"):
        assert (out / name).stat().st_size > 0


def test_compare_refuses_several_processes(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "one process" in fails(["compare"], capsys)


def state(path: Path) -> dict[str, torch.Tensor]:
    return torch.load(path, weights_only=True)["model"]


def assert_same_weights(one: Path, other: Path) -> None:
    for name, value in state(one).items():
        assert torch.equal(value, state(other)[name]), name


def test_kill_9_leaves_a_checkpoint_that_resumes_to_the_same_bits(tmp_path: Path) -> None:
    arguments = ["finetune", *DIGITS, "--epochs", "4", "--no-progress", "--checkpoint-steps", "3", "--threads", "1"]
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    child = subprocess.Popen(command(*arguments, "--out", str(killed)), env=ENVIRONMENT, cwd=tmp_path)
    deadline = time.monotonic() + 60
    while not (killed / "last.pt").exists():
        assert child.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    child.send_signal(signal.SIGKILL)
    assert child.wait(timeout=10) == -signal.SIGKILL
    progress = torch.load(killed / "last.pt", weights_only=True)["progress"]
    assert progress["epoch"] < 4
    assert cli.main([*arguments, "--out", str(killed), "--resume"]) == 0
    assert cli.main([*arguments, "--out", str(whole)]) == 0
    assert_same_weights(killed / "last.pt", whole / "last.pt")
    assert_same_weights(killed / "best.pt", whole / "best.pt")
    without_times = [
        [line.rpartition(",")[0] for line in (folder / "log.csv").read_text().splitlines()]
        for folder in (killed, whole)
    ]
    assert without_times[0] == without_times[1]
    assert not list(killed.glob(".*"))


def test_a_full_disk_is_one_line_and_leaves_the_checkpoint(tmp_path: Path) -> None:
    """The limit on file size stands for the disk; it lets the logs through and stops the checkpoint half way."""
    out = tmp_path / "out"
    assert cli.main(["finetune", *DIGITS, "--epochs", "1", "--no-progress", "--out", str(out)]) == 0
    before = (out / "last.pt").read_bytes()
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))"
    arguments = ["finetune", *DIGITS, "--no-progress", "--overwrite", "--out", str(out)]
    done = subprocess.run(
        command(*arguments, prefix=limit), env=ENVIRONMENT, cwd=tmp_path, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 2
    assert re.fullmatch(
        r"tinytl: error: cannot write .*\.pt: the disk is full; the file from before is untouched\n", done.stderr
    )
    assert (out / "last.pt").read_bytes() == before


def test_sigterm_keeps_the_run_and_says_how_to_go_on(tmp_path: Path) -> None:
    arguments = command("finetune", *DIGITS, "--epochs", "500", "--no-progress", "--out", str(tmp_path / "out"))
    child = subprocess.Popen(arguments, env=ENVIRONMENT, cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not (tmp_path / "out" / "last.pt").exists():
        assert child.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    child.terminate()
    _, told = child.communicate(timeout=30)
    assert child.returncode == 128 + signal.SIGTERM
    assert re.fullmatch(
        r"tinytl: error: interrupted in epoch \d+; the run is kept in .*last\.pt; go on with --resume\n", told
    )
    assert torch.load(tmp_path / "out" / "last.pt", weights_only=True)["progress"]["steps"] > 0


def test_torchrun_trains_with_two_processes(tmp_path: Path) -> None:
    out = tmp_path / "out"
    arguments = ["finetune", *DIGITS, "--batch-size", "4", "--method", "bias", "--no-progress", "--out", str(out)]
    status, output, errors = torchrun("-m", "tinytl_kernels", *arguments)
    assert status == 0, errors
    assert output.count("bias: test accuracy") == 1  # the first process speaks for both
    saved = torch.load(out / "last.pt", weights_only=True)
    assert saved["identity"]["processes"] == 2
    assert saved["progress"]["steps"] == 2 * 6
    assert saved["progress"]["history"][-1]["images"] == 48
    assert np.isfinite(saved["progress"]["history"][-1]["train_loss"])
