"""Table 2's memory column on the package's own ProxylessNAS-Mobile, as a stock model and converted."""

from __future__ import annotations

import pytest
import torch

import tinytl_kernels as tk
from tests.memory.test_estimate import TABLE_2
from tinytl_kernels.convert.training import set_trained
from tinytl_kernels.models import proxylessnas_mobile

OTHERS = [("lite_residual+bias", 8, 320, 64.7), ("lite_residual+bias", 1, 224, 13.9), ("bias", 1, 224, 8.5)]
CASES = [(method, 8, 224, megabytes) for method, megabytes in TABLE_2.items()] + OTHERS


def estimate(model, batch: int, size: int) -> float:
    return tk.estimate_memory(model.to("meta"), torch.zeros(batch, 3, size, size, device="meta")).peak / 1e6


@pytest.mark.parametrize(("method", "batch", "size", "megabytes"), CASES)
def test_the_papers_figures_for_the_stock_network(method: str, batch: int, size: int, megabytes: float) -> None:
    with torch.device("meta"):
        model = proxylessnas_mobile(102, lite_residual=True)
    set_trained(model, method, model.classifier)
    assert estimate(model, batch, size) == pytest.approx(megabytes, rel=0.005)


@pytest.mark.parametrize(
    ("norm", "method"), [*(("gn", m) for m in TABLE_2), ("bn", "bias"), ("bn", "lite_residual+bias")]
)
@pytest.mark.usefixtures("reference_backend")
def test_the_papers_figures_for_the_converted_network(norm: str, method: str) -> None:
    model = proxylessnas_mobile(102, norm=norm, lite_residual=True).eval()
    model = tk.convert(model, method, example_input=torch.randn(1, 3, 32, 32), inplace=True)
    cases = [(8, 224, TABLE_2[method]), *(case[1:] for case in OTHERS if case[0] == method)]
    for batch, size, megabytes in cases:
        assert estimate(model, batch, size) == pytest.approx(megabytes, rel=0.005)


@pytest.mark.usefixtures("reference_backend")
def test_branches_that_convert_adds_count_as_those_of_the_checkpoints() -> None:
    model = proxylessnas_mobile(102).eval()
    model = tk.convert(
        model, "lite_residual+bias", example_input=torch.randn(1, 3, 32, 32), inplace=True, lite_resolution="paper"
    )
    assert estimate(model, 8, 224) == pytest.approx(TABLE_2["lite_residual+bias"], rel=0.005)
