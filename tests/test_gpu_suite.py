"""``python -m benchmarks.gpu`` without a GPU: its schedule, its sections in the small, what it keeps and says."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from benchmarks.gpu import __main__ as suite
from benchmarks.gpu import report
from benchmarks.gpu.operators import OperatorCase, Sample, cases, difference
from benchmarks.gpu.schedule import Job, Outcome, Schedule
from benchmarks.gpu.worker import Context, rows

ROOT = Path(__file__).parents[1]
TINY = Context(torch.device("cpu"), "reference", tiny=True)


@pytest.fixture(autouse=True)
def without_compiling(monkeypatch, one_thread):
    """As in a worker: what nobody forces is the reference's."""
    monkeypatch.setenv("TINYTL_BACKEND", "reference")
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    yield
    torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before


def job(name: str, code: str, seconds: float = 30.0, **more) -> Job:
    """A job that runs a few lines of Python, quick to start."""
    start = "import json, os, sys, time\nrows = open(os.environ['TINYTL_GPU_ROWS'], 'a')\n"
    start += "def row(**r): rows.write(json.dumps(r) + '\\n'); rows.flush()\n"
    return Job(name, [sys.executable, "-S", "-c", start + code], seconds, **more)


def test_rows_of_a_job_that_fails_count_and_its_end_is_told():
    schedule = Schedule(60)
    schedule.run([job("bad", "row(a=1); row(a=2); print('noise'); sys.exit('out of luck')"), job("good", "row(b=3)")])
    bad, good = schedule.outcomes.values()
    assert (bad.state, bad.note) == ("failed", "status 1: out of luck")
    assert bad.rows[:2] == [{"a": 1}, {"a": 2}]
    assert "noise" in bad.rows[2]["log"]
    assert (good.state, good.rows) == ("done", [{"b": 3}])


def test_a_job_that_is_killed_by_a_signal_costs_its_own_rows_only():
    schedule = Schedule(60)
    schedule.run([job("crash", "row(a=1); os.abort()"), job("next", "row(b=2)")])
    assert schedule.outcomes["crash"].state == "failed"
    assert schedule.outcomes["crash"].rows[0] == {"a": 1}
    assert schedule.outcomes["next"].state == "done"


@pytest.mark.parametrize("stubborn", ["", "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"])
def test_a_job_that_hangs_is_ended_with_what_it_started(stubborn, tmp_path, monkeypatch):
    monkeypatch.setattr("benchmarks.gpu.schedule._GRACE", 0.5)
    child = tmp_path / "child"
    code = f"import subprocess\np = subprocess.Popen(['sleep', '60'])\nopen({str(child)!r}, 'w').write(str(p.pid))\n"
    schedule = Schedule(60)
    started = time.monotonic()
    schedule.run([job("hangs", stubborn + code + "row(a=1)\ntime.sleep(60)", seconds=2.0)])
    assert time.monotonic() - started < 20
    outcome = schedule.outcomes["hangs"]
    assert (outcome.state, outcome.rows) == ("out of time", [{"a": 1}])
    state = Path(f"/proc/{child.read_text()}/stat")
    assert not state.exists() or state.read_text().split()[2] == "Z"


def test_half_a_line_is_no_row():
    schedule = Schedule(60)
    schedule.run([job("half", "row(a=1); rows.write('{\"a\": '); rows.flush(); os._exit(0)")])
    assert schedule.outcomes["half"].rows == [{"a": 1}]


def test_no_job_starts_without_time_for_it():
    now = [0.0]
    schedule = Schedule(100, clock=lambda: now[0])
    schedule.run([job("first", "row(a=1)")])
    now[0] = 95.0
    schedule.run([job("second", "row(a=2)", seconds=60.0)])
    assert schedule.outcomes["first"].state == "done"
    assert (schedule.outcomes["second"].state, schedule.outcomes["second"].note) == ("skipped", "5 s left")


def test_jobs_that_may_run_together():
    wait = "row(start=time.time()); time.sleep(1.5); row(end=time.time())"
    schedule = Schedule(60)
    schedule.run([job("one", wait), job("two", wait)], at_a_time=2)
    starts = [outcome.rows[0]["start"] for outcome in schedule.outcomes.values()]
    ends = [outcome.rows[1]["end"] for outcome in schedule.outcomes.values()]
    assert max(starts) < min(ends)


def test_every_change_is_told_and_a_summary_is_found():
    told = []
    schedule = Schedule(60, lambda outcomes: told.append({n: (o.state, len(o.rows)) for n, o in outcomes.items()}))
    code = "row(a=1); time.sleep(1); print('===== ERROR SUMMARY: 0 errors'); print('bye')"
    schedule.run([job("one", code, summary=r"(ERROR|RACECHECK) SUMMARY")])
    assert {"one": ("running", 1)} in told  # while it ran
    assert told[-1] == {"one": ("done", 1)}
    assert schedule.outcomes["one"].note == "===== ERROR SUMMARY: 0 errors"


def test_without_a_gpu_it_says_so_and_ends_with_a_status_of_its_own(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert suite.main(["--out", str(tmp_path / "results.json")]) == suite.NO_GPU == 3
    (line,) = capsys.readouterr().out.splitlines()
    assert "no GPU" in line
    assert list(tmp_path.iterdir()) == []


def test_what_would_run_on_a_gpu_names_sections_that_exist():
    from benchmarks import blocks, layers
    from benchmarks.gpu import worker
    from benchmarks.gpu.sections import BLOCKS, LAYERS, NETWORKS, SECTIONS

    options = suite.parser().parse_args([])
    options.device, options.backend = "cuda", "triton"
    jobs = [*suite.untimed(options), *suite.timed(options)]
    assert len({j.name for j in jobs}) == len(jobs)
    for j in jobs:
        if "benchmarks.gpu.worker" in j.command:
            words = list(j.command)
            parsed = worker.parser().parse_args(words[words.index("benchmarks.gpu.worker") + 1 :])
            assert parsed.section in SECTIONS
            if parsed.section == "network":
                assert parsed.name.partition(":")[0] in NETWORKS
    assert set(LAYERS) <= {case.name for case in layers.LAYERS}
    assert set(BLOCKS) <= {case.name for case in blocks.BLOCKS}
    # What is timed is compiled before, by a job of the same name.
    names = {j.name for j in jobs}
    assert {f"warm {j.name}" for j in suite.timed(options)} <= names
    assert sum(j.seconds for j in suite.timed(options)[:2]) + suite._UNTIMED_SECONDS < suite._MINUTES * 60


def test_the_sanitizer_is_found_below_cuda_home(monkeypatch, tmp_path):
    tool = tmp_path / "bin" / "compute-sanitizer"
    tool.parent.mkdir()
    tool.write_text("#!/bin/sh\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    assert suite.sanitizer() == str(tool)
    options = suite.parser().parse_args([])
    options.device, options.backend = "cuda", "triton"
    memcheck, racecheck = suite._sanitized(options, {})
    assert memcheck.command[:3] == [str(tool), "--tool", "memcheck"]
    assert racecheck.environment["PYTORCH_NO_CUDA_MEMORY_CACHING"] == "1"


def test_a_dry_run_from_the_command_line_keeps_its_results(tmp_path):
    out = tmp_path / "results.json"
    command = [
        sys.executable,
        "-m",
        "benchmarks.gpu",
        "--dry-run",
        "--only",
        "touch",
        "--out",
        str(out),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=200)
    assert run.returncode == 0, run.stdout + run.stderr
    content = json.loads(out.read_text())
    assert {j["name"]: j["state"] for j in content["jobs"]} == {"environment": "done", "touch": "done"}
    assert content["about"]["torch"] == torch.__version__
    assert content["about"]["copy_bytes_per_s"] > 0
    assert content["wrong"] == []
    assert {claim["verdict"] for claim in content["claims"]} == {"not measured"}
    assert os.uname().nodename not in out.read_text()
    assert [p.name for p in tmp_path.iterdir()] == ["results.json"]


def test_a_section_that_does_not_exist_is_named():
    with pytest.raises(ValueError, match=r"section: expected one of environment.*got 'operator'"):
        rows("operator", "", TINY)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_operators_are_judged_right_by_themselves(dtype):
    found = list(rows("operators", dtype, TINY))
    assert len(found) == len(list(cases(tiny=True))) > 30
    assert all(row["right"] for row in found), [row for row in found if not row["right"]]


@pytest.mark.parametrize(("factor", "right"), [(1.0, True), (1.001, False), (float("nan"), False)])
def test_an_operator_is_held_to_float64(factor, right):
    calls = 0

    def function(x):
        nonlocal calls
        calls += 1
        # Asked for the shape of its output, the exact answer, the reference's, and at last ours.
        return x * (factor if calls == 4 else 1.0)

    case = OperatorCase("scaled", lambda dtype, device: Sample(function, (torch.randn(2, 8, 3, 3).to(dtype),)))
    found = difference(case, "float32", torch.device("cpu"), "reference")
    assert calls == 4
    assert found.right == right


def test_system_checks_run_on_the_cpu_too():
    found = list(rows("system", "", TINY))
    assert [row["check"] for row in found] == ["cuda_graph", "compiled", "wide_offsets"]
    assert all(row["right"] for row in found), found


def test_kernels_have_a_share_of_the_copys_rate():
    pytest.importorskip("triton")
    copy, *found = rows("kernels", "", TINY)
    assert copy["copy_bytes_per_s"] > 0
    assert {row["kind"] for row in found} >= {"pointwise", "depthwise", "dense", "inverted_residual", "max_pool"}
    for row in found:
        assert "wrong" not in row, row
        assert row["backward_of_copy"] == pytest.approx(
            row["backward_bytes"] / row["backward_s"] / copy["copy_bytes_per_s"]
        )


def test_the_bytes_of_a_kernel_are_each_tensors_once():
    from benchmarks.gpu.bandwidth import prepared
    from benchmarks.gpu.operators import conv, upsample_add

    n, c, h, w, o = 2, 24, 6, 5, 40
    sample = conv((n, c, h, w), o, 1)(torch.bfloat16, torch.device("cpu"))
    parts = {name: moved for name, (_, moved) in prepared(sample).items()}
    narrow, wide, mask, weight, bias = n * c * h * w * 2, n * o * h * w * 2, n * h * w * o // 8, o * c * 2, o * 4
    assert parts == {"forward": narrow + wide + mask + weight + bias, "backward": narrow + wide + mask + weight + bias}
    # The gradient of the sum's first term is the sum's: nobody writes it.
    image, branch = 2 * 8 * 6 * 4 * 4, 2 * 8 * 3 * 2 * 4
    sample = upsample_add((2, 8, 6, 4))(torch.float32, torch.device("cpu"))
    parts = {name: moved for name, (_, moved) in prepared(sample).items()}
    assert parts == {"forward": 2 * image + branch, "backward": image + branch}


@pytest.mark.parametrize("section", ["blocks", "layers"])
def test_layers_and_blocks_are_checked_and_timed(section):
    if importlib.util.find_spec("torchvision") is None:
        pytest.skip("the blocks are torchvision's")
    found = list(rows("inner", section, TINY))
    assert {row["contestant"] for row in found} >= {"stock_inference", "stock_bias", "folded", "ours_reference_bias"}
    for row in found:
        assert "wrong" not in row, row
        assert row["absent"] or (
            row["eager_s"] > 0 and row["answer"]["output_error"] <= row["answer"]["output_allowed"]
        )


def test_networks_are_checked_and_timed_by_the_first_model_that_builds(monkeypatch):
    from benchmarks.gpu import sections

    monkeypatch.setitem(sections.NETWORKS, "mobilenet_v2", ("timm:no_such_network", "timm:test_efficientnet"))
    found = list(rows("network", "mobilenet_v2:float32", TINY))
    by_key = {row["contestant"]: row for row in found}
    assert set(by_key) == {
        "stock_inference", "stock_bias", "folded", "stock_full", "ours_reference_bias",
        "ours_reference_lite_residual+bias",
    }  # fmt: skip
    for row in found:
        assert (row["model"], row["case"], row.get("wrong")) == ("timm:test_efficientnet", "mobilenet_v2_b2", None)
        assert row["eager_s"] > 0
        assert row["answer"]["gradients"] > 0 or row["kind"] == "inference"


def test_a_network_that_nobody_builds_is_absent(monkeypatch):
    from benchmarks.gpu import sections

    monkeypatch.setitem(sections.NETWORKS, "mobilenet_v2", ("timm:no_such_network",))
    (row,) = rows("network", "mobilenet_v2:float32", TINY)
    assert "none of timm:no_such_network" in row["absent"]


def test_warming_up_compiles_and_times_nothing():
    warm = Context(torch.device("cpu"), "reference", tiny=True, warm=True)
    (row,) = rows("inner", "layers:depthwise_3x3_s2_96_112", warm)
    assert (row["contestant"], row["note"]) == ("ours_reference_bias", "")
    assert "eager_s" not in row


def outcomes(**changes) -> dict[str, Outcome]:
    """A run with everything in it, as a GPU would give it."""
    about = {"torch": "2.11.0", "triton": "3.6.0", "python": "3.12.3", "commit": "0123456789ab", "driver": "580.1"}
    about |= {"device": "NVIDIA H100 80GB HBM3", "copy_bytes_per_s": 3e12}

    def step(match: str, key: str, eager: float, **more) -> dict:
        return {
            "case": "mobilenet_v2_b128", "precision": "bfloat16", "match": match, "contestant": key, "kind": "step",
            "eager_s": eager, "graph_s": eager / 2, "peak_bytes": int(eager * 1e12), "absent": "",
        } | more  # fmt: skip

    network = [
        step("first", "stock_bias", 0.020), step("first", "ours_triton_bias", 0.008) | changes,
        step("compiled", "stock_bias", 0.020), step("compiled", "ours_triton_bias", 0.009),
        step("compiled", "compiled", 0.010),
    ]  # fmt: skip
    kernels = [{"copy_bytes_per_s": 3e12}]
    for case, seconds in (("large", 1e-3), ("small", 1e-5)):
        row = {"kind": "pointwise", "case": case}
        for direction in ("forward", "backward"):
            row |= {f"{direction}_s": seconds, f"{direction}_bytes": 2.4e9 if case == "large" else 6e6}
            row[f"{direction}_of_copy"] = row[f"{direction}_bytes"] / seconds / 3e12
        kernels.append(row)
    answers = [{"operator": "pointwise", "dtype": "float16", "right": True}]
    parts = {"environment": [about], "operators float16": answers, "kernels": kernels, "network mobilenet": network}
    return {name: Outcome(name, "done", 1.0, rows=found) for name, found in parts.items()}


def verdicts(found: dict[str, Outcome]) -> list[str]:
    return [claim.verdict for claim in report.claims(found)]


def test_claims_are_met_and_missed_by_their_bounds():
    claims = report.claims(outcomes())
    assert [claim.measured for claim in claims[:5]] == pytest.approx([0.4, 0.4, 0.9, 0.9, 0.4])
    assert verdicts(outcomes()) == [
        "met", "met", "missed", "missed", "missed", "met", "met", "not measured", "not measured",
    ]  # fmt: skip
    # By time, as a network runs them; the slowest shape is named.
    assert claims[5].measured == pytest.approx((2.4e9 + 6e6) / (1e-3 + 1e-5) / 3e12)
    assert claims[5].note == "least 20% (small)"


def test_a_wrong_answer_has_no_time_to_compare():
    found = outcomes(wrong="WrongAnswer: output: relative error 1.0e+00")
    assert verdicts(found)[0] == "not measured"
    assert report.wrong_answers(found) == [
        "network mobilenet: mobilenet_v2_b128 ours_triton_bias: WrongAnswer: output: relative error 1.0e+00"
    ]
    text = report.render(found)
    assert "WRONG" in text
    assert "WrongAnswer: output" in text


def test_an_operator_off_by_too_much_is_told_with_its_numbers():
    found = outcomes()
    found["operators float16"].rows.append(
        {"operator": "dense", "dtype": "float16", "right": False, "tensor": "output 0", "error": 0.5, "allowed": 0.1}
    )
    assert report.wrong_answers(found) == ["operators float16: dense: output 0: error 5.00e-01, allowed 1.00e-01"]
    assert "answers: 1 of 2 right" in report.render(found)


def test_a_job_that_failed_makes_the_run_fail_unless_it_only_warmed_up():
    found = outcomes()
    found["memcheck"] = Outcome("memcheck", "failed", note="ERROR SUMMARY: 3 errors")
    found["racecheck"] = Outcome("racecheck", "failed", note="status 1: Device not supported")
    found["warm kernels"] = Outcome("warm kernels", "failed", note="status 1")
    assert report.wrong_answers(found) == ["memcheck: ERROR SUMMARY: 3 errors"]
    assert "Device not supported" in report.render(found)


def test_the_table_says_what_was_measured_on_what():
    text = report.render(outcomes())
    assert "NVIDIA H100 80GB HBM3, driver 580.1, torch 2.11.0, Triton 3.6.0" in text
    assert "copy 3000 GB/s" in text
    assert max(map(len, text.splitlines())) < 160
    line = next(line for line in text.splitlines() if "ours_triton_bias" in line)
    assert "0.40x" in line


def test_results_are_named_by_date_gpu_and_commit_and_are_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    path = report.default_path(outcomes())
    assert path.name.endswith("-NVIDIA-H100-80GB-HBM3-0123456789ab.json")
    report.save(path, report.as_text(outcomes()))
    assert json.loads(path.read_text())["about"]["device"] == "NVIDIA H100 80GB HBM3"
    monkeypatch.setattr("os.replace", lambda *args: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        report.save(path, "half")
    assert json.loads(path.read_text())["format"] == 1
    assert len(list(tmp_path.iterdir())) == 1


def test_nothing_at_all_can_be_told_too():
    assert "environment: nothing is known" in report.render({})
    assert verdicts({}) == ["not measured"] * 9
