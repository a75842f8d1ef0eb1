"""What the tests of the CPU backend's one-call chains share."""

from __future__ import annotations

import pytest
import torch

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


def image(*size: int, dtype=torch.float32) -> torch.Tensor:
    return torch.randn(*size).to(dtype).contiguous(memory_format=torch.channels_last)
