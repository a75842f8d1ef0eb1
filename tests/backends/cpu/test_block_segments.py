"""Blocks of a chain image by image: the bits of blocks one by one, for no more memory than their largest takes."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
import torch.utils.checkpoint
from torch import nn
from torch.profiler import ProfilerActivity, profile

import tinytl_kernels as tk
from tests.allocations import steadily_allocated
from tests.backends.cpu.fused import CPU, image
from tests.threads import num_threads
from tinytl_kernels.nn import FusedSequential

pytestmark = pytest.mark.usefixtures("cpu_kernels")

FORWARD, BACKWARD = "tinytl_cpu::inverted_residual_forward", "tinytl_cpu::inverted_residual_backward"
BLOCKS = 7


def network(activation: str | None = "relu6", bits: int = 32) -> FusedSequential:
    """Shrinking as networks do: the first blocks need more memory than those behind them together."""
    torch.manual_seed(5)
    block = tk.FrozenInvertedResidual
    model = FusedSequential(
        block(9, 12, expand_ratio=2, activation=activation),
        block(12, 12, expand_ratio=4, kernel_size=5, stride=2, activation=activation),
        block(12, 20, expand_ratio=4, stride=2, activation=activation),
        block(20, 20, expand_ratio=4, activation=activation),
        block(20, 24, expand_ratio=1, activation=activation),
        block(24, 24, expand_ratio=3, kernel_size=7, activation=activation),
        block(24, 31, expand_ratio=3, stride=2, activation=activation),
    )
    assert len(model) == BLOCKS
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.endswith("bias"))
        if name.endswith("bias"):
            nn.init.normal_(parameter)
    if bits == 8:
        for child in model:
            child.quantize_()
    return model.to(memory_format=torch.channels_last)


def step(model: nn.Module, x: torch.Tensor, input_grad: bool) -> list[torch.Tensor | None]:
    x = x.detach().clone(memory_format=torch.preserve_format).requires_grad_(input_grad)
    model.zero_grad()
    output = model(x)
    generator = torch.Generator().manual_seed(3)
    output.backward(torch.randn(output.shape, generator=generator).to(output.dtype))
    return [output.detach(), x.grad, *(p.grad for p in model.parameters())]


def kernels(function) -> Counter[str]:
    with profile(activities=[ProfilerActivity.CPU]) as trace:
        function()
    return Counter(event.name for event in trace.events() if event.name in (FORWARD, BACKWARD))


def assert_bits(ours, theirs) -> None:
    for a, b in zip(ours, theirs, strict=True):
        assert (a is None) == (b is None)
        assert a is None or torch.equal(a, b)


def one_by_one(model: nn.Module, monkeypatch, function):
    with monkeypatch.context() as patch:
        patch.delitem(CPU.FUSED, "block_chain")
        return function(model)


@pytest.mark.parametrize("count", [2, 3, 4])
@pytest.mark.parametrize("images", [4, 12])
@pytest.mark.parametrize("size", [(65, 47), (32, 32)], ids=str)
def test_the_bits_of_blocks_one_by_one(size, images, count, monkeypatch):
    model, x = network(), image(images, 9, *size)
    with num_threads(count):
        ours = step(model, x, True)
        seen = kernels(lambda: step(model, x, True))
        assert_bits(ours, one_by_one(model, monkeypatch, lambda m: step(m, x, True)))
    if images % count == 0:  # else threads share the rows of images
        assert seen[FORWARD] == seen[BACKWARD] < BLOCKS - 1


@pytest.mark.parametrize("images", [1, 7, 16, 17])
def test_weights_that_leave_a_cache_are_read_for_several_images(images, monkeypatch):
    """Blocks whose weights are packed into more than a thread's budget go through in waves of two images and more."""
    block = tk.FrozenInvertedResidual
    model = FusedSequential(
        block(9, 16, expand_ratio=2, stride=2),
        block(16, 96, expand_ratio=4, stride=2),
        block(96, 96, expand_ratio=5, stride=2),
        block(96, 96, expand_ratio=5),
    )
    for parameter in model.parameters():
        parameter.requires_grad_(parameter.dim() == 1)
    model, x = model.to(memory_format=torch.channels_last), image(images, 9, 96, 96)
    with num_threads(2):
        ours = step(model, x, False)
        assert_bits(ours, one_by_one(model, monkeypatch, lambda m: step(m, x, False)))
        assert images % 2 or kernels(lambda: step(model, x, False))[BACKWARD] < len(model)
        assert_bits(step(model, x, False), ours)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("activation", ["relu", None])
@pytest.mark.parametrize("bits", [32, 8])
def test_whatever_the_blocks_are(bits, activation, dtype, monkeypatch):
    model, x = network(activation, bits).to(dtype), image(4, 9, 65, 61, dtype=dtype)
    with num_threads(2):
        assert kernels(lambda: model(x))[FORWARD] < BLOCKS - 1
        assert_bits(step(model, x, True), one_by_one(model, monkeypatch, lambda m: step(m, x, True)))


@pytest.mark.parametrize(
    "trained", ["0.expand", "1.depthwise", "4.project", "6.depthwise", "6.project", "3.expand 5.project"]
)
@pytest.mark.parametrize("input_grad", [True, False])
def test_only_what_is_asked_for(trained, input_grad, monkeypatch):
    model, x = network().requires_grad_(False), image(4, 9, 32, 32)
    for name in trained.split():
        model.get_submodule(name).bias.requires_grad_(True)
    with num_threads(2):
        ours = step(model, x, input_grad)
        assert_bits(ours, one_by_one(model, monkeypatch, lambda m: step(m, x, input_grad)))
    assert (ours[1] is not None) == input_grad
    for parameter, gradient in zip(model.parameters(), ours[2:], strict=True):
        assert (gradient is not None) == parameter.requires_grad


@pytest.mark.parametrize("training", [True, False])
def test_a_segment_needs_no_more_than_the_largest_block(training, monkeypatch):
    model, x = network().requires_grad_(False), image(8, 9, 96, 96)
    for child in model:
        child.project.bias.requires_grad_(training)

    def peak(model) -> int:
        return x.nbytes + steadily_allocated(lambda: model(x).sum().backward() if training else model(x))[0]

    with num_threads(2):
        assert kernels(lambda: model(x))[FORWARD] < BLOCKS - 1
        ours, theirs = peak(model), one_by_one(model, monkeypatch, peak)
    small = 16 * 1024  # the sums of the biases' gradients, and biases in whole vectors
    assert x.nbytes < ours <= theirs + small


@pytest.mark.parametrize("training", [True, False])
def test_equal_blocks_are_cut_where_two_would_need_more(training):
    """Every block needs as much as the next, and two of them what is under way between them: more than one needs in
    backward, and in forward less than the chain's input, which stays."""
    model = FusedSequential(*(tk.FrozenInvertedResidual(8, 8, expand_ratio=1) for _ in range(6)))
    for parameter in model.to(memory_format=torch.channels_last).parameters():
        parameter.requires_grad_(training and parameter.dim() == 1)
    with num_threads(2):
        seen = kernels(lambda: model(image(4, 8, 64, 64)))[FORWARD]
    assert seen == 6 if training else seen < 6


def test_a_segment_notices_weights_changed_before_backward():
    model, x = network(), image(4, 9, 32, 32)
    with num_threads(2):
        output = model(x).sum()
        with torch.no_grad():
            model[3].project.weight.mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            output.backward()


def test_a_second_derivative_is_an_error():
    model, x = network(), image(4, 9, 32, 32).requires_grad_()
    with num_threads(2):
        (gradient,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
        with pytest.raises(RuntimeError, match="no second derivative"):
            gradient.sum().backward()


def test_the_same_bits_run_after_run():
    model, x = network(), image(6, 9, 40, 36)
    with num_threads(3):
        first = step(model, x, True)
        for _ in range(10):
            assert_bits(step(model, x, True), first)


@pytest.mark.parametrize("size", [(0, 9, 32, 32), (2, 9, 4, 5)], ids=str)
def test_no_image_and_small_ones(size, monkeypatch):
    model, x = network(), image(*size)
    with num_threads(2):
        assert_bits(step(model, x, True), one_by_one(model, monkeypatch, lambda m: step(m, x, True)))


def test_backward_twice_and_parameters_stepped_in_between():
    model, x = network(), image(4, 9, 32, 32)
    with num_threads(2):
        loss = model(x).square().sum()
        loss.backward(retain_graph=True)
        once = [p.grad.clone() for p in model.parameters() if p.requires_grad]
        with torch.no_grad():  # as an optimizer that steps while gradients come in: biases are not read in backward
            model[1].depthwise.bias.add_(1)
        loss.backward()
    for parameter, gradient in zip((p for p in model.parameters() if p.requires_grad), once, strict=True):
        torch.testing.assert_close(parameter.grad, 2 * gradient)


def test_checkpointed():
    model, x = network(), image(4, 9, 32, 32).requires_grad_()
    with num_threads(2):
        (plain,) = torch.autograd.grad(model(x).square().sum(), x)
        output = torch.utils.checkpoint.checkpoint(model, x, use_reentrant=False)
        (again,) = torch.autograd.grad(output.square().sum(), x)
    assert torch.equal(plain, again)


def test_infinities_stay_in_their_image():
    model, x = network("relu"), image(4, 9, 32, 32)
    with num_threads(2):
        expected = model(x)
        x[2] = float("nan")
        output = model(x)
    for i in (0, 1, 3):
        assert torch.equal(output[i], expected[i])
    assert output[2].isnan().all()
