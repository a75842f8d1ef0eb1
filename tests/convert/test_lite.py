"""Where lite residuals go, and with which geometry: tinytl.md's rules on small networks and on known ones."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from tests.convert.models import Residual, SmallNet, conv_norm, with_statistics, zoo_model
from tinytl_kernels.convert import conversion_report, convert
from tinytl_kernels.nn import FrozenConvBias, LiteResidualBlock


def branches(model: nn.Module) -> dict[str, tuple[int, int | None, int]]:
    """(kernel, downsample, stride) of every branch, by the block's name."""
    return {
        name: (m.lite.conv1.kernel_size[0], m.lite.downsample, m.lite.conv1.stride[0])
        for name, m in model.named_modules()
        if isinstance(m, LiteResidualBlock)
    }


def mobilenet(size: int, rule: str) -> list[tuple[int, int | None, int]]:
    model = zoo_model("torchvision:mobilenet_v2")
    converted = convert(model, "lite_residual", example_input=torch.randn(1, 3, size, size), lite_resolution=rule)
    return list(branches(converted).values())


def test_real_resolutions_size_the_kernels() -> None:
    # 64 px: the first block with a branch sees 32 px, the later stages 16, 8, 4, 4 and 2.
    assert mobilenet(64, "real") == [
        *[(5, 2, 2), (5, 2, 1)],  # 32 px: 16 inside
        *[(5, 2, 2), (3, 2, 1), (3, 2, 1)],  # 16: 8 inside, then 8: 4 inside
        *[(3, 2, 2), (1, 2, 1), (1, 2, 1), (1, 2, 1)],  # 4: 2 inside
        *[(1, 2, 1), (1, 2, 1), (1, 2, 1)],
        *[(1, 2, 2), (1, None, 1), (1, None, 1)],  # 2: 1 inside: global pooling
        (1, None, 1),
    ]


def test_the_papers_rule_does_not_see_the_image() -> None:
    # 128 at the first block, strides 2, 2, 2, 1, 2, 1: 128, 64, 32, 16, 16, 8, 8 inside a half each.
    expected = [
        *[(5, 2, 2), (5, 2, 1)],
        *[(5, 2, 2), (5, 2, 1), (5, 2, 1)],
        *[(5, 2, 2), (5, 2, 1), (5, 2, 1), (5, 2, 1)],
        *[(5, 2, 1), (5, 2, 1), (5, 2, 1)],
        *[(5, 2, 2), (3, 2, 1), (3, 2, 1)],
        (3, 2, 1),
    ]
    assert mobilenet(64, "paper") == expected
    assert mobilenet(96, "paper") == expected


@pytest.mark.parametrize("library", ["torchvision:mobilenet_v2", "timm:mobilenetv2_050"])
def test_the_first_block_has_none_and_all_others_have(library: str) -> None:
    names = list(branches(convert(zoo_model(library), example_input=torch.randn(1, 3, 64, 64))))
    if library.startswith("timm"):
        counts = {1: 2, 2: 3, 3: 4, 4: 3, 5: 3, 6: 1}
        assert names == [f"blocks.{stage}.{i}" for stage, n in counts.items() for i in range(n)]
    else:
        assert names == [f"features.{i}" for i in range(2, 18)]


def test_a_new_branch_changes_nothing_and_a_trained_one_does() -> None:
    stock = with_statistics(SmallNet()).eval()
    x = torch.randn(2, 3, 32, 32)
    model = convert(stock, "lite_residual", example_input=x)
    torch.testing.assert_close(model(x), stock(x))
    with torch.no_grad():
        model.blocks[1].lite.final_bn.weight.fill_(1.0)
    assert (model(x) - stock(x)).abs().max() > 1e-3


class Block(nn.Module):
    """Stride 2, odd channels, no shortcut: depthwise makes it a block."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Sequential(
            conv_norm(5, 10, nn.ReLU6(), kernel_size=1, padding=0),
            conv_norm(10, 10, nn.ReLU6(), stride=2, groups=10),
            conv_norm(10, 7, kernel_size=1, padding=0),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


def test_odd_channels_and_strides() -> None:
    stock = with_statistics(nn.Sequential(conv_norm(3, 5, nn.ReLU()), Block(), nn.Flatten(), nn.LazyLinear(4)), 21)
    model = convert(stock, "lite_residual+bias", example_input=torch.randn(1, 3, 21, 21))
    assert branches(model) == {"1": (5, 2, 2)}
    assert model[1].lite.conv1.groups == 1
    model.train()(torch.randn(2, 3, 21, 21)).sum().backward()
    assert model[1].lite.final_bn.weight.grad.abs().sum() > 0


def widths(model: nn.Module) -> list[tuple[int, int, int]]:
    """(input channels, inner width, groups) of every branch."""
    convs = [m.lite.conv1 for m in model.modules() if isinstance(m, LiteResidualBlock)]
    return [(conv.in_channels, conv.out_channels, conv.groups) for conv in convs]


def test_around_a_bottleneck_the_branch_is_as_wide_as_the_bottleneck() -> None:
    model = convert(zoo_model("torchvision:resnet50"), "lite_residual", example_input=torch.randn(1, 3, 64, 64))
    assert widths(model) == [
        *[(64, 64, 2), (256, 64, 8), (256, 64, 8)],
        *[(256, 128, 4), *[(512, 128, 8)] * 3],
        *[(512, 256, 4), *[(1024, 256, 8)] * 5],
        *[(1024, 512, 4), *[(2048, 512, 8)] * 2],
    ]
    blocks = [m for m in model.modules() if isinstance(m, LiteResidualBlock)]
    sizes = [[sum(p.numel() for p in part.parameters()) for part in (b.lite, b.main)] for b in blocks]
    assert all(lite <= 1.1 * main for lite, main in sizes), sizes


def test_around_blocks_that_are_narrow_at_their_ends_it_is_the_papers() -> None:
    for name in ("torchvision:mobilenet_v2", "torchvision:mnasnet1_0", "torchvision:resnet18"):
        model = convert(zoo_model(name), "lite_residual", example_input=torch.randn(1, 3, 64, 64))
        assert all((inner, groups) == (channels, 2) for channels, inner, groups in widths(model)), name


def test_a_bottleneck_of_odd_widths() -> None:
    class Bottleneck(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.reduce = conv_norm(21, 9, nn.ReLU(), kernel_size=1, padding=0)
            self.filter = conv_norm(9, 9, nn.ReLU())
            self.widen = conv_norm(9, 21, kernel_size=1, padding=0)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.widen(self.filter(self.reduce(x)))

    stock = with_statistics(nn.Sequential(conv_norm(3, 21, nn.ReLU()), Bottleneck(), nn.Flatten(), nn.LazyLinear(4)), 9)
    model = convert(stock, "lite_residual+bias", example_input=torch.randn(1, 3, 9, 9))
    assert widths(model) == [(21, 16, 1)]
    model.train()(torch.randn(2, 3, 9, 9)).sum().backward()
    assert model[1].lite.final_bn.weight.grad.abs().sum() > 0


def test_without_blocks_each_convolution_but_the_first_gets_one() -> None:
    stock = nn.Sequential(
        conv_norm(3, 8, nn.ReLU(inplace=True)),
        conv_norm(8, 8, nn.ReLU(inplace=True), stride=2),
        conv_norm(8, 16, nn.ReLU6(inplace=True)),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(16, 4),
    )
    stock = with_statistics(stock, 24).eval()
    x = torch.randn(2, 3, 24, 24)
    model = convert(stock, "lite_residual", example_input=x)
    assert branches(model) == {"1.0": (5, 2, 2), "2.0": (5, 2, 1)}
    # The branch joins before the activation, which stays outside.
    assert type(model[1][0].main) is FrozenConvBias
    assert model[1][0].main.activation is None
    assert isinstance(model[1][2], nn.ReLU)
    assert model[0][0].activation == "relu"
    torch.testing.assert_close(model(x), stock(x))
    assert "no residual or inverted residual blocks" in conversion_report(model).warnings[0]


def test_an_activation_outside_the_block_stays_outside() -> None:
    class Outside(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = conv_norm(3, 4, nn.ReLU())
            self.body = nn.Sequential(conv_norm(4, 4, nn.ReLU(), groups=4), conv_norm(4, 4, nn.ReLU()), conv_norm(4, 4))
            self.act = nn.ReLU()

        def forward(self, x: Tensor) -> Tensor:
            return self.act(self.body(self.stem(x)))

    model = convert(Outside(), "lite_residual", blocks=["body"], example_input=torch.randn(1, 3, 16, 16))
    assert model.body.main[2][0].activation is None
    assert model.body.main[1][0].activation == "relu"
    assert isinstance(model.act, nn.ReLU)


def test_named_blocks_are_taken_as_they_are() -> None:
    x = torch.randn(1, 3, 32, 32)
    model = convert(with_statistics(SmallNet()), "lite_residual", example_input=x, blocks=["blocks.1", "stem"])
    assert list(branches(model)) == ["stem", "blocks.1"]
    assert [note.path for note in conversion_report(model).branches] == ["stem", "blocks.1"]


def test_siblings_of_a_block_without_a_shortcut_count_too() -> None:
    class Wide(Residual):
        def __init__(self, channels: int, shortcut: bool) -> None:
            super().__init__(channels)
            self.shortcut = shortcut

        def forward(self, x: Tensor) -> Tensor:
            y = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
            return y + x if self.shortcut else y

    stock = nn.Sequential(conv_norm(3, 4, nn.ReLU()), Wide(4, True), Wide(4, False))
    model = convert(stock, "lite_residual", example_input=torch.randn(1, 3, 16, 16))
    assert list(branches(model)) == ["1", "2"]


def test_no_place_for_a_branch_is_a_clear_error() -> None:
    with pytest.raises(ValueError, match=r"found no place for a lite residual.*blocks=\[...\]"):
        convert(conv_norm(3, 8, nn.ReLU()), "lite_residual", example_input=torch.randn(1, 3, 16, 16))


def test_a_named_activation_or_norm_is_not_merged_away() -> None:
    x = torch.randn(1, 3, 16, 16)
    stock = with_statistics(conv_norm(3, 4, nn.ReLU()), 16).eval()
    around_norm = convert(stock, "lite_residual", example_input=x, blocks=["1"])
    assert type(around_norm[1]) is LiteResidualBlock
    assert around_norm[0].activation is None
    assert isinstance(around_norm[2], nn.ReLU)
    torch.testing.assert_close(around_norm(x), stock(x))
    around_activation = convert(stock, "lite_residual", example_input=x, blocks=["2"])
    assert isinstance(around_activation[2].main, nn.ReLU)
    assert around_activation[0].activation is None
