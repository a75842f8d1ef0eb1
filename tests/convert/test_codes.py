"""convert(code_bits=8): a byte an element instead of a value or a second forward, and a report that says so."""

from __future__ import annotations

import pickle

import pytest
import torch
from torch import nn

from tests.convert.test_recompute import GroupNormNet, randomised, step, zoo_model
from tinytl_kernels import conversion_report, convert, measure_memory, to_torch
from tinytl_kernels import nn as tnn
from tinytl_kernels.convert import ConversionReport
from tinytl_kernels.errors import TinyTLError
from tinytl_kernels.models.zoo import import_timm

X = torch.linspace(-2, 2, 4 * 3 * 64 * 64).sin().view(4, 3, 64, 64)


def norm_act_model() -> nn.Module:
    try:
        norm_act = import_timm().layers.BatchNormAct2d
    except TinyTLError as reason:
        pytest.skip(str(reason))

    def layer(channels: int, out: int, kernel: int, stride: int = 1) -> nn.Module:
        conv = nn.Conv2d(channels, out, kernel, stride, kernel // 2, bias=False)
        return nn.Sequential(conv, norm_act(out, act_layer=nn.SiLU))

    return nn.Sequential(
        layer(3, 16, 3, 2), layer(16, 32, 3), layer(32, 8, 1), nn.Flatten(), nn.Linear(8 * 32 * 32, 10)
    )


MODELS = {
    "group norm": GroupNormNet,
    "mobilenet_v3_small": lambda: zoo_model("mobilenet_v3_small"),
    "activation inside the norm": norm_act_model,
}


@pytest.fixture(scope="module", params=MODELS)
def stock(request) -> nn.Module:
    torch.manual_seed(20260101)
    return randomised(MODELS[request.param]())


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


def coded_modules(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if getattr(module, "code_bits", None) == 8]


def test_less_is_kept_than_without_and_gradients_are_a_few_percent_off(stock):
    exact = convert(stock, "bias", example_input=X[:1], recompute=False).eval()
    model = convert(stock, "bias", example_input=X[:1], code_bits=8).eval()
    assert not any(isinstance(m, tnn.Recomputed) for m in model.modules())
    assert relative(model(X), exact(X)) < 1e-5
    kept, value = measure_memory(model, X).saved, measure_memory(exact, X).saved
    gradients, true = step(model, X), step(to_torch(exact).double(), X.double())
    off = relative(*(torch.cat([g.double().flatten() for g in grads.values()]) for grads in (gradients, true)))
    print(f"kept {kept:,} of {value:,}, gradients {off:.4f} off")
    assert kept < 0.5 * value
    assert 1e-6 < off < (0.1 if isinstance(stock, GroupNormNet) else 0.01)


def test_the_report_names_who_keeps_codes_and_the_error(stock):
    model = convert(stock, "bias", example_input=X[:1], code_bits=8)
    report: ConversionReport = conversion_report(model)
    notes = {note.path: note.text for note in report.done if "in 8 bits" in note.text}
    assert list(notes) == coded_modules(model)
    assert report.coded == len(notes) > 0
    assert f"8-bit codes for backward: kept by {len(notes)} layers, so gradients are not exact" in str(report)
    expected = "1 to 5 % off" if isinstance(stock, GroupNormNet) else "off by at most 0.00"
    assert all(expected in text for text in notes.values())
    assert not {note.path for note in report.kept} & set(notes)


def test_exact_is_the_default(stock):
    for options in ({}, dict(recompute=False)):
        model = convert(stock, "bias", example_input=X[:1], **options)
        assert coded_modules(model) == []
        assert "8-bit codes" not in str(conversion_report(model))


def test_what_is_recomputed_stays_exact(stock):
    model = convert(stock, "bias", example_input=X[:1], recompute=True, code_bits=8)
    blocks = [name for name, module in model.named_modules() if isinstance(module, tnn.Recomputed)]
    assert blocks
    assert not [name for name in coded_modules(model) for block in blocks if f"{name}.".startswith(f"{block}.")]


def test_goes_back_to_torch_and_through_pickle(stock):
    model = convert(stock, "bias", example_input=X[:1], code_bits=8).eval()
    plain = to_torch(model)
    assert not any(type(m).__module__.startswith("tinytl_kernels") for m in plain.modules())
    assert relative(plain(X), model(X)) < 1e-5
    assert coded_modules(pickle.loads(pickle.dumps(model))) == coded_modules(model)


def test_names_stay_those_of_the_exact_conversion(stock):
    exact, coded = (convert(stock, "bias", example_input=X[:1], code_bits=bits) for bits in (None, 8))
    assert list(coded.state_dict()) == list(exact.state_dict())


class Functions(nn.Module):
    """One function right behind a convolution, one that is not."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.classifier = nn.Linear(8, 2)

    def forward(self, x):
        x = nn.functional.silu(self.first(x))
        return self.classifier(nn.functional.gelu(x + self.second(x)).mean((2, 3)))


def test_a_function_behind_a_convolution_is_coded_and_others_are_reported():
    model = convert(Functions(), "bias", example_input=X[:1], code_bits=8)
    assert coded_modules(model) == ["first"]
    assert repr(model.first).endswith("activation=silu, code_bits=8)")
    text = str(conversion_report(model))
    assert "keeps the derivative of silu in 8 bits: off by at most 0.0024" in text
    assert "gelu keeps a full value" in text


def test_an_activation_that_stands_alone_is_coded():
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AvgPool2d(2), nn.GELU("tanh"), nn.Flatten(), nn.Linear(72, 2)
    )
    lean = convert(model, "bias", example_input=torch.randn(1, 3, 8, 8), code_bits=8)
    assert coded_modules(lean) == ["3"]
    assert repr(lean[3]) == "GELU(approximate='tanh', code_bits=8)"


def test_lite_residuals_stay_exact():
    model = convert(randomised(GroupNormNet()), "lite_residual+bias", example_input=X[:1], code_bits=8)
    branches = [name for name, module in model.named_modules() if isinstance(module, tnn.LiteResidual)]
    assert branches
    assert not [name for name in coded_modules(model) for branch in branches if name.startswith(f"{branch}.")]


def test_an_inplace_activation_that_others_rely_on_is_left_alone():
    class Reads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.act = nn.Conv2d(3, 4, 3), nn.SiLU(inplace=True)

        def forward(self, x):
            y = self.conv(x)
            self.act(y)  # for its effect
            return y

    model = nn.Sequential(Reads(), nn.Flatten(), nn.Linear(4 * 36, 2))
    lean = convert(model, "bias", example_input=torch.randn(1, 3, 8, 8), code_bits=8)
    assert coded_modules(lean) == []
    assert "overwrites a tensor that may be read again" in str(conversion_report(lean))


def test_a_module_that_brings_codes_along_keeps_them():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), tnn.SiLU(code_bits=8), nn.Flatten(), nn.Linear(4 * 36, 2))
    lean = convert(model, "bias", example_input=torch.randn(1, 3, 8, 8), recompute=False)
    assert coded_modules(lean) == ["1"]
    assert lean[0].activation is None


@pytest.mark.parametrize(
    ("method", "code_bits", "message"),
    [("bias", 4, "code_bits: expected None"), ("full", 8, "code_bits: expected None with method 'full'")],
)
def test_refuses(method, code_bits, message):
    with pytest.raises(ValueError, match=message):
        convert(nn.Sequential(nn.Conv2d(3, 4, 3), nn.SiLU()), method, code_bits=code_bits)
