"""The talk's figure: accuracy over measured training memory, one marker a method."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..errors import missing_extra
from ..memory import plot_memory
from .checkpoint import atomic_write
from .compare import Comparison, Summary

# Colour-blind safe (Okabe and Ito), and a shape each, so that the figure survives a grey printer.
_STYLE = {
    "full": ("s", "#4c566a"),
    "norm+last": ("D", "#e69f00"),
    "last": ("v", "#d55e00"),
    "bias": ("o", "#56b4e9"),
    "lite_residual": ("^", "#009e73"),
    "lite_residual+bias": ("*", "#0072b2"),
}


def plot_accuracy(comparison: Comparison, path: str | Path) -> None:
    """Draw accuracy (%) over the measured memory of a training step (MB); bars show the spread over seeds.

    Args:
        comparison: What :func:`~tinytl_kernels.finetune.compare` returned.
        path: A ``.png`` file.
    """
    figure_class = _figure_class()
    figure = figure_class(figsize=(6.4, 4.2), layout="constrained")
    axes = figure.add_subplot()
    rows = comparison.summaries()
    for row in rows:
        marker, colour = _STYLE.get(row.method, ("x", "black"))
        axes.errorbar(
            row.total_bytes / 1e6,
            row.accuracy * 100,
            yerr=None if row.spread is None else row.spread * 100,
            fmt=marker,
            markersize=13 if marker == "*" else 9,
            color=colour,
            capsize=3,
            label=_label(row),
        )
    axes.set_xlim(0, max(row.total_bytes for row in rows) / 1e6 * 1.12)
    axes.margins(y=0.15)
    axes.set_xlabel("measured training memory, weights included (MB)")
    axes.set_ylabel("test accuracy (%)")
    about = comparison.about
    recipe = about["recipe"]
    axes.set_title(
        f"{about['model']} on {about['data']}, batch {recipe['batch_size']}, "
        f"{recipe['resolution']}x{recipe['resolution']}",
        fontsize=10,
    )
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8)
    atomic_write(Path(path), lambda file: figure.savefig(file, format="png", dpi=150))


def _label(row: Summary) -> str:
    return f"{row.method} ({row.total_bytes / 1e6:.0f} MB, {row.accuracy:.1%})"


def draw(comparison: Comparison, folder: Path) -> Sequence[Path]:
    """Write ``accuracy.png`` and ``memory.png``; returns their paths."""
    accuracy, memory = folder / "accuracy.png", folder / "memory.png"
    plot_accuracy(comparison, accuracy)
    plot_memory({row.method: row for row in comparison.summaries()}, memory)
    return accuracy, memory


def _figure_class():
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        raise missing_extra("matplotlib", "demo", "drawing the figures") from None
    return Figure
