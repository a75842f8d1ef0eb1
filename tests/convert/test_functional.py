"""Functional activations and pools: the smallest enclosing forward is generated anew, and the module stays itself."""

from __future__ import annotations

import copy
import inspect
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.checks import saved_bytes
from tests.convert.models import FunctionalNet, FusableNet, Residual, SharedNet, with_statistics
from tinytl_kernels.convert import conversion_report, convert, to_torch

X = torch.randn(2, 3, 17, 14, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def pair(kind: type[nn.Module]) -> tuple[nn.Module, nn.Module]:
    stock = with_statistics(kind(), 16).double().eval()
    return convert(stock, "bias", example_input=X), stock


def same_gradients(model: nn.Module, stock: nn.Module, *args, **kwargs) -> None:
    gradients = []
    for net in (model, stock):
        x = X.clone().requires_grad_()
        y = net(x, *args, **kwargs)
        y.square().sum().backward()
        gradients += [y.detach(), x.grad]
    torch.testing.assert_close(gradients[:2], gradients[2:], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("kind", [FunctionalNet, FusableNet, SharedNet])
def test_outputs_and_gradients_stay(kind: type[nn.Module]) -> None:
    same_gradients(*pair(kind))


def test_optional_arguments_still_work() -> None:
    model, stock = pair(FunctionalNet)
    same_gradients(model, stock, True)
    same_gradients(model, stock, features=True, scale=2.0)
    same_gradients(model, stock, False, scale=0.5)
    assert inspect.signature(type(model).forward) == inspect.signature(FunctionalNet.forward)


def test_the_original_forward_does_not_activate_twice() -> None:
    class Optional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 3)

        def forward(self, x: Tensor, twice: bool = False) -> Tensor:
            y = F.hardswish(self.conv(x))
            return y * 2 if twice else y

    model, stock = pair(Optional)
    same_gradients(model, stock)
    same_gradients(model, stock, twice=True)


def test_class_methods_and_attributes_stay() -> None:
    model, stock = pair(FunctionalNet)
    assert isinstance(model, FunctionalNet)
    assert type(model).__name__ == "FunctionalNet"
    assert type(model).__module__ == FunctionalNet.__module__
    assert list(model._modules) == list(stock._modules)


def test_training_and_evaluation_each_have_their_code() -> None:
    model, _ = pair(FunctionalNet)
    torch.manual_seed(0)
    a = model.train()(X)
    torch.manual_seed(1)
    assert not torch.equal(model(X), a)
    model.eval()
    assert torch.equal(model(X), model(X))


def test_activations_right_behind_convolutions_are_fused() -> None:
    model, _ = pair(FusableNet)
    assert [model.conv1.activation, model.conv2.activation, model.conv3.activation] == ["relu6", "relu", "leaky_relu"]


def test_an_activation_module_that_is_called_again_and_again_is_fused_where_it_stands_behind_a_convolution() -> None:
    model, stock = pair(SharedNet)
    activations = [conv.activation for conv in (model.conv1, model.conv2, model.conv3, model.conv4)]
    assert activations == ["relu6", "relu6", "relu6", None]
    done = [note.text for note in conversion_report(model).done if note.kind == "SharedNet"]
    assert done == ["relu6 fused into conv1", "relu6 fused into conv2", "sum and relu6 fused into conv3"]
    assert list(model._modules) == list(stock._modules)


def test_not_where_a_trained_norm_or_a_hook_is_between() -> None:
    stock = with_statistics(SharedNet(), 16).double().eval()
    model = convert(stock, "norm+last", example_input=X)
    assert [model.conv1.activation, model.conv2.activation] == [None, "relu6"]
    same_gradients(model, stock)
    stock.act.register_forward_hook(lambda module, args, output: None)
    assert type(convert(stock, "bias", example_input=X)) is SharedNet


def test_the_sum_of_a_residual_block_is_fused_into_its_last_convolution_and_comes_back() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block, self.fc = Residual(3), nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(self.block(x).mean((2, 3)))

    model, stock = pair(Net)
    same_gradients(model, stock)
    assert [model.block.conv1.activation, model.block.conv2.activation] == ["relu", "relu"]
    plain = to_torch(model)
    assert type(plain.block) is Residual
    assert not any(type(m).__module__.startswith("tinytl_kernels") for m in plain.modules())
    same_gradients(plain, stock)


class Sums(nn.Module):
    """Sums and a ReLU behind a convolution, each in a way of its own."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.first, self.last, self.other = (nn.Conv2d(3, 3, 3, padding=1) for _ in range(3))
        self.scale = nn.Parameter(torch.randn(1, 3, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x) * 2
        if self.kind == "into the shortcut":
            return F.relu(y.add_(self.last(y * 1)))
        if self.kind == "input overwritten":
            z = self.last(y)
            y.mul_(2)
            return F.relu(z + y)
        if self.kind == "sum read twice":
            z = self.last(y * 1) + y
            return F.relu(z) + z
        if self.kind == "with itself":
            z = self.last(y)
            return F.relu(z + z)
        if self.kind == "a number":
            return F.relu(self.last(y) + x.size(0))
        if self.kind == "broadcast":
            return F.relu(self.last(y) + self.scale)
        if self.kind == "scaled":
            return F.relu(torch.add(self.last(y), x, alpha=2))
        if self.kind == "another convolution, later":
            z = self.last(y)
            return F.relu(F.relu(self.other(x)) + z)
        return F.relu(torch.add(x, self.last(y)))


@pytest.mark.parametrize(
    ("kind", "fused"),
    [
        *[("into the shortcut", None), ("input overwritten", None), ("sum read twice", None), ("with itself", None)],
        *[("scaled", None), ("a number", "relu"), ("broadcast", "relu"), ("another convolution, later", "relu")],
        ("torch.add", "relu"),
    ],
)
def test_a_sum_and_the_activation_behind_it_are_fused_where_nobody_can_tell(kind: str, fused: str | None) -> None:
    stock = Sums(kind).double().eval()
    model = convert(stock, "bias", example_input=X)
    assert model.last.activation == fused
    for net in (model, pickle.loads(pickle.dumps(model)), to_torch(model), model.train()):
        if kind != "input overwritten":  # stock PyTorch keeps it, and so cannot differentiate that
            same_gradients(net, stock)
        with torch.no_grad():
            torch.testing.assert_close(net(X), stock(X))


def test_saved_bytes_are_bits() -> None:
    model, stock = pair(FusableNet)
    # Three masks of 8 channels (a byte a pixel), and the head's input.
    bits = 2 * (15 * 12 + 13 * 10 + 11 * 8)
    own = [*model.parameters(), *model.buffers()]
    assert saved_bytes(lambda: model(X), own) == bits + 2 * 8 * 8
    assert saved_bytes(lambda: stock(X), [*stock.parameters(), *stock.buffers()]) > 50 * bits


@pytest.mark.parametrize("kind", [FunctionalNet, FusableNet, SharedNet])
def test_copies_and_pickles_compute_the_same(kind: type[nn.Module]) -> None:
    model, _ = pair(kind)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(file, weights_only=False)):
        assert torch.equal(other(X), model(X))
        assert type(other) is type(model)
        assert str(conversion_report(other)) == str(conversion_report(model))


@pytest.mark.parametrize("kind", [FunctionalNet, FusableNet, SharedNet])
def test_compiles_without_graph_breaks(kind: type[nn.Module]) -> None:
    model, _ = pair(kind)
    expected = model(X)
    expected.sum().backward()
    gradient, model.conv2.bias.grad = model.conv2.bias.grad, None
    output = torch.compile(model, fullgraph=True, backend="aot_eager")(X)
    output.sum().backward()
    torch.testing.assert_close(output, expected)
    torch.testing.assert_close(model.conv2.bias.grad, gradient)


def test_only_the_smallest_module_is_rewritten() -> None:
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.other = FusableNet(), nn.Conv2d(3, 3, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(self.other(x))

    model, _ = pair(Outer)
    assert type(model) is Outer
    assert type(model.inner) is not FusableNet
    assert isinstance(model.inner, FusableNet)


def test_equal_modules_share_one_generated_class() -> None:
    model, _ = pair(Twins)
    assert type(model.a) is type(model.b)


class Twins(nn.Module):
    """Two equal functional modules."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = FusableNet(), FusableNet()

    def forward(self, x: Tensor) -> Tensor:
        return self.a(x) + self.b(x)


class Overwriting(nn.Module):
    """An in-place activation on a tensor that is read again, and one on the caller's."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return F.relu_(y) + y


def test_in_place_calls_on_what_is_read_again_are_left_alone() -> None:
    model, stock = pair(Overwriting)
    same_gradients(model, stock)
    assert type(model) is Overwriting
    assert any("overwrites" in note.text for note in conversion_report(model).kept)


class Untraceable(nn.Module):
    """Branches on values."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return F.relu(y) if y.mean() < 1e9 else y


def test_what_cannot_be_traced_stays_and_is_reported() -> None:
    model, stock = pair(Untraceable)
    same_gradients(model, stock)
    assert type(model) is Untraceable
    assert any("cannot trace" in note.text for note in conversion_report(model).kept)


class OtherSelf(nn.Module):
    """Names that clash with what generated code uses."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3)

    def forward(this, input: Tensor, getattr: int = 1, *args: int, **options: int) -> Tensor:
        return F.relu(this.conv(input)) * getattr * (1 + len(args)) * options.get("k", 1)


def test_awkward_signatures_survive() -> None:
    model, stock = pair(OtherSelf)
    assert type(model) is not OtherSelf
    for args, kwargs in (((), {}), ((3,), {}), ((3, 4, 5), {}), ((), {"k": 2}), ((), {"getattr": 7})):
        torch.testing.assert_close(model(X, *args, **kwargs), stock(X, *args, **kwargs))


def test_smooth_functions_are_named_in_the_report() -> None:
    class Smooth(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 3)

        def forward(self, x: Tensor) -> Tensor:
            return F.silu(x) + F.gelu(F.pad(self.conv(x), (1, 1, 1, 1)), approximate="tanh")

    model, stock = pair(Smooth)
    same_gradients(model, stock)
    texts = [note.text for note in conversion_report(model).kept]
    assert any("silu keeps a full value" in text for text in texts)
    assert any("gelu keeps a full value" in text for text in texts)
