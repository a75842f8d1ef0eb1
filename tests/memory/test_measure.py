"""What measure_memory counts, checked against independent counts."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from tests.process_group import run_in_process_group
from tinytl_kernels.memory import MemoryReport, measure_memory
from tinytl_kernels.models import import_torchvision
from tinytl_kernels.nn import FrozenConvBias


def small_network(channels: int = 16) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, channels, 3, padding=1),
        nn.BatchNorm2d(channels),
        nn.ReLU(),
        nn.Conv2d(channels, channels, 3, padding=1),
        nn.Sigmoid(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(channels, 5),
    )


def saved_by_hooks(model: nn.Module, x: Tensor) -> int:
    """Bytes that autograd saves in a forward pass with cross entropy, parameters and buffers aside; input included."""
    ours = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    found: dict[int, int] = {}
    kept: list[Tensor] = []  # storages must not be reused while they are counted

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in ours:
            found[storage.data_ptr()] = storage.nbytes()
        return tensor.detach()  # with its history, a node that keeps its output would keep itself alive

    target = torch.zeros(len(x), dtype=torch.long)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        functional.cross_entropy(model(x), target)
    found.pop(target.untyped_storage().data_ptr(), None)
    return sum(found.values())


@pytest.mark.parametrize("train", ["full", "bias"])
def test_saved_is_what_autograd_saves_in_mobilenet(train: str) -> None:
    model = import_torchvision().models.mobilenet_v2()
    if train == "bias":
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name.endswith("bias") or name.startswith("classifier"))
    x = torch.randn(1, 3, 96, 96)
    report = measure_memory(model, x)
    assert report.saved_input == (x.nbytes if train == "full" else 0)
    assert report.saved + report.saved_input == saved_by_hooks(model, x)
    # The stock promise that this package is about: freezing the weights saves the image, and nothing else.
    assert report.saved > 13e6


def test_saved_of_a_frozen_convolution_is_its_bit_mask() -> None:
    n, c, h, w = 2, 13, 9, 11
    model = nn.Sequential(FrozenConvBias(3, c, 3, padding=1, activation="relu6"), FrozenConvBias(c, 4, 3))
    report = measure_memory(model, torch.randn(n, 3, h, w))
    assert report.saved == n * h * w * -(-c // 8)
    assert [(row.name, row.kind, row.saved, row.dtypes) for row in report.by_layer] == [
        ("0", "FrozenConvBias", report.saved, "uint8")
    ]


def test_saved_by_layer_by_hand() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.Sigmoid(), nn.Linear(8, 2))
    report = measure_memory(model, torch.randn(16, 4))
    rows = {row.name: (row.kind, row.saved) for row in report.by_layer}
    # The second linear shares the sigmoid's output; the loss keeps log-probabilities and one scalar.
    assert rows == {"1": ("Sigmoid", 16 * 8 * 4), "(loss)": ("", 16 * 2 * 4 + 4)}
    assert report.saved_input == 16 * 4 * 4
    assert (report.trained, report.frozen, report.gradients) == (232, 0, 232)
    assert report.optimizer == 2 * 232 + 4 * 4  # Adam: two moments, and one step count for each of four parameters


def test_parts_add_up() -> None:
    report = measure_memory(small_network(), torch.randn(4, 3, 16, 16))
    assert sum(row.saved for row in report.by_layer) == report.saved
    assert sum(report.at_peak.values()) == report.peak
    assert sum(report.stack().values()) == report.total == report.parameters + report.buffers + report.peak
    assert report.peak > report.saved + report.optimizer
    assert report.at_peak["saved"] <= report.saved


def test_peak_by_hand() -> None:
    class Chain(nn.Module):
        """A convolution that saves nothing new and a sigmoid that saves its output."""

        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Conv2d(1, 1, 1)
            self.second = nn.Sigmoid()

        def forward(self, x: Tensor) -> Tensor:
            return self.second(self.first(x)).sum()

    x = torch.randn(1, 1, 256, 256)
    report = measure_memory(Chain(), x)
    # Forward, inside the sigmoid: its input and its output. Backward: the output, and the input's gradient.
    # (The gradient of the sum is expanded: one number.)
    assert report.peak == pytest.approx(2 * x.nbytes, abs=256)
    assert report.saved == x.nbytes
    assert report.peak_layer == "second"


copying = torch.library.Library("tinytl_memory_test", "DEF")
copying.define("double(Tensor x, bool copy) -> Tensor")


def _double(x: Tensor, copy: bool) -> Tensor:
    return (x.clone() if copy else x) * 2


copying.impl("double", _double, "CompositeExplicitAutograd")
torch.library.register_autograd(
    "tinytl_memory_test::double", lambda ctx, grad: (grad * 2, None), setup_context=lambda ctx, inputs, output: None
)


def test_a_copy_hidden_inside_a_custom_operator_shows() -> None:
    class Double(nn.Module):
        def __init__(self, copy: bool) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.zeros(1))
            self.copy = copy

        def forward(self, x: Tensor) -> Tensor:
            return torch.ops.tinytl_memory_test.double(x + self.scale, self.copy).mean()

    x = torch.randn(1, 64, 64)
    lean, wasteful = (measure_memory(Double(copy), x) for copy in (False, True))
    assert lean.saved == wasteful.saved == 0
    assert wasteful.peak - lean.peak == pytest.approx(x.nbytes, abs=64)


def test_checkpointed_region_keeps_its_input_and_peaks_as_without() -> None:
    class Region(nn.Module):
        def __init__(self, recompute: bool) -> None:
            super().__init__()
            self.stem = nn.Conv2d(3, 4, 1)
            self.body = nn.Sequential(nn.Conv2d(4, 32, 1), nn.Sigmoid(), nn.Conv2d(32, 32, 1), nn.Sigmoid())
            self.recompute = recompute

        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            x = checkpoint(self.body, x, use_reentrant=False) if self.recompute else self.body(x)
            return x.mean()

    x = torch.randn(2, 3, 32, 32)
    pixels = 4 * 2 * 32 * 32
    plain, recomputed = (measure_memory(Region(recompute), x) for recompute in (False, True))
    assert plain.saved == pixels * (4 + 32 + 32)
    assert recomputed.saved == pixels * 4
    assert recomputed.peak > pixels * (32 + 32)
    assert recomputed.peak_phase == "backward"
    assert recomputed.peak_layer.startswith("body")


def test_a_tensor_kept_without_autograds_help_is_saved_too() -> None:
    class Stash(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.stash = x * 3  # not save_for_backward
            return x.sum()

        @staticmethod
        def backward(ctx, grad):
            return ctx.stash * grad

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(40, 10))

        def forward(self, x: Tensor) -> Tensor:
            return Stash.apply(x @ self.weight)

    report = measure_memory(Model(), torch.randn(30, 40))
    assert report.saved == 30 * 10 * 4
    assert report.by_layer[0].name == "(model)"


def test_everything_comes_back_bit_for_bit() -> None:
    model = nn.Sequential(*small_network(), nn.Dropout(0.5))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    x = torch.randn(4, 3, 8, 8)
    model(x).sum().backward()
    optimizer.step()  # state and gradients exist before
    objects = [(p, p.grad) for p in model.parameters()]
    before = _everything(model, optimizer)
    measure_memory(model, x, torch.tensor([0, 1, 2, 3]), optimizer)
    _assert_same(before, _everything(model, optimizer))
    assert all(p.grad is gradient for p, gradient in objects)


def test_a_fresh_optimizer_is_fresh_afterwards() -> None:
    model = small_network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
    x = torch.randn(4, 3, 8, 8)
    before = _everything(model, optimizer)
    report = measure_memory(model, x, optimizer=optimizer)
    _assert_same(before, _everything(model, optimizer))
    assert not optimizer.state
    assert report.optimizer == report.trained


def test_everything_comes_back_after_an_error() -> None:
    model, x = small_network(), torch.randn(4, 3, 8, 8)
    before = _everything(model, None)
    with pytest.raises(IndexError):
        measure_memory(model, x, torch.tensor([0, 1, 2, 99]))
    _assert_same(before, _everything(model, None))
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_the_callers_input_gets_no_gradient() -> None:
    x = torch.randn(2, 3, 8, 8, requires_grad=True)
    measure_memory(small_network(), x)
    assert x.grad is None


def test_measuring_twice_gives_the_same_figures() -> None:
    model, x = small_network(), torch.randn(4, 3, 8, 8)
    assert _figures(measure_memory(model, x)) == _figures(measure_memory(model, x))


def test_warm_optimizer_counts_like_a_fresh_one() -> None:
    model, x = small_network(), torch.randn(4, 3, 8, 8)
    optimizer = torch.optim.Adam(model.parameters())
    fresh = measure_memory(model, x, optimizer=optimizer)
    model(x).sum().backward()
    optimizer.step()
    assert _figures(measure_memory(model, x, optimizer=optimizer)) == _figures(fresh)


def test_compiled_model_measures_like_its_module() -> None:
    model, x = small_network(), torch.randn(4, 3, 8, 8)
    compiled = torch.compile(model, backend="aot_eager")
    compiled(x).sum().backward()  # code is compiled and cached before it is measured
    model.zero_grad()
    assert _figures(measure_memory(compiled, x)) == _figures(measure_memory(model, x))


def measure_in_distributed_data_parallel() -> None:
    model, x = small_network(), torch.randn(4, 3, 8, 8)
    alone = measure_memory(model, x)
    wrapped = measure_memory(nn.parallel.DistributedDataParallel(model), x)
    assert (wrapped.saved, wrapped.gradients, wrapped.optimizer) == (alone.saved, alone.gradients, alone.optimizer)
    assert wrapped.by_layer == alone.by_layer


def test_ddp_model_measures_like_its_module() -> None:
    run_in_process_group(measure_in_distributed_data_parallel)


def test_autocast_around_the_call_is_kept() -> None:
    model = nn.Sequential(nn.Linear(32, 64), nn.Sigmoid(), nn.Linear(64, 3))
    x = torch.randn(128, 32)
    with torch.autocast("cpu", torch.bfloat16):
        report = measure_memory(model, x)
    sigmoid = next(row for row in report.by_layer if row.name == "1")
    assert (sigmoid.saved, sigmoid.dtypes) == (128 * 64 * 2, "bfloat16")


@pytest.mark.parametrize(
    "output",
    [lambda y: (y, y.mean()), lambda y: {"logits": y, "index": y.argmax(1)}, lambda y: y[:, :, None]],
    ids=["tuple", "dict", "3d"],
)
def test_outputs_of_any_structure_without_a_target(output: Callable) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(6, 3)

        def forward(self, x: Tensor, scale: float = 1.0):
            return output(self.linear(x) * scale)

    report = measure_memory(Model(), {"x": torch.randn(2, 6), "scale": 2.0})
    assert report.gradients == 4 * (18 + 3)


def test_a_model_without_trained_parameters_is_refused() -> None:
    with pytest.raises(ValueError, match=r"`model` has no trained parameter"):
        measure_memory(small_network().requires_grad_(False), torch.randn(1, 3, 8, 8))


def test_an_output_without_gradient_is_refused() -> None:
    class Detached(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(x).detach()

    with pytest.raises(ValueError, match="does not depend on any trained parameter"):
        measure_memory(Detached(), torch.randn(2, 3))


def test_an_optimizer_of_another_model_is_refused() -> None:
    with pytest.raises(ValueError, match="`optimizer` holds none of the trained parameters"):
        measure_memory(
            small_network(), torch.randn(1, 3, 8, 8), optimizer=torch.optim.SGD(nn.Linear(2, 2).parameters())
        )


def test_an_optimizer_with_a_closure_is_refused() -> None:
    model = small_network()
    with pytest.raises(ValueError, match=r"`optimizer` \(LBFGS\).*closure"):
        measure_memory(model, torch.randn(2, 3, 8, 8), optimizer=torch.optim.LBFGS(model.parameters()))


def _figures(report: MemoryReport) -> dict[str, object]:
    """All that must not depend on the moment: the process's own figure aside."""
    return {name: value for name, value in vars(report).items() if name != "process_peak"}


def _everything(model: nn.Module, optimizer: torch.optim.Optimizer | None) -> list[object]:
    def leaves() -> Iterator[object]:
        yield from model.state_dict().values()
        yield from (p.grad for p in model.parameters())
        yield torch.get_rng_state()
        if optimizer is not None:
            state = optimizer.state_dict()
            yield from state["param_groups"]
            for entry in state["state"].values():
                yield from entry.values()

    return [leaf.clone() if isinstance(leaf, Tensor) else leaf for leaf in leaves()]


def _assert_same(before: list[object], after: list[object]) -> None:
    assert len(before) == len(after)
    for old, new in zip(before, after, strict=True):
        assert torch.equal(old, new) if isinstance(old, Tensor) else old == new
