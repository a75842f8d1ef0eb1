"""convert(weight_bits=8): a quarter of the frozen bytes, close outputs, gradients exact for the quantised weights."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import tinytl_kernels as tk
from tinytl_kernels.core.quantization import CODES
from tinytl_kernels.errors import TinyTLError
from tinytl_kernels.models.zoo import import_timm, import_torchvision

X = torch.linspace(-2, 2, 2 * 3 * 64 * 64).sin().view(2, 3, 64, 64)


def zoo(name: str) -> nn.Module:
    try:
        if name == "mobilenet_v2":
            model = import_torchvision().models.mobilenet_v2(num_classes=10)
        else:
            model = import_timm().create_model(name, num_classes=10)
    except TinyTLError as error:
        pytest.skip(str(error))
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):  # statistics as after training: channels of different scales
            nn.init.uniform_(module.running_var, 0.5, 2)
            nn.init.normal_(module.running_mean, 0, 0.1)
            module.num_batches_tracked.fill_(1)
    return model.eval()


def small() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, stride=2, bias=False), nn.BatchNorm2d(16), nn.ReLU(),
        nn.Conv2d(16, 24, 3, padding=1), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(24, 8), nn.ReLU(), nn.Linear(8, 4),
    )  # fmt: skip


def gradients(model: nn.Module) -> list[torch.Tensor]:
    model.zero_grad()
    F.cross_entropy(model(X), torch.tensor([1, 3])).backward()
    return [p.grad for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize(("name", "code"), [("mobilenet_v2", "int8"), ("efficientnet_lite0", "kmeans")])
def test_a_network_of_the_zoo(name, code):
    stock = zoo(name)
    floats = tk.convert(stock, "bias", example_input=X)
    model = tk.convert(stock, "bias", example_input=X, weight_bits=8, weight_code=code)
    report = tk.conversion_report(model)
    assert report.quantization.code == code
    assert 0 < report.quantization.error < 0.02
    assert 1e-5 < report.quantization.deviation < 0.1
    assert report.deviation < 1e-4  # before the weights were quantised
    # Bytes: one a weight, and the scales.
    sizes = {"floats": floats, "coded": model}
    frozen = {k: tk.measure_memory(m, X).frozen for k, m in sizes.items()}
    assert frozen["floats"] - frozen["coded"] == 3 * report.quantization.elements
    assert report.quantization.elements > 0.99 * report.frozen_elements
    # Gradients: those of the plain model with the weights that the 8 bits stand for.
    plain = tk.to_torch(model)
    assert {t.dtype for t in plain.state_dict().values()} == {torch.float32}
    ours, theirs = gradients(model), gradients(plain)
    exact = gradients_in_double(plain)
    assert len(ours) == len(theirs) > 50
    for a, b, c in zip(ours, theirs, exact, strict=True):
        error, stock_error = (a - c).abs().max(), (b - c).abs().max()
        # Thousands of sums behind each other: of the order of stock PyTorch's own error, and far from any real one.
        assert error <= 3 * stock_error + 1e-5 * c.abs().max()


def gradients_in_double(plain: nn.Module) -> list[torch.Tensor]:
    model = copy.deepcopy(plain).double()
    model.zero_grad()
    F.cross_entropy(model(X.double()), torch.tensor([1, 3])).backward()
    return [p.grad for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize("code", CODES)
@pytest.mark.parametrize("method", ["norm+last", "last", "bias", "lite_residual", "lite_residual+bias"])
def test_only_frozen_convolutions_are_quantised(method, code):
    model = tk.convert(small(), method, weight_bits=8, weight_code=code, example_input=torch.randn(1, 3, 16, 16))
    coded = {name for name, p in model.named_parameters() if not p.is_floating_point()}
    convolutions = {f"{n}.weight" for n, m in model.named_modules() if isinstance(m, tk.FrozenConvBias)}
    assert coded == convolutions
    assert all(p.is_floating_point() for p in model.parameters() if p.requires_grad)
    model(torch.randn(2, 3, 16, 16)).sum().backward()


def test_full_trains_every_weight():
    with pytest.raises(ValueError, match="weight_bits: expected 32 with method 'full'"):
        tk.convert(small(), "full", weight_bits=8)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(weight_bits=4), "weight_bits: expected one of 32, 8, got 4"),
        (dict(weight_bits=True), "weight_bits: expected one of 32, 8, got True"),
        (dict(weight_code="int4"), "weight_code: expected one of 'int8', 'kmeans', got 'int4'"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        tk.convert(small(), "bias", **arguments)


def test_a_weight_of_nan_is_named():
    model = small()
    nn.init.constant_(model[3].weight, float("nan"))
    with pytest.raises(ValueError, match=r"3\.weight: NaN or inf cannot be coded"):
        tk.convert(model, "bias", weight_bits=8, example_input=torch.randn(1, 3, 16, 16))


def test_a_layer_that_8_bits_would_make_larger_stays():
    # A BatchNorm that stands alone becomes one weight a channel: a byte and a scale would be five.
    model = nn.Sequential(nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(8 * 4 * 4, 2))
    model = tk.convert(model, "bias", weight_bits=8, example_input=torch.randn(1, 8, 6, 6))
    assert model[0].weight.dtype == torch.float32
    assert model[2].weight.dtype == torch.int8
    assert tk.conversion_report(model).quantization.layers == 1


def test_the_report_tells_the_error():
    model = tk.convert(small(), "bias", weight_bits=8, example_input=torch.randn(1, 3, 16, 16))
    text = str(tk.conversion_report(model))
    assert "8-bit weights (int8): 3,888 of 4,080 frozen parameters, in 2 convolutions; largest relative error" in text
    assert "outputs with 8-bit weights: relative difference" in text
    assert "8-bit" not in str(tk.conversion_report(tk.convert(small(), "bias")))


def test_a_float_checkpoint_of_the_converted_model_loads():
    example = torch.randn(2, 3, 16, 16)
    floats = tk.convert(small(), "bias", example_input=example)
    model = tk.convert(small(), "bias", weight_bits=8, example_input=example)
    model.load_state_dict(floats.state_dict())
    expected = copy.deepcopy(floats)
    for module in expected.modules():
        if isinstance(module, tk.FrozenConvBias):
            module.quantize_()
    assert torch.equal(model(example), expected(example))


def test_trains_copies_and_pickles():
    model = tk.convert(small(), "lite_residual+bias", weight_bits=8, example_input=torch.randn(1, 3, 16, 16))
    x = torch.randn(4, 3, 16, 16)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], 1e-2)
    losses = []
    for _ in range(10):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), torch.tensor([0, 1, 2, 3]))
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    model.eval()
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(x), model(x))
    torch.testing.assert_close(tk.to_torch(model)(x), model(x), rtol=1e-4, atol=1e-5)


def test_the_estimate_is_one_byte_a_frozen_weight_either_way():
    example = torch.randn(1, 3, 16, 16)
    estimates = [
        tk.estimate_memory(tk.convert(small(), "bias", weight_bits=bits, example_input=example), example)
        for bits in (32, 8)
    ]
    assert estimates[0].frozen == estimates[1].frozen
    assert estimates[0].by_layer == estimates[1].by_layer


@pytest.mark.parametrize("code", CODES)
def test_an_adapter_fits_the_backbone_it_was_trained_with(code, tmp_path):
    example = torch.randn(1, 3, 16, 16)
    stock = small()
    floats = tk.convert(stock, "bias", example_input=example)
    model = tk.convert(stock, "bias", example_input=example, weight_bits=8, weight_code=code)
    tk.save_adapter(model, tmp_path / "coded")
    tk.save_adapter(floats, tmp_path / "floats")
    tk.load_adapter(
        tk.convert(stock, "bias", example_input=example, weight_bits=8, weight_code=code), tmp_path / "coded"
    )
    with pytest.raises(
        ValueError, match=f"a backbone with {code} weights, but the model's are floating point.*weight_bits"
    ):
        tk.load_adapter(floats, tmp_path / "coded")
    with pytest.raises(ValueError, match=f"with floating point weights, but the model's are {code}"):
        tk.load_adapter(model, tmp_path / "floats")
