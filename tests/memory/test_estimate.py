"""The paper's formula, on networks computed by hand and on the paper's own."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from tests.memory.proxyless import METHODS, Proxyless
from tinytl_kernels.memory import estimate_memory
from tinytl_kernels.nn import FrozenConvBias, LiteResidual, LiteResidualBlock

# Table 2 of the paper to two decimals: bytes / 10^6 at batch 8, 224x224, 102 classes.
TABLE_2 = {
    "full": 390.84,
    "norm+last": 192.42,
    "last": 30.83,
    "bias": 31.69,
    "lite_residual": 37.08,
    "lite_residual+bias": 37.13,
}


@pytest.mark.parametrize("method", METHODS)
def test_table_2(method: str) -> None:
    with torch.device("meta"):  # shapes are all that matters
        estimate = estimate_memory(Proxyless().train_only(method), torch.zeros(8, 3, 224, 224))
    assert estimate.peak / 1e6 == pytest.approx(TABLE_2[method], abs=0.006)


@pytest.mark.parametrize(
    ("method", "batch", "size", "megabytes"),
    [
        ("lite_residual+bias", 8, 320, 64.7),
        ("lite_residual+bias", 1, 224, 13.9),
        ("lite_residual+bias", 1, 256, 15.0),
        ("bias", 1, 224, 8.5),
    ],
)
def test_other_sizes_and_batches(method: str, batch: int, size: int, megabytes: float) -> None:
    with torch.device("meta"):
        estimate = estimate_memory(Proxyless().train_only(method), torch.zeros(batch, 3, size, size))
    assert estimate.peak / 1e6 == pytest.approx(megabytes, abs=0.06)


def small_network() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=1, groups=8),
        nn.BatchNorm2d(8),
        nn.Sigmoid(),
        nn.AvgPool2d(4),
        nn.Flatten(),
        nn.Linear(8, 10),
    )


def test_every_row_of_the_formula_by_hand() -> None:
    model = small_network()
    model[2].weight.requires_grad_(False)
    estimate = estimate_memory(model, torch.zeros(2, 3, 4, 4))
    # Per image: 3*16 = 48 elements in, 8*16 = 128 after the first convolution; batch 2, 4 bytes.
    image, features = 2 * 4 * 48, 2 * 4 * 128
    assert [(row.name, row.kind, row.temporaries, row.saved) for row in estimate.by_layer] == [
        ("0", "conv", image + features, image),
        ("1", "activation", features, 2 * 128 // 8),
        ("2", "conv", features + features // 8, 0),  # frozen weight: keeps nothing; 8 groups
        ("3", "norm", features, features),
        ("4", "activation", features, features),
        ("7", "linear", 2 * 4 * (8 + 10), 2 * 4 * 8),
    ]
    assert estimate.trained == 4 * ((3 * 8 * 9 + 8) + 8 + (8 + 8) + (80 + 10))
    assert estimate.frozen == 1 * (8 * 9)
    # The worst moment is the last layer: everything before it is saved.
    assert estimate.activations == 2 * 4 * (8 + 10) + (image + 32 + features + features)
    assert estimate.peak == estimate.trained + estimate.frozen + estimate.activations


def test_activations_keep_nothing_when_only_the_last_layer_is_trained() -> None:
    model = small_network().requires_grad_(False)
    model[-1].requires_grad_(True)
    estimate = estimate_memory(model, torch.zeros(2, 3, 4, 4))
    assert {row.name: row.saved for row in estimate.by_layer if row.saved} == {"7": 2 * 4 * 8}


def test_activations_before_the_first_trained_parameter_count_as_in_the_authors_code() -> None:
    model = small_network().requires_grad_(False)
    model[3].bias.requires_grad_(True)
    estimate = estimate_memory(model, torch.zeros(2, 3, 4, 4))
    assert {row.name: row.saved for row in estimate.by_layer if row.saved} == {"1": 32, "4": 1024}


class Residual(nn.Module):
    def __init__(self, spelling: str) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1))
        self.spelling = spelling

    def forward(self, x: Tensor) -> Tensor:
        out = self.inner(x)
        if self.spelling == "in place":
            out += nn.Identity()(x)
            return out
        return {"operator": lambda: x + out, "function": lambda: torch.add(out, x), "none": lambda: out + 1}[
            self.spelling
        ]()


@pytest.mark.parametrize("spelling", ["operator", "function", "in place", "none"])
def test_identity_shortcut_is_held_while_its_block_runs(spelling: str) -> None:
    # The stage receives the same tensor as its first block: only the block holds it.
    model = nn.Sequential(nn.Sequential(Residual(spelling), nn.Conv2d(4, 4, 1)))
    estimate = estimate_memory(model, torch.zeros(2, 4, 3, 5))
    held = 0 if spelling == "none" else 2 * 4 * 4 * 15
    assert [row.shortcut for row in estimate.by_layer] == [held, held, 0]


def test_projected_shortcut_is_no_identity() -> None:
    class Projected(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.main, self.side = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.main(x) + self.side(x)

    estimate = estimate_memory(Projected(), torch.zeros(1, 4, 3, 3))
    assert [row.shortcut for row in estimate.by_layer] == [0, 0]


@pytest.mark.parametrize(
    ("function", "module"),
    [
        (functional.relu, nn.ReLU()),
        (torch.relu_, nn.ReLU()),
        (functional.relu6, nn.ReLU6()),
        (functional.leaky_relu, nn.LeakyReLU()),
        (functional.hardswish, nn.Hardswish()),
        (functional.silu, nn.SiLU()),
        (functional.gelu, nn.GELU()),
        (Tensor.sigmoid, nn.Sigmoid()),
    ],
)
def test_activation_called_as_a_function_counts_like_its_module(function, module: nn.Module) -> None:
    class Functional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 5, 3)

        def forward(self, x: Tensor) -> Tensor:
            return function(self.conv(x))

    x = torch.zeros(1, 3, 7, 9)
    ours = estimate_memory(Functional(), x).by_layer[1]
    stock = estimate_memory(nn.Sequential(nn.Conv2d(3, 5, 3), module), x).by_layer[1]
    assert (ours.kind, ours.temporaries, ours.saved) == (stock.kind, stock.temporaries, stock.saved)
    assert stock.saved in (5 * 5 * 7 * 4, -(-5 * 5 * 7 // 8))


@pytest.mark.parametrize("activation", ["relu", "relu6", "hardswish", None])
def test_frozen_conv_bias_counts_as_frozen_convolution_then_activation(activation: str | None) -> None:
    stock = {"relu": nn.ReLU(), "relu6": nn.ReLU6(), "hardswish": nn.Hardswish(), None: nn.Identity()}[activation]
    conv = nn.Conv2d(6, 10, 3, stride=2, padding=1, groups=2)
    conv.weight.requires_grad_(False)
    converted = nn.Sequential(FrozenConvBias(6, 10, 3, 2, 1, groups=2, activation=activation), nn.ReLU())
    x = torch.zeros(3, 6, 9, 7)
    ours, theirs = estimate_memory(converted, x), estimate_memory(nn.Sequential(conv, stock, nn.ReLU()), x)
    assert (ours.trained, ours.frozen, ours.activations, ours.saved) == (
        theirs.trained,
        theirs.frozen,
        theirs.activations,
        theirs.saved,
    )


def test_lite_residual_runs_after_the_main_branch() -> None:
    block = LiteResidualBlock(FrozenConvBias(16, 24, 3, padding=1, activation="relu6"), LiteResidual(16, 24))
    estimate = estimate_memory(block, torch.zeros(1, 16, 8, 8))
    full, pooled = 64, 16  # pixels
    assert [(row.name, row.temporaries, row.saved) for row in estimate.by_layer] == [
        ("main", 4 * full * (16 + 24), 0),
        ("main.activation", 4 * full * 24, full * 24 // 8),
        ("lite.conv1", 4 * pooled * 16 + 4 * pooled * 16 // 2, 4 * pooled * 16),
        ("lite.bn1", 4 * pooled * 16, 4 * pooled * 16),
        ("lite.act", 4 * pooled * 16, pooled * 16 // 8),
        ("lite.conv2", 4 * pooled * (16 + 24), 4 * pooled * 16),
        ("lite.final_bn", 4 * pooled * 24, 4 * pooled * 24),
    ]


def test_the_model_is_left_as_it_was() -> None:
    model = small_network()
    model[3].eval()
    modes = [module.training for module in model.modules()]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    estimate_memory(model, torch.randn(2, 3, 4, 4))
    assert modes == [module.training for module in model.modules()]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_wrappers_make_no_difference() -> None:
    model, x = small_network(), torch.zeros(2, 3, 4, 4)
    assert estimate_memory(torch.compile(model), x) == estimate_memory(model, x)


def test_tied_parameters_count_once() -> None:
    one = nn.Linear(6, 6)
    estimate = estimate_memory(nn.Sequential(one, one), torch.zeros(1, 6))
    assert estimate.parameters == 4 * 42


def test_input_without_a_tensor_is_refused() -> None:
    with pytest.raises(TypeError, match=r"example_input.*got tuple"):
        estimate_memory(small_network(), (8, 3, 224, 224))
