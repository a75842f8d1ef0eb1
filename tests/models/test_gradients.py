"""Gradients of TinyTL's own network, GroupNorm and standardised weights everywhere, are stock PyTorch's to rounding."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import tinytl_kernels as tk
from tests.checks import assert_as_exact_as_torch
from tinytl_kernels.models import proxylessnas_mobile
from tinytl_kernels.nn import Recomputed

METHOD = "lite_residual+bias"  # every bias, the branches and the classifier


@pytest.fixture(scope="module")
def stock() -> nn.Module:
    """ProxylessNAS-Mobile with norms that scale and shift, so that ReLU6 cuts on both sides, and branches that count.

    Contiguous: PyTorch 2.13 crashes on the CPU in the backward of a channels_last GroupNorm of which only the bias is
    trained.
    """
    torch.manual_seed(20260101)
    model = proxylessnas_mobile(10, norm="gn", lite_residual=True, dropout=0.0)
    for module in model.modules():
        if isinstance(module, nn.GroupNorm):
            nn.init.normal_(module.weight, 1, 0.2)
            nn.init.normal_(module.bias, 0.5, 0.5)
    return model.to(memory_format=torch.contiguous_format)


@pytest.fixture(scope="module")
def images() -> Tensor:
    return torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(3))


def gradients(model: nn.Module, images: Tensor, trained: tuple[str, ...]) -> dict[str, Tensor]:
    """Of the loss, by the images and by the parameters named."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in trained)
    images = images.to(next(model.parameters()).dtype).requires_grad_()
    loss = nn.functional.cross_entropy(model(images), torch.tensor([3, 7]))
    grads = torch.autograd.grad(loss, [images, *(model.get_parameter(name) for name in trained)])
    return dict(zip(("images", *trained), grads, strict=True))


@pytest.fixture(scope="module")
def converted(stock: nn.Module, images: Tensor) -> nn.Module:
    return tk.convert(stock, METHOD, example_input=images)


@pytest.fixture(scope="module")
def exact(stock: nn.Module, images: Tensor, converted: nn.Module) -> dict[str, Tensor]:
    """Stock PyTorch's, in float64."""
    return gradients(copy.deepcopy(stock).double(), images, tk.conversion_report(converted).trained)


def test_in_float32_they_are_as_exact_as_stock_pytorchs(stock, images, converted, exact):
    trained = tk.conversion_report(converted).trained
    assert any(isinstance(module, Recomputed) for module in converted.modules())
    assert {"stem.norm.bias", "classifier.bias"} < set(trained)
    ours, theirs = gradients(converted, images, trained), gradients(copy.deepcopy(stock), images, trained)
    for name in exact:
        assert_as_exact_as_torch(name, ours[name], theirs[name], exact[name])


def test_in_float64_they_are_stock_pytorchs(stock, images, converted, exact):
    with tk.use_backend("reference"):
        model = tk.convert(copy.deepcopy(stock).double(), METHOD, example_input=images.double())
        ours = gradients(model, images, tk.conversion_report(converted).trained)
    for name in exact:
        error = ((ours[name] - exact[name]).abs().max() / exact[name].abs().max()).item()
        print(f"{name}: {error:.1e}")
        assert error < 1e-12, f"{name}: {error:.1e}"
