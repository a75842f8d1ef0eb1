"""A stock model that has lite residuals already: kept, trained or made lean, never doubled."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import tinytl_kernels as tk
from tests.checks import saved_bytes
from tinytl_kernels.models import NetworkConfig, build, stage, with_lite_residuals
from tinytl_kernels.nn import FrozenConvBias, LiteResidualBlock

X = (2, 3, 32, 32)


@pytest.fixture(autouse=True)
def reference_backend():
    with tk.use_backend("reference"):
        yield


def network(norm: str = "bn") -> nn.Module:
    blocks = stage(16, 1, (3,), (1,)) + stage(24, 2, (5, 3), (3, 3))
    model = build(with_lite_residuals(NetworkConfig("small", blocks, norm=norm, num_classes=5))).double().eval()
    for module in model.modules():
        if isinstance(module, (nn.BatchNorm2d, nn.GroupNorm)):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.2)
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_(std=0.2)
                module.running_var.uniform_(0.5, 1.5)
    return model


def branches(model: nn.Module) -> list[LiteResidualBlock]:
    return [module for module in model.modules() if isinstance(module, LiteResidualBlock)]


@pytest.mark.parametrize("norm", ["bn", "gn"])
@pytest.mark.parametrize("method", tk.METHODS)
def test_outputs_and_gradients_are_the_stock_models(norm: str, method: str) -> None:
    stock, x = network(norm), torch.randn(X, dtype=torch.float64)
    lean = tk.convert(stock, method, example_input=x)
    assert len(branches(lean)) == 2
    given = [x.clone().requires_grad_() for _ in range(2)]
    outputs = [model(one) for model, one in zip((stock, lean), given, strict=True)]
    torch.testing.assert_close(outputs[1], outputs[0], rtol=1e-9, atol=1e-9)
    for output in outputs:
        output.square().sum().backward()
    torch.testing.assert_close(given[1].grad, given[0].grad, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("method", "trained"),
    [
        ("last", set()),
        ("norm+last", {"bn1.weight", "bn1.bias", "final_bn.weight", "final_bn.bias"}),
        ("bias", {"bn1.bias", "final_bn.bias"}),
        ("lite_residual+bias", {"conv1.weight", "bn1.weight", "bn1.bias", "conv2.weight", "final_bn.weight"}),
        (
            "lite_residual",
            {"conv1.weight", "bn1.weight", "bn1.bias", "conv2.weight", "final_bn.weight", "final_bn.bias"},
        ),
    ],
)
def test_what_of_a_branch_is_trained(method: str, trained: set[str]) -> None:
    model = tk.convert(network("gn"), method, example_input=torch.randn(X, dtype=torch.float64))
    for block in branches(model):
        assert {name for name, p in block.lite.named_parameters() if p.requires_grad} == trained


def test_a_frozen_branch_with_batch_norm_keeps_bits() -> None:
    x = torch.randn(X, dtype=torch.float64)
    lean = tk.convert(network(), "bias", example_input=x)
    lite = branches(lean)[0].lite
    assert isinstance(lite.conv1, FrozenConvBias)
    assert lite.conv1.activation == "relu"
    given = torch.randn(2, 16, 16, 16, dtype=torch.float64, requires_grad=True)
    kept = saved_bytes(lambda: lite(given), [given, *lite.parameters()])
    assert kept == 2 * 4 * 4 * 16 // 8  # one bit an element of its only activation


def test_blocks_are_fused_inside_and_the_stock_model_is_untouched() -> None:
    stock = network()
    before = copy.deepcopy(stock)
    lean = tk.convert(stock, "lite_residual+bias", example_input=torch.randn(X, dtype=torch.float64))
    assert all(isinstance(block.main, tk.FrozenInvertedResidual) for block in branches(lean))
    assert repr(stock) == repr(before)
    for (name, value), other in zip(stock.state_dict().items(), before.state_dict().values(), strict=True):
        assert torch.equal(value, other), name


def test_a_refused_conversion_in_place_puts_everything_back() -> None:
    model = network()
    model.classifier = nn.Identity()
    before = repr(model)
    with pytest.raises(ValueError, match="no classifier"):
        tk.convert(model, "bias", num_classes=3, example_input=torch.randn(X, dtype=torch.float64), inplace=True)
    assert repr(model) == before


def test_the_report_names_the_stock_models_modules() -> None:
    stock = network()
    report = tk.conversion_report(tk.convert(stock, "bias", example_input=torch.randn(X, dtype=torch.float64)))
    assert [note.path for note in report.branches] == ["blocks.1", "blocks.2"]
    assert "frozen" in report.branches[0].text
    names = {name for name, _ in stock.named_modules()}
    assert {note.path for note in report.done} <= names


def test_places_cannot_be_named_where_branches_are() -> None:
    with pytest.raises(ValueError, match="lite residuals of its own"):
        tk.convert(network(), "lite_residual", blocks=["blocks.0"])


def test_a_single_block_is_no_network() -> None:
    with pytest.raises(ValueError, match="single LiteResidualBlock"):
        tk.convert(branches(network())[0], "bias")
