"""``python -m benchmarks.nsight`` without a GPU: what it runs, and what would wrap it."""

from __future__ import annotations

import pytest
import torch

from benchmarks import nsight
from benchmarks.gpu.operators import OPERATORS

SMALL = ["--device", "cpu", "--backend", "reference", "--rounds", "1"]


@pytest.mark.parametrize("operator", OPERATORS)
def test_every_operator_runs_at_a_chosen_size(operator, capsys):
    assert nsight.main([operator, "1x16x6x5", *SMALL]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith(f"{operator} 1x16x6x5 bfloat16, 1 rounds; at least has to move: forward ")


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_one_direction_alone(direction, capsys):
    assert nsight.main(["depthwise", "1x16x6x5", *SMALL, "--direction", direction, "--dtype", "float32"]) == 0
    line = capsys.readouterr().out
    assert ("backward" in line, "forward" in line) == (direction == "backward", direction == "forward")


def test_without_a_gpu_it_says_so(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert nsight.main(["depthwise"]) == nsight.NO_GPU
    assert "no GPU" in capsys.readouterr().out


@pytest.mark.parametrize("flag", ["--commands", "--profile"])
def test_the_commands_are_shown_and_without_a_gpu_not_run(flag, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(nsight.subprocess, "run", lambda *args, **kwargs: pytest.fail("ran"))
    assert nsight.main(["depthwise", "8x32x14x14", "--direction", "backward", flag]) == 0
    ncu, nsys = capsys.readouterr().out.splitlines()
    assert ncu.startswith("ncu --profile-from-start off ")
    assert nsys.startswith("nsys profile --capture-range cudaProfilerApi ")
    for line in (ncu, nsys):
        assert line.endswith(" python3 -m benchmarks.nsight depthwise 8x32x14x14 --direction backward")


def test_with_a_gpu_the_tools_that_are_here_are_run(capsys, monkeypatch):
    ran = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(nsight.shutil, "which", lambda tool: "/usr/bin/ncu" if tool == "ncu" else None)

    def run(command, check):
        ran.append(command)
        return nsight.subprocess.CompletedProcess(command, 7)

    monkeypatch.setattr(nsight.subprocess, "run", run)
    assert nsight.main(["depthwise", "--profile"]) == 7
    (command,) = ran
    assert command[0] == "ncu"
    assert nsight.sys.executable in command
    assert "nsys is not on the PATH" in capsys.readouterr().out


@pytest.mark.parametrize("size", ["8x32x14", "8x32x14xx", "0x32x14x14", "a"])
def test_a_size_that_is_none_is_told(size, capsys):
    with pytest.raises(SystemExit):
        nsight.main(["depthwise", size])
    assert size in capsys.readouterr().err


def test_each_operator_launches_kernels_inside_a_range_of_its_name(monkeypatch):
    pytest.importorskip("triton")
    from tinytl_kernels.backends.triton import launch

    ranges = []

    class OnGPU:
        """A tensor that says it is on a GPU."""

        device = torch.device("cuda", 0)

    def depthwise(tensor):
        return list(ranges)

    class Range:
        def __init__(self, name):
            self.name = name

        def __enter__(self):
            ranges.append(self.name)

        def __exit__(self, *error):
            ranges.pop()

    monkeypatch.setattr(torch.cuda.nvtx, "mark", lambda name: None)
    monkeypatch.setattr(torch.cuda.nvtx, "range", Range)
    monkeypatch.setattr(torch.cuda, "device", lambda device: Range("device"))
    launch._has_ranges.cache_clear()
    try:
        assert launch.on_device(depthwise)(OnGPU()) == ["device", "tinytl::depthwise"]
        monkeypatch.setattr(torch.cuda.nvtx, "mark", unavailable)
        launch._has_ranges.cache_clear()
        assert launch.on_device(depthwise)(OnGPU()) == ["device"]
    finally:
        launch._has_ranges.cache_clear()


def unavailable(name: str) -> None:
    raise RuntimeError("NVTX functions not installed. Are you sure you have a CUDA build?")
