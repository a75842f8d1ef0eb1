"""convert wraps what keeps full values for the expanded activations of a block: exact, and many times less is kept."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from tests.memory.proxyless import Block as ProxylessBlock
from tests.memory.proxyless import conv_norm
from tinytl_kernels import conversion_report, convert, measure_memory, to_torch
from tinytl_kernels.models.zoo import import_torchvision
from tinytl_kernels.nn import FrozenConvBias, GroupNorm, Recomputed, stop_recomputing


class GroupNormNet(nn.Module):
    """The first blocks of ProxylessNAS-Mobile, GroupNorm with 8 channels a group; without lite residuals."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(*conv_norm(3, 32, 3, 2))
        numbers = [(32, 16, 3, 1, 1), (16, 32, 5, 3, 2), (32, 32, 3, 3, 1), (32, 40, 7, 3, 2), (40, 40, 3, 3, 1)]
        self.blocks = nn.Sequential(*(ProxylessBlock(*block, None) for block in numbers))
        self.last = nn.Sequential(*conv_norm(40, 160, 1))
        self.classifier = nn.Linear(160, 10)

    def forward(self, x):
        return self.classifier(self.last(self.blocks(self.first(x))).mean((2, 3)))


def randomised(model: nn.Module) -> nn.Module:
    """Norms that do something, so that activations are cut on both sides and nothing cancels."""
    for module in model.modules():
        if isinstance(module, (nn.GroupNorm, nn.BatchNorm2d)):
            nn.init.normal_(module.weight, 1, 0.2)
            nn.init.normal_(module.bias, 0, 0.3)
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
            module.num_batches_tracked += 1
    return model.eval()  # drop path is for another test


def zoo_model(name: str) -> nn.Module:
    return getattr(import_torchvision().models, name)(num_classes=10)


MODELS = {
    "group norm": GroupNormNet,
    "mobilenet_v3_small": lambda: zoo_model("mobilenet_v3_small"),
    "efficientnet_b0": lambda: zoo_model("efficientnet_b0"),
}


@pytest.fixture(scope="module", params=MODELS)
def stock(request):
    torch.manual_seed(20260101)
    return randomised(MODELS[request.param]())


def step(model: nn.Module, x: torch.Tensor) -> dict[str, torch.Tensor]:
    # With a gradient of the image too: PyTorch 2.13 crashes where only the bias of a channels_last GroupNorm has one.
    x = x.clone().requires_grad_()
    model.zero_grad()
    nn.functional.cross_entropy(model(x), torch.arange(len(x)) % 10).backward()
    return {name: p.grad.double() for name, p in model.named_parameters() if p.grad is not None}


def error(gradients, exact) -> float:
    """The largest relative error (root mean square) of a gradient."""
    return max(((a - b).norm() / b.norm()).item() for a, b in zip(gradients.values(), exact.values(), strict=True))


@pytest.mark.parametrize("method", ["bias", "lite_residual+bias"])
def test_gradients_are_as_exact_as_plain_pytorchs(stock, method):
    x = torch.randn(3, 3, 64, 64)
    model = convert(stock, method, example_input=x[:1]).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("final_bn.weight"):
            nn.init.ones_(parameter)  # new branches change nothing, so nothing would come back through them
    plain = to_torch(model)
    exact = step(copy.deepcopy(plain).double(), x.double())
    assert error(step(model, x), exact) <= 3 * error(step(plain, x), exact) + 1e-6


def test_a_fraction_of_stock_is_kept(stock, request):
    x = torch.randn(4, 3, 64, 64)
    model = convert(stock, "bias", example_input=x[:1])
    trained = set(conversion_report(model).trained)
    plain = to_torch(model).to(memory_format=torch.contiguous_format)  # see step()
    for name, parameter in plain.named_parameters():
        parameter.requires_grad_(name.endswith("bias") or name in trained)
    ours, theirs = measure_memory(model, x), measure_memory(plain, x)
    print(f"saved {ours.saved:,} of {theirs.saved:,}, peak {ours.peak:,} of {theirs.peak:,}")
    factor = 20 if isinstance(stock, GroupNormNet) else 8
    assert factor * ours.saved <= theirs.saved
    assert ours.peak < theirs.peak


def test_segments_lower_the_peak():
    x = torch.randn(8, 3, 96, 96)
    model = convert(randomised(GroupNormNet()), "bias", example_input=x[:1])
    blocks = [m for m in model.modules() if isinstance(m, Recomputed)]
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    with_segments = measure_memory(model, x, optimizer=optimizer)
    assert not all(block.keep_input for block in blocks)
    for block in blocks:
        block.keep_input = True
    one_by_one = measure_memory(model, x, optimizer=optimizer)
    print(f"peak {with_segments.peak:,} with segments, {one_by_one.peak:,} block by block")
    assert with_segments.saved < 0.5 * one_by_one.saved
    assert with_segments.peak < one_by_one.peak


def test_no_batch_of_expanded_activations_exists_at_any_time(monkeypatch):
    monkeypatch.setattr("tinytl_kernels.nn.recomputed.CHUNK_BYTES", {"cpu": 1})  # one image at a time
    x = torch.randn(16, 3, 64, 64)
    model = convert(randomised(GroupNormNet()), "bias", example_input=x[:1])
    report = measure_memory(model, x, optimizer=torch.optim.SGD(model.classifier.parameters(), lr=0.1))
    # First convolution and first block, at half the resolution: 32 channels in, 16 out; the next expands to 48.
    pixels = 16 * 32 * 32 * 4
    assert report.peak < (32 + 16 + 32 / 4 + 48) * pixels


def test_names_classes_and_outputs_stay(stock):
    x = torch.randn(2, 3, 64, 64)
    model = convert(stock, "bias", example_input=x)
    without = convert(stock, "bias", example_input=x, recompute=False)
    assert any(isinstance(m, Recomputed) for m in model.modules())
    assert not any(isinstance(m, Recomputed) for m in without.modules())
    assert list(model.state_dict()) == list(without.state_dict())
    torch.testing.assert_close(model(x), without(x))
    for (name, a), (_, b) in zip(model.named_modules(), without.named_modules(), strict=True):
        assert isinstance(a, type(b)), name
    assert {type(stop_recomputing(m)) for m in model.modules()} == {type(m) for m in without.modules()}


def test_the_report_says_what_is_recomputed_and_in_how_many_bytes():
    model = convert(randomised(GroupNormNet()), "bias", example_input=torch.randn(1, 3, 64, 64))
    report = conversion_report(model)
    notes = {note.path: note.text for note in report.done if "recomputed" in note.text}
    assert set(notes) == {"first", *(f"blocks.{i}" for i in range(5)), "last"}
    assert notes["first"] == "recomputed in backward: keeps its input, 49.15 kB an image instead of 131.10 kB"
    assert report.kept == []


def test_group_norm_takes_the_activation_behind_it():
    model = convert(randomised(GroupNormNet()), "bias", example_input=torch.randn(1, 3, 64, 64))
    assert type(model.first[1]) is GroupNorm
    assert model.first[1].activation == "relu6"
    assert type(model.first[2]) is nn.Identity
    assert type(to_torch(model).first[1][0]) is nn.GroupNorm


def test_norms_that_are_trained_are_recomputed_too():
    stock = randomised(GroupNormNet())
    x = torch.randn(3, 3, 64, 64)
    model = convert(stock, "norm+last", example_input=x[:1])
    assert model.first[1].weight.requires_grad
    assert isinstance(model.first, Recomputed)
    plain = to_torch(model)
    exact = step(copy.deepcopy(plain).double(), x.double())
    assert error(step(model, x), exact) <= 3 * error(step(plain, x), exact) + 1e-6


def test_blocks_with_live_statistics_are_left_alone():
    model = convert(zoo_model("mobilenet_v3_small"), "norm+last", example_input=torch.randn(1, 3, 64, 64))
    assert not any(isinstance(m, Recomputed) for m in model.modules())
    assert "not recomputed: a norm inside updates its statistics" in str(conversion_report(model))


class MixesImages(nn.Module):
    """A block by its structure, that subtracts the mean of the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Sequential(nn.Conv2d(8, 32, 1), nn.SiLU(), nn.Conv2d(32, 8, 3, padding=1))

    def forward(self, x):
        return x + self.conv(x - x.mean(0, keepdim=True))


def test_a_block_that_mixes_images_is_left_alone():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), MixesImages(), nn.Flatten(), nn.Linear(8 * 36, 2))
    lean = convert(model, "bias", example_input=torch.randn(1, 3, 8, 8))
    assert not isinstance(lean[1], Recomputed)
    assert "not recomputed: its output for an image depends on the other images" in str(conversion_report(lean))


def test_a_convolution_before_a_smooth_activation_keeps_its_input_where_that_is_less():
    model = nn.Sequential(nn.Conv2d(3, 32, 3), nn.SiLU(), nn.Conv2d(32, 8, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    lean = convert(model, "bias", example_input=torch.randn(1, 3, 16, 16))
    assert isinstance(lean[0], Recomputed)
    assert isinstance(lean[0], FrozenConvBias)
    assert not isinstance(lean[2], Recomputed)
