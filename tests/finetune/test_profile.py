"""Time by layer adds up, and the stock model trains what the method trains."""

from __future__ import annotations

import itertools
import time

import pytest
import torch
from torch import nn

from tinytl_kernels.finetune import Recipe, profile
from tinytl_kernels.finetune.profile import timing_by_layer, train_as_stock
from tinytl_kernels.models import import_timm

from .conftest import make_tiny


def trained(model: nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


@pytest.mark.parametrize(
    ("method", "expected", "norm_trains"),
    [
        ("full", {"0.weight", "0.bias", "1.weight", "1.bias", "3.weight", "3.bias", "8.weight", "8.bias"}, True),
        ("norm+last", {"1.weight", "1.bias", "8.weight", "8.bias"}, True),
        ("last", {"8.weight", "8.bias"}, False),
        ("bias", {"0.bias", "1.bias", "3.bias", "8.weight", "8.bias"}, False),
        ("lite_residual", {"8.weight", "8.bias"}, False),
        ("lite_residual+bias", {"0.bias", "1.bias", "3.bias", "8.weight", "8.bias"}, False),
    ],
)
def test_stock_trains_what_the_method_trains(method: str, expected: set[str], norm_trains: bool) -> None:
    model = make_tiny()
    train_as_stock(model, method)
    assert trained(model) == expected
    assert model[1].training is norm_trains
    assert model[7].training  # dropout


def test_every_tick_of_the_clock_belongs_to_the_layer_that_ran() -> None:
    """A clock that counts its calls: each layer takes one tick forward; in backward the ticks follow each other."""
    ticks = itertools.count()
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU(inplace=True), nn.Sequential(nn.Linear(2, 2), nn.Identity()))
    with timing_by_layer(model, lambda: float(next(ticks))) as times:
        model(torch.ones(1, 2)).sum().backward()
    assert set(times) == {"0", "1", "2.0", "2.1"}  # "2" is what its layers are
    assert {layer.forward for layer in times.values()} == {1.0}
    assert times["2.0"].backward == times["0"].backward == 1.0
    assert times["1"].backward == times["2.1"].backward == 0.0  # they pass the tensor on: nothing to mark
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_a_norm_with_its_activation_is_one_layer() -> None:
    norm_act = import_timm().layers.BatchNormAct2d
    model = nn.Sequential(nn.Conv2d(3, 4, 1), norm_act(4))
    with timing_by_layer(model, time.perf_counter) as times:
        model(torch.ones(2, 3, 4, 4)).sum().backward()
    assert set(times) == {"0", "1"}
    assert times["1"].backward > 0


def test_a_profile_shows_both_sides() -> None:
    recipe = Recipe(batch_size=2, resolution=32)
    pair = profile("timm:test_efficientnet", "bias", recipe, torch.device("cpu"), pretrained=False, rounds=1)
    stock, ours = pair.stock, pair.ours
    assert ours.memory.saved < stock.memory.saved / 2  # its SiLU keeps a value an element
    assert stock.step_ms > 0
    assert sum(layer.forward + layer.backward for layer in stock.times.values()) > 0
    assert {name for name, layer in stock.times.items() if layer.backward} >= {
        "bn1",
        "blocks.0.0.conv",
        "classifier",
    }
    text = str(pair)
    assert "timm:test_efficientnet, bias, batch 2, 32x32, float32" in text
    assert "whole step" in text
    rows = pair.table(rows=None).splitlines()
    assert any(row.startswith("conv_stem ") for row in rows)
    assert len(pair.table(rows=3).splitlines()) == 2 + 3 + 2
