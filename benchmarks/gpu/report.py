"""What is kept of a run, as JSON, and what is read at a glance: claims with their measurements, then a table or two."""

from __future__ import annotations

import datetime
import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.gpu.schedule import Outcome, Row
from tinytl_kernels.core.files import replace_file

RESULTS = Path(__file__).parents[1] / "results"
_FORMAT = 1
_NOTHING = "–"

Outcomes = Mapping[str, Outcome]


@dataclass(frozen=True)
class Claim:
    """Something that this package means to be true on a GPU.

    Args:
        text: What.
        bound: A number that the measurement has to reach or stay below.
        at_least: Whether larger is better.
        measured: None where nobody could measure it.
        note: Beside it.
    """

    text: str
    bound: float
    at_least: bool
    measured: float | None
    note: str = ""

    @property
    def verdict(self) -> str:
        """``"met"``, ``"missed"`` or ``"not measured"``."""
        if self.measured is None:
            return "not measured"
        return "met" if (self.measured >= self.bound if self.at_least else self.measured <= self.bound) else "missed"


def rows_of(outcomes: Outcomes, prefix: str) -> list[Row]:
    """The rows of all jobs whose name starts so."""
    return [row for name, outcome in outcomes.items() if name.startswith(prefix) for row in outcome.rows]


def about(outcomes: Outcomes) -> Row:
    """What the environment section found, in one dictionary."""
    merged: Row = {}
    for row in rows_of(outcomes, "environment"):
        merged |= row
    return merged


def claims(outcomes: Outcomes, backend: str = "triton") -> list[Claim]:
    """The claims of the GPU kernels, each with what was measured."""
    steps = {
        (row["case"], row["precision"], row["match"], row["contestant"]): row
        for row in rows_of(outcomes, "network")
        if "match" in row
    }

    def ratio(match: str, of: str, field: str) -> tuple[float | None, str]:
        case = ("mobilenet_v2_b128", "bfloat16", match)
        mine, theirs = (steps.get((*case, key), {}) for key in (f"ours_{backend}_bias", of))
        # What gave a wrong answer has no time worth comparing.
        note = mine.get("wrong") or mine.get("unchecked") or ""
        if note or not mine.get(field) or not theirs.get(field):
            return None, note
        return mine[field] / theirs[field], note

    network = "MobileNetV2, bfloat16, batch 128, bias:"
    found = [
        Claim(f"{network} step / stock eager's bias-only step", 0.5, False, *ratio("first", "stock_bias", "eager_s")),
        Claim(f"{network} the same, both as CUDA graphs", 0.5, False, *ratio("first", "stock_bias", "graph_s")),
        Claim(f"{network} step / torch.compile's", 0.75, False, *ratio("compiled", "compiled", "eager_s")),
        Claim(f"{network} the same, both as CUDA graphs", 0.75, False, *ratio("compiled", "compiled", "graph_s")),
        Claim(f"{network} peak activations / stock's", 1 / 8, False, *ratio("first", "stock_bias", "peak_bytes")),
    ]
    for kind in ("pointwise", "depthwise"):
        for direction in ("forward", "backward"):
            found.append(_bandwidth_claim(rows_of(outcomes, "kernels"), kind, direction))
    return found


def _bandwidth_claim(rows: Iterable[Row], kind: str, direction: str) -> Claim:
    """All kernels of a kind together, as a network runs them; the slowest is named beside it."""
    text = f"{kind}, {direction}, MobileNetV2's in bfloat16: share of the copy's bandwidth"
    rows = list(rows)
    copy = next((row["copy_bytes_per_s"] for row in rows if "copy_bytes_per_s" in row), None)
    timed = [row for row in rows if row.get("kind") == kind and f"{direction}_s" in row]
    if not timed or not copy:
        return Claim(text, 0.75, True, None)
    share = sum(row[f"{direction}_bytes"] for row in timed) / sum(row[f"{direction}_s"] for row in timed) / copy
    worst = min(timed, key=lambda row: row[f"{direction}_of_copy"])
    return Claim(text, 0.75, True, share, f"least {worst[f'{direction}_of_copy']:.0%} ({worst['case']})")


def wrong_answers(outcomes: Outcomes) -> list[str]:
    """Everything that is wrong, a line each."""
    lines = []
    for name, outcome in outcomes.items():
        for row in outcome.rows:
            if row.get("wrong") or row.get("right") is False:
                what = (
                    row.get("operator") or row.get("check") or f"{row.get('case')} {row.get('contestant', '')}".strip()
                )
                why = row.get("wrong") or f"{row['tensor']}: error {row['error']:.2e}, allowed {row['allowed']:.2e}"
                lines.append(f"{name}: {what}: {why}")
        # A sanitizer that found nothing out, because it does not work here, has found nothing wrong.
        useless = name in ("memcheck", "racecheck") and "SUMMARY" not in outcome.note
        if outcome.state == "failed" and not useless and not name.startswith("warm"):
            lines.append(f"{name}: {outcome.note}")
    return lines


def content(outcomes: Outcomes, backend: str = "triton") -> dict[str, Any]:
    """Everything, ready for ``json.dump``."""
    return {
        "format": _FORMAT,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "about": about(outcomes),
        "claims": [asdict(claim) | {"verdict": claim.verdict} for claim in claims(outcomes, backend)],
        "wrong": wrong_answers(outcomes),
        "jobs": [outcome.as_json() for outcome in outcomes.values()],
    }


def default_path(outcomes: Outcomes) -> Path:
    """``benchmarks/results/DATE-GPU-COMMIT.json``."""
    facts = about(outcomes)
    today = datetime.datetime.now(datetime.timezone.utc).date().isoformat()
    parts = [today, str(facts.get("device", "unknown-gpu")), str(facts.get("commit", "unknown"))]
    return RESULTS / ("-".join(re.sub(r"[^A-Za-z0-9.]+", "-", part).strip("-") for part in parts) + ".json")


def save(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, lambda file: file.write(text.encode()))


def render(outcomes: Outcomes, backend: str = "triton") -> str:
    """What is printed at the end."""
    parts = [_headline(outcomes), _jobs(outcomes), _answers(outcomes), _claims(claims(outcomes, backend))]
    parts += [_networks(rows_of(outcomes, "network"), backend), _inner(rows_of(outcomes, "inner"), backend)]
    parts.append(_kernels(rows_of(outcomes, "kernels")))
    return "\n\n".join(part for part in parts if part) + "\n"


def _headline(outcomes: Outcomes) -> str:
    facts = about(outcomes)
    copy = facts.get("copy_bytes_per_s")
    return (
        f"{facts.get('device', 'no GPU')}, driver {facts.get('driver')}, torch {facts.get('torch')}, "
        f"Triton {facts.get('triton')}, Python {facts.get('python')}, commit {facts.get('commit')}; "
        f"copy {copy / 1e9:.0f} GB/s"
        if copy
        else "environment: nothing is known"
    )


def _jobs(outcomes: Outcomes) -> str:
    """Those that did not end well, and what each of the others said."""
    told = [
        (name, outcome.state, f"{outcome.seconds:.0f} s", outcome.note)
        for name, outcome in outcomes.items()
        if outcome.state != "done" or (outcome.note and not name.startswith("warm"))
    ]
    return _columns(("job", "", "", ""), told) if told else ""


def _answers(outcomes: Outcomes) -> str:
    rows = [row for name in ("operators", "system") for row in rows_of(outcomes, name) if "right" in row]
    lines = [f"answers: {sum(row['right'] for row in rows)} of {len(rows)} right"]
    return "\n".join([*lines, *(f"  WRONG {line}" for line in wrong_answers(outcomes))])


def _claims(found: list[Claim]) -> str:
    return _columns(
        ("claim", "bound", "measured", "verdict", ""),
        [
            (
                c.text,
                f"{'>=' if c.at_least else '<='} {c.bound:.3g}",
                _NOTHING if c.measured is None else f"{c.measured:.3f}",
                c.verdict.upper() if c.verdict == "missed" else c.verdict,
                c.note,
            )
            for c in found
        ],
    )


def _networks(rows: list[Row], backend: str) -> str:
    """A line a network, batch size, precision and contestant; ratios to stock's bias-only step of the same match."""
    return _steps(
        [row for row in rows if "match" in row], backend, lambda row: f"{row['case']} {row['precision']}", "network"
    )


def _inner(rows: list[Row], backend: str) -> str:
    return _steps([row for row in rows if "match" in row], backend, lambda row: row["case"], "layer or block")


def _steps(rows: list[Row], backend: str, name: Callable[[Row], str], title: str) -> str:
    stock = {(name(row), row["match"]): row for row in rows if row["contestant"] == "stock_bias"}
    lines = []
    for row in rows:
        # The second match is there for the compiled contestant's ratio.
        if row["match"] == "compiled" and row["contestant"] != "compiled":
            continue
        twin = stock.get((name(row), row["match"]), {})
        lines.append(
            (
                name(row),
                row["contestant"],
                _ms(row.get("eager_s")),
                _ratio(row, twin, "eager_s"),
                _ms(row.get("graph_s")),
                _ratio(row, twin, "graph_s"),
                _NOTHING if row.get("peak_bytes") is None else f"{row['peak_bytes'] / 1e6:.1f}",
                "WRONG" if row.get("wrong") else row.get("absent") or row.get("unchecked") or "",
            )
        )
    header = (title, "", "eager ms", "/ stock", "graph ms", "/ stock", "peak MB", "")
    return _columns(header, lines) if lines else ""


def _kernels(rows: list[Row]) -> str:
    lines = [
        (
            row["kind"],
            row["case"],
            *(
                text
                for direction in ("forward", "backward")
                for text in (
                    _us(row.get(f"{direction}_s")),
                    f"{row[f'{direction}_of_copy']:.0%}" if f"{direction}_of_copy" in row else _NOTHING,
                    _us(row.get(f"{direction}_python_s")),
                )
            ),
        )
        for row in rows
        if "kind" in row
    ]
    header = ("kernel", "", "forward us", "of copy", "python us", "backward us", "of copy", "python us")
    return _columns(header, lines) if lines else ""


def _ms(seconds: float | None) -> str:
    return _NOTHING if seconds is None else f"{seconds * 1e3:.3f}"


def _us(seconds: float | None) -> str:
    return _NOTHING if seconds is None else f"{seconds * 1e6:.1f}"


def _ratio(row: Row, twin: Row, field: str) -> str:
    if not row.get(field) or not twin.get(field) or row["kind"] == "inference":
        return _NOTHING
    return f"{row[field] / twin[field]:.2f}x"


def _columns(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in (header, *rows)
    )


def as_text(outcomes: Outcomes, backend: str = "triton") -> str:
    """The JSON of a run."""
    return json.dumps(content(outcomes, backend), indent=1) + "\n"
