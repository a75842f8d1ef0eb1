"""A block and its lite residual in one call: the bits of its three operators, and left to them where it has to be."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import tinytl_kernels as tk
from tests.backends.cpu.fused import CPU, counted, image

pytestmark = pytest.mark.usefixtures("cpu_kernels")

NAME = "lite_residual_block"

NORMS = {
    "batch norm": nn.BatchNorm2d,
    "group norm": lambda channels: nn.GroupNorm(2, channels),
    "no running statistics": lambda channels: nn.BatchNorm2d(channels, track_running_stats=False),
}


@pytest.fixture
def taken(monkeypatch) -> list[bool]:
    """For every time that the one call was asked for: whether it took the block."""
    return counted(NAME, monkeypatch)


def make(norm="batch norm", stride=1, recompute=False, bits=32, **block) -> tk.LiteResidualBlock:
    out = 8 if stride == 1 else 12
    main = tk.FrozenInvertedResidual(8, out, expand_ratio=3, stride=stride, **block)
    if bits == 8:
        main.quantize_()
    lite = tk.LiteResidual(8, out, stride=stride, norm=NORMS[norm], recompute=recompute)
    nn.init.normal_(lite.final_bn.weight)  # zero at first, and a zero would hide everything before it
    return tk.LiteResidualBlock(main, lite).to(memory_format=torch.channels_last)


def step(block: nn.Module, x: torch.Tensor, input_grad: bool = True) -> dict[str, torch.Tensor | None]:
    x = x.detach().clone(memory_format=torch.preserve_format).requires_grad_(input_grad)
    block.zero_grad()
    output = block(x)
    generator = torch.Generator().manual_seed(3)
    if output.requires_grad:
        (output * torch.randn(output.shape, generator=generator).to(output.dtype)).sum().backward()
    results = {"output": output.detach(), "input": x.grad}
    results |= {name: p.grad for name, p in block.named_parameters()}
    return results | {name: b.clone() for name, b in block.named_buffers()}


def assert_same(ours: dict, theirs: dict) -> None:
    assert ours.keys() == theirs.keys()
    for name, result in ours.items():
        expected = theirs[name]
        assert (result is None) == (expected is None), name
        if result is None:
            continue
        if name.endswith(("running_mean", "running_var")):  # PyTorch rounds once more, between two calls
            torch.testing.assert_close(result, expected, rtol=3e-7, atol=1e-7, msg=name)
        else:
            assert torch.equal(result, expected), name


def both(block: nn.Module, x: torch.Tensor, taken: list[bool], monkeypatch, **options) -> tuple[dict, dict]:
    """One step in one call and one, of a copy, operator by operator."""
    operators = copy.deepcopy(block)
    ours = step(block, x, **options)
    assert taken == [True]
    with monkeypatch.context() as patch:
        patch.delitem(CPU.FUSED, NAME)
        theirs = step(operators, x, **options)
    assert taken == [True]
    return ours, theirs


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("stride", [1, 2])
def test_the_bits_of_three_operators(norm, stride, training, taken, monkeypatch):
    block = make(norm, stride).train(training)
    assert_same(*both(block, image(3, 8, 13, 10), taken, monkeypatch))


@pytest.mark.parametrize(
    "options",
    [dict(recompute=True), dict(bits=8), dict(activation="relu"), dict(activation=None), dict(residual=False)],
    ids=str,
)
def test_whatever_the_block_is(options, taken, monkeypatch):
    assert_same(*both(make(**options), image(2, 8, 9, 9), taken, monkeypatch))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_with_statistics_in_float32(dtype, taken, monkeypatch):
    block = make().to(dtype)
    for norm in (block.lite.bn1, block.lite.final_bn):
        norm.float()
    assert_same(*both(block, image(2, 8, 10, 10, dtype=dtype), taken, monkeypatch))


@pytest.mark.parametrize(
    "frozen",
    [
        ["main"],
        ["lite"],
        ["main", "lite"],
        ["lite.conv1"],
        ["lite.conv2", "lite.final_bn"],
        ["main.expand"],
        ["main.depthwise", "main.project"],
    ],
    ids=" ".join,
)
@pytest.mark.parametrize("input_grad", [True, False])
def test_only_what_is_asked_for(frozen, input_grad, taken, monkeypatch):
    block = make()
    for name in frozen:
        block.get_submodule(name).requires_grad_(False)
    ours, theirs = both(block, image(2, 8, 8, 8), taken, monkeypatch, input_grad=input_grad)
    assert_same(ours, theirs)
    for name, parameter in block.named_parameters():
        assert (ours[name] is not None) == parameter.requires_grad, name
    assert (ours["input"] is not None) == input_grad


def test_without_gradients(taken, monkeypatch):
    block, x = make(), image(2, 8, 8, 8)
    with torch.no_grad():
        ours = block(x)
    assert taken == [True]
    assert not ours.requires_grad
    monkeypatch.delitem(CPU.FUSED, NAME)
    assert torch.equal(ours, block(x))


def test_it_keeps_the_same_bytes(taken, monkeypatch):
    block = make()

    def kept() -> list[tuple]:
        saved = []
        pack = lambda t: (saved.append((tuple(t.shape), t.dtype)), t)[1]  # noqa: E731
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            block(image(2, 8, 8, 8).requires_grad_())
        return sorted(saved, key=str)

    ours = kept()
    assert taken == [True]
    monkeypatch.delitem(CPU.FUSED, NAME)
    assert ours == kept()


def test_batches_are_counted(taken):
    block = make()
    versions = [b._version for b in block.buffers()]
    for _ in range(3):
        block(image(2, 8, 8, 8))
    assert taken == [True] * 3
    assert block.lite.bn1.num_batches_tracked == block.lite.final_bn.num_batches_tracked == 3
    assert all(b._version > v for b, v in zip(block.buffers(), versions, strict=True))  # autograd notices
    block.eval()(image(2, 8, 8, 8))
    assert block.lite.bn1.num_batches_tracked == 3


@pytest.mark.parametrize(
    "why", ["average of all batches", "statistics in half precision", "another class", "fused", "other channels"]
)
def test_what_is_not_asked_for_in_one_call(why, taken):
    block = make()
    if why == "average of all batches":
        block.lite.bn1.momentum = None
    elif why == "statistics in half precision":
        block.lite.bn1.running_mean = block.lite.bn1.running_mean.half()
        block.lite.bn1.running_var = block.lite.bn1.running_var.half()
    elif why == "another class":

        class Doubled(tk.LiteResidual):
            def forward_pooled(self, pooled):
                return 2 * super().forward_pooled(pooled)

        block.lite.__class__ = Doubled
    elif why == "fused":
        block.lite.fused = False
    else:
        block.lite.conv2 = nn.Conv2d(8, 16, 1, bias=False)
        block.lite.final_bn = nn.BatchNorm2d(16)
        with pytest.raises(ValueError, match=r"branch: expected \(N, C, h, w\) with N, C of main"):
            block(image(2, 8, 8, 8))
        assert not taken
        return
    block(image(2, 8, 8, 8)).sum().backward()
    assert not taken
    assert block.lite.bn1.num_batches_tracked == 1


def test_nchw_autocast_and_other_backends_are_left_to_the_operators(taken):
    block, x = make(), torch.randn(2, 8, 8, 8)
    block(x)
    assert taken == [False]
    with torch.autocast("cpu", torch.bfloat16):
        assert block(image(2, 8, 8, 8)).dtype is torch.bfloat16
    with tk.use_backend("reference"):
        block(image(2, 8, 8, 8))
    assert taken == [False]


def test_a_second_derivative_is_an_error_where_it_is_asked_for(taken):
    block, x = make(), image(2, 8, 8, 8).requires_grad_()
    (first,) = torch.autograd.grad(block(x).square().sum(), x, create_graph=True)
    assert taken == [True]
    with pytest.raises(RuntimeError, match=r"tinytl::.*_backward has no second derivative.*to_torch"):
        first.sum().backward()


def test_a_weight_changed_in_place_before_backward_is_noticed(taken):
    block = make()
    output = block(image(2, 8, 8, 8))
    with torch.no_grad():
        block.lite.conv1.weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()


def test_a_trained_weight_of_the_block_is_refused():
    block = make()
    block.main.project.weight.requires_grad_(True)
    with pytest.raises(RuntimeError, match="computes no weight gradient"):
        block(image(2, 8, 8, 8))
