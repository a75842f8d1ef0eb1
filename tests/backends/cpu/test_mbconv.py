"""The block with any activation and squeeze-and-excite in one call: as exact as its layers, and only its input kept."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import tinytl_kernels as tk
from tests.backends.cpu.exact import poisoned_memory
from tests.backends.cpu.fused import counted, image
from tests.checks import saved_tensors
from tests.threads import num_threads
from tinytl_kernels import FrozenConvBias, ops
from tinytl_kernels.core.activations import STAND_ALONE
from tinytl_kernels.core.layout import memory_format

pytestmark = pytest.mark.usefixtures("cpu_kernels")


@pytest.fixture
def taken(monkeypatch) -> list[bool]:
    return counted("mbconv", monkeypatch)


class Block(nn.Module):
    """The block of its frozen layers, computed in one call or, with ``fused`` False, layer by layer."""

    see_gated = None  # called with what is gated and the gradient of the product

    def __init__(
        self, channels=8, expanded=48, out=24, kernel=3, stride=1, padding=None, activation="silu", squeezed=4,
        squeeze_activation="silu", gate="sigmoid", residual=False,
    ) -> None:  # fmt: skip
        super().__init__()
        padding = kernel // 2 if padding is None else padding
        self.expand = None if expanded == channels else FrozenConvBias(channels, expanded, 1)
        self.depthwise = FrozenConvBias(expanded, expanded, kernel, stride, padding, groups=expanded)
        self.reduce = FrozenConvBias(expanded, squeezed, 1) if squeezed else None
        self.restore = FrozenConvBias(squeezed, expanded, 1) if squeezed else None
        self.project = FrozenConvBias(expanded, out, 1)
        self.activation, self.squeeze_activation, self.gate = activation, squeeze_activation, gate
        self.residual, self.fused = residual, True
        for conv in self.convs:
            nn.init.normal_(conv.bias, std=0.5)

    @property
    def convs(self) -> list[FrozenConvBias]:
        return list(self.children())

    def forward(self, x: Tensor) -> Tensor:
        if not self.fused:
            return self.layer_by_layer(x)
        gate = None
        if self.reduce is not None:
            operands = self.reduce.operands(), self.restore.operands()
            gate = ops.SqueezeExcite(*operands, self.squeeze_activation, self.gate)
        output = ops.mbconv(
            x,
            None if self.expand is None else self.expand.operands(),
            self.depthwise.operands(),
            self.project.operands(),
            self.depthwise.stride,
            self.depthwise.four_paddings(x),
            self.activation,
            gate,
            self.residual,
        )
        assert output is not None
        return output

    def layer_by_layer(self, x: Tensor) -> Tensor:
        h = x if self.expand is None else _activate(self.expand(x), self.activation)
        h = _activate(self.depthwise(h), self.activation)
        if self.reduce is not None:
            squeezed = _activate(self.reduce(h.mean((2, 3), keepdim=True)), self.squeeze_activation)
            gated = h * _activate(self.restore(squeezed), self.gate)
            if self.see_gated is not None:
                gated.register_hook(partial(self.see_gated, h))
            h = gated
        y = self.project(h)
        return x + y if self.residual else y


def _activate(x: Tensor, name: str | None) -> Tensor:
    # torch's own, so that nothing of ours is on the other side.
    f = nn.functional
    known = {
        None: lambda x: x, "relu": f.relu, "relu6": f.relu6, "leaky_relu": f.leaky_relu, "hardsigmoid": f.hardsigmoid,
        "hardswish": f.hardswish, "silu": f.silu, "gelu": f.gelu, "sigmoid": torch.sigmoid,
        "gelu_tanh": lambda x: f.gelu(x, approximate="tanh"),
    }  # fmt: skip
    return known[name](x)


def step(block: Block, x: Tensor) -> dict[str, Tensor]:
    """Output, gradient of the input and of every bias, for the same random gradient of the output."""
    block.zero_grad()
    x = x.detach().requires_grad_()
    output = block(x)
    generator = torch.Generator().manual_seed(5)
    output.backward(torch.randn(output.shape, generator=generator).to(output.dtype))
    biases = {name: p.grad for name, p in block.named_parameters() if name.endswith("bias")}
    return {"output": output.detach(), "input": x.grad, **biases}


def added_up(block: Block) -> dict[str, Tensor]:
    """For every bias, once the block has been differentiated layer by layer: the sum of what adds up to its gradient,
    without signs. Before the restored values, of which an image has one a channel, it is the sum over the pixels that
    cancels; before the squeezed values, which are few, the sum over the restored channels, too."""
    sums = {}
    cancelled = []  # by how much the sum over the pixels is smaller than it would be without signs

    def see_gated(h: Tensor, grad: Tensor) -> None:
        terms = grad * h
        sides = {"dim": (2, 3), "keepdim": True}
        cancelled.append((terms.abs().sum(**sides) / terms.sum(**sides).abs()).nan_to_num(1.0))

    block.see_gated = see_gated

    def add(name: str, terms: Tensor) -> None:
        sums[name] = torch.maximum(sums.get(name, terms), terms)

    def watch(conv: nn.Module, args: tuple, output: Tensor) -> None:
        def seen(grad: Tensor) -> None:
            size = grad.abs()
            if conv is block.restore:
                size = size * cancelled[-1]
                add(
                    "reduce.bias", torch.einsum("nehw,es->s", size, conv.float_weight().abs().flatten(1).to(grad.dtype))
                )
            add(names[conv], size.sum((0, 2, 3)))

        output.register_hook(seen)

    names = {module: f"{name}.bias" for name, module in block.named_children()}
    for conv in block.convs:
        conv.register_forward_hook(watch)
    return sums


def assert_exact(block: Block, x: Tensor, factor: float = 3.0) -> dict[str, Tensor]:
    """The block's step, after comparing it with float64: no more than ``factor`` times off what its layers are, and
    some rounding, of a bias's gradient relative to the terms of its sum, which may cancel."""
    with poisoned_memory():
        ours = step(block, x)
    layers = copy.deepcopy(block)
    layers.fused = False
    theirs = step(layers, x)
    exact_layers = copy.deepcopy(layers).double()
    terms = added_up(exact_layers)
    with tk.use_backend("reference"):
        exact = step(exact_layers, x.double())
    for name, expected in exact.items():
        a, b = ours[name], theirs[name]
        assert (a.shape, a.dtype) == (b.shape, b.dtype), name
        error, layered = ((t.double() - expected).norm().item() for t in (a, b))
        rounding = (4e-6 + 8 * torch.finfo(x.dtype).eps) * expected.norm().item()
        if name in terms:
            rounding = 16 * torch.finfo(x.dtype).eps * terms[name].norm().item()
        assert error <= factor * layered + rounding, f"{name}: {error:.2e}, its layers {layered:.2e}, {rounding:.2e}"
    return ours


@pytest.mark.parametrize("activation", [None, *STAND_ALONE])
@pytest.mark.parametrize("squeezed", [0, 4])
def test_every_activation(activation, squeezed, taken):
    block = Block(activation=activation, squeezed=squeezed, squeeze_activation="relu", gate="hardsigmoid")
    assert_exact(block, 2 * image(3, 8, 9, 11))
    assert taken == [True]


@pytest.mark.parametrize("name", STAND_ALONE)
def test_every_activation_inside_and_every_gate(name):
    assert_exact(Block(squeeze_activation=name, gate=name), image(2, 8, 7, 7))


@given(
    batch=st.integers(1, 6),
    height=st.integers(1, 20),
    width=st.integers(1, 20),
    channels=st.integers(1, 30),
    expanded=st.integers(1, 70),
    out=st.integers(1, 30),
    kernel=st.sampled_from([1, 2, 3, 5]),
    stride=st.integers(1, 3),
    pads=st.tuples(*[st.integers(0, 3)] * 4),
    squeezed=st.sampled_from([0, 1, 5, 12]),
    activation=st.sampled_from(["relu", "hardswish", "silu"]),
    count=st.sampled_from([1, 2, 5]),
)
# One value is squeezed, and the sum over the pixels of its gate's gradient cancels.
@example(
    batch=1, height=17, width=13, channels=13, expanded=1, out=12, kernel=3, stride=2, pads=(0, 0, 0, 2), squeezed=5,
    activation="silu", count=1,
)  # fmt: skip
@settings(max_examples=100, deadline=None)
def test_any_shape(batch, height, width, pads, kernel, count, **options):
    top, bottom, left, right = pads
    assume(height + top + bottom >= kernel and width + left + right >= kernel)
    torch.manual_seed(0)
    block, x = Block(kernel=kernel, padding=pads, **options), image(batch, options["channels"], height, width)
    assume(memory_format(x) is torch.channels_last)  # a picture of one channel may be in any layout
    with num_threads(count):
        assert_exact(block, x)


@pytest.mark.parametrize("images", [1, 2, 3, 9])
@pytest.mark.parametrize("count", [1, 2, 4, 7])
@pytest.mark.parametrize("options", [dict(), dict(kernel=5, stride=2), dict(squeezed=0, expanded=8)], ids=str)
def test_the_same_bits_run_after_run(images, count, options):
    block, x = Block(out=8, **options), image(images, 8, 23, 19)
    with num_threads(count):
        first = assert_exact(block, x)
        for _ in range(3):
            again = step(block, x)
            assert all(torch.equal(again[name], first[name]) for name in first)


def test_a_large_image_whose_rows_go_through_a_ring():
    assert_exact(Block(channels=16, expanded=96, out=16, residual=True), image(2, 16, 112, 60))


def test_the_shortcut():
    assert_exact(Block(out=8, residual=True, squeezed=0), image(2, 8, 9, 9))
    assert_exact(Block(out=8, residual=True), image(2, 8, 9, 9))


def test_no_images():
    block, x = Block(), image(0, 8, 9, 9).requires_grad_()
    tensors = [t for conv in block.convs for t in conv.operands()]
    output = torch.ops.tinytl_cpu.mbconv(x, tensors, 1, [1] * 4, "silu", "silu", "sigmoid", False)
    assert output.shape == (0, 24, 9, 9)
    output.sum().backward()
    assert x.grad.shape == x.shape
    assert all(conv.bias.grad.eq(0).all() for conv in block.convs)


def test_only_the_input_is_kept():
    block, x = Block(), image(4, 8, 14, 14)
    held = {p.data_ptr() for p in block.parameters()}
    kept = []

    def pack(tensor: Tensor) -> Tensor:
        if tensor.data_ptr() not in held and tensor.numel():
            kept.append(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        block(x)
    assert kept == [(4, 8, 14, 14)]
    with torch.no_grad():
        assert saved_tensors(lambda: block(x)) == []


ALONE = [(4, name) for name in ("expand", "depthwise", "reduce", "restore", "project", "input")]
ALONE += [(0, name) for name in ("expand", "depthwise", "project", "input")]


@pytest.mark.parametrize(("squeezed", "trained"), ALONE)
def test_only_what_is_asked_for(squeezed, trained):
    block, x = Block(squeezed=squeezed), image(3, 8, 9, 9)
    everything = step(block, x)
    block.requires_grad_(False)
    x.requires_grad_(trained == "input")
    if trained != "input":
        block.get_submodule(trained).bias.requires_grad_()
    output = block(x)
    generator = torch.Generator().manual_seed(5)
    block.zero_grad()
    output.backward(torch.randn(output.shape, generator=generator))
    gradient = x.grad if trained == "input" else block.get_submodule(trained).bias.grad
    assert torch.equal(gradient, everything["input" if trained == "input" else f"{trained}.bias"])
    assert (x.grad is not None) == (trained == "input")


@pytest.mark.parametrize("weights", ["half", "float32"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype, weights):
    block = Block(activation="hardswish").to(dtype)
    if weights == "float32":
        block = block.float()
    assert_exact(block, image(3, 8, 14, 14, dtype=dtype), factor=1.5)


@pytest.mark.parametrize("code", ["int8", "kmeans"])
def test_weights_in_8_bits(code):
    block = Block()
    for conv in block.convs:
        conv.quantize_(code)
    assert_exact(block, image(2, 8, 14, 14))


def test_history_without_values():
    block, x = Block(), image(2, 8, 9, 9).requires_grad_()
    expected = step(block, x)
    tensors = [t for conv in block.convs for t in conv.operands()]
    block.zero_grad()
    output = torch.ops.tinytl_cpu.mbconv(x, tensors, 1, [1] * 4, "silu", "silu", "sigmoid", False, False)
    output.backward(torch.randn(output.shape, generator=torch.Generator().manual_seed(5)))
    assert torch.equal(x.grad, expected["input"])


def test_a_second_derivative_is_refused():
    x = image(2, 8, 9, 9).requires_grad_()
    with pytest.raises(RuntimeError, match=r"no second derivative.*to_torch"):
        torch.autograd.grad(Block()(x).square().sum(), x, create_graph=True)


def test_not_a_number_stays_in_its_image():
    block, x = Block(activation="hardswish"), image(3, 8, 9, 9)
    clean = step(block, x)
    x[1, 2, 3, 4] = float("nan")
    dirty = step(block, x)
    assert dirty["output"][1].isnan().all()
    assert dirty["input"][1].isnan().all()
    for i in (0, 2):
        assert torch.equal(dirty["output"][i], clean["output"][i])
        assert torch.equal(dirty["input"][i], clean["input"][i])


def test_what_the_call_leaves_alone(taken):
    block = Block()
    gate = ops.SqueezeExcite(block.reduce.operands(), block.restore.operands(), "silu", "sigmoid")
    layers = block.expand.operands(), block.depthwise.operands(), block.project.operands()
    numbers = (1, 1), (1, 1, 1, 1), "silu", gate
    assert ops.mbconv(torch.randn(2, 8, 9, 9), *layers, *numbers) is None  # not channels_last
    assert ops.mbconv(image(2, 8, 9, 9), *layers, (1, 2), *numbers[1:]) is None
    assert taken == [False, False]
    with tk.use_backend("reference"):
        assert ops.mbconv(image(2, 8, 9, 9), *layers, *numbers) is None
    assert ops.mbconv(image(2, 8, 9, 9), *layers, *numbers) is not None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(activation="swish"), "activation: expected None or one of .*'swish'"),
        (dict(gate="gate"), "gate: expected None or one of .*'gate'"),
    ],
    ids=str,
)
def test_unknown_activations(change, message):
    with pytest.raises(ValueError, match=message):
        Block(**change)(image(2, 8, 9, 9))


def test_layers_that_do_not_fit():
    with pytest.raises(RuntimeError, match=r"expand_weight: expected \(48, 9, 1, 1\), got \[48, 8, 1, 1\]"):
        Block()(image(2, 9, 9, 9))
    block = Block()
    block.reduce = FrozenConvBias(40, 4, 1)
    with pytest.raises(RuntimeError, match=r"reduce_weight: expected \(4, 48, 1, 1\)"):
        block(image(2, 8, 9, 9))


def test_trained_weights_are_refused():
    block = Block()
    tensors = [t for conv in block.convs for t in conv.operands()]
    tensors[0] = tensors[0].detach().requires_grad_()
    with pytest.raises(RuntimeError, match="expand_weight: a frozen block"):
        torch.ops.tinytl_cpu.mbconv(image(2, 8, 9, 9), tensors, 1, [1] * 4, "silu", "silu", "sigmoid", False)
