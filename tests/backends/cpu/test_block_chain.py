"""Blocks and their lite residuals in one call: the bits of their operators, and left to them where it has to be."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import tinytl_kernels as tk
from tests.allocations import steadily_allocated
from tests.backends.cpu.fused import CPU, counted, image, kept
from tinytl_kernels.core.hooks import listens_only
from tinytl_kernels.nn import FusedSequential

pytestmark = pytest.mark.usefixtures("cpu_kernels")

NAME = "block_chain"

NORMS = {
    "batch norm": nn.BatchNorm2d,
    "group norm": lambda channels: nn.GroupNorm(2, channels),
    "no running statistics": lambda channels: nn.BatchNorm2d(channels, track_running_stats=False),
}


@pytest.fixture
def taken(monkeypatch) -> list[bool]:
    """For every time that the one call was asked for: whether it took the blocks."""
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


def assert_only_trained(model: nn.Module, results: dict) -> None:
    for name, parameter in model.named_parameters():
        assert (results[name] is not None) == parameter.requires_grad, name


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
    assert_only_trained(block, ours)
    assert (ours["input"] is not None) == input_grad


@pytest.mark.parametrize("many", [False, True])
def test_without_gradients(many, taken, monkeypatch):
    model, x = (row().eval(), image(2, 3, 20, 20)) if many else (make(), image(2, 8, 8, 8))
    with torch.no_grad():
        ours = model(x)
    assert taken == [True]
    assert not ours.requires_grad
    monkeypatch.delitem(CPU.FUSED, NAME)
    assert torch.equal(ours, model(x))


def test_it_keeps_the_same_bytes(taken, monkeypatch):
    block = make()
    ours = kept(lambda: block(image(2, 8, 8, 8).requires_grad_()))
    assert taken == [True]
    monkeypatch.delitem(CPU.FUSED, NAME)
    assert ours == kept(lambda: block(image(2, 8, 8, 8).requires_grad_()))


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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("given", [torch.float32, torch.bfloat16])
def test_autocast(dtype, given, taken, monkeypatch):
    with torch.autocast("cpu", dtype):
        ours, theirs = both(make(), image(2, 8, 9, 9, dtype=given), taken, monkeypatch)
    assert ours["output"].dtype is dtype
    assert_same(ours, theirs)


def test_nchw_and_other_backends_are_left_to_the_operators(taken):
    block, x = make(), torch.randn(2, 8, 8, 8)
    block(x)
    assert taken == [False]
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


def conv(channels: int, out: int, k: int = 1, **options) -> tk.FrozenConvBias:
    return tk.FrozenConvBias(channels, out, k, **options)


def row() -> FusedSequential:
    """Blocks of every kind in a row: with and without a lite residual, of loose convolutions, in a Sequential of their
    own, padded as TensorFlow does, with strides; something else before and behind them."""
    return FusedSequential(
        conv(3, 8, 3, padding=1, activation="relu6"),
        tk.FrozenInvertedResidual(8, 8, expand_ratio=2),
        make(stride=2),
        nn.Identity(),
        conv(12, 20, activation="relu"),
        conv(20, 20, 5, stride=2, padding="tf_same", groups=20, activation="relu"),
        conv(20, 8, activation=None),
        nn.Sequential(
            make("group norm"), nn.Identity(), tk.FrozenInvertedResidual(8, 6, expand_ratio=1, kernel_size=3)
        ),
        conv(6, 5),
    ).to(memory_format=torch.channels_last)


def assert_all_same(ours: dict, theirs: dict) -> None:
    assert any(result is not None for name, result in ours.items() if name.endswith("bias"))
    assert_same(ours, theirs)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("size", [(2, 3, 31, 28), (1, 3, 16, 17), (3, 3, 12, 12)], ids=str)
def test_a_row_of_blocks_is_one_call_and_has_their_bits(size, training, taken, monkeypatch):
    assert_all_same(*both(row().train(training), image(*size), taken, monkeypatch))


def test_a_row_under_autocast(taken, monkeypatch):
    with torch.autocast("cpu", torch.bfloat16):
        ours, theirs = both(row(), image(2, 3, 20, 20), taken, monkeypatch)
    assert ours["output"].dtype is torch.bfloat16
    assert_all_same(ours, theirs)


@pytest.mark.parametrize(
    "frozen", [["1"], ["1", "2"], ["2.lite", "7.0.lite"], ["2.main", "4", "5", "6"], ["0", "8"]], ids=" ".join
)
def test_a_row_computes_the_gradients_that_are_asked_for(frozen, taken, monkeypatch):
    model = row()
    for name in frozen:
        model.get_submodule(name).requires_grad_(False)
    ours, theirs = both(model, image(2, 3, 20, 20), taken, monkeypatch, input_grad=False)
    assert_all_same(ours, theirs)
    assert_only_trained(model, ours)


@pytest.mark.parametrize("trained", ["", "0", "7.2", "2.lite", "8"])
def test_a_row_keeps_the_same_bytes(trained, taken, monkeypatch):
    model = row().requires_grad_(False)
    if trained:
        module = model.get_submodule(trained)
        for parameter in [module.bias] if isinstance(module, tk.FrozenConvBias) else module.parameters():
            parameter.requires_grad_(parameter.dim() == 1 or "lite" in trained)
    ours = kept(lambda: model(image(2, 3, 20, 20)))
    assert taken == [True]
    assert any(ours) == bool(trained)
    monkeypatch.delitem(CPU.FUSED, NAME)
    assert ours == kept(lambda: model(image(2, 3, 20, 20)))


@pytest.mark.parametrize("listening", [True, False])
def test_a_block_with_a_hook_is_called(listening, taken):
    model, x, seen = row(), image(2, 3, 20, 20), []
    hook = lambda module, args, output: seen.append(output.shape)  # noqa: E731
    handle = model[2].register_forward_hook(listens_only(hook) if listening else hook)
    model(x)
    assert seen == [(2, 12, 10, 10)]
    assert taken == [True, True]  # itself, and the row behind it
    handle.remove()
    handle = model[7].register_forward_hook(hook)
    model(x)
    assert len(seen) == 2
    handle.remove()
    del taken[:]
    with nn.modules.module.register_module_forward_hook(lambda module, args, output: seen.append(module)):
        model(x)
    assert model[1] in seen
    del taken[:]
    model(x)
    assert taken == [True]


def test_a_row_is_asked_for_once_where_it_is_refused(taken):
    model, x = row(), image(2, 3, 20, 20)
    expected = model(x)
    del taken[:]
    rows = copy.deepcopy(model).to(memory_format=torch.contiguous_format)
    torch.testing.assert_close(rows(x.contiguous()), expected, rtol=1e-4, atol=1e-5)
    # The row, and each lite residual by itself.
    assert taken == [False] * 3
    with tk.use_backend("reference"):
        torch.testing.assert_close(model(x), expected, rtol=1e-3, atol=1e-3)
    model[5].activation = model[4].activation = "leaky_relu"  # which the kernels leave to the reference
    model(x)
    assert taken == [False] * 4 + [True] * 2


def test_nothing_is_counted_where_a_block_is_refused(taken):
    model = row()
    last = model[7][2].project
    last.bias = nn.Parameter(torch.zeros(7))
    with pytest.raises(ValueError, match=r"project_bias: expected shape \(6,\), got \(7,\)"):
        model(image(2, 3, 20, 20))
    assert model[2].lite.bn1.num_batches_tracked == 0
    last.bias = nn.Parameter(torch.zeros(6).double())
    with pytest.raises(ValueError, match=r"project_bias: expected dtype torch\.float32"):
        model(image(2, 3, 20, 20))
    last.bias = None
    with pytest.raises(ValueError, match=r"input: .* smaller than the kernel|expected at least 2 x 2 pixels to pool"):
        model(image(2, 3, 1, 1))
    assert not taken
    last.weight.requires_grad_(True)
    with pytest.raises(RuntimeError, match="computes no weight gradient"):
        model(image(2, 3, 20, 20))
    assert model[2].lite.bn1.num_batches_tracked == 0


def test_a_row_frees_what_it_has_used():
    """The one call holds no block's output beyond the next: as much as the blocks one by one."""
    block = tk.FrozenInvertedResidual(8, 8, expand_ratio=1).requires_grad_(False)
    model = FusedSequential(*(copy.deepcopy(block) for _ in range(12))).to(memory_format=torch.channels_last)
    x = image(1, 8, 64, 64)
    peaks = []
    for fused in (True, False):
        model.fused = fused
        peaks.append(steadily_allocated(lambda: model(x))[0])
    assert 0 < peaks[0] <= peaks[1] + x.nbytes


def test_convert_makes_a_row_of_a_networks_stages(taken):
    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            stages = [nn.Sequential(Bottleneck(8), Bottleneck(8)), nn.Sequential(Bottleneck(8))]
            self.stem, self.blocks = nn.Conv2d(3, 8, 1), nn.Sequential(*stages)
            self.head = nn.Linear(8, 3)

        def forward(self, x):
            return self.head(self.blocks(self.stem(x)).mean((2, 3)))

    x = image(2, 3, 16, 16)
    stock = Network().eval()
    for method, blocks in (("bias", 0), ("lite_residual+bias", 3)):
        model = tk.convert(stock, method, example_input=x)
        assert sum(isinstance(m, tk.LiteResidualBlock) for m in model.modules()) == blocks
        assert type(model.blocks) is type(model.blocks[0]) is FusedSequential
        assert "up to 3 blocks in one call" in str(tk.conversion_report(model))
        del taken[:]
        torch.testing.assert_close(model(x), stock(x), rtol=1e-4, atol=1e-5)
        assert taken == [True]
        measured = {row.name for row in tk.measure_memory(model, x).by_layer}
        assert "blocks.0.1" in measured  # a measurement tells the blocks apart
        plain = tk.to_torch(model)
        assert type(plain.blocks) is type(plain.blocks[0]) is nn.Sequential
        torch.testing.assert_close(plain(x), model(x), rtol=1e-4, atol=1e-5)


class Bottleneck(nn.Module):
    """An inverted residual block as networks write it."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        hidden = 3 * channels
        self.layers = nn.Sequential(
            nn.Conv2d(channels, hidden, 1, bias=False), nn.BatchNorm2d(hidden), nn.ReLU6(),
            nn.Conv2d(hidden, hidden, 3, 1, 1, groups=hidden, bias=False), nn.BatchNorm2d(hidden), nn.ReLU6(),
            nn.Conv2d(hidden, channels, 1, bias=False), nn.BatchNorm2d(channels),
        )  # fmt: skip

    def forward(self, x):
        return x + self.layers(x)


def test_a_row_compiles(taken):
    model, x = row().eval(), image(2, 3, 20, 20)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-5)
