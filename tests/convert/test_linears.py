"""Linear layers of rows become tnn.Linear where they stand; others stay."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn

from tests.convert.models import conv_norm
from tinytl_kernels import nn as tnn
from tinytl_kernels.convert import METHODS, conversion_report, convert, to_torch

X = torch.randn(2, 3, 16, 16)


class Classifies(nn.Module):
    """Tokens of an image through one linear layer, then its mean through three: two large, one small."""

    def __init__(self, classes: int = 500) -> None:
        super().__init__()
        self.stem = conv_norm(3, 8, nn.ReLU(), stride=2)
        self.tokens = nn.Linear(8, 320 * 40)
        self.wide, self.narrow, self.fc = nn.Linear(320 * 40, 256), nn.Linear(256, 256), nn.Linear(256, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.tokens(self.stem(x).flatten(2).mT).mean(1)
        return self.fc(torch.relu(self.narrow(torch.relu(self.wide(x)))))


def kinds(model: nn.Module) -> list[type]:
    return [type(module) for module in model.modules() if isinstance(module, nn.Linear)]


@pytest.mark.parametrize("method", [method for method in METHODS if not method.startswith("lite")])
def test_large_ones_that_see_rows_are_swapped(method):
    stock = Classifies()
    model = convert(stock, method, example_input=X)
    if method == "full":
        assert kinds(model) == [nn.Linear] * 4
        return
    assert kinds(model) == [nn.Linear, tnn.Linear, nn.Linear, tnn.Linear]
    assert [note.path for note in conversion_report(model).done if note.kind == "Linear"] == ["wide", "fc"]
    assert kinds(stock) == [nn.Linear] * 4
    assert {name for name, p in model.named_parameters() if p.requires_grad} >= {"fc.weight", "fc.bias"}
    torch.testing.assert_close(model.eval()(X), stock.eval()(X))


def test_a_new_head_is_swapped_by_its_size():
    for classes, kind in ((390, nn.Linear), (400, tnn.Linear)):
        assert type(convert(Classifies(), "bias", num_classes=classes, example_input=X).fc) is kind


def test_without_a_run_the_head_alone_is_swapped():
    model = convert(nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(8 * 14 * 14, 100)), "bias")  # of 16 x 16
    assert conversion_report(model).deviation is None
    assert kinds(model) == [tnn.Linear]
    assert model(X).shape == (2, 100)


def test_hooks_subclasses_and_own_forwards_stay():
    class Scaled(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return 2 * super().forward(input)

    model, seen = Classifies(), []
    model.wide = Scaled(320 * 40, 256)
    model.fc.register_forward_hook(lambda *_: seen.append("fc"))
    expected = model.eval()(X)
    lean = convert(model, "bias", example_input=X)
    assert kinds(lean) == [nn.Linear, Scaled, nn.Linear, tnn.Linear]
    seen.clear()
    torch.testing.assert_close(lean(X), expected)
    assert seen == ["fc"]
    plain = to_torch(lean)
    assert kinds(plain) == [nn.Linear, Scaled, nn.Linear, nn.Linear]
    torch.testing.assert_close(plain(X), expected)
    assert seen == ["fc", "fc"]


def test_a_step_is_the_stock_models():
    stock = Classifies()
    lean = convert(stock, "last", example_input=X).eval()
    grads = []
    for model in (stock.eval(), lean):
        nn.functional.cross_entropy(model(X), torch.tensor([1, 7])).backward()
        grads.append([model.fc.weight.grad, model.fc.bias.grad])
    torch.testing.assert_close(*grads)


def test_copies_pickles_and_state_dicts():
    model = convert(Classifies(), "bias", example_input=X).eval()
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model.fc))):
        assert kinds(again)[-1] is tnn.Linear
    assert model.fc.state_dict().keys() == nn.Linear(2, 2).state_dict().keys()
