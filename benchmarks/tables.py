"""``python -m benchmarks.tables results.json [--update FILE]``: the documents' tables from pytest-benchmark's JSON.

Ratios are of medians of one interleaved run. Wins of this package are bold; losses stand beside them, above 1. The
kernels' table (:mod:`benchmarks.kernel_table`) holds them against the machine, the others against peers: they stand in
different documents, between different markers.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from benchmarks import kernel_table

# Section -> what stands around it in a document.
MARKERS = {name: (f"<!-- {name}:begin -->", f"<!-- {name}:end -->") for name in ("benchmarks", "kernels")}
NOTHING = "–"

Info = dict[str, Any]


class TablesError(Exception):
    """The input cannot be turned into tables; one line that says why."""


def load(path: Path) -> list[Info]:
    """What each benchmark of a JSON file put into ``extra_info``, in order.

    Raises:
        TablesError: The file is unreadable, or holds no benchmark of this suite.
    """
    try:
        benchmarks = json.loads(path.read_text(encoding="utf-8"))["benchmarks"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise TablesError(f"{path}: expected the JSON of pytest-benchmark ({type(error).__name__}: {error})") from None
    infos = [b["extra_info"] for b in benchmarks if "median_s" in b.get("extra_info", {})]
    if not infos:
        raise TablesError(f"{path}: no benchmark of this suite; run pytest benchmarks/ --benchmark-only")
    return infos


def render(infos: list[Info]) -> dict[str, str]:
    """Section -> its tables as Markdown; sections that ``infos`` have rows of."""
    kernels = [info for info in infos if info["level"] == "kernel"]
    others = [info for info in infos if info["level"] != "kernel"]
    sections = {}
    if others:
        sections["benchmarks"] = _against_peers(others)
    if kernels:
        sections["kernels"] = _against_limits(kernels)
    return sections


def _against_peers(infos: list[Info]) -> str:
    parts = [f"{_machine(infos[0]['machine'])} {_PEERS}"]
    networks = [info for info in infos if info["level"] == "network"]
    for case in _unique(info["case"] for info in networks):
        parts.append(_network([info for info in networks if info["case"] == case]))
    parts.append(_absent(networks))
    for level, title in (("block", "Blocks"), ("layer", "Layers")):
        rows = [info for info in infos if info["level"] == level]
        if rows:
            parts.append(_inner(title, rows))
    return _joined(parts)


def _against_limits(infos: list[Info]) -> str:
    machine, batch = infos[0]["machine"], infos[0]["input_size"][0]
    header = (column.format(batch=batch) for column in kernel_table.HEADER)
    table = _table(header, kernel_table.rows(infos))
    parts = [f"{_machine(machine)} Medians; float32.", kernel_table.rates(machine), table, kernel_table.legend(infos)]
    return _joined(parts)


def _joined(parts: Iterable[str]) -> str:
    return "\n\n".join(part for part in parts if part) + "\n"


def update(document: Path, sections: dict[str, str]) -> None:
    """Replace what stands between the markers of those sections that ``document`` has.

    Raises:
        TablesError: It has none of them, or a section's markers are not there once each and in order.
    """
    old = text = document.read_text(encoding="utf-8")
    for name, section in sections.items():
        begin, end = MARKERS[name]
        if begin not in old and end not in old:
            continue
        if old.count(begin) != 1 or old.count(end) != 1 or old.index(begin) > old.index(end):
            raise TablesError(f"{document}: expected {begin} and, after it, {end}, once each")
        head, _, rest = text.partition(begin)
        _, _, tail = rest.partition(end)
        text = f"{head}{begin}\n{section}{end}{tail}"
    if text == old and not any(MARKERS[name][0] in old for name in sections):
        expected = " or ".join(" and ".join(MARKERS[name]) for name in sections)
        raise TablesError(f"{document}: expected {expected}, once each")
    document.write_text(text, encoding="utf-8")


def _machine(machine: Info) -> str:
    return (
        f"{machine['cpu']} ({machine['capability']}), {machine['threads']} threads, torch {machine['torch']}, "
        f"Python {machine['python']}, commit {machine['commit']}. The machine's own limits, measured beside: sgemm "
        f"{machine['sgemm_gflops']:.0f} GFLOP/s, copy {machine['copy_gb_s']:.0f} GB/s."
    )


_PEERS = "Medians of interleaved rounds; float32 unless said; MB = 10^6 bytes."


def _network(rows: list[Info]) -> str:
    batch, _, height, width = rows[0]["input_size"]
    name = rows[0]["case"].rpartition("_b")[0]
    header = (
        f"{name}, batch {batch}, {height}x{width}",
        "ms",
        "images/s",
        "vs inference",
        "vs bias step",
        "vs fastest peer",
        "saved MB",
        "peak MB",
        "process peak MB",
        "GFLOP/s",
    )
    cells = [
        (
            row["label"],
            f"{row['median_s'] * 1e3:.1f}",
            f"{row['images_per_s']:.0f}",
            _ratio(row, "ratio_to_stock_inference"),
            _ratio(row, "ratio_to_stock_bias"),
            _ratio(row, "ratio_to_fastest_peer"),
            _megabytes(row["saved_bytes"]),
            _megabytes(row["peak_bytes"]),
            _megabytes(row["process_peak_bytes"]),
            _of_limit(row),
        )
        for row in rows
    ]
    return f"{_table(header, cells)}\n\n{_fastest_peers(rows)}"


def _inner(title: str, rows: list[Info]) -> str:
    header = (
        f"{title}, batch {rows[0]['input_size'][0]}",
        "",
        "ms",
        "vs inference",
        "vs bias step",
        "vs fastest peer",
        "saved MB",
        "stock saves",
        "peak MB",
        "stock's peak",
        "of the machine's limit",
    )
    stock = {row["case"]: row for row in rows if row["contestant"] == "stock_bias"}
    cells = []
    for row in rows:
        if not row["ours"]:
            continue
        # A selection of tests (-k) may have left the stock step out.
        twin = stock.get(row["case"], {})
        cells.append(
            (
                row["case"].replace("_", " "),
                row["label"],
                f"{row['median_s'] * 1e3:.2f}",
                _ratio(row, "ratio_to_stock_inference"),
                _ratio(row, "ratio_to_stock_bias"),
                f"{_ratio(row, 'ratio_to_fastest_peer')} ({row['fastest_peer']})",
                _megabytes(row["saved_bytes"]),
                _megabytes(twin.get("saved_bytes")),
                _megabytes(row["peak_bytes"]),
                _megabytes(twin.get("peak_bytes")),
                _of_limit(row),
            )
        )
    return f"{_table(header, cells)}\n\n{_absent(rows)}"


def _ratio(row: Info, key: str) -> str:
    value = row[key]
    # An inference against a training step says nothing about either.
    if value is None or (row["kind"] == "inference" and key != "ratio_to_stock_inference"):
        return NOTHING
    text = f"{value:.2f}x"
    # To beat a step that trains more is no win.
    win = row["ours"] and "bias" in row["method"] and round(value, 2) < 1
    return f"**{text}**" if win else text


def _megabytes(count: int | None) -> str:
    if count is None:
        return NOTHING
    megabytes = count / 1e6
    return f"{megabytes:.0f}" if megabytes >= 100 else f"{megabytes:.1f}" if megabytes >= 10 else f"{megabytes:.2f}"


def _of_limit(row: Info) -> str:
    """The rate, and its share of what the machine does best."""
    if row["gb_per_s"] is not None:
        return f"{row['gb_per_s']:.1f} GB/s ({row['gb_per_s'] / row['machine']['copy_gb_s']:.0%})"
    if row["gflops_per_s"] is not None:
        return f"{row['gflops_per_s']:.0f} GFLOP/s ({row['gflops_per_s'] / row['machine']['sgemm_gflops']:.0%})"
    return NOTHING


def _fastest_peers(rows: list[Info]) -> str:
    peers = _unique((row["precision"], row["fastest_peer"]) for row in rows if row["fastest_peer"])
    labels = {row["contestant"]: row["label"].removeprefix("+ ") for row in rows}
    return "Fastest peer: " + ", ".join(f"{labels.get(peer, peer)} ({precision})" for precision, peer in peers) + "."


def _absent(rows: list[Info]) -> str:
    """Who is missing, by reason."""
    reasons: dict[str, list[str]] = {}
    for row in rows:
        for key, reason in row["absent"].items():
            reasons.setdefault(reason, []).append(key)
    return "\n".join(f"- not run: {', '.join(_unique(keys))}: {reason}" for reason, keys in reasons.items())


def _table(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    header = list(header)
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _unique(items: Iterable[Any]) -> list[Any]:
    return list(dict.fromkeys(items))


def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("results", type=Path, help="JSON of pytest benchmarks/ --benchmark-json")
    markers = " or ".join(" and ".join(pair) for pair in MARKERS.values())
    parser.add_argument("--update", type=Path, metavar="FILE", help=f"rewrite what is between its {markers}")
    options = parser.parse_args(arguments)
    try:
        sections = render(load(options.results))
        if options.update:
            update(options.update, sections)
        else:
            print("\n".join(sections.values()), end="")
    except (TablesError, OSError) as error:
        print(f"benchmarks.tables: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
