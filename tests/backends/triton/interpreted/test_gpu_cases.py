"""What a GPU is given by ``python -m benchmarks.gpu``, through the interpreter: a first run should find no slip."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from benchmarks.cases import Case
from benchmarks.gpu.operators import cases, difference
from benchmarks.gpu.steps import matches
from benchmarks.gpu.worker import Context
from tinytl_kernels import use_backend
from tinytl_kernels.backends.triton.launch import observe, record
from tinytl_kernels.backends.triton.operators import OPERATORS

CPU = torch.device("cpu")
# Random: its own test on a GPU counts what it keeps.
LEFT_OUT = {"dropout", "dropout_backward"}


def test_every_operator_of_the_backend_is_among_the_cases():
    seen = set()
    # Launches are collected and not started: what comes out is arbitrary, and nobody looks at it.
    with use_backend("triton"), observe(lambda operator, args, kwargs: seen.add(operator)), record():
        for case in cases(tiny=True):
            sample = case.build(torch.float32, CPU)
            sample.answers([torch.ones_like(output) for output in sample.outputs()])
    assert {name for name, operator in OPERATORS.items() if operator not in seen} == LEFT_OUT


@pytest.mark.parametrize(
    "name", ["pointwise, NCHW", "depthwise, int8 weight", "block, 7x7, pooled", "max pooling", "lite branch"]
)
def test_a_case_is_right(name):
    (case,) = (case for case in cases(tiny=True) if case.name == name)
    found = difference(case, "float32", CPU, "triton")
    assert found.right, found


def layer() -> nn.Module:
    return nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False), nn.BatchNorm2d(8), nn.ReLU6())


def test_the_backend_is_a_contestant_of_its_own(monkeypatch):
    monkeypatch.setenv("TINYTL_BACKEND", "reference")  # what nobody forces, as in a worker
    case = Case("layer", "layer", layer, (2, 8, 6, 5))
    found = list(matches(case, case.stock(), "float32", Context(CPU, "triton", tiny=True)))
    mine = {row["contestant"]: row for row in found if row["ours"]}
    assert set(mine) == {"ours_reference_bias", "ours_triton_bias"}
    assert mine["ours_triton_bias"]["eager_s"] > mine["ours_reference_bias"]["eager_s"]  # it was interpreted
    assert mine["ours_triton_bias"]["answer"]["gradients"] == 2
