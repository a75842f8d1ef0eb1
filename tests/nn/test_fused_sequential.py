"""FusedSequential: blocks among its children in one operator, everything else as nn.Sequential does it."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

import tinytl_kernels as tk
from tinytl_kernels import FrozenConvBias
from tinytl_kernels.core.hooks import listens_only
from tinytl_kernels.nn import FusedSequential


def conv(cin, cout, k=1, *, depthwise=False, activation="relu", **options) -> FrozenConvBias:
    groups = cin if depthwise else 1
    return FrozenConvBias(cin, cout, k, padding=k // 2, groups=groups, activation=activation, **options)


def layers() -> list[nn.Module]:
    """A stem, a depthwise and a projection, a whole block, and a layer that is of no block."""
    return [
        conv(3, 8, 3, stride=2),
        nn.Identity(),
        conv(8, 8, 3, depthwise=True),
        nn.Identity(),
        nn.Identity(),
        conv(8, 4, activation=None),
        conv(4, 24),
        conv(24, 24, 5, depthwise=True, stride=2),
        conv(24, 6, activation=None),
        conv(6, 10),
    ]


def called(model: nn.Sequential, x: torch.Tensor) -> list[int]:
    """The children that a forward calls; a Sequential among them where it calls something in it."""
    seen = []
    forward = nn.Module.__call__

    def call(module, *args, **kwargs):
        if not isinstance(module, nn.Sequential):  # they come with what is in them
            seen.extend(i for i, child in enumerate(model) if module in _standing(child) and [i] != seen[-1:])
        return forward(module, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nn.Module, "__call__", call)
        model(x)
    return seen


def _standing(child: nn.Module) -> list[nn.Module]:
    return [m for c in child for m in _standing(c)] if isinstance(child, nn.Sequential) else [child]


def gradients(model: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    x = x.clone().requires_grad_()
    model.zero_grad()
    output = model(x)
    (output * torch.linspace(-1, 1, output.numel()).view_as(output)).sum().backward()
    return [output.detach(), x.grad, *(p.grad for p in model.parameters() if p.requires_grad)]


def test_blocks_are_one_operator_and_the_rest_is_called():
    model, x = FusedSequential(*layers()), torch.randn(2, 3, 17, 15)
    assert called(model, x) == [0, 1, 9]
    plain = nn.Sequential(*model)
    assert called(plain, x) == list(range(10))
    for ours, theirs in zip(gradients(model, x), gradients(plain, x), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_unbatched_images_and_fused_false_are_computed_layer_by_layer():
    model, x = FusedSequential(*layers()), torch.randn(2, 3, 17, 15)
    expected = model(x)
    assert called(model, x[0]) == list(range(10))
    torch.testing.assert_close(model(x[0]), expected[0], rtol=1e-4, atol=1e-5)
    model.fused = False
    assert called(model, x) == list(range(10))
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)


def test_a_child_that_is_watched_is_called():
    model, x, seen = FusedSequential(*layers()), torch.randn(1, 3, 9, 9), []
    handle = model[7].register_forward_hook(lambda *_: seen.append(7))
    assert called(model, x) == [0, 1, 6, 7, 8, 9]
    assert seen == [7]
    handle.remove()
    forward = model[4].forward
    model[4].forward = lambda x: forward(x) * 2
    assert called(model, x) == [0, 1, 2, 3, 4, 5, 9]
    del model[4].forward
    assert called(model, x) == [0, 1, 9]


def test_what_measures_a_model_does_not_change_what_it_computes():
    model, x = FusedSequential(*layers()), torch.randn(2, 3, 64, 64)
    model[7].register_forward_hook(listens_only(lambda *_: pytest.fail("not called")))
    assert called(model, x) == [0, 1, 9]
    model = tk.convert(Flat(), "bias", example_input=x)
    alone = copy.deepcopy(model)
    alone.layers.__class__ = nn.Sequential
    fused, single = (tk.measure_memory(m, x) for m in (model, alone))
    assert fused.saved == single.saved
    # The mask of the depthwise convolution is the block's, not a layer's that ran by itself.
    assert "layers.3" in {row.name for row in single.by_layer}
    assert "layers.3" not in {row.name for row in fused.by_layer}


def test_children_may_be_replaced_sliced_deleted_and_appended():
    model, x = FusedSequential(*layers()), torch.randn(2, 3, 17, 15)
    assert called(model[:5], x) == [0, 1, 2, 3, 4]
    assert called(model[:6], x) == [0, 1]
    model[4] = nn.Dropout(0.5)
    assert called(model, x) == [0, 1, 2, 3, 4, 5, 9]
    del model[3:5]
    assert called(model, x) == [0, 1, 7]
    model.append(nn.Flatten())
    assert called(model, x) == [0, 1, 7, 8]
    assert model(x).dim() == 2


def test_copies_and_pickles():
    model, x = FusedSequential(*layers()), torch.randn(1, 3, 9, 9)
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(again) is FusedSequential
        assert torch.equal(again(x), model(x))
        assert again.state_dict().keys() == nn.Sequential(*model).state_dict().keys()


def test_nothing_is_made_of_what_is_no_block():
    assert FusedSequential()(3) == 3
    assert called(FusedSequential(conv(4, 4), conv(4, 4)), torch.randn(1, 4, 3, 3)) == [0, 1]
    grouped = FrozenConvBias(4, 4, 3, padding=1, groups=2)
    assert called(FusedSequential(grouped, conv(4, 4, activation=None)), torch.randn(1, 4, 3, 3)) == [0, 1]
    model = FusedSequential(*layers())
    model[8].weight.requires_grad_(True)
    with pytest.raises(RuntimeError, match="computes no weight gradient"):
        model(torch.randn(1, 3, 9, 9))


def nested() -> FusedSequential:
    """As torchvision's MobileNetV2 begins: the stem in a Sequential of its own, then blocks."""
    block = tk.FrozenInvertedResidual(8, 4, expand_ratio=1, activation="relu")
    stem = nn.Sequential(conv(3, 8, 3, stride=2), nn.Identity(), nn.Identity())
    return FusedSequential(stem, nn.Identity(), block, tk.FrozenInvertedResidual(4, 4, activation="relu"))


def test_a_stem_is_asked_for_with_the_blocks_behind_it(cpu_kernels):
    x = torch.randn(2, 3, 17, 15)
    # The stem by itself and the blocks in a row, or all of them together.
    alone, together = [0], []
    for model, stem in ((FusedSequential(*layers()), 0), (nested(), (0, 0))):
        model.to(memory_format=torch.channels_last)
        stem = model[0][0] if isinstance(stem, tuple) else model[0]
        assert called(model, x) == together
        output = model(x)
        stem.register_forward_hook(listens_only(lambda *_: None))
        assert called(model, x) == together
        handle = stem.register_forward_hook(lambda *_: None)
        assert called(model, x) == alone
        torch.testing.assert_close(model(x), output, rtol=1e-5, atol=1e-6)
        handle.remove()
        assert called(model, x.clone().requires_grad_()) == alone  # the picture's own gradient
        assert called(model, x) == together


@pytest.mark.parametrize(
    "why", ["residual", "expansion", "activation", "groups", "dilation", "channels", "1 x 1", "unfused", "padding"]
)
def test_what_is_no_stem_and_block(why, cpu_kernels):
    model, x = nested().to(memory_format=torch.channels_last), torch.randn(2, 3, 17, 15)
    if why == "residual":
        model[2] = tk.FrozenInvertedResidual(8, 8, expand_ratio=1, activation="relu")
        model[3] = nn.Identity()
    elif why == "expansion":
        model[2] = tk.FrozenInvertedResidual(8, 4, activation="relu")
    elif why == "unfused":
        model[2].fused = False
    else:
        stems = {
            "activation": conv(3, 8, 3, stride=2, activation="relu6"),
            "groups": FrozenConvBias(4, 8, 3, 2, 1, groups=2, activation="relu"),
            "dilation": FrozenConvBias(3, 8, 3, 2, 1, dilation=2, activation="relu"),
            "channels": FrozenConvBias(8, 8, 3, 2, 1, activation="relu"),
            "1 x 1": FrozenConvBias(3, 8, 1, 2, activation="relu"),
            "padding": FrozenConvBias(3, 8, 3, 2, 1, padding_mode="reflect", activation="relu"),
        }
        model[0][0] = stems[why].to(memory_format=torch.channels_last)
        x = torch.randn(2, stems[why].in_channels, 17, 15)
    assert called(model, x)[0] == 0
    model[0][1].register_forward_hook(lambda *_: None)
    alone = copy.deepcopy(model)
    alone.fused = False
    torch.testing.assert_close(model(x), alone(x), rtol=1e-5, atol=1e-6)


class Flat(nn.Module):
    """As torchvision's MNASNet begins: everything in one Sequential."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU(),
            nn.Conv2d(8, 8, 3, 1, 1, groups=8, bias=False), nn.BatchNorm2d(8), nn.ReLU(),
            nn.Conv2d(8, 4, 1, bias=False), nn.BatchNorm2d(4),
        )  # fmt: skip
        self.classifier = nn.Linear(4, 5)

    def forward(self, x):
        return self.classifier(self.layers(x).mean((2, 3)))


def with_last(last: nn.Module, *behind: nn.Module) -> FusedSequential:
    """Two blocks, and what may be the 1x1 convolution behind them."""
    blocks = tk.FrozenInvertedResidual(4, 4, activation="relu"), tk.FrozenInvertedResidual(4, 6, activation="relu")
    return FusedSequential(*blocks, last, *behind).to(memory_format=torch.channels_last)


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("activation", ["relu6", "silu", None])
def test_the_last_convolution_is_asked_for_with_the_blocks_before_it(activation, wrapped, cpu_kernels):
    last = conv(6, 10, activation=activation)
    last = nn.Sequential(last, nn.Identity()) if wrapped else last
    model = with_last(last, nn.Identity())
    x = torch.randn(2, 4, 9, 7).contiguous(memory_format=torch.channels_last)
    assert called(model, x) == ([2, 3] if wrapped else [3])  # identities
    ours = gradients(model, x)
    model.fused = False
    for a, b in zip(ours, gradients(model, x), strict=True):
        assert torch.equal(a, b)
    model.fused = True
    with torch.no_grad():
        assert torch.equal(model(x), ours[0])
    model.requires_grad_(False).zero_grad()
    bias = (last[0] if wrapped else last).bias.requires_grad_()
    model(x).sum().backward()
    assert [p for p in model.parameters() if p.grad is not None] == [bias]


@pytest.mark.parametrize(
    ("why", "layers"),
    [
        ("another layer is behind it", lambda: (conv(6, 8), conv(8, 4))),
        ("a block is behind it", lambda: (conv(6, 8), tk.FrozenInvertedResidual(8, 8))),
        ("its activation keeps codes", lambda: (conv(6, 8, activation="silu", code_bits=8),)),
        ("it has a stride", lambda: (FrozenConvBias(6, 8, 1, 2),)),
        ("it is grouped", lambda: (FrozenConvBias(6, 8, 1, groups=2),)),
        ("it pads", lambda: (FrozenConvBias(6, 8, 1, padding=1),)),
        ("it is not 1x1", lambda: (conv(6, 8, 3),)),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_no_last_convolution(why, layers, cpu_kernels):
    model, x = with_last(*layers()), torch.randn(2, 4, 9, 7).contiguous(memory_format=torch.channels_last)
    assert called(model, x)[0] == 2, why


def test_a_last_convolution_that_is_watched_is_called(cpu_kernels):
    model, x = with_last(conv(6, 8)), torch.randn(2, 4, 9, 7).contiguous(memory_format=torch.channels_last)
    model[2].register_forward_hook(lambda *_: None)
    assert called(model, x) == [2]


def test_a_last_convolution_that_does_not_fit_is_its_own_error(cpu_kernels):
    x = torch.randn(2, 4, 9, 7).contiguous(memory_format=torch.channels_last)
    with pytest.raises(ValueError, match="input: expected 7 channels"):
        with_last(conv(7, 8))(x)
    model = with_last(conv(6, 8))
    model[2].weight.requires_grad_()
    with pytest.raises(RuntimeError, match="computes no weight gradient"):
        model(x)


@pytest.mark.parametrize("weight_bits", [32, 8])
def test_convert_finds_them_and_to_torch_gives_them_back(weight_bits):
    stock, x = Flat().eval(), torch.randn(2, 3, 12, 12)
    model = tk.convert(stock, "bias", example_input=x, **({"weight_bits": 8} if weight_bits == 8 else {}))
    assert type(model.layers) is FusedSequential
    assert called(model.layers, x) in ([0, 1, 2, 7], [7])
    assert "layers.3 to 6" in str(tk.conversion_report(model))
    assert "layers.0 to 6" in str(tk.conversion_report(model))
    torch.testing.assert_close(model(x), stock(x), rtol=0, atol=1e-5 if weight_bits == 32 else 0.05)
    model(x).sum().backward()
    assert all(model.layers[i].bias.grad is not None for i in (0, 3, 6))
    plain = tk.to_torch(model)
    assert type(plain.layers) is nn.Sequential
    torch.testing.assert_close(plain(x), model(x), rtol=1e-4, atol=1e-5)


class Nested(nn.Module):
    """As torchvision's MobileNetV2: a stem and a block, modules of one Sequential."""

    def __init__(self) -> None:
        super().__init__()
        stem = nn.Sequential(nn.Conv2d(3, 16, 3, 2, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU6())
        block = nn.Sequential(
            nn.Conv2d(16, 16, 3, 1, 1, groups=16, bias=False), nn.BatchNorm2d(16), nn.ReLU6(),
            nn.Conv2d(16, 8, 1, bias=False), nn.BatchNorm2d(8),
        )  # fmt: skip
        self.features = nn.Sequential(stem, block)
        self.classifier = nn.Linear(8, 5)

    def forward(self, x):
        return self.classifier(self.features(x).mean((2, 3)))


def test_convert_joins_a_stem_and_its_block(cpu_kernels):
    stock, x = Nested().eval(), torch.randn(2, 3, 12, 12)
    model = tk.convert(stock, "bias", example_input=x)
    assert "features.0 to 1" in str(tk.conversion_report(model))
    assert called(model.features, x) == []
    torch.testing.assert_close(model(x), stock(x), rtol=1e-4, atol=1e-5)
    model(x).sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    plain = tk.to_torch(model)
    assert type(plain.features) is nn.Sequential
    torch.testing.assert_close(plain(x), model(x), rtol=1e-4, atol=1e-5)
    lite = tk.convert(stock, "lite_residual+bias", example_input=x, blocks=["features.1"])
    assert "features.0 to 1" not in str(tk.conversion_report(lite))
    assert called(lite.features, x) == [0, 1]


def test_a_model_that_is_one_sequential():
    stock = nn.Sequential(*Flat().layers, nn.Flatten(), nn.Linear(4 * 36, 5)).eval()
    x = torch.randn(2, 3, 12, 12)
    model = tk.convert(stock, "bias", example_input=x)
    assert isinstance(model, nn.Sequential)
    assert "3 to 6" in str(tk.conversion_report(model))
    torch.testing.assert_close(model(x), stock(x), rtol=1e-4, atol=1e-5)
    assert type(tk.to_torch(model)) is nn.Sequential


def test_a_place_of_a_lite_residual_is_left_alone():
    x = torch.randn(2, 3, 16, 16)
    model = tk.convert(Flat(), "lite_residual+bias", example_input=x, blocks=["layers.3"])
    assert isinstance(model.layers[3], tk.LiteResidualBlock)
    assert type(model.layers) is nn.Sequential
    assert "whole block" not in str(tk.conversion_report(model))
    model(x).sum().backward()


def test_the_formula_sees_the_layers():
    x = torch.randn(1, 3, 12, 12)
    model = tk.convert(Flat(), "bias", example_input=x)
    plain = copy.deepcopy(model)
    plain.layers.__class__ = nn.Sequential
    ours, theirs = tk.estimate_memory(model, x), tk.estimate_memory(plain, x)
    assert ours.by_layer == theirs.by_layer
    assert model.layers.fused
    assert "fused" not in vars(model.layers)


def test_compiles():
    model, x = FusedSequential(*layers()), torch.randn(2, 3, 17, 15)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), model(x))
