"""A model, a data set and a recipe small enough to train in a blink."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from tinytl_kernels.finetune import Data, Recipe
from tinytl_kernels.finetune.sources import ArraySource


@pytest.fixture(autouse=True)
def always_one_thread(one_thread):
    """Small tensors; and one order of summation wherever a test asks for equal bits."""


def make_tiny(classes: int = 3, seed: int = 0) -> nn.Module:
    """A network with everything that carries state: batch statistics, dropout, frozen and trained parameters."""
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 16, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Dropout(0.3),
        nn.Linear(16, classes),
    )
    model[0].weight.requires_grad_(False)
    return model


def make_data(train: int = 22, test: int = 7, classes: int = 3) -> Data:
    """Grey squares whose brightness is their class, plus noise."""
    generator = np.random.default_rng(5)

    def part(count: int) -> ArraySource:
        labels = np.arange(count, dtype=np.int64) % classes
        noise = generator.integers(0, 40, size=(count, 12, 12))
        return ArraySource(
            [f"class {i}" for i in range(classes)], labels, (noise + labels[:, None, None] * 80).astype(np.uint8)
        )

    return Data("squares", [f"class {i}" for i in range(classes)], part(train), part(test))


RECIPE = Recipe(learning_rate=1e-2, epochs=3, batch_size=4, resolution=12, crop_scale=0.5)


def write_pictures(root: Path, layout: dict[str, int], size: tuple[int, int] = (20, 16)) -> Path:
    """Write ``layout[folder]`` pictures into ``root/folder``; each has a colour of its own."""
    from PIL import Image

    generator = np.random.default_rng(3)
    for folder, count in layout.items():
        (root / folder).mkdir(parents=True, exist_ok=True)
        for index in range(count):
            colour = generator.integers(0, 255, size=(1, 1, 3))
            pixels = np.broadcast_to(colour, (size[1], size[0], 3)).astype(np.uint8)
            Image.fromarray(pixels).save(root / folder / f"{index:02d}.png")
    return root


ROOT = Path(__file__).parents[2]
# One thread a process, and both the package and its tests importable from any folder.
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def torchrun(*arguments: str) -> tuple[int, str, str]:
    """Run ``torchrun`` with two processes on this machine; returns status, output and errors. Nothing outlives it."""
    child = subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *arguments],
        cwd=ROOT,
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        output, errors = child.communicate(timeout=120)
    finally:
        if child.poll() is None:
            os.killpg(child.pid, signal.SIGKILL)
    return child.returncode, output, errors


@pytest.fixture
def pictures(tmp_path: Path) -> Callable[..., Path]:
    """A function that writes an image folder below the test's own folder."""
    return lambda layout, **more: write_pictures(tmp_path / "pictures", layout, **more)
