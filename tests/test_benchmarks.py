"""The benchmark suite itself: its answer check, its clockwork, what it reports, and its tables."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

pytest.importorskip("pytest_benchmark")

from benchmarks import ours, peers, tables
from benchmarks.cases import Case
from benchmarks.contestants import Contestant
from benchmarks.interleave import interleave
from benchmarks.match import Match, Plan, play
from benchmarks.networks import BY_NAME

ROOT = Path(__file__).parents[1]
# Of the network not what is slow in a quick run too and is there as a block.
FEW = (
    "not test_kernel and (depthwise_3x3_s1_144_56 or inverted_residual_32x6_32_s1_28 or "
    "(mobilenet_v2_b8 and not (bias_bf16 or reference_last or reference_lite)))"
)


def pytest_run(*arguments: str) -> subprocess.CompletedProcess:
    environment = {k: v for k, v in os.environ.items() if k != "PYTEST_ADDOPTS"} | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--benchmark-only", "--quick"]
    return subprocess.run(
        [*command, "--threads=1", *arguments], cwd=ROOT, env=environment, capture_output=True, text=True
    )


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The JSON of a quick run of one layer, one block and one network."""
    path = tmp_path_factory.mktemp("benchmarks") / "results.json"
    run = pytest_run("benchmarks", "-k", FEW, f"--benchmark-json={path}")
    assert run.returncode == 0, run.stdout + run.stderr
    return path


@pytest.fixture(scope="module")
def infos(results: Path) -> list[tables.Info]:
    return tables.load(results)


PROMISED = {
    "case": str,
    "level": str,
    "contestant": str,
    "answer": dict,
    "median_s": float,
    "medians_s": dict,
    "rounds": int,
    "ratio_to_stock_inference": float,
    "ratio_to_stock_bias": float,
    "fastest_peer": str,
    "ratio_to_fastest_peer": float,
    "images_per_s": float,
    "saved_bytes": int,
    "memory_counted_by": str,
    "machine": dict,
}
MACHINE = {
    "cpu", "capability", "threads", "torch", "python", "system", "commit", "sgemm_gflops", "conv_gflops", "copy_gb_s",
}  # fmt: skip


def test_every_entry_has_the_promised_fields(infos):
    assert {info["level"] for info in infos} == {"layer", "block", "network"}
    for info in infos:
        for name, kind in PROMISED.items():
            assert isinstance(info[name], kind), f"{info['case']} {info['contestant']}: {name} is {info[name]!r}"
        assert set(info["machine"]) == MACHINE
        assert info["machine"]["threads"] == 1
        assert info["machine"]["sgemm_gflops"] > 0
        assert info["machine"]["conv_gflops"] > 0
        assert info["machine"]["copy_gb_s"] > 0
        if info["kind"] == "step" and info["precision"] == "float32":
            assert info["answer"]["telling"] == info["answer"]["gradients"] > 0
        if info["kind"] == "step":
            assert info["peak_bytes"] > info["saved_bytes"] > 0
        if info["limit"] == "bytes":
            assert info["gb_per_s"] > 0
        elif info["kind"] == "inference" or info["method"] == "bias":
            assert info["gflops_per_s"] > 0


def test_ratios_and_pytest_benchmarks_medians_are_of_one_interleaved_run(results):
    benchmarks = json.loads(results.read_text())["benchmarks"]
    by_case: dict[str, list[dict]] = {}
    for benchmark in benchmarks:
        info = benchmark["extra_info"]
        by_case.setdefault(info["case"], []).append(info)
        assert benchmark["stats"]["median"] == pytest.approx(info["median_s"], rel=1e-9)
    for entries in by_case.values():
        assert len(entries) > 3
        for info in entries:
            assert info["medians_s"] == entries[0]["medians_s"]
            expected = info["medians_s"][info["contestant"]] / info["medians_s"]["stock_bias"]
            assert info["ratio_to_stock_bias"] == pytest.approx(expected)


def test_bytes_of_the_same_count_show_the_packages_saving(infos):
    network = {info["contestant"]: info for info in infos if info["level"] == "network"}
    stock, lean = network["stock_bias"], network["ours_reference_bias"]
    assert stock["memory_counted_by"] == lean["memory_counted_by"] == "storages"
    assert lean["saved_bytes"] < stock["saved_bytes"] / 40
    assert lean["saved_bytes"] < network["checkpointed"]["saved_bytes"] < network["folded"]["saved_bytes"]
    # A layer inside a network answers for the input that it keeps: stock keeps the conv's, the norm's and ReLU6's.
    layer = {info["contestant"]: info for info in infos if info["level"] == "layer"}
    n, c, h, w = layer["stock_bias"]["input_size"]
    assert layer["stock_bias"]["saved_bytes"] >= 3 * 4 * n * c * h * w
    assert layer["ours_reference_bias"]["saved_bytes"] == n * c * h * w // 8


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="resident memory is read from /proc")
def test_process_peak_agrees_with_the_count_of_storages(infos):
    for info in infos:
        if info["level"] == "network" and info["precision"] == "float32" and info["kind"] == "step":
            peak, process = info["peak_bytes"], info["process_peak_bytes"]
            # Scratch space of libraries comes on top; a megabyte of pages may have been resident before.
            assert peak - 1e6 < process < 1.5 * peak + 8e6, info["contestant"]


def test_tables_show_every_contestant_and_every_loss(infos):
    text = tables.render(infos)["benchmarks"]
    network = [info for info in infos if info["level"] == "network"]
    for info in network:
        row = next(line for line in text.splitlines() if line.startswith(f"| {info['label']} |"))
        assert f"{info['ratio_to_stock_inference']:.2f}x" in row
    for case in {info["case"] for info in infos if info["level"] != "network"}:
        assert f"| {case.replace('_', ' ')} |" in text
    assert "not run: memsave" in text or any(info["contestant"] == "memsave" for info in infos)


def test_only_wins_that_train_the_biases_are_bold(infos):
    lean = next(i for i in infos if i["contestant"] == "ours_reference_bias" and i["level"] == "network")

    def row(**changes) -> str:
        text = tables.render([{**lean, **changes}])["benchmarks"]
        return next(line for line in text.splitlines() if "**tinytl**" in line)

    assert "**0.50x**" in row(ratio_to_stock_bias=0.5)
    assert "| 2.00x" in row(ratio_to_stock_bias=2.0)
    assert "| 1.00x" in row(ratio_to_stock_bias=0.999)
    assert "| 0.50x" in row(ratio_to_stock_bias=0.5, method="last")


def test_update_rewrites_what_is_between_the_markers_and_nothing_else(results, tmp_path):
    readme = tmp_path / "README.md"
    begin, end = tables.MARKERS["benchmarks"]
    readme.write_text(f"before\n{begin}\nstale\n{end}\nafter\n")
    for _ in range(2):
        assert tables.main([str(results), "--update", str(readme)]) == 0
    text = readme.read_text()
    assert text.startswith(f"before\n{begin}\n")
    assert text.endswith(f"{end}\nafter\n")
    assert "stale" not in text
    assert text.count("| PyTorch, bias only |") == 1


@pytest.mark.parametrize(("content", "told"), [("no markers", "once each"), (None, "No such file")])
def test_update_of_a_file_without_markers_is_one_clear_line(results, tmp_path, capsys, content, told):
    readme = tmp_path / "README.md"
    if content is not None:
        readme.write_text(content)
    assert tables.main([str(results), "--update", str(readme)]) == 2
    assert told in capsys.readouterr().err
    assert content is None or readme.read_text() == content


@pytest.mark.parametrize("content", ["", "[]", '{"benchmarks": []}'])
def test_tables_refuse_a_json_of_something_else(tmp_path, capsys, content):
    path = tmp_path / "other.json"
    path.write_text(content)
    assert tables.main([str(path)]) == 2
    assert str(path) in capsys.readouterr().err


def block() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(8, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU6(), nn.Conv2d(16, 8, 1)
    )


BLOCK = Case("block", "block", block, (8, 8, 30, 30))


class Unmasked(nn.Module):
    """ReLU6 whose backward forgets the mask."""

    def forward(self, input):
        return input + (input.clamp(0, 6) - input).detach()


def scaled_bias_gradient(stock, case):
    module = ours.converted("bias", stock, case)
    next(p for p in module.parameters() if p.requires_grad).register_hook(lambda grad: 1.05 * grad)
    return module


def nan_bias_gradient(stock, case):
    module = peers.biases_trained(stock, case)
    next(p for p in module.parameters() if p.requires_grad).register_hook(lambda grad: grad * float("nan"))
    return module


def forgotten_mask(stock, case):
    stock[2] = Unmasked()
    return peers.biases_trained(stock, case)


def output_off(stock, case):
    stock.register_forward_hook(lambda module, args, output: output * 1.00001)
    return peers.biases_trained(stock, case)


def untrained_bias(stock, case):
    module = peers.biases_trained(stock, case)
    next(p for p in module.parameters() if p.requires_grad).requires_grad_(False)
    return module


def check_only(*contestants: Contestant) -> Match:
    return play(BLOCK, contestants, Plan(timed=False))


@pytest.mark.parametrize(
    ("build", "told"),
    [
        (scaled_bias_gradient, "gradient of 0.bias: relative error 5"),
        (nan_bias_gradient, "relative error nan"),
        (forgotten_mask, "gradient of input: relative error"),
        (output_off, "output: relative error 1"),
        (untrained_bias, "gradients: expected 3, got 2"),
    ],
)
def test_a_wrong_contestant_is_found_and_the_others_are_not_blamed(build, told):
    wrong = Contestant("wrong", "wrong", build)
    match = check_only(wrong, peers.FOLDED)
    assert set(match.wrong) == {"wrong"}
    assert told in match.wrong["wrong"]
    assert {"stock_inference", "stock_bias", "folded"} == set(match.verdicts)


def test_half_precision_is_judged_as_half_precision():
    single = replace(peers.STOCK_BIAS, key="single", build=rounded)
    half = replace(peers.STOCK_BIAS_BF16, key="half", build=rounded)
    match = check_only(single, half)
    assert "half" in match.verdicts
    assert "output: relative error" in match.wrong["single"]


@torch.no_grad()
def rounded(stock, case):
    for parameter in stock.parameters():
        parameter.copy_(parameter.bfloat16())
    return peers.biases_trained(stock, case)


def test_a_peer_that_fails_is_absent_and_ours_that_fails_is_wrong():
    def broken(stock, case):
        raise RuntimeError("cannot take groups\nand more")

    peer = Contestant("peer", "peer", broken)
    mine = Contestant("mine", "mine", broken, backend="reference")
    match = check_only(peer, mine)
    assert match.absent == {"peer": "fails: RuntimeError: cannot take groups"}
    assert set(match.wrong) == {"mine"}


def test_a_wrong_contestant_fails_its_pytest_item_and_no_other(tmp_path):
    (tmp_path / "test_wrong.py").write_text(
        "import pytest\n"
        "from benchmarks import peers\n"
        "from benchmarks.conftest import REPLAY\n"
        "from tests.test_benchmarks import BLOCK, Contestant, forgotten_mask\n"
        "pytestmark = pytest.mark.benchmark(timer=REPLAY)\n"
        "@pytest.mark.parametrize('case', [BLOCK], ids=['block'])\n"
        "@pytest.mark.parametrize('contestant', [peers.FOLDED, Contestant('wrong', 'wrong', forgotten_mask)],\n"
        "                         ids=lambda c: c.key)\n"
        "def test_block(case, contestant, take_part):\n"
        "    take_part(case, contestant)\n"
    )
    run = pytest_run("-p", "benchmarks.conftest", str(tmp_path), "-c", str(ROOT / "pytest.ini"))
    assert run.returncode == 1, run.stdout + run.stderr
    assert "1 failed, 1 passed" in run.stdout
    assert "wrong on block: gradient of" in run.stdout


@pytest.mark.parametrize("name", ["mobilenet_v2_b8", "efficientnet_lite0_b8", "mnasnet1_0_b8", "resnet50_b8"])
def test_folding_by_hand_leaves_no_norm_and_checkpointing_takes_every_block(name):
    case = BY_NAME[name].quick()
    module = peers.checkpointed(case.stock(), case)
    assert not [m for m in module.modules() if isinstance(m, nn.BatchNorm2d)]
    blocks = {"mobilenet_v2_b8": 17, "efficientnet_lite0_b8": 16, "mnasnet1_0_b8": 16, "resnet50_b8": 16}
    assert sum(isinstance(m, peers.Checkpointed) for m in module.modules()) == blocks[name]


def test_a_case_is_the_same_in_every_process():
    def draw() -> list[torch.Tensor]:
        torch.rand(3)  # whatever was drawn before
        return [BLOCK.input(), *BLOCK.stock().state_dict().values()]

    assert all(torch.equal(a, b) for a, b in zip(draw(), draw(), strict=True))


def test_activations_of_a_calibrated_network_do_not_fade():
    case = BY_NAME["mobilenet_v2_b8"].quick()
    deviations = []
    stock = case.stock()
    for module in stock.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.register_forward_hook(lambda m, args, output: deviations.append(output.std().item()))
    with torch.no_grad():
        stock(case.input())
    assert len(deviations) == 52
    assert 0.3 < min(deviations) < max(deviations) < 3


class Clock:
    """Each contestant advances it by what the script says."""

    def __init__(self) -> None:
        self.now = 0.0
        self.order: list[str] = []

    def contestant(self, name: str, durations: list[float]):
        script = iter(durations)

        def run() -> None:
            self.order.append(name)
            self.now += next(script)

        return run

    def __call__(self) -> float:
        return self.now


def test_rounds_go_in_turn_and_warm_up_does_not_count():
    clock = Clock()
    runs = {"a": clock.contestant("a", [9, 1, 2, 6]), "b": clock.contestant("b", [9, 4, 4, 5])}
    rounds = interleave(runs, warmup=1, min_rounds=3, max_rounds=3, clock=clock)
    assert "".join(clock.order) == "abababab"
    assert rounds.seconds == {"a": [1, 2, 6], "b": [4, 4, 5]}
    assert rounds.medians == {"a": 2, "b": 4}
    assert rounds.ratio("a", to="b") == 0.5


@pytest.mark.parametrize(("budget", "expected"), [(0.0, 2), (3.5, 4), (100.0, 6)])
def test_budget_ends_the_rounds_between_the_bounds(budget, expected):
    clock = Clock()
    runs = {"a": clock.contestant("a", [1.0] * 10)}
    assert interleave(runs, warmup=0, min_rounds=2, max_rounds=6, budget=budget, clock=clock).count == expected


@pytest.mark.parametrize(
    ("contestants", "numbers"), [({}, {}), ({"a": print}, {"min_rounds": 3, "max_rounds": 2})], ids=["nobody", "bounds"]
)
def test_interleave_names_the_bad_argument(contestants, numbers):
    with pytest.raises(ValueError, match="contestants: expected" if not contestants else "min_rounds, max_rounds"):
        interleave(contestants, **numbers)
