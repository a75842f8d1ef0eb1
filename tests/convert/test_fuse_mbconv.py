"""convert finds the blocks of MobileNetV3 and EfficientNet and computes each in one call on a CPU."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

from tests.backends.cpu.fused import counted
from tests.checks import saved_bytes
from tests.convert.models import zoo_model
from tests.process_group import run_in_process_group
from tinytl_kernels import FrozenConvBias, conversion_report, convert, measure_memory, to_torch, use_backend
from tinytl_kernels import nn as tnn
from tinytl_kernels.models import import_torchvision
from tinytl_kernels.nn import MBConv, recomputed

pytestmark = pytest.mark.usefixtures("cpu_kernels")


@pytest.fixture
def taken(monkeypatch) -> list[bool]:
    return counted("mbconv", monkeypatch)


def blocks_of(model: nn.Module) -> list[MBConv]:
    return [module for module in model.modules() if isinstance(module, MBConv)]


def layer_by_layer(model: nn.Module) -> nn.Module:
    model = copy.deepcopy(model)
    for block in blocks_of(model):
        block.fused = False
    return model


def images(count: int, size: int = 64, channels: int = 3) -> torch.Tensor:
    return torch.randn(count, channels, size, size).contiguous(memory_format=torch.channels_last)


def step(model: nn.Module, x: torch.Tensor, seed: int = 0) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    model.zero_grad()
    output = model(x)
    output.float().square().mean().backward()
    return {"output": output.detach(), **{n: p.grad for n, p in model.named_parameters() if p.grad is not None}}


def assert_close(ours: dict, theirs: dict, tolerance: float = 1e-4) -> None:
    assert ours.keys() == theirs.keys()
    for name, expected in theirs.items():
        assert (ours[name] - expected).norm() <= tolerance * expected.norm() + 1e-12, name


FAMILIES = {
    "torchvision:mobilenet_v3_small": 8,
    "torchvision:efficientnet_b0": 16,
    "timm:tf_efficientnet_b0": 16,
    "timm:mobilenetv3_small_100": 8,
    "timm:semnasnet_100": 7,
}


@pytest.mark.parametrize("name", FAMILIES)
def test_families(name, taken):
    x = images(3)
    model = convert(zoo_model(name), "bias", example_input=x[:1]).eval()
    blocks = blocks_of(model)
    assert len(blocks) == FAMILIES[name]
    notes = [note for note in conversion_report(model).done if note.text == "on a CPU, whole block as one operator"]
    assert len(notes) == len(blocks)
    taken.clear()
    ours = step(model, x)
    assert len(taken) >= len(blocks)
    assert all(taken)
    taken.clear()
    theirs = step(layer_by_layer(model), x)
    assert taken == []
    # Gradients of networks with relu amplify rounding: an input changed by 1e-6 changes them by up to 1e-2.
    assert_close(ours, theirs, 2e-2)
    torch.testing.assert_close(ours["output"], theirs["output"], rtol=1e-3, atol=1e-4)


class Gate(nn.Module):
    def __init__(self, channels: int, squeezed: int, gate: nn.Module) -> None:
        super().__init__()
        self.reduce, self.restore = nn.Conv2d(channels, squeezed, 1), nn.Conv2d(squeezed, channels, 1)
        self.activation, self.gate = nn.ReLU(), gate

    def forward(self, x):
        return x * self.gate(self.restore(self.activation(self.reduce(x.mean((2, 3), keepdim=True)))))


def conv_norm(c_in, c_out, kernel=1, activation=None, **options) -> nn.Sequential:
    layers = [nn.Conv2d(c_in, c_out, kernel, padding=kernel // 2, bias=False, **options), nn.BatchNorm2d(c_out)]
    return nn.Sequential(*layers, *([] if activation is None else [activation]))


class Block(nn.Module):
    """With one trait of ``kind``, which decides whether it is what it looks like."""

    def __init__(self, kind: str = "") -> None:
        super().__init__()
        self.kind = kind
        self.expand = conv_norm(8, 32, activation=nn.SiLU())
        other = nn.Hardswish() if kind == "two activations" else nn.SiLU()
        self.depthwise = conv_norm(32, 32, 3, other, groups=16 if kind == "groups of two" else 32)
        gated = 8 if kind == "gate behind the projection" else 32
        self.gate = Gate(gated, 4, nn.Softplus() if kind == "another gate" else nn.Sigmoid())
        self.project = conv_norm(32, 8, activation=nn.ReLU() if kind == "activated" else None)
        stochastic_depth = import_torchvision().ops.StochasticDepth
        self.drop = stochastic_depth(0.5, "row") if kind == "drops paths" else nn.Identity()

    def forward(self, x):
        if self.kind == "gate before the depthwise convolution":
            return x + self.project(self.depthwise(self.gate(self.expand(x))))
        h = self.depthwise(self.expand(x))
        if self.kind == "gate behind the projection":
            return x + self.gate(self.project(h))
        h = h + self.gate(h) if self.kind == "gate added" else self.gate(h)
        if self.kind == "scaled shortcut":
            return 0.5 * x + self.project(h)
        return x + self.drop(self.project(h))


def small_net(*blocks: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 8, 3), *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)).eval()


OTHERS = [
    "two activations", "groups of two", "another gate", "activated", "scaled shortcut", "gate added",
    "gate before the depthwise convolution", "gate behind the projection",
]  # fmt: skip


@pytest.mark.parametrize("kind", ["", "drops paths", *OTHERS])
def test_only_what_is_such_a_block(kind):
    x = images(2, 16)
    stock = small_net(Block(kind))
    model = convert(stock, "bias", example_input=x)
    assert len(blocks_of(model)) == (kind not in OTHERS)
    torch.testing.assert_close(model.eval()(x), stock(x))


def lean(*blocks: nn.Module, method: str = "bias") -> nn.Module:
    return convert(small_net(*(blocks or (Block(), Block()))), method, example_input=images(1, 16))


def test_keeps_its_input_and_nothing_else():
    model = lean()
    block, x = model[1], images(4, 14, 8)
    assert saved_bytes(lambda: block(x), [*model.parameters(), *model.buffers()]) == x.nbytes


def test_memory_is_measured_of_what_is_computed(taken):
    model, x = lean(), images(32, 32)
    report = measure_memory(model, x)
    assert all(taken)
    assert taken
    narrow = 32 * 30 * 30 * 8 * 4  # an input of a block
    assert 2 * narrow <= report.saved < 2.01 * narrow
    # Beside them gradients at both ends of a block; one expanded activation of all images would be 4 more.
    assert report.activations - report.saved < 5 * narrow


def test_drop_path_draws_the_same_numbers():
    model, x = lean(Block("drops paths"), Block("drops paths")).train(), images(6, 16)
    assert all(block.mbconv_drop is not None for block in blocks_of(model))
    ours = step(model, x)
    assert_close(ours, step(layer_by_layer(model), x))
    assert not torch.allclose(step(model, x, seed=1)["output"], ours["output"])
    model.eval()
    assert_close(step(model, x), step(layer_by_layer(model), x))


def test_hooks_run():
    model, x = lean(), images(2, 16)
    seen = []
    handle = model[1].depthwise.register_forward_hook(lambda *_: seen.append("depthwise"))
    hooked = step(model, x)
    assert seen
    handle.remove()
    assert_close(step(model, x), hooked)


def test_copies_and_pickles():
    model, x = lean(), images(2, 16)
    expected = step(model, x)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert len(blocks_of(twin)) == 2
        assert_close(step(twin, x), expected, 0.0)
    assert list(model.state_dict()) == list(convert(small_net(Block(), Block()), "bias").state_dict())
    plain = to_torch(model)
    assert blocks_of(plain) == []
    assert type(plain[1]) is Block
    torch.testing.assert_close(plain(x), expected["output"])


def test_without_gradients_and_in_other_layouts(taken):
    model, x = lean(), images(2, 16)
    expected = model(x)
    with torch.no_grad():
        assert torch.equal(model(x), expected)
    taken.clear()
    block = model[1]
    contiguous = images(2, 14, 8).contiguous()
    torch.testing.assert_close(block(contiguous), block(contiguous.to(memory_format=torch.channels_last)))
    assert taken == [True]


def test_autocast(taken):
    model, x = lean(), images(2, 16)
    exact = step(model, x)
    with torch.autocast("cpu", torch.bfloat16):
        step(model, x)  # also finds out what is kept
        taken.clear()
        ours = step(model, x)
    assert taken == [True, True]
    assert_close(ours, exact, 0.1)
    assert all(gradient.dtype is torch.float32 for name, gradient in ours.items() if name != "output")


def test_it_compiles():
    model, x = lean(), images(2, 16)
    expected = step(model, x)
    assert_close(step(torch.compile(model, backend="aot_eager"), x) and step(model, x), expected)


@pytest.mark.parametrize("chunk", [1, 1 << 30])
def test_segments(chunk, monkeypatch):
    model, x = lean(Block(), Block(), Block()), images(5, 16)
    expected = step(layer_by_layer(model), x)
    monkeypatch.setattr(recomputed, "CHUNK_BYTES", {"cpu": chunk})
    for block in blocks_of(model)[1:]:
        block.keep_input = False
    assert_close(step(model, x), expected)


def test_another_backend_recomputes_layer_by_layer(taken):
    model, x = lean(), images(3, 16)
    expected = step(model, x)
    taken.clear()
    with use_backend("reference"):
        assert_close(step(model, x), expected)
    assert taken == []


@pytest.mark.parametrize("method", ["lite_residual", "lite_residual+bias"])
def test_beside_lite_residuals(method, taken):
    model, x = convert(zoo_model("torchvision:mobilenet_v3_small"), method, example_input=images(1)).eval(), images(3)
    assert len(blocks_of(model)) == 8
    taken.clear()
    ours = step(model, x)
    assert taken
    assert all(taken)
    assert_close(ours, step(layer_by_layer(model), x))


def test_weights_in_8_bits():
    model = convert(small_net(Block()), "bias", example_input=images(1, 16), weight_bits=8)
    assert len(blocks_of(model)) == 1
    x = images(2, 16)
    assert_close(step(model, x), step(layer_by_layer(model), x))


def test_children_can_be_replaced():
    model, x = lean(Block()), images(2, 16)
    project = model[1].project[0]
    model[1].project[0] = FrozenConvBias(project.in_channels, project.out_channels, 1)
    model = model.to(memory_format=torch.channels_last)
    assert_close(step(model, x), step(layer_by_layer(model), x))


def distributed() -> None:
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    model = lean()
    x = images(2 * world, 16)
    alone = step(model, x)
    parallel = nn.parallel.DistributedDataParallel(model)
    step(parallel, x[2 * rank : 2 * rank + 2])
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert_close(gradients, {name: alone[name] for name in gradients})


def test_distributed_data_parallel():
    run_in_process_group(distributed, 2)


def test_recompute_can_be_undone(taken):
    model, x = lean(), images(2, 16)
    expected = step(model, x)
    taken.clear()
    assert all(type(tnn.stop_recomputing(block)) is Block for block in blocks_of(model))
    assert_close(step(model, x), expected)
    assert taken == []
