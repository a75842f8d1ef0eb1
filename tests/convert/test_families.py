"""torchvision's and timm's families convert as they are: same outputs, same gradients, in float64 to rounding."""

from __future__ import annotations

import copy
import re

import pytest
import torch

from tests.checks import saved_bytes
from tests.convert.models import zoo_model
from tinytl_kernels.convert import conversion_report, convert
from tinytl_kernels.nn import FrozenConvBias, FrozenInvertedResidual, LiteResidualBlock

LEAN = [
    "torchvision:mobilenet_v2",
    "torchvision:mnasnet0_5",
    "torchvision:resnet18",
    "torchvision:regnet_x_400mf",
    "torchvision:shufflenet_v2_x0_5",
    "timm:mobilenetv2_050",
    "timm:efficientnet_lite0",
    "timm:tf_efficientnet_lite0",
    "timm:fbnetc_100",
    "timm:resnet18",
    "timm:regnetx_002",
]
PARTLY_LEAN = [
    "torchvision:mobilenet_v3_small",
    "torchvision:efficientnet_b0",
    "timm:mobilenetv3_small_050",
    "timm:mnasnet_small",  # squeeze-and-excite
]
# How many of each family's blocks get a branch: all, except a first one that starts with its depthwise convolution.
BRANCHES = {
    "torchvision:mobilenet_v2": 16,
    "torchvision:mnasnet0_5": 16,
    "torchvision:resnet18": 8,
    "torchvision:regnet_x_400mf": 22,
    "torchvision:shufflenet_v2_x0_5": 15,
    "torchvision:mobilenet_v3_small": 10,
    "torchvision:efficientnet_b0": 15,
    "timm:mobilenetv2_050": 16,
    "timm:efficientnet_lite0": 15,
    "timm:tf_efficientnet_lite0": 15,
    "timm:fbnetc_100": 21,
    "timm:resnet18": 8,
    "timm:regnetx_002": 13,
    "timm:mobilenetv3_small_050": 10,
    "timm:mnasnet_small": 14,
}


def folded_pairs(report) -> list[tuple[str, str]]:
    """(convolution, BatchNorm folded into it), by name."""
    found = ((note.path, re.search(r"(\S+) folded", note.text)) for note in report.done)
    return [(path, match[1]) for path, match in found if match]


def frozen_twin(model: torch.nn.Module, stock: torch.nn.Module, path: str) -> torch.nn.Module:
    """What became of the stock model's convolution at ``path``: a layer, or a part of a block that is one operator."""
    module, rest = model, path.split(".")
    while rest:
        if isinstance(module, LiteResidualBlock):
            module = module.main
        if isinstance(module, FrozenInvertedResidual):
            block = stock.get_submodule(".".join(path.split(".")[: -len(rest)]))
            convs = [m for m in block.modules() if isinstance(m, torch.nn.Conv2d)]
            parts = [m for m in module.modules() if type(m) is FrozenConvBias]
            return parts[convs.index(stock.get_submodule(path))]
        module = module._modules[rest.pop(0)]
    return module


def close(name: str, ours: torch.Tensor, stock: torch.Tensor) -> None:
    # float64 through some 150 layers: sqrt(150) eps is 3e-15; two wrong roundings of a weight would show at 1e-8.
    error = ((ours - stock).abs().max() / stock.abs().max().clamp_min(1e-30)).item()
    assert error < 1e-9, f"{name}: relative difference {error:.1e}"


class ExactHardsigmoid(torch.nn.Module):
    """PyTorch 2.13's own float64 backward multiplies by a float32 1/6: 3e-8 off."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.relu6(x + 3) / 6


def with_exact_hardsigmoid(model: torch.nn.Module) -> None:
    for module in list(model.modules()):
        for name, child in module.named_children():
            if type(child) is torch.nn.Hardsigmoid:
                setattr(module, name, ExactHardsigmoid())


@pytest.mark.parametrize("name", LEAN + PARTLY_LEAN)
def test_outputs_and_gradients_are_the_stock_models(name: str) -> None:
    stock = zoo_model(name).double()
    # Odd and unequal sides: TensorFlow's SAME padding differs between them.
    x = torch.randn(2, 3, 65, 62, dtype=torch.float64)
    model = convert(stock, "lite_residual+bias", example_input=x)
    report = conversion_report(model)
    assert report.deviation < 1e-12
    with_exact_hardsigmoid(stock)
    assert len(report.branches) == BRANCHES[name]
    ours_x, stock_x = x.clone().requires_grad_(), x.clone().requires_grad_()
    ours, theirs = model(ours_x), stock(stock_x)
    close("output", ours, theirs)
    grad = torch.randn_like(theirs)
    ours.backward(grad)
    theirs.backward(grad)
    close("input gradient", ours_x.grad, stock_x.grad)
    pairs = folded_pairs(report)
    assert len(pairs) >= 17
    for conv, norm in pairs:
        bias = frozen_twin(model, stock, conv).bias
        close(f"bias gradient of {conv}", bias.grad, stock.get_submodule(norm).bias.grad)


@pytest.mark.parametrize("name", LEAN)
def test_nothing_is_left_to_complain_about(name: str) -> None:
    model = convert(zoo_model(name), "bias", example_input=torch.randn(1, 3, 64, 64))
    report = conversion_report(model)
    assert report.kept == []
    assert report.warnings == []
    convs = [m for m in model.modules() if isinstance(m, torch.nn.Conv2d)]
    assert convs
    assert all(type(m) is FrozenConvBias for m in convs)


@pytest.mark.parametrize("name", PARTLY_LEAN)
def test_squeeze_and_excite_is_named_in_the_report(name: str) -> None:
    x = torch.randn(1, 3, 64, 64)
    text = str(conversion_report(convert(zoo_model(name), "bias", example_input=x, recompute=False)))
    assert "squeeze-and-excite" in text
    assert "smooth" in text


@pytest.mark.parametrize("name", ["torchvision:mobilenet_v2", "timm:tf_efficientnet_lite0"])
def test_bias_keeps_one_bit_an_activation_and_the_heads_input(name: str) -> None:
    stock = zoo_model(name)
    x = torch.randn(2, 3, 64, 64)
    bits: list[int] = []

    def count(module, args, output):
        n, c, h, w = output.shape
        bits.append(n * h * w * ((c + 7) // 8))

    counted = copy.deepcopy(stock)
    for module in counted.modules():
        if isinstance(module, torch.nn.ReLU6):
            module.register_forward_hook(count)
    with torch.no_grad():
        counted(x)
    model = convert(stock, "bias", example_input=x)
    saved = saved_bytes(lambda: model(x), [*model.parameters(), *model.buffers()])
    assert saved == sum(bits) + 2 * 1280 * 4
    assert saved * 60 < saved_bytes(lambda: stock(x), [*stock.parameters(), *stock.buffers()])


def test_float32_bias_gradients_are_as_exact_as_stock_pytorchs() -> None:
    stock = zoo_model("torchvision:mobilenet_v2")
    for module in list(stock.modules()):
        for name, child in module.named_children():
            if isinstance(child, torch.nn.ReLU6):
                # At a kink one rounding flips a bit, and a thousandfold error is a matter of luck, ours or stock's.
                setattr(module, name, torch.nn.SiLU())
    exact = copy.deepcopy(stock).double()
    x = torch.randn(4, 3, 64, 64, dtype=torch.float64)
    model = convert(stock, "bias", example_input=x.float())
    grad = torch.randn(4, 10, dtype=torch.float64)
    for net, dtype in ((exact, torch.float64), (stock, torch.float32), (model, torch.float32)):
        net(x.to(dtype)).backward(grad.to(dtype))
    ours, theirs = [], []
    for conv, norm in folded_pairs(conversion_report(model)):
        reference = exact.get_submodule(norm).bias.grad
        ours.append((frozen_twin(model, stock, conv).bias.grad - reference).norm() / reference.norm())
        theirs.append((stock.get_submodule(norm).bias.grad - reference).norm() / reference.norm())
    worst, allowed = max(ours), 2 * max(theirs) + 4 * torch.finfo(torch.float32).eps
    assert worst <= allowed, f"worst layer {worst:.1e}, stock PyTorch's {max(theirs):.1e}"


def test_names_classes_and_methods_stay() -> None:
    x = torch.randn(1, 3, 64, 64)
    stock = zoo_model("timm:mobilenetv3_small_050")
    model = convert(stock, "lite_residual+bias", example_input=x)
    assert type(model) is type(stock)
    torch.testing.assert_close(model.forward_features(x), stock.forward_features(x), rtol=1e-4, atol=1e-4)
    # A block with squeeze-and-excite stays itself inside, and its attributes stay in reach.
    assert isinstance(model.blocks[2][0], LiteResidualBlock)
    assert isinstance(model.blocks[2][0].main, type(stock.blocks[2][0]))
    assert model.blocks[2][0].conv_dw is model.blocks[2][0].main.conv_dw


def test_plain_inverted_residuals_become_one_operator() -> None:
    model = convert(zoo_model("torchvision:mobilenet_v2"), "lite_residual", example_input=torch.randn(1, 3, 64, 64))
    blocks = [m for m in model.modules() if isinstance(m, FrozenInvertedResidual)]
    assert len(blocks) == 17
    assert [block.residual for block in blocks[:4]] == [False, False, True, False]


def test_dynamic_padding_follows_every_size() -> None:
    stock = zoo_model("timm:tf_efficientnet_lite0").double()
    model = convert(stock, "bias", example_input=torch.randn(1, 3, 64, 64, dtype=torch.float64))
    for height, width in ((33, 64), (50, 47)):
        x = torch.randn(1, 3, height, width, dtype=torch.float64)
        close(f"output at {height} x {width}", model(x), stock(x))
