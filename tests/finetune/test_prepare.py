"""From a name and a recipe to the converted model."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tinytl_kernels import conversion_report
from tinytl_kernels.errors import TinyTLError
from tinytl_kernels.finetune import prepare
from tinytl_kernels.finetune.arguments import parse

from .conftest import RECIPE

MODEL = "timm:test_efficientnet"
CODED = replace(RECIPE, weight_bits=8, weight_code="kmeans", resolution=32)


def test_the_recipes_weight_bits_reach_the_model() -> None:
    model = prepare(MODEL, "last", 3, CODED, pretrained=False)
    assert conversion_report(model).quantization.code == "kmeans"
    assert any(p.dtype == torch.uint8 for p in model.parameters())
    floats = prepare(MODEL, "last", 3, replace(CODED, weight_bits=32), pretrained=False)
    assert all(p.dtype == torch.float32 for p in floats.parameters())


def test_full_fine_tuning_has_no_frozen_weights() -> None:
    with pytest.raises(TinyTLError, match=r"cannot convert .* weight_bits: expected 32 with method 'full'"):
        prepare(MODEL, "full", 3, CODED, pretrained=False)


def test_the_command_line_takes_them() -> None:
    options = parse(["compare", "--weight-bits", "8", "--weight-code", "kmeans"])
    assert (options.weight_bits, options.weight_code) == (8, "kmeans")
    assert parse(["finetune"]).weight_bits is None  # the recipe's own default
