"""Numbers of bytes for people: units, tables, bar charts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from os import PathLike
from typing import Protocol, TypeVar

Row = TypeVar("Row")

_UNITS = ((10**9, "GB"), (10**6, "MB"), (10**3, "kB"))

# Bottom to top of a bar, with colours that stay apart in grey print and for colour-blind readers.
_STACK = {
    "weights": "#4c566a",
    "trained": "#0072b2",
    "gradients": "#56b4e9",
    "optimizer": "#cc79a7",
    "saved": "#e69f00",
    "temporaries": "#f0e442",
}


class Stacked(Protocol):
    """What :func:`plot_memory` can draw: anything that splits its bytes into the parts of one bar."""

    def stack(self) -> dict[str, int]:
        """Bytes by part; keys among weights, trained, gradients, optimizer, saved, temporaries."""
        ...


def format_bytes(count: float) -> str:
    """A number of bytes in decimal units (1 MB = 10^6 bytes, as in the paper).

    Args:
        count: bytes; may be negative (a difference).

    Returns:
        Two decimals and a unit; bytes below 1000 are written whole.

    Example:
        >>> format_bytes(37_130_000)
        '37.13 MB'
        >>> format_bytes(512)
        '512 B'
    """
    for size, unit in _UNITS:
        if abs(count) >= size:
            return f"{count / size:.2f} {unit}"
    return f"{count:.0f} B"


def render_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Plain-text table: first column to the left, all others to the right, a rule under the header."""
    widths = [max(len(row[column]) for row in (header, *rows)) for column in range(len(header))]

    def line(cells: Sequence[str]) -> str:
        first, *others = (
            cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(cells, widths, strict=True))
        )
        return "  ".join([first, *others]).rstrip()

    return "\n".join([line(header), "  ".join("-" * w for w in widths), *(line(row) for row in rows)])


def largest(rows: Sequence[Row], size: Callable[[Row], int], limit: int = 20) -> tuple[list[Row], int]:
    """The ``limit`` rows of most bytes, in their own order, and the number of rows left out."""
    kept = sorted(sorted(range(len(rows)), key=lambda index: -size(rows[index]))[:limit])
    return [rows[index] for index in kept], len(rows) - len(kept)


def plot_memory(reports: Mapping[str, Stacked], path: str | PathLike[str]) -> None:
    """Draw one stacked bar of bytes for each report and write the picture to ``path``.

    Args:
        reports: name of the bar -> :class:`MemoryReport` or :class:`MemoryEstimate`, drawn in this order. The parts of
            a bar add up to everything alive at the peak: weights, trained parameters, gradients, optimizer state,
            saved activations and temporaries.
        path: file to write; its ending chooses the format (``.png``, ``.svg``, ``.pdf``).

    Raises:
        ValueError: ``reports`` is empty.
        ImportError: matplotlib is not installed.

    Example:
        >>> reports = {name: measure_memory(model, x) for name, model in models.items()}  # doctest: +SKIP
        >>> plot_memory(reports, "memory.png")  # doctest: +SKIP
    """
    if not reports:
        raise ValueError("plot_memory: expected `reports` to hold at least one report, got an empty mapping")
    try:
        # Not pyplot: no global state, no display, no backend chosen behind the caller's back.
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            "plot_memory: drawing needs matplotlib, which is not installed; run `pip install tinytl_kernels[demo]`"
        ) from error

    stacks = {name: report.stack() for name, report in reports.items()}
    figure = Figure(figsize=(max(4.0, 1.5 + 1.1 * len(stacks)), 4.2), layout="constrained")
    axes = figure.add_subplot()
    names = list(stacks)
    bottoms = [0.0] * len(names)
    for part, colour in _STACK.items():
        heights = [stacks[name].get(part, 0) / 1e6 for name in names]
        if any(heights):
            axes.bar(names, heights, bottom=bottoms, label=part, color=colour, width=0.65)
        bottoms = [bottom + height for bottom, height in zip(bottoms, heights, strict=True)]
    for position, total in enumerate(bottoms):
        axes.annotate(format_bytes(total * 1e6), (position, total), ha="center", va="bottom", fontsize=8)
    axes.set_ylabel("memory at the peak (MB)")
    axes.margins(y=0.12)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(axis="x", rotation=20 if max(map(len, names)) > 10 else 0)
    # Beside the bars, never over them, and in their order from the top.
    axes.legend(frameon=False, fontsize=8, reverse=True, loc="upper left", bbox_to_anchor=(1, 1))
    figure.savefig(path, dpi=150)
