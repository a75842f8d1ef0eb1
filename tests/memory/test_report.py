"""Tables and bars."""

from __future__ import annotations

import sys

import pytest
import torch
from torch import nn

from tinytl_kernels.memory import estimate_memory, format_bytes, measure_memory, plot_memory


def model() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 10))


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.00 kB"),
        (37_130_000, "37.13 MB"),
        (2_500_000_000, "2.50 GB"),
        (-6_100, "-6.10 kB"),
    ],
)
def test_format_bytes_is_decimal(count: int, text: str) -> None:
    assert format_bytes(count) == text


def test_measured_table_shows_every_part_and_layer() -> None:
    report = measure_memory(model(), torch.randn(2, 3, 8, 8))
    text = str(report)
    for size in (report.trained, report.buffers, report.gradients, report.optimizer, report.saved, report.peak):
        assert f"{size:,}" in text
    for row in report.by_layer:
        assert f"{row.name} " in text
    assert report.peak_phase in text


def test_estimated_table_marks_the_peak() -> None:
    estimate = estimate_memory(model(), torch.randn(2, 3, 8, 8))
    marked = [line for line in str(estimate).splitlines() if "<- peak" in line]
    assert len(marked) == 1
    assert marked[0].startswith(estimate.peak_layer.name)
    assert format_bytes(estimate.peak) in str(estimate).splitlines()[-1]


def test_long_tables_say_what_they_leave_out() -> None:
    long = nn.Sequential(*(nn.Sigmoid() for _ in range(50)), nn.Linear(4, 2))
    text = str(estimate_memory(long, torch.randn(2, 4)))
    assert "... and 11 smaller layers" in text


def test_columns_line_up() -> None:
    lines = str(estimate_memory(model(), torch.randn(2, 3, 8, 8))).splitlines()[:-1]
    assert len({len(line) for line in lines}) == 1


def test_bars_reach_the_total(tmp_path, monkeypatch) -> None:
    from matplotlib.axes import Axes

    reports = {
        "measured": measure_memory(model(), torch.randn(2, 3, 8, 8)),
        "estimated": estimate_memory(model(), torch.randn(2, 3, 8, 8)),
    }
    tops: list[float] = []
    drawn = Axes.bar

    def bar(self, names, heights, bottom, **rest):
        tops[:] = [b + h for b, h in zip(bottom, heights, strict=True)]
        return drawn(self, names, heights, bottom=bottom, **rest)

    monkeypatch.setattr(Axes, "bar", bar)
    plot_memory(reports, tmp_path / "bars.png")
    assert tops == pytest.approx([reports["measured"].total / 1e6, reports["estimated"].peak / 1e6])
    assert (tmp_path / "bars.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("tool", [measure_memory, estimate_memory])
def test_a_report_draws_itself(tool, tmp_path) -> None:
    tool(model(), torch.randn(2, 3, 8, 8)).plot(tmp_path / "one.svg")
    assert "<svg" in (tmp_path / "one.svg").read_text()


def test_without_matplotlib_the_error_names_the_extra(tmp_path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"pip install tinytl_kernels\[demo\]"):
        plot_memory({"one": estimate_memory(model(), torch.randn(2, 3, 8, 8))}, tmp_path / "x.png")


def test_nothing_to_draw_is_refused(tmp_path) -> None:
    with pytest.raises(ValueError, match="`reports`"):
        plot_memory({}, tmp_path / "x.png")
