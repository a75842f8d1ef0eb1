"""Layers that a forward calls by name, one after the other, are computed together as those of one Sequential are."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from tests.convert.models import conv_norm, with_statistics
from tinytl_kernels.convert import conversion_report, convert, to_torch

X = torch.randn(2, 3, 32, 28)
JOINED = "stem to last in a row"


def separable(channels: int, out: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(channels, channels, 3, padding=1, groups=channels, bias=False),
        nn.BatchNorm2d(channels), nn.ReLU6(), nn.Conv2d(channels, out, 1, bias=False), nn.BatchNorm2d(out),
    )  # fmt: skip


class Inverted(nn.Module):
    def __init__(self, channels: int, out: int) -> None:
        super().__init__()
        self.expand = conv_norm(channels, 3 * channels, nn.ReLU6(), kernel_size=1, padding=0)
        self.rest = separable(3 * channels, out)

    def forward(self, x: Tensor) -> Tensor:
        y = self.rest(self.expand(x))
        return x + y if x.shape == y.shape else y


class Named(nn.Module):
    """As timm's EfficientNets: the layers around the blocks are attributes, and a switch checkpoints the blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm1, self.act1 = nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU6()
        self.blocks = nn.Sequential(nn.Sequential(separable(8, 12)), nn.Sequential(Inverted(12, 12), Inverted(12, 20)))
        self.last, self.norm2, self.act2 = nn.Conv2d(20, 32, 1, bias=False), nn.BatchNorm2d(32), nn.ReLU6()
        self.fc = nn.Linear(32, 5)
        self.grad_checkpointing = False
        self.checkpointed = 0

    def features(self, x: Tensor) -> Tensor:
        x = self.act1(self.norm1(self.stem(x)))
        if self.grad_checkpointing:
            self.checkpointed += 1
        return self.act2(self.norm2(self.last(self.blocks(x))))

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.features(x).mean((2, 3)))


def named(kind: type[nn.Module] = Named) -> nn.Module:
    return with_statistics(kind(), 32).eval()


def gradients(model: nn.Module) -> list[Tensor]:
    model.zero_grad()
    output = model(X)
    F.cross_entropy(output, torch.tensor([1, 4])).backward()
    return [output.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]


def kernels(model: nn.Module) -> list[str]:
    with profile(activities=[ProfilerActivity.CPU]) as trace:
        model(X)
    return [e.name for e in trace.events() if e.name == "tinytl_cpu::block_chain"]


def test_outputs_and_gradients_are_those_of_layers_one_by_one(cpu_kernels):
    model = convert(named(), "bias", example_input=X)
    assert JOINED in [note.text for note in conversion_report(model).done if note.path == ""]
    assert len(kernels(model)) == 1
    ours = gradients(model)
    for name in ("stem", "last", "blocks"):  # none of them is computed with others
        model.get_submodule(name).register_forward_hook(lambda *_: None)
    for a, b in zip(ours, gradients(model), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_a_hook_is_called_and_a_layer_can_be_replaced(cpu_kernels):
    model, seen = convert(named(), "bias", example_input=X), []
    expected = model(X)
    handle = model.blocks[1][0].register_forward_hook(lambda module, args, output: seen.append(output.shape))
    torch.testing.assert_close(model(X), expected, rtol=1e-4, atol=1e-5)
    assert seen == [(2, 12, 16, 14)]
    handle.remove()
    model.last = nn.Conv2d(20, 32, 1)
    assert model(X).shape == (2, 5)
    model.blocks = nn.Sequential(nn.Conv2d(8, 20, 3))
    assert model(X).shape == (2, 5)


def test_the_switch_that_checkpoints_the_blocks_still_switches():
    model = convert(named(), "bias", example_input=X)
    expected = model(X)
    assert model.checkpointed == 0
    model.grad_checkpointing = True
    torch.testing.assert_close(model(X), expected, rtol=1e-4, atol=1e-5)
    assert model.checkpointed == 1
    on = named()
    on.grad_checkpointing = True
    assert convert(on, "bias", example_input=X)(X).shape == (2, 5)


class Switches(Named):
    """Attributes of every kind that forward reads, one of them in a method, and one that it does not."""

    def __init__(self) -> None:
        super().__init__()
        self.rate, self.scale, self.kind, self.shift, self.unread = 0.0, 2, "mean", None, 5

    def pooled(self, x: Tensor) -> Tensor:
        return x.mean((2, 3)) if self.kind == "mean" else x.amax((2, 3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.pooled(self.features(x)) * self.scale
        if self.rate > 0:
            x = x * (1 - self.rate)
        return self.fc(x if self.shift is None else x + self.shift)


@pytest.mark.parametrize(("name", "value"), [("rate", 0.5), ("scale", 3), ("kind", "max"), ("shift", 1.5)])
def test_an_attribute_that_forward_reads_may_change_later(name, value, cpu_kernels):
    stock = named(Switches)
    model = convert(stock, "bias", example_input=X)
    assert JOINED in [note.text for note in conversion_report(model).done if note.path == ""]
    torch.testing.assert_close(model(X), stock(X), rtol=1e-4, atol=1e-5)
    before = getattr(model, name)
    for m in (model, stock):
        setattr(m, name, value)
    torch.testing.assert_close(model(X), stock(X), rtol=1e-4, atol=1e-5)
    setattr(model, name, before)
    model.unread = 6
    assert len(kernels(model)) == 1


def test_lite_residuals_stand_in_the_row(cpu_kernels):
    model = convert(named(), "lite_residual+bias", example_input=X)
    assert JOINED in [note.text for note in conversion_report(model).done if note.path == ""]
    assert len(conversion_report(model).branches) > 0
    ours = gradients(model.train())
    again = convert(named(), "lite_residual+bias", example_input=X).train()
    again.load_state_dict(model.state_dict())
    again.stem.register_forward_hook(lambda *_: None)
    for a, b in zip(ours, gradients(again), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_to_torch_copies_and_pickles():
    stock = named()
    model = convert(stock, "bias", example_input=X)
    expected = model(X)
    torch.testing.assert_close(expected, stock(X), rtol=1e-4, atol=1e-5)
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(again) is type(model)
        assert torch.equal(again(X), expected)
    plain = to_torch(model)
    assert type(plain) is Named
    torch.testing.assert_close(plain(X), expected, rtol=1e-4, atol=1e-5)


class Functional(Named):
    """A function beside the row."""

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(F.dropout(self.features(x).mean((2, 3)), 0.5, self.training))


class ReadTwice(Named):
    """What the stem makes is read again."""

    def features(self, x: Tensor) -> Tensor:
        x = self.act1(self.norm1(self.stem(x)))
        return self.act2(self.norm2(self.last(self.blocks(x) + x.mean())))


class NoBlocks(Named):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(conv_norm(8, 20, nn.ReLU6()))


class OtherActivation(Named):
    """The stem's is not that of the block behind it, and what is behind the blocks is no matrix product."""

    def __init__(self) -> None:
        super().__init__()
        self.act1, self.last = nn.ReLU(), nn.Conv2d(20, 32, 3, bias=False)


def test_beside_a_function():
    model = convert(named(Functional), "bias", example_input=X)
    texts = [note.text for note in conversion_report(model).done if note.path == ""]
    assert JOINED in texts
    assert any("dropout" in text for text in texts)


@pytest.mark.parametrize("kind", [ReadTwice, NoBlocks, OtherActivation])
def test_what_is_no_row_stays(kind):
    model = convert(named(kind), "bias", example_input=X)
    assert type(model) is kind
    torch.testing.assert_close(model(X), to_torch(model)(X), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["tf_efficientnet_lite0", "mobilenetv2_100"])
def test_timms_networks_are_one_chain(name, cpu_kernels):
    from tinytl_kernels.models import import_timm

    model = convert(import_timm().create_model(name).eval(), "bias", example_input=torch.randn(1, 3, 64, 64))
    assert "conv_stem to conv_head in a row" in [note.text for note in conversion_report(model).done]
    assert len(kernels(model)) == 1
