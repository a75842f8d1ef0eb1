"""``net.config`` files: what they describe is built, and what cannot be is told by name."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from torch import nn

from tests.models.official import block_table, official_state
from tests.models.test_official import assert_computes, write
from tinytl_kernels.errors import TinyTLError
from tinytl_kernels.models import StandardizedConv2d, from_config, load_official_checkpoint, proxylessnas_mobile
from tinytl_kernels.nn import LiteResidualBlock

pytestmark = pytest.mark.usefixtures("reference_backend")

IDENTITY = {
    "name": "IdentityLayer",
    "in_channels": [16],
    "out_channels": [16],
    "use_bn": False,
    "act_func": None,
    "dropout_rate": 0,
    "ops_order": "weight_bn_act",
}
ZERO = {
    "name": "MobileInvertedResidualBlock",
    "mobile_inverted_conv": {"name": "ZeroLayer", "stride": 1},
    "shortcut": IDENTITY,
}


def conv(cin: int, cout: int, kernel: int, stride: int) -> dict:
    return {
        "name": "ConvLayer",
        "kernel_size": kernel,
        "stride": stride,
        "dilation": 1,
        "groups": 1,
        "bias": False,
        "has_shuffle": False,
        "in_channels": cin,
        "out_channels": cout,
        "use_bn": True,
        "act_func": "relu6",
        "dropout_rate": 0,
        "ops_order": "weight_bn_act",
    }


def mobile(cin: int, cout: int, kernel: int = 3, expand: int = 6, stride: int = 1, **more) -> dict:
    return {
        "name": "MBInvertedConvLayer",
        "in_channels": cin,
        "out_channels": cout,
        "kernel_size": kernel,
        "stride": stride,
        "expand_ratio": expand,
        **more,
    }


def block(main: dict | None, *, key: str = "mobile_inverted_conv", shortcut: dict | None = None) -> dict:
    return {"name": "MobileInvertedResidualBlock", key: main, "shortcut": shortcut}


def network(blocks: list[dict], first: int, last: int, **more) -> dict:
    return {
        "name": "ProxylessNASNets",
        "bn": {"momentum": 0.1, "eps": 0.001},
        "first_conv": conv(3, first, 3, 2),
        "blocks": blocks,
        "feature_mix_layer": None,
        "classifier": {
            "name": "LinearLayer",
            "in_features": last,
            "out_features": 10,
            "bias": True,
            "use_bn": False,
            "act_func": None,
            "dropout_rate": 0.2,
            "ops_order": "weight_bn_act",
        },
        **more,
    }


def small() -> dict:
    return copy.deepcopy(network([block(mobile(16, 24, 5, 4, 2)), block(mobile(24, 24), shortcut=IDENTITY)], 16, 24))


def proxyless_config(*, lite: bool) -> dict:
    blocks, resolution = [], 128
    for index, (cin, cout, kernel, expand, stride) in enumerate(block_table()):
        main = mobile(cin, cout, kernel, expand, stride)
        if lite and index:
            residual = {
                "in_channels": cin,
                "out_channels": cout,
                "expand": 1,
                "kernel_size": 5 if resolution // 2 >= 5 else 3,
                "act_func": "relu",
                "n_groups": 2,
                "downsample_ratio": 2,
                "upsample_type": "bilinear",
                "stride": stride,
            }
            main = {"name": "LiteResidualModule", "main": main, "lite_residual": residual}
            resolution //= stride
        blocks.append(block(main, shortcut=IDENTITY if stride == 1 and cin == cout else None))
    blocks[3:3] = [ZERO, ZERO]
    config = network(blocks, 32, 1280, feature_mix_layer=conv(320, 1280, 1, 1), resolution=224)
    config["bn"] = {"momentum": None, "eps": 0.001, "gn_channel_per_group": 8, "ws_eps": 1e-5}
    return copy.deepcopy(config)


def shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in model.state_dict().items()}


def test_the_published_backbone_is_ours() -> None:
    model = from_config(proxyless_config(lite=False))
    assert shapes(model) == shapes(proxylessnas_mobile(10))
    assert model.dropout.p == 0.2
    assert [type(a) for a in model.modules()] == [type(b) for b in proxylessnas_mobile(10).modules()]


def test_a_specialised_network_and_its_weights_from_files(tmp_path) -> None:
    path = tmp_path / "net.config"
    path.write_text(json.dumps(proxyless_config(lite=True)))
    state = official_state(num_classes=102)  # the file's classes, not the configuration's
    model = load_official_checkpoint(write(tmp_path, state, "init"), config=path)
    assert sum(isinstance(module, LiteResidualBlock) for module in model.modules()) == 19
    assert_computes(model, state)


def test_one_configuration_is_read_twice_alike() -> None:
    config = small()
    before = copy.deepcopy(config)
    assert shapes(from_config(config)) == shapes(from_config(config))
    assert config == before


def test_squeeze_excite_groups_reduced_blocks_and_activations() -> None:
    blocks = [
        block(mobile(16, 24, 5, 4, 2, use_se=True, act_func="h_swish", mid_channels=None), key="conv"),
        block(mobile(24, 24, 3, 2, 1, groups=5), shortcut=IDENTITY),
        block({**mobile(24, 32, 3, 3, 2, groups=8), "name": "ReducedMBConvLayer"}),
    ]
    model = from_config(network(blocks, 16, 32), num_classes=4)
    first, second, third = model.blocks
    assert isinstance(first.expand.act, nn.Hardswish)
    assert (first.se.reduce.in_channels, first.se.reduce.out_channels) == (64, 16)
    assert second.depthwise.conv.groups == 4  # 5 does not divide 48
    assert second.shortcut
    assert third.depthwise is None
    assert (third.expand.conv.kernel_size, third.expand.conv.stride, third.expand.conv.groups) == ((3, 3), (2, 2), 8)
    assert model(torch.zeros(2, 3, 32, 32)).shape == (2, 4)


def test_the_authors_names_of_squeeze_excite_and_reduced_blocks(tmp_path) -> None:
    blocks = [
        block(mobile(16, 24, 5, 4, 2, use_se=True), key="conv"),
        block({**mobile(24, 32, 3, 3, 2, groups=8), "name": "ReducedMBConvLayer"}),
    ]
    config = network(blocks, 16, 32)
    sizes = {
        "blocks.0.conv.inverted_bottleneck.conv.weight": (64, 16, 1, 1),
        "blocks.0.conv.depth_conv.conv.weight": (64, 1, 5, 5),
        "blocks.0.conv.depth_conv.se.fc.reduce.weight": (16, 64, 1, 1),
        "blocks.0.conv.depth_conv.se.fc.reduce.bias": (16,),
        "blocks.0.conv.depth_conv.se.fc.expand.weight": (64, 16, 1, 1),
        "blocks.0.conv.depth_conv.se.fc.expand.bias": (64,),
        "blocks.0.conv.point_linear.conv.weight": (24, 64, 1, 1),
        "blocks.1.conv.expand_conv.conv.weight": (72, 3, 3, 3),
        "blocks.1.conv.reduce_conv.conv.weight": (32, 72, 1, 1),
        "first_conv.conv.weight": (16, 3, 3, 3),
        "classifier.linear.weight": (10, 32),
        "classifier.linear.bias": (10,),
    }
    state = {name: torch.randn(size) for name, size in sizes.items()}
    for name in [name for name in sizes if name.endswith("conv.weight")]:
        for tensor in ("weight", "bias", "running_mean", "running_var"):
            state[name.replace("conv.weight", f"bn.{tensor}")] = torch.rand(sizes[name][0])
    model = load_official_checkpoint(write(tmp_path, state), config=config)
    for ours, theirs in {
        "blocks.0.se.reduce.bias": "blocks.0.conv.depth_conv.se.fc.reduce.bias",
        "blocks.1.expand.conv.weight": "blocks.1.conv.expand_conv.conv.weight",
        "blocks.1.project.norm.running_var": "blocks.1.conv.reduce_conv.bn.running_var",
    }.items():
        assert torch.equal(model.state_dict()[ours], state[theirs])


@pytest.mark.parametrize(
    ("bn", "norm", "standardized"),
    [
        ({"momentum": 0.2, "eps": 1e-5, "ws_eps": None}, nn.BatchNorm2d, False),
        ({"momentum": None, "eps": 1e-3, "gn_channel_per_group": 8, "ws_eps": 1e-4}, nn.GroupNorm, True),
        (None, nn.BatchNorm2d, False),
    ],
)
def test_the_norm_is_the_files(bn: dict | None, norm: type, standardized: bool) -> None:
    config = small()
    config.pop("bn") if bn is None else config.update(bn=bn)
    model = from_config(config)
    assert type(model.stem.norm) is norm
    assert model.stem.norm.eps == (1e-3 if bn is None else bn["eps"])
    assert isinstance(model.stem.conv, StandardizedConv2d) == standardized
    if standardized:
        assert model.stem.conv.eps == 1e-4
    if bn and bn["momentum"]:
        assert model.stem.norm.momentum == 0.2


def changed(path: str, value: object) -> dict:
    """``small()`` with the entry at ``path`` set, or taken away for ``...``."""
    config = small()
    *way, last = path.split("/")
    here = config
    for step in way:
        here = here[int(step)] if isinstance(here, list) else here[step]
    if value is ...:
        del here[last]
    else:
        here[last] = value
    return config


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("name", "MobileNetV3", "name: expected 'ProxylessNASNets', got 'MobileNetV3'"),
        ("blocks", ..., "blocks: missing"),
        ("blocks", [ZERO], "blocks: expected at least one with a convolution, got '1 without'"),
        ("blocks", {}, "blocks: expected a list"),
        ("final_expand_layer", {}, "final_expand_layer: unknown entry"),
        ("bn/eps", ..., "bn.eps: missing"),
        ("bn/eps", "small", "bn.eps: expected a number, got 'small'"),
        ("first_conv/dilation", 2, "first_conv.dilation: expected 1, got '2'"),
        ("first_conv/act_func", "mish", "first_conv.act_func: expected 'relu' or 'relu6'"),
        ("first_conv/ops_order", "bn_act_weight", "first_conv.ops_order: expected 'weight_bn_act'"),
        ("first_conv/kernel_size", True, "first_conv.kernel_size: expected a whole number"),
        ("blocks/0/name", "ResNetBottleneckBlock", r"blocks\[0\].name: expected 'MobileInvertedResidualBlock'"),
        ("blocks/0/mobile_inverted_conv", 3, r"blocks\[0\].mobile_inverted_conv: expected an object or null"),
        (
            "blocks/0/mobile_inverted_conv/name",
            "Swin",
            r"blocks\[0\].mobile_inverted_conv.name: expected 'MB",
        ),
        ("blocks/0/mobile_inverted_conv/in_channels", 8, r"blocks\[0\].mobile_inverted_conv.in_channels: expected 16"),
        ("blocks/0/mobile_inverted_conv/kernel_size", 4, "kernel_size: expected an odd number, got 4"),
        ("blocks/0/mobile_inverted_conv/stochastic", 1, r"mobile_inverted_conv.stochastic: unknown entry"),
        ("blocks/0/mobile_inverted_conv/groups", 0, "groups: expected at least 1"),
        ("blocks/0/shortcut", IDENTITY, r"blocks\[0\]: shortcut: expected False with stride 2"),
        ("blocks/1/shortcut/name", "Pool", r"blocks\[1\].shortcut.name: expected 'IdentityLayer' or 'ZeroLayer'"),
        ("classifier/in_features", 1280, "classifier.in_features: expected 24, got '1280'"),
        ("classifier/out_features", 0, "num_classes: expected a positive number, got 0"),
    ],
)
def test_what_cannot_be_built_is_told_by_name(path: str, value: object, message: str) -> None:
    with pytest.raises(TinyTLError, match=message) as caught:
        from_config(changed(path, value))
    assert str(caught.value).startswith("net.config: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("entry", "value", "message"),
    [
        ("upsample_type", "nearest", "lite_residual.upsample_type: expected 'bilinear', got 'nearest'"),
        ("stride", 1, "lite_residual.stride: expected 2"),
        ("act_func", "h_swish", "lite_residual.act_func: expected 'relu' or 'relu6'"),
        ("kernel_size", 4, r"blocks\[1\]: kernel_size: expected an odd number"),
        ("n_groups", 5, r"blocks\[1\]: groups: expected a divisor"),
        ("gate", True, "lite_residual.gate: unknown entry"),
    ],
)
def test_a_lite_residual_that_cannot_be_built_is_told_by_name(entry: str, value: object, message: str) -> None:
    config = proxyless_config(lite=True)
    config["blocks"][1]["mobile_inverted_conv"]["lite_residual"][entry] = value
    with pytest.raises(TinyTLError, match=message):
        from_config(config)


def test_a_file_that_is_no_json_is_one_line(tmp_path) -> None:
    path = tmp_path / "net.config"
    for content in (b'{"name": "Proxy', b"\xff\xfe\x00", b"[1, 2]"):
        path.write_bytes(content)
        with pytest.raises(TinyTLError, match=r"net\.config: ") as caught:
            from_config(path)
        assert "\n" not in str(caught.value)
    with pytest.raises(TinyTLError, match="no such file"):
        from_config(tmp_path / "nothing")
