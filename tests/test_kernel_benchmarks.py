"""The benchmark of the C++ kernels: what it counts, what it covers, and that nothing is left unexplained."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

pytest.importorskip("pytest_benchmark")

import tinytl_kernels as tk
from benchmarks import kernel_table, roofline, tables
from benchmarks.gpu.bandwidth import prepared
from benchmarks.gpu.operators import Difference, group_norm
from benchmarks.kernels import KERNELS
from benchmarks.notes import NOTES, REASONS
from benchmarks.roofline import DIRECTIONS, Limit, WrongKernel, computed_by, measure
from tinytl_kernels.backends import backend_module

RESULTS = Path(__file__).parents[1] / "benchmarks" / "results"
CPU = torch.device("cpu")
CASES = {case.name: case for case in KERNELS}
DIRECTED = {(case.name, direction) for case in KERNELS for direction in DIRECTIONS}


@pytest.fixture
def kernels():
    if (state := tk.available_backends()["cpu"]) != "available":
        pytest.skip(f"backend cpu: {state}")


def committed() -> list[tables.Info]:
    """The newest committed results of kernels."""
    newest: tuple[str, list[tables.Info]] = ("", [])
    for path in RESULTS.glob("20*.json"):
        results = json.loads(path.read_text(encoding="utf-8"))
        kernels = [b["extra_info"] for b in results.get("benchmarks", []) if b["extra_info"].get("level") == "kernel"]
        if kernels:
            newest = max(newest, (results["datetime"], kernels), key=lambda pair: pair[0])
    return newest[1]


def test_every_registered_kernel_is_timed(kernels):
    reached = set()
    for case in KERNELS:
        case = case.quick()
        with tk.use_backend("cpu"):
            for run, _ in prepared(case.make(case.size).build(torch.float32, CPU)).values():
                reached |= set(computed_by(run))
    prefix = "tinytl_cpu::"
    registered = {name[len(prefix) :] for name in torch._C._dispatch_get_all_op_names() if name.startswith(prefix)}
    assert len(registered) > 20
    # What copies between layouts; what counts memory; and what calls kernels that are there by themselves, two of them
    # as one: frozen_conv_add is frozen_conv with a shortcut.
    cpu = backend_module("cpu")
    callers = {*cpu.DIFFERENTIABLE, *cpu.FUSED} - {"frozen_conv_add"}
    assert registered - reached == {"in_layout", "scratch_bytes", "reset_scratch_bytes", *callers}


@pytest.mark.parametrize(
    "name", ["pointwise_1x1_s2_256_512_56", "depthwise_5x5_s2_144_56", "grouped_3x3_g4_128_128_56"]
)
def test_operations_of_a_convolution_are_those_that_pytorch_counts(name):
    case = CASES[name].quick()
    work = case.make(case.size)
    sample = work.build(torch.float32, CPU)
    (x, _), (weight,) = sample.inputs, sample.constants
    x = x.requires_grad_()
    stride = 2 if "s2" in name else 1
    with FlopCounterMode(display=False) as forward:
        output = F.conv2d(x, weight, None, stride, weight.size(-1) // 2, 1, x.size(1) // weight.size(1))
    with FlopCounterMode(display=False) as backward:
        output.sum().backward()
    assert (work.forward_flops, work.backward_flops) == (forward.get_total_flops(), backward.get_total_flops())


@pytest.mark.parametrize(
    "name",
    ["inverted_residual_16x6_24_s2_112", "inverted_residual_32x1_16_s1_112", "inverted_residual_5x5_40x6_40_s1_28"],
)
def test_operations_of_a_block_are_those_of_its_convolutions(name):
    case = CASES[name].quick()
    work = case.make(case.size)
    x, weights = torch.empty(case.size), work.build(torch.float32, CPU).constants
    with FlopCounterMode(display=False) as counter:
        for weight in weights:
            depthwise = weight.size(1) == 1 and weight.size(-1) > 1
            stride = 2 if depthwise and "s2" in name else 1
            x = F.conv2d(x, weight, None, stride, weight.size(-1) // 2, 1, x.size(1) if depthwise else 1)
    assert work.forward_flops == work.backward_flops == counter.get_total_flops()


def test_operations_of_a_block_with_squeeze_and_excite_are_those_of_its_convolutions():
    case = CASES["mbconv_silu_se_16_96_24_s2_112"].quick()
    work = case.make(case.size)
    expand, depthwise, project, reduce, restore = work.build(torch.float32, CPU).constants
    with FlopCounterMode(display=False) as counter:
        h = F.conv2d(F.conv2d(torch.empty(case.size), expand), depthwise, None, 2, 1, 1, depthwise.size(0))
        F.conv2d(h * F.conv2d(F.conv2d(h.mean((2, 3), keepdim=True), reduce), restore), project)
    assert work.forward_flops == work.backward_flops == counter.get_total_flops()


def test_operations_of_a_trained_branch_include_those_of_its_weights_gradients():
    case = CASES["lite_branch_24_24_28"].quick()
    work = case.make(case.size)
    pooled, weight1, _, _, weight2, _, _ = (t.requires_grad_() for t in work.build(torch.float32, CPU).inputs)
    with FlopCounterMode(display=False) as forward:
        # Group by group: of a grouped weight's gradient PyTorch counts every pair of channels.
        halves = zip(pooled.chunk(2, 1), weight1.chunk(2), strict=True)
        output = F.conv2d(torch.cat([F.conv2d(x, weight, padding=2) for x, weight in halves], 1), weight2)
    with FlopCounterMode(display=False) as backward:
        output.sum().backward()
    assert (work.forward_flops, work.backward_flops) == (forward.get_total_flops(), backward.get_total_flops())


def test_a_backward_reads_the_input_where_it_is_kept():
    size = (2, 16, 6, 5)
    image, affine, statistics = 2 * 16 * 6 * 5 * 4, 16 * 4, 2 * 2 * 2 * 4
    parts = {name: moved for name, (_, moved) in prepared(group_norm(size, 2, None)(torch.float32, CPU)).items()}
    assert parts["forward"] == 2 * image + 2 * affine + statistics
    # x, dy and dx; the norm's weight and bias, and their gradients.
    assert parts["backward"] == 3 * image + 4 * affine + statistics


@pytest.mark.parametrize(("arithmetic", "copy", "nearer"), [(3.0, 2.0, "arithmetic"), (1.0, 2.0, "copy")])
def test_the_limit_is_the_longer_of_the_two_times(arithmetic, copy, nearer):
    limit = Limit(arithmetic, copy)
    assert (limit.seconds, limit.nearer) == (max(arithmetic, copy), nearer)


def test_a_measurement_agrees_with_itself(kernels, monkeypatch):
    rates = {"sgemm_gflops": 50.0, "conv_gflops": 100.0, "copy_gb_s": 10.0}
    monkeypatch.setattr(roofline, "machine", lambda: rates)
    for direction, measurement in measure(CASES["dense_3x3_64_64_56"], quick=True).items():
        info = measurement.info
        assert info["direction"] == direction
        assert sorted(measurement.seconds)[0] <= info["median_s"] <= sorted(measurement.seconds)[-1]
        assert info["gflops_per_s"] * info["median_s"] == pytest.approx(info["flops"] / 1e9)
        assert info["gb_per_s"] * info["median_s"] == pytest.approx(info["bytes"] / 1e9)
        # The faster of the two arithmetic rates.
        limits = {"arithmetic": info["flops"] / 100e9, "copy": info["bytes"] / info["copy_gb_per_s"] / 1e9}
        assert info["limit_s"] == pytest.approx(max(limits.values()))
        assert info["limit"] == max(limits, key=limits.get)
        assert info["of_limit"] == pytest.approx(info["limit_s"] / info["median_s"])


def test_a_wrong_kernel_is_not_timed(monkeypatch):
    found = Difference("gradient of input 0", error=2.0, allowed=1.0)
    monkeypatch.setattr(roofline, "difference", lambda *args: found)
    monkeypatch.setattr(roofline, "interleave", lambda *args, **kwargs: pytest.fail("timed"))
    with pytest.raises(WrongKernel, match="relu_64_56, gradient of input 0: off by"):
        measure(CASES["relu_64_56"], quick=True)


def info(case="relu_64_56", direction="forward", of_limit=0.5, **changes) -> tables.Info:
    machine = {
        "cpu": "a", "capability": "b", "threads": 2, "torch": "c", "python": "d", "commit": "e",
        "sgemm_gflops": 50.0, "conv_gflops": 100.0, "copy_gb_s": 10.0,
    }  # fmt: skip
    return {
        "level": "kernel", "case": case, "direction": direction, "computed_by": ["f"], "median_s": 1e-3,
        "gflops_per_s": 25.0, "gb_per_s": 4.0, "copy_gb_per_s": 8.0, "limit": "copy", "of_limit": of_limit,
        "machine": machine, "input_size": [8, 1, 1, 1], **changes,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("of_limit", "known", "expected"),
    [
        (0.59, True, "| pages |"),
        (0.59, False, f"| {kernel_table.NO_NOTE} |"),
        (0.61, True, "|  |"),
        (0.61, False, "|  |"),
    ],
)
def test_the_table_explains_what_is_below_its_limit_or_says_that_nobody_does(monkeypatch, of_limit, known, expected):
    monkeypatch.setattr(kernel_table, "NOTES", {("relu_64_56", "forward"): ("pages",)} if known else {})
    monkeypatch.setattr(kernel_table, "REASONS", {"pages": "the reason in full", "other": "not named"})
    text = tables.render([info(of_limit=of_limit)])["kernels"]
    (row,) = (line for line in text.splitlines() if line.startswith("| relu 64 56 |"))
    assert row.endswith(expected)
    assert "25 (50%)" in row
    assert ("- pages: the reason in full" in text) == (expected == "| pages |")
    assert "not named" not in text


def test_each_document_takes_the_section_that_it_has_markers_of(tmp_path):
    document = tmp_path / "kernels.md"
    begin, end = tables.MARKERS["kernels"]
    document.write_text(f"before\n{begin}\nstale\n{end}\nafter\n")
    tables.update(document, {"benchmarks": "peers\n", "kernels": "limits\n"})
    assert document.read_text() == f"before\n{begin}\nlimits\n{end}\nafter\n"
    with pytest.raises(tables.TablesError, match="benchmarks:begin"):
        tables.update(document, {"benchmarks": "peers\n"})


def test_the_committed_results_have_every_kernel():
    assert {(row["case"], row["direction"]) for row in committed()} == DIRECTED


def test_every_committed_row_below_its_limit_has_a_note():
    owed = {(row["case"], row["direction"]) for row in committed() if row["of_limit"] < kernel_table.EXPLAIN_BELOW}
    assert owed <= set(NOTES)


def test_notes_are_of_cases_and_reasons_that_exist():
    assert set(NOTES) <= DIRECTED
    assert {reason for reasons in NOTES.values() for reason in reasons} == set(REASONS)
