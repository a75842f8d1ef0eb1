"""Batch 1 trains like batch 8 on the kind of network the paper trains at batch 1: GroupNorm, no batch statistics."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

import tinytl_kernels as tk
from tinytl_kernels.finetune import Options, Recipe, Training
from tinytl_kernels.models import InputConfig, mcunet_320kb

from .conftest import make_data

RECIPE = Recipe(learning_rate=1e-3, epochs=2, resolution=32, crop_scale=1.0, flip=False, dropout=0.0)
QUIET = Options(checkpoints=False, progress=False, tensorboard=False)


class InFloat64(nn.Module):
    """So that the method is compared: in float32 Adam takes whole steps on gradients that are nothing but rounding."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x.double()).float()


def build(method: str, batch_size: int, accumulate: int) -> Training:
    torch.manual_seed(0)
    model = mcunet_320kb(num_classes=3, norm="gn").double()
    example = torch.zeros(1, 3, 32, 32, dtype=torch.float64)
    model = InFloat64(tk.convert(model, method, example_input=example))
    recipe = replace(RECIPE, batch_size=batch_size, accumulate=accumulate)
    return Training(model, make_data(train=10, test=3), recipe, InputConfig(), options=QUIET)


@pytest.mark.parametrize("method", ["bias", "lite_residual+bias"])
def test_batch_1_trains_like_batch_8(method: str) -> None:
    """10 pictures: the last step of an epoch has two, whichever way it is taken."""
    large, small = build(method, 8, 1), build(method, 1, 8)
    start = {name: parameter.detach().clone() for name, parameter in large.model.named_parameters()}
    large.run(), small.run()
    assert large.progress.steps == small.progress.steps == 4
    for (name, expected), found in zip(large.model.named_parameters(), small.model.parameters(), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7, msg=lambda text, n=name: f"{n}: {text}")
        assert torch.equal(expected, start[name]) != expected.requires_grad, name
