"""The stem and the first block, a quarter of the batch at a time: where that is lean, and nowhere else."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tests.checks import assert_as_exact_as_torch
from tinytl_kernels.models.slices import run_in_slices
from tinytl_kernels.nn import FrozenConvBias, recompute


def layers(*more: nn.Module) -> list[nn.Module]:
    stem = FrozenConvBias(3, 8, 3, stride=2, padding=1, activation="relu6")
    return [stem, nn.Sequential(FrozenConvBias(8, 8, 3, padding=1, groups=8), *more)]


def sizes_seen(modules: list[nn.Module], batch: int) -> list[int]:
    seen: list[int] = []
    handle = modules[0].register_forward_hook(lambda module, args, output: seen.append(args[0].size(0)))
    run_in_slices(modules, torch.randn(batch, 3, 9, 8))
    handle.remove()
    return seen


@pytest.mark.parametrize(("batch", "parts"), [(8, [2, 2, 2, 2]), (6, [2, 2, 2]), (2, [1, 1]), (1, [1]), (0, [0])])
def test_a_batch_goes_in_at_most_four_parts(batch: int, parts: list[int]) -> None:
    assert sizes_seen(layers(), batch) == parts


def test_output_and_gradients_are_those_of_the_whole_batch() -> None:
    modules, x = layers(), torch.randn(6, 3, 9, 8)
    biases = [module.bias for module in (modules[0], modules[1][0])]
    whole = nn.Sequential(*modules)
    exact = [g.double() for g in torch.autograd.grad(whole(x).square().sum(), biases)]
    output = run_in_slices(modules, x)
    assert torch.equal(output, whole(x))
    for ours, stock in zip(torch.autograd.grad(output.square().sum(), biases), exact, strict=True):
        assert_as_exact_as_torch("bias gradient", ours, stock.float(), stock)


def test_statistics_of_a_batch_are_of_the_whole_batch() -> None:
    modules = layers(nn.BatchNorm2d(8))
    assert sizes_seen(modules, 8) == [8]
    modules[1].eval()
    assert sizes_seen(modules, 8) == [2, 2, 2, 2]


def test_recomputed_modules_see_to_it_themselves() -> None:
    """In slices put together again they would not recognise what comes straight from each other."""
    modules = layers()
    recompute(modules[1])
    assert sizes_seen(modules, 8) == [8]


def test_a_stock_network_runs_whole() -> None:
    assert sizes_seen([nn.Conv2d(3, 8, 3), nn.ReLU()], 8) == [8]
