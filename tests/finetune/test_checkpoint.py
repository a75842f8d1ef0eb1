"""Checkpoints: whole or not at all, nothing unpickled, refused where they do not belong."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from tinytl_kernels.errors import TinyTLError
from tinytl_kernels.finetune import Process
from tinytl_kernels.finetune.checkpoint import (
    atomic_write,
    load_checkpoint,
    random_state,
    remove_leftovers,
    save_checkpoint,
    set_random_state,
)

IDENTITY = {"model": "timm:a", "method": "bias", "classes": 3}
PROCESS = Process(torch.device("cpu"))


def python(code: str, path: Path) -> subprocess.Popen:
    """Run ``code`` with ``path`` in ``sys.argv[1]``."""
    command = [sys.executable, "-c", textwrap.dedent(code), str(path)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_what_is_saved_comes_back(tmp_path: Path) -> None:
    path = tmp_path / "last.pt"
    save_checkpoint(path, {"identity": IDENTITY, "model": {"weight": torch.arange(3.0)}, "progress": {"epoch": 2}})
    state = load_checkpoint(path, IDENTITY)
    assert torch.equal(state["model"]["weight"], torch.arange(3.0))
    assert state["progress"] == {"epoch": 2}
    assert os.listdir(tmp_path) == ["last.pt"]


@pytest.mark.parametrize("key", ["model", "method", "classes"])
def test_a_checkpoint_of_another_run_is_refused(key: str, tmp_path: Path) -> None:
    path = tmp_path / "last.pt"
    save_checkpoint(path, {"identity": IDENTITY})
    with pytest.raises(TinyTLError, match=f"its {key} is") as caught:
        load_checkpoint(path, {**IDENTITY, key: "other"})
    assert repr(IDENTITY[key]) in str(caught.value)
    assert "'other'" in str(caught.value)


def test_a_checkpoint_that_knows_more_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "last.pt"
    save_checkpoint(path, {"identity": {**IDENTITY, "epochs": 5}})
    with pytest.raises(TinyTLError, match="its epochs is 5, this one's is None"):
        load_checkpoint(path, IDENTITY)


class Payload:
    """Unpickling this would write a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def test_a_checkpoint_with_code_is_refused_and_not_run(tmp_path: Path) -> None:
    path, proof = tmp_path / "last.pt", tmp_path / "proof"
    torch.save({"format": 1, "identity": IDENTITY, "model": Payload(proof)}, path)
    with pytest.raises(TinyTLError, match="cannot read"):
        load_checkpoint(path, IDENTITY)
    assert not proof.exists()


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (None, "no such file"),
        (b"", "cannot read"),
        (b"nothing of ours", "cannot read"),
        ({"model": {}}, "not written by tinytl"),
        ({"format": 99, "identity": IDENTITY}, "format 99"),
    ],
)
def test_a_file_that_is_no_checkpoint_is_one_line(content: object, told: str, tmp_path: Path) -> None:
    path = tmp_path / "last.pt"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        torch.save(content, path)
    with pytest.raises(TinyTLError, match=told) as caught:
        load_checkpoint(path, IDENTITY)
    assert "\n" not in str(caught.value)


def test_a_full_disk_leaves_the_old_checkpoint(tmp_path: Path) -> None:
    """A limit on the file's size stands for the disk: the write fails half way, as it would there."""
    path = tmp_path / "last.pt"
    save_checkpoint(path, {"identity": IDENTITY, "model": {"weight": torch.zeros(8)}})
    code = """
        import resource, sys, torch
        from tinytl_kernels.errors import TinyTLError
        from tinytl_kernels.finetune.checkpoint import save_checkpoint
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        try:
            save_checkpoint(sys.argv[1], {"identity": {}, "model": {"weight": torch.ones(1_000_000)}})
        except TinyTLError as error:
            print(error)
    """
    out, err = python(code, path).communicate(timeout=60)
    assert out.strip() == f"cannot write {path}: the disk is full; the file from before is untouched", err
    assert torch.equal(load_checkpoint(path, IDENTITY)["model"]["weight"], torch.zeros(8))
    assert os.listdir(tmp_path) == ["last.pt"]


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(TinyTLError, match=r"cannot write .*No such file") as caught:
        atomic_write(tmp_path / "nothing" / "last.pt", lambda file: file.write(b""))
    assert "untouched" not in str(caught.value)


def test_an_error_of_the_writer_is_not_disguised(tmp_path: Path) -> None:
    def fail(file: object) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        atomic_write(tmp_path / "x", fail)
    assert os.listdir(tmp_path) == []


def test_a_kill_while_writing_leaves_the_old_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "last.pt"
    code = """
        import sys, time
        from tinytl_kernels.finetune.checkpoint import atomic_write
        def write(file):
            file.write(b"new" * 10_000)
            file.flush()
            print("half", flush=True)
            time.sleep(60)
        atomic_write(sys.argv[1], write)
    """
    atomic_write(path, lambda file: file.write(b"old"))
    child = python(code, path)
    assert child.stdout.readline() == "half\n"
    child.send_signal(signal.SIGKILL)
    child.wait(timeout=10)
    child.stdout.close(), child.stderr.close()
    assert path.read_bytes() == b"old"
    assert len(os.listdir(tmp_path)) == 2
    remove_leftovers(tmp_path)
    assert os.listdir(tmp_path) == ["last.pt"]


def test_readers_see_old_or_new_and_nothing_between(tmp_path: Path) -> None:
    """A reader that opens the file again and again while it is replaced, in pieces, finds it whole each time."""
    path = tmp_path / "last.pt"
    atomic_write(path, lambda file: file.write(b"0" * 100_000))
    code = """
        import sys
        from tinytl_kernels.finetune.checkpoint import atomic_write
        print("ready", flush=True)
        for digit in b"123456789" * 10:
            atomic_write(sys.argv[1], lambda file: [file.write(bytes([digit]) * 1000) for _ in range(100)])
    """
    child = python(code, path)
    assert child.stdout.readline() == "ready\n"
    seen = set()
    deadline = time.monotonic() + 30
    while child.poll() is None and time.monotonic() < deadline:
        content = path.read_bytes()
        assert len(content) == 100_000
        assert len(set(content)) == 1
        seen.add(content[0])
    assert child.wait(timeout=10) == 0
    child.stdout.close(), child.stderr.close()
    assert len(seen) > 1


def test_every_generator_goes_on_where_it_was(tmp_path: Path) -> None:
    def draw() -> tuple:
        return (
            torch.rand(3).tolist(),
            np.random.rand(3).tolist(),
            np.random.randn(),
            random.random(),
            random.gauss(0, 1),
        )

    draw()
    path = tmp_path / "last.pt"
    save_checkpoint(path, {"identity": {}, "rng": random_state(PROCESS)})
    expected = draw()
    draw()
    set_random_state(load_checkpoint(path, {})["rng"], PROCESS)
    assert draw() == expected
