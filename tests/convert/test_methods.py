"""What each of the six methods trains, folds and refuses."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from tests.convert.models import Residual, SmallNet, conv_norm, with_statistics
from tinytl_kernels import nn as tnn
from tinytl_kernels.convert import METHODS, conversion_report, convert
from tinytl_kernels.nn import FrozenConvBias, LiteResidualBlock

X = torch.zeros(1, 3, 32, 32)
BIASES = {"stem.0.bias", *(f"blocks.{i}.{conv}.bias" for i in (0, 1) for conv in ("conv1", "conv2"))}
HEAD = {"fc.weight", "fc.bias"}
NORMS = {
    f"{norm}.{p}"
    for norm in ("stem.1", "blocks.0.bn1", "blocks.0.bn2", "blocks.1.bn1", "blocks.1.bn2")
    for p in ("weight", "bias")
}


def net() -> SmallNet:
    return with_statistics(SmallNet())


def in_blocks(names: set[str]) -> set[str]:
    """The names once blocks are inside LiteResidualBlocks."""
    return {name.replace("blocks.0.", "blocks.0.main.").replace("blocks.1.", "blocks.1.main.") for name in names}


def branch_parameters(*, final_bias: bool) -> set[str]:
    own = {"conv1.weight", "bn1.weight", "bn1.bias", "conv2.weight", "final_bn.weight"}
    own |= {"final_bn.bias"} if final_bias else set()
    return {f"blocks.{i}.lite.{name}" for i in (0, 1) for name in own}


EXPECTED = {
    "full": {name for name, _ in SmallNet().named_parameters()},
    "norm+last": NORMS | HEAD,
    "last": HEAD,
    "bias": BIASES | HEAD,
    "lite_residual": branch_parameters(final_bias=True) | HEAD,
    "lite_residual+bias": in_blocks(BIASES) | branch_parameters(final_bias=False) | HEAD,
}


@pytest.mark.parametrize("method", METHODS)
def test_exactly_the_methods_parameters_are_trained(method: str) -> None:
    model = convert(net(), method, example_input=X)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == EXPECTED[method]
    report = conversion_report(model)
    assert set(report.trained) == trained
    assert report.trained_elements == sum(p.numel() for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("method", METHODS)
def test_a_step_moves_what_is_trained_and_nothing_else(method: str) -> None:
    model = convert(net(), method, num_classes=4, example_input=X).train()
    with torch.no_grad():  # zero-initialised branches give their inner layers no gradient at first
        for module in model.modules():
            if isinstance(module, LiteResidualBlock):
                module.lite.final_bn.weight.fill_(0.5)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model(torch.randn(4, 3, 32, 32)).square().sum().backward()
    optimizer.step()
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == set(conversion_report(model).trained)


@pytest.mark.parametrize("method", ["last", "bias", "lite_residual", "lite_residual+bias"])
def test_folded_statistics_stay_frozen_in_training(method: str) -> None:
    model = convert(net(), method, example_input=X).train()
    assert not [name for name, m in model.named_modules() if isinstance(m, nn.BatchNorm2d) and ".lite." not in name]
    assert any("folded" in note.text for note in conversion_report(model).done)


@pytest.mark.parametrize("method", ["full", "norm+last"])
def test_norms_stay_live(method: str) -> None:
    model = convert(net(), method, example_input=X).train()
    stock = copy.deepcopy(model.stem[1].running_mean)
    model(torch.randn(4, 3, 32, 32))
    assert not torch.equal(model.stem[1].running_mean, stock)


def test_full_leaves_every_module_stock() -> None:
    stock = net()
    model = convert(stock, "full", num_classes=4, example_input=X)
    assert [type(m) for m in model.modules()] == [type(m) for m in stock.modules()]
    assert "stock" in str(conversion_report(model))


def test_norm_last_swaps_convolutions_without_folding() -> None:
    stock = net().eval()
    model = convert(stock, "norm+last", example_input=X)
    assert type(model.stem[0]) is FrozenConvBias
    assert torch.equal(model.stem[0].weight, stock.stem[0].weight)
    assert type(model.stem[1]) is nn.BatchNorm2d


@pytest.mark.parametrize("method", METHODS)
def test_outputs_in_evaluation_stay(method: str) -> None:
    stock = net().double().eval()
    x = torch.randn(2, 3, 33, 30, dtype=torch.float64)
    torch.testing.assert_close(convert(stock, method, example_input=x)(x), stock(x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("method", METHODS)
def test_a_new_head_is_fresh_trained_and_of_the_asked_size(method: str) -> None:
    model = convert(net(), method, num_classes=7, example_input=X)
    assert model(torch.randn(2, 3, 32, 32)).shape == (2, 7)
    assert model.num_classes == 7
    assert type(model.fc) is nn.Linear
    assert model.fc.weight.requires_grad
    assert model.fc.bias.requires_grad


def test_squeezenets_head_is_its_last_convolution() -> None:
    classifier = nn.Sequential(nn.Dropout(0.5), nn.Conv2d(8, 10, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    model = convert(nn.Sequential(conv_norm(3, 8, nn.ReLU()), classifier), "bias", num_classes=3, example_input=X)
    assert conversion_report(model).head == "1.1"
    assert type(model[1][1]) is nn.Conv2d
    assert model[1][1].weight.requires_grad
    assert model(X).shape == (1, 3)


def test_the_last_linear_in_execution_is_the_head_not_the_last_registered() -> None:
    class Backwards(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head, self.neck = nn.Linear(6, 5), nn.Linear(3, 6)

        def forward(self, x):
            return self.head(self.neck(x.mean((2, 3))))

    assert conversion_report(convert(Backwards(), "bias", example_input=X)).head == "head"


def test_the_original_is_untouched_unless_asked() -> None:
    stock = net()
    before = copy.deepcopy(stock.state_dict())
    assert convert(stock, example_input=X) is not stock
    assert stock.state_dict().keys() == before.keys()
    assert all(torch.equal(a, b) for a, b in zip(stock.state_dict().values(), before.values(), strict=True))
    assert all(p.requires_grad for p in stock.parameters())
    assert convert(stock, "bias", example_input=X, inplace=True) is stock
    assert type(stock.stem[0]) is FrozenConvBias


@pytest.mark.parametrize("training", [True, False])
def test_mode_dtype_and_random_state_stay(training: bool) -> None:
    stock = net().train(training).to(torch.bfloat16)
    stock.stem.eval()
    state = torch.get_rng_state()
    model = convert(stock, "bias", example_input=X.to(torch.bfloat16))
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training == training
    assert not model.stem.training
    assert model.blocks[0].conv1.training == training
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert model.stem[0].weight.is_contiguous(memory_format=torch.channels_last)


def test_untouched_statistics_are_warned_about_and_real_ones_are_not() -> None:
    fresh = conversion_report(convert(SmallNet(), "bias", example_input=X))
    assert any("num_batches_tracked=0" in text for text in fresh.warnings)
    assert not conversion_report(convert(net(), "bias", example_input=X)).warnings
    # Weights converted from TensorFlow come without a count, and are no reason to warn.
    counted = net()
    for module in counted.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.num_batches_tracked.zero_()
    assert not conversion_report(convert(counted, "bias", example_input=X)).warnings


def test_a_model_that_cannot_run_on_the_example_still_converts_for_bias_and_says_so() -> None:
    fixed = nn.Sequential(conv_norm(3, 4, nn.ReLU()), nn.Flatten(), nn.Linear(4 * 8 * 8, 5))
    model = convert(fixed, "bias", example_input=X)
    assert type(model[0][0]) is FrozenConvBias
    assert model(torch.zeros(1, 3, 8, 8)).shape == (1, 5)
    assert any("could not be run" in text for text in conversion_report(model).warnings)
    with pytest.raises(ValueError, match=r"example_input: method 'lite_residual' needs to run"):
        convert(fixed, "lite_residual", example_input=X)


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        (
            {"method": "lite_residual+biases"},
            ValueError,
            r"method: expected one of 'full'.*Did you mean 'lite_residual\+bias'",
        ),
        ({"method": "???"}, ValueError, r"method: expected one of 'full', 'norm\+last', 'last', 'bias'.*got '\?\?\?'"),
        ({"num_classes": 0}, ValueError, r"num_classes: expected None or a positive int, got 0"),
        ({"num_classes": True}, ValueError, r"num_classes: expected None or a positive int, got True"),
        ({"lite_resolution": "full"}, ValueError, r"lite_resolution: expected one of 'real', 'paper', got 'full'"),
        ({"blocks": ["blocks.2"]}, ValueError, r"no module 'blocks.2'; close to it: 'blocks.[01]'"),
        ({"blocks": "blocks.0"}, ValueError, r"blocks: expected a list of module names, got 'blocks.0'"),
        ({"blocks": ["fc"]}, ValueError, r"map one \(N, C, H, W\) tensor to one, but 'fc'"),
        ({"blocks": ["blocks", "blocks.0"]}, ValueError, r"blocks: 'blocks.0' lies inside another named block"),
        ({"blocks": ["blocks.0"], "method": "bias"}, ValueError, r"blocks: expected None with method 'bias'"),
    ],
)
def test_bad_arguments_are_named_and_change_nothing(arguments: dict, error: type, text: str) -> None:
    stock = net()
    kinds = [type(m) for m in stock.modules()]
    with pytest.raises(error, match=text):
        convert(stock, **{"example_input": X, "inplace": True, **arguments})
    assert [type(m) for m in stock.modules()] == kinds
    assert all(p.requires_grad for p in stock.parameters())


def test_bad_models_are_refused() -> None:
    with pytest.raises(TypeError, match=r"model: expected a torch.nn.Module, got str"):
        convert("mobilenet_v2")
    with pytest.raises(ValueError, match=r"converted already"):
        convert(convert(net(), "bias", example_input=X), "last")
    with pytest.raises(ValueError, match=r"a single Conv2d; for one convolution use FrozenConvBias.from_conv"):
        convert(nn.Conv2d(3, 8, 3), "bias")
    with pytest.raises(ValueError, match=r"inside OptimizedModule; convert, then wrap"):
        convert(torch.compile(net()), "bias")
    with pytest.raises(ValueError, match=r"holds no data yet"):
        convert(nn.Sequential(nn.LazyConv2d(8, 3), nn.ReLU()), "bias")
    with pytest.raises(ValueError, match=r"no classifier"):
        convert(nn.Sequential(conv_norm(3, 8, nn.ReLU())), "bias", num_classes=3, example_input=X)
    with pytest.raises(ValueError, match=r"not converted"):
        conversion_report(net())


def test_group_norm_backbones_get_group_norm_branches() -> None:
    stock = SmallNet()
    for block in stock.blocks:
        block.bn1, block.bn2 = nn.GroupNorm(1, 8), nn.GroupNorm(1, 8)
    stock.stem[1] = nn.GroupNorm(1, 8)
    model = convert(stock, "lite_residual+bias", example_input=X)
    assert type(model.blocks[0].lite.final_bn) is nn.GroupNorm
    assert type(model.stem[1]) is tnn.GroupNorm
    assert "keeps its input" in next(n.text for n in conversion_report(model).done if n.path == "stem.1")


def test_default_example_takes_the_models_channels() -> None:
    gray = nn.Sequential(conv_norm(1, 4, nn.ReLU(), stride=4), Residual(4), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    assert conversion_report(convert(gray, "lite_residual+bias")).branches[0].text.startswith("4 -> 4, stride 1")
