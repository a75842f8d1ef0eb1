"""What the tests of the CPU backend's one-call chains share."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch

from tests.checks import saved_tensors
from tinytl_kernels.backends import backend_module

CPU = backend_module("cpu")


def counted(name: str, monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """For every time that the chain ``name`` is asked for from now on: whether it took its arguments."""
    calls: list[bool] = []
    fused = CPU.FUSED[name]

    def counting(*args):
        output = fused(*args)
        calls.append(output is not None)
        return output

    monkeypatch.setitem(CPU.FUSED, name, counting)
    return calls


def kept(function: Callable[[], object]) -> tuple[list[tuple], int]:
    """Shape and dtype of every tensor that autograd keeps while ``function()`` runs, but for the bytes of masks: those
    are added up, because a chain holds the masks of several blocks in one tensor."""
    saved = [entry for entry in saved_tensors(function) if 0 not in entry[0]]
    masks = [shape for shape, dtype in saved if dtype is torch.uint8]
    return [entry for entry in saved if entry[1] is not torch.uint8], sum(map(math.prod, masks))


def image(*size: int, dtype=torch.float32) -> torch.Tensor:
    return torch.randn(*size).to(dtype).contiguous(memory_format=torch.channels_last)
