"""Noting what autograd saves leaves its graph as mortal as it was."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from tinytl_kernels.memory import measure_memory
from tinytl_kernels.memory.ledger import ModuleStack
from tinytl_kernels.memory.saved import SavedTensors


@pytest.mark.parametrize("module", [nn.Sigmoid(), nn.Softmax(-1), nn.Tanh()], ids=str)
def test_a_node_that_keeps_its_output_dies_with_it(module: nn.Module) -> None:
    """A graph that is never walked backward: a node that held its own output would hold itself, for good."""
    saved = SavedTensors(ModuleStack(module))
    x = torch.randn(4, 8, requires_grad=True)
    with saved.attached():
        y = module(x)
    assert [size for size, _, _ in saved.by_storage().values()] == [y.nbytes]
    del y
    assert saved.by_storage() == {}


def test_gradients_are_the_same() -> None:
    x = torch.randn(4, 8, requires_grad=True)
    module = nn.Sequential(nn.Linear(8, 8), nn.Sigmoid(), nn.Softmax(-1))
    with SavedTensors(ModuleStack(module)).attached():
        noted = torch.autograd.grad(module(x).square().sum(), [x, *module.parameters()], create_graph=True)
    plain = torch.autograd.grad(module(x).square().sum(), [x, *module.parameters()], create_graph=True)
    for a, b in zip(noted, plain, strict=True):
        assert torch.equal(a, b)
    again = [torch.autograd.grad(grads[0].sum(), x)[0] for grads in (noted, plain)]
    assert torch.equal(*again)


class Gate(nn.Module):
    """Computes a gate that nobody uses."""

    def __init__(self, wasted: bool) -> None:
        super().__init__()
        self.linear, self.wasted = nn.Linear(64, 4), wasted

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x)
        if self.wasted:
            y.repeat(1, 100).sigmoid()
        return y


def test_a_branch_that_leads_nowhere_is_not_counted() -> None:
    x = torch.randn(16, 64)
    reports = [measure_memory(Gate(wasted), x) for wasted in (False, True)]
    assert reports[0].saved == reports[1].saved > 0
