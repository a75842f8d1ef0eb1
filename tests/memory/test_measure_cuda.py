"""The CUDA path: its bookkeeping on a simulated allocator anywhere, and the real thing where there is a GPU."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tinytl_kernels.memory import measure_memory
from tinytl_kernels.memory.ledger import ModuleStack, StorageLedger
from tinytl_kernels.memory.measure import _Step
from tinytl_kernels.memory.snapshot import restored


def network() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1),
        nn.BatchNorm2d(16),
        nn.Sigmoid(),
        nn.Conv2d(16, 16, 3, padding=1),
        nn.Sigmoid(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(16, 5),
    )


class SimulatedAllocator:
    """torch.cuda's memory statistics, made from the storages that live on the CPU."""

    def __init__(self, ledger: StorageLedger) -> None:
        self.ledger, self.since = ledger, 0

    def memory_allocated(self, device: torch.device) -> int:
        return sum(change for _, change, _, _ in self.ledger.events)

    def reset_peak_memory_stats(self, device: torch.device) -> None:
        self.since = len(self.ledger.events)

    def max_memory_allocated(self, device: torch.device) -> int:
        total = sum(change for _, change, _, _ in self.ledger.events[: self.since])
        most = total
        for _, change, _, _ in self.ledger.events[self.since :]:
            total += change
            most = max(most, total)
        return most


def test_allocator_statistics_and_storages_tell_the_same(monkeypatch) -> None:
    model, x = network(), torch.randn(4, 3, 32, 32)
    target = torch.tensor([0, 1, 2, 3])
    by_storages = measure_memory(model, x, target)
    ledger = StorageLedger(ModuleStack(model), [])
    allocator = SimulatedAllocator(ledger)
    for name in ("memory_allocated", "reset_peak_memory_stats", "max_memory_allocated"):
        monkeypatch.setattr(torch.cuda, name, getattr(allocator, name))
    with restored(model, None), ledger:
        step = _Step(model, (x,), {}, target, torch.optim.Adam(model.parameters()))
        by_allocator = step.by_allocator(torch.device("cpu"))
    ledger.close()

    assert by_allocator.saved == by_storages.saved
    counters = 4 * len(list(model.parameters()))  # Adam's steps: the simulation does not see `torch.tensor`
    assert by_allocator.peak + counters == by_storages.peak
    assert by_allocator.peak_phase == by_storages.peak_phase
    assert by_allocator.by_layer == by_storages.by_layer
    assert by_allocator.at_peak["optimizer"] + counters == by_storages.at_peak["optimizer"] == by_storages.optimizer
    assert sum(by_allocator.at_peak.values()) == by_allocator.peak


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_agrees_with_cpu() -> None:
    model, x = network(), torch.randn(8, 3, 128, 128)
    cpu = measure_memory(model, x)
    values = [p.clone() for p in model.parameters()]
    model.cuda()
    cuda = measure_memory(model, x.cuda())
    assert cuda.source == "cuda allocator"
    assert cuda.saved == pytest.approx(cpu.saved, rel=0.02)
    assert (cuda.gradients, cuda.trained, cuda.optimizer) == (cpu.gradients, cpu.trained, cpu.optimizer)
    assert cuda.peak >= cuda.saved + cuda.at_peak["optimizer"]
    assert all(torch.equal(old, new.cpu()) for old, new in zip(values, model.parameters(), strict=True))
