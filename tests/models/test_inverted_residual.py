"""The builder: its networks are the published ones, and ``convert`` understands them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

import tinytl_kernels as tk
from tinytl_kernels.models import (
    ARCHITECTURES,
    BlockConfig,
    NetworkConfig,
    StandardizedConv2d,
    build,
    efficientnet_lite0,
    import_timm,
    import_torchvision,
    mcunet_320kb,
    mobilenet_v2,
    proxylessnas_mobile,
    stage,
    with_lite_residuals,
)
from tinytl_kernels.models.architectures import PROXYLESSNAS_MOBILE

pytestmark = pytest.mark.usefixtures("reference_backend")


def peer(name: str) -> tuple[nn.Module, nn.Module]:
    """A network of ours and the library's own."""
    if name == "mobilenet_v2":
        return mobilenet_v2(), import_torchvision().models.mobilenet_v2()
    return efficientnet_lite0(), import_timm().create_model("efficientnet_lite0")


def shaken(model: nn.Module) -> nn.Module:
    """Norms with numbers of their own, so that a norm in the wrong place shows."""
    for module in model.modules():
        if isinstance(module, (nn.BatchNorm2d, nn.GroupNorm)):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.2)
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_(std=0.2)
                module.running_var.uniform_(0.5, 1.5)
    return model.eval()


@pytest.mark.parametrize("name", ["mobilenet_v2", "efficientnet_lite0"])
def test_it_computes_what_the_librarys_own_network_computes(name: str) -> None:
    ours, theirs = peer(name)
    state = shaken(theirs).state_dict()
    # Both list their layers in the order in which they run.
    assert [v.shape for v in ours.state_dict().values()] == [v.shape for v in state.values()]
    ours.load_state_dict(dict(zip(ours.state_dict(), state.values(), strict=True)))
    x = torch.randn(1, 3, 40, 33, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(ours.double().eval()(x), theirs.double()(x), rtol=1e-9, atol=1e-9)


def test_parameters_of_the_published_networks() -> None:
    with torch.device("meta"):
        sizes = {name: sum(p.numel() for p in make().parameters()) for name, make in ARCHITECTURES.items()}
    assert sizes["proxylessnas_mobile"] == 4_080_512
    assert round(sizes["mcunet_320kb"] / 1e6, 2) == 0.74  # the authors' table


def test_group_norm_takes_eight_channels_a_group_or_the_largest_divisor_below() -> None:
    blocks = stage(12, 1, (3,), (1,)) + stage(20, 2, (3,), (7,))
    model = build(NetworkConfig("odd", blocks, stem_channels=16, norm="gn"))
    norms = [module for module in model.modules() if isinstance(module, nn.GroupNorm)]
    per_group = {module.num_channels: module.num_channels // module.num_groups for module in norms}
    assert per_group == {16: 8, 12: 6, 84: 7, 20: 5, 1280: 8}
    assert {module.eps for module in norms} == {1e-3}


@pytest.mark.parametrize(("options", "kind"), [({}, "gn"), ({"norm": "bn"}, "bn")])
def test_weights_are_standardised_beside_group_norm_unless_said(options: dict, kind: str) -> None:
    def kinds(**more) -> set[bool]:
        model = proxylessnas_mobile(lite_residual=True, **options, **more)
        return {isinstance(m, StandardizedConv2d) for m in model.modules() if isinstance(m, nn.Conv2d)}

    with torch.device("meta"):
        assert kinds() == {kind == "gn"}  # the branches' convolutions too
        assert kinds(weight_standardization=True) == {True}
        assert kinds(weight_standardization=False) == {False}


def test_standardised_weight_by_hand() -> None:
    conv = StandardizedConv2d(2, 1, (1, 2), bias=False, eps=0.5)
    conv.weight.data = torch.tensor([[[[1.0, 2.0]], [[3.0, 6.0]]]])
    # mean 3, sum of squares 4 + 1 + 0 + 9, three degrees of freedom
    expected = torch.tensor([-2.0, -1.0, 0.0, 3.0]) / ((14 / 3) ** 0.5 + 0.5)
    torch.testing.assert_close(conv.standardized_weight().flatten(), expected)
    torch.testing.assert_close(conv(torch.ones(1, 2, 1, 2)), expected.sum().view(1, 1, 1, 1))
    with pytest.raises(ValueError, match="at least two numbers a filter"):
        StandardizedConv2d(8, 8, 1, groups=8)


def test_lite_residuals_have_the_authors_kernels() -> None:
    lites = [block.lite for block in with_lite_residuals(PROXYLESSNAS_MOBILE).blocks]
    assert lites[0] is None
    # Half of 128, 64, 32, 16, 16, 8, 8: from the second block of the last stride-2 stage on, 5x5 is too large.
    assert [lite.kernel_size for lite in lites[1:]] == [5] * 15 + [3] * 4
    deep = NetworkConfig("deep", stage(16, 1, (3,), (1,)) + stage(16, 2, (3,) * 1, (3,)) * 8)
    assert [block.lite.downsample for block in with_lite_residuals(deep).blocks[1:]] == [2] * 6 + [None] * 2


def test_a_new_lite_residual_changes_nothing() -> None:
    blocks = stage(16, 1, (3,), (1,)) + stage(24, 2, (5, 3), (3, 3))
    config = NetworkConfig("small", blocks, norm="gn", weight_standardization=1e-5, num_classes=5)
    model = build(with_lite_residuals(config)).eval()
    bare = build(config).eval()
    bare.load_state_dict({n.replace(".main.", "."): v for n, v in model.state_dict().items() if ".lite." not in n})
    x = torch.randn(1, 3, 32, 32)
    torch.testing.assert_close(model(x), bare(x), rtol=0, atol=0)


def test_converted_with_batch_norm_every_block_is_one_operator() -> None:
    model = shaken(proxylessnas_mobile(5, norm="bn")).double()
    x = torch.randn(1, 3, 40, 33, dtype=torch.float64)
    lean = tk.convert(model, "bias", example_input=x)
    assert all(isinstance(block, tk.FrozenInvertedResidual) for block in lean.blocks)
    assert not tk.conversion_report(lean).kept
    assert tk.conversion_report(lean).model == "proxylessnas_mobile"
    torch.testing.assert_close(lean(x), model(x), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(tk.to_torch(lean)(x), model(x), rtol=1e-9, atol=1e-9)


def test_converted_with_group_norm_standardisation_is_applied_once() -> None:
    model = shaken(mcunet_320kb(5, norm="gn")).double()
    x = torch.randn(1, 3, 40, 33, dtype=torch.float64)
    lean = tk.convert(model, "lite_residual+bias", example_input=x, lite_resolution="paper")
    kinds = {type(m) for m in lean.modules() if isinstance(m, nn.Conv2d)}
    assert StandardizedConv2d not in kinds
    torch.testing.assert_close(lean.stem.conv.weight.data, model.stem.conv.standardized_weight().data)
    torch.testing.assert_close(lean(x), model(x), rtol=1e-9, atol=1e-9)


def test_blocks_with_squeeze_excite_and_fused_blocks_convert() -> None:
    blocks = (
        BlockConfig(16, expand_ratio=1, se_ratio=0.25, activation="hardswish"),
        BlockConfig(24, kernel_size=5, stride=2, fused=True, expand_ratio=4, activation="silu"),
        BlockConfig(24, se_ratio=0.5, activation="relu", shortcut=False),
    )
    model = shaken(build(NetworkConfig("mixed", blocks, head_channels=None, num_classes=3))).double()
    assert [block.shortcut for block in model.blocks] == [False, False, False]
    x = torch.randn(1, 3, 24, 17, dtype=torch.float64)
    lean = tk.convert(model, "bias", example_input=x)
    torch.testing.assert_close(lean(x), model(x), rtol=1e-9, atol=1e-9)


def test_reset_classifier_keeps_device_dtype_and_mode() -> None:
    model = mcunet_320kb(5).bfloat16().eval()
    model.reset_classifier(7)
    assert (model.classifier.weight.dtype, model.classifier.training) == (torch.bfloat16, False)
    assert (model.num_classes, model.classifier.out_features) == (7, 7)


SMALL = NetworkConfig("small", stage(16, 1, (3,), (1,)))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: BlockConfig(16, kernel_size=4), "kernel_size: expected an odd number, got 4"),
        (lambda: BlockConfig(0), "out_channels: expected a positive number, got 0"),
        (lambda: BlockConfig(16, activation="swiglu"), "activation: expected one of 'relu'"),
        (lambda: proxylessnas_mobile(norm="ln"), "norm: expected one of 'bn', 'gn', got 'ln'"),
        (lambda: proxylessnas_mobile(0), "num_classes: expected a positive number, got 0"),
        (lambda: replace(SMALL, blocks=()), "blocks: expected at least one"),
        (
            lambda: build(replace(SMALL, blocks=(BlockConfig(8, shortcut=True),))),
            r"blocks\[0\]: shortcut: expected False",
        ),
        (lambda: build(replace(SMALL, blocks=(BlockConfig(8, groups=7),))), r"blocks\[0\]: groups: expected a divisor"),
        (
            lambda: build(replace(SMALL, blocks=(BlockConfig(8, expand_ratio=1, mid_channels=40),))),
            r"blocks\[0\]: mid_channels: expected 32",
        ),
    ],
)
def test_numbers_that_do_not_fit_are_refused(make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
