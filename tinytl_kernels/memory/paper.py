"""The memory column of the paper's Table 2: its figure, the formula, and what a training step really takes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from itertools import product
from os import PathLike

import torch
from torch import nn

from tinytl_kernels.convert import METHODS, convert, to_torch
from tinytl_kernels.convert.training import set_trained
from tinytl_kernels.memory.estimate import estimate_memory
from tinytl_kernels.memory.measure import MemoryReport, measure_memory
from tinytl_kernels.memory.report import render_table
from tinytl_kernels.models import InvertedResidualNet, proxylessnas_mobile
from tinytl_kernels.nn import LiteResidual

# Table 2 (arXiv 2007.11622) in bytes, by method and resolution; batch 8, Flowers' 102 classes.
TABLE_2: dict[tuple[str, int], int] = {
    ("last", 224): 31_000_000,
    ("bias", 224): 32_000_000,
    ("lite_residual", 224): 37_000_000,
    ("lite_residual+bias", 224): 37_000_000,
    ("lite_residual+bias", 320): 65_000_000,
    ("norm+last", 224): 192_000_000,
    ("full", 224): 391_000_000,
}
TABLE_2_BATCH = 8
NUM_CLASSES = 102
NORMS = ("bn", "gn")
KINDS = ("stock", "float32", "int8")

# From parameters to an optimizer, inside whose context the step is measured.
Stepping = Callable[[list[nn.Parameter]], AbstractContextManager[torch.optim.Optimizer]]


@dataclass(frozen=True)
class PaperRow:
    """One method on one network, measured. Every figure in bytes.

    Attributes:
        method: one of the six.
        norm: ``"bn"`` or ``"gn"``, the backbone's.
        kind: ``"stock"`` (plain ``torch.nn``), ``"float32"`` or ``"int8"`` (converted; the frozen weights' dtype).
        resolution: height and width of the pictures.
        table_2: the paper's figure; None where it has none.
        formula: :func:`estimate_memory` of the network.
        weights: frozen parameters and buffers.
        trained: trained parameters.
        gradients, optimizer, saved, temporaries: alive at the moment of the peak.
        activations: most of saved and temporaries together, at any moment.
    """

    method: str
    norm: str
    kind: str
    resolution: int
    table_2: int | None
    formula: int
    weights: int
    trained: int
    gradients: int
    optimizer: int
    saved: int
    temporaries: int
    activations: int

    @property
    def paper(self) -> int:
        """What the paper counts: weights, trained parameters and the peak of activations."""
        return self.weights + self.trained + self.activations

    @property
    def total(self) -> int:
        """Everything at the worst moment, gradients and optimizer state included."""
        return sum(self.stack().values())

    def stack(self) -> dict[str, int]:
        """The parts of :attr:`total`, as :func:`tinytl_kernels.memory.plot_memory` draws them."""
        parts = ("weights", "trained", "gradients", "optimizer", "saved", "temporaries")
        return {part: getattr(self, part) for part in parts}


@dataclass(frozen=True)
class PaperMemory:
    """All rows, and what they were measured on: ``about`` has batch, classes, threads, backend and versions."""

    about: dict[str, str | int]
    rows: list[PaperRow]

    def table(self) -> str:
        """A table for each resolution; MB are 10^6 bytes, as in the paper."""
        header = ("method", "norm", "measured", "Table 2", "formula", "as the paper counts")
        header += ("all in", "weights", "trained", "gradients", "optimizer", "saved", "temporaries")
        texts = []
        for resolution in dict.fromkeys(row.resolution for row in self.rows):
            rows = [
                (
                    row.method,
                    row.norm,
                    row.kind,
                    "" if row.table_2 is None else _megabytes(row.table_2, 0),
                    *map(_megabytes, (row.formula, row.paper, row.total, *row.stack().values())),
                )
                for row in self.rows
                if row.resolution == resolution
            ]
            title = f"MB at {resolution}x{resolution}"
            texts.append(f"{title}\n{render_table(header, rows)}")
        return "\n\n".join(texts)

    def as_dict(self) -> dict:
        """For JSON: ``about``, and the rows with ``paper`` and ``total``."""
        rows = [{**asdict(row), "paper": row.paper, "total": row.total} for row in self.rows]
        return {**self.about, "rows": rows}

    def plot(self, path: str | PathLike[str]) -> None:
        """Draw the figures as the paper counts them: one panel a norm and resolution, one group of bars a method.

        Args:
            path: file to write; its ending chooses the format (``.png``, ``.svg``, ``.pdf``).

        Raises:
            ImportError: matplotlib is not installed.
        """
        try:
            from matplotlib.figure import Figure
        except ImportError as error:
            raise ImportError(
                "PaperMemory.plot: drawing needs matplotlib, which is not installed; "
                "run `pip install tinytl_kernels[demo]`"
            ) from error
        panels = list(dict.fromkeys((row.resolution, row.norm) for row in self.rows))
        figure = Figure(figsize=(8, 0.6 + 2.9 * len(panels)), layout="constrained")
        for axes, (resolution, norm) in zip(figure.subplots(len(panels), squeeze=False)[:, 0], panels, strict=True):
            rows = [row for row in self.rows if (row.resolution, row.norm) == (resolution, norm)]
            _draw(axes, rows)
            axes.set_title(
                f"{'BatchNorm' if norm == 'bn' else 'GroupNorm'}, batch {self.about['batch']}, "
                f"{resolution}x{resolution}",
                fontsize=10,
            )
        figure.axes[0].legend(frameon=False, fontsize=8, ncols=5, loc="lower center", bbox_to_anchor=(0.5, 1.12))
        figure.savefig(path, dpi=150)


def paper_memory(
    methods: Sequence[str] = METHODS,
    resolutions: Sequence[int] = (224, 320),
    norms: Sequence[str] = NORMS,
    kinds: Sequence[str] = KINDS,
    *,
    batch: int = TABLE_2_BATCH,
    num_classes: int = NUM_CLASSES,
    stepping: Stepping | None = None,
    progress: Callable[[PaperRow], object] | None = None,
) -> PaperMemory:
    """Measure the paper's Table 2: one training step of ProxylessNAS-Mobile for each method.

    The lite residuals are in the network in every row, as in the paper; weights are random, which changes no figure.

    Args:
        methods: Any of the six.
        resolutions: Heights and widths of the pictures.
        norms: ``"bn"``: BatchNorm, as the backbone was published. ``"gn"``: GroupNorm and weight standardisation, as
            TinyTL trained it.
        kinds: ``"stock"``: plain ``torch.nn``, the same parameters trained. ``"float32"`` and ``"int8"``: converted,
            with frozen weights in that dtype; ``full`` has none, and no int8 row.
        batch: Pictures a step.
        num_classes: Outputs of the classifier.
        stepping: Makes the optimizer of the trained parameters, inside whose context the step runs; default: Adam.
        progress: Called with each row when it is there.

    Returns:
        :class:`PaperMemory`; ``print(result.table())``.

    Raises:
        ValueError: An argument is out of range.

    Example:
        >>> result = paper_memory(["bias"], [64], ["bn"], ["float32"], batch=1)  # doctest: +SKIP
        >>> result.rows[0].paper  # doctest: +SKIP
    """
    for name, given, known in (("methods", methods, METHODS), ("norms", norms, NORMS), ("kinds", kinds, KINDS)):
        wrong = [value for value in given if value not in known]
        if wrong:
            raise ValueError(f"paper_memory: {name}: expected some of {', '.join(known)}, got {wrong[0]!r}")
    for name, values in (("batch", [batch]), ("num_classes", [num_classes]), ("resolutions", resolutions)):
        if any(value < 1 for value in values):
            raise ValueError(f"paper_memory: {name}: expected at least 1, got {min(values)}")
    rows = []
    for resolution, method in product(resolutions, methods):
        size = (batch, 3, resolution, resolution)
        with torch.device("meta"):  # shapes are all that the formula needs, and the norms' are the same
            formula = estimate_memory(stock_network(method, "bn", num_classes), torch.zeros(size)).peak
        at_table = (batch, num_classes) == (TABLE_2_BATCH, NUM_CLASSES)
        table_2 = TABLE_2.get((method, resolution)) if at_table else None
        for norm, kind in product(norms, kinds):
            if (method, kind) == ("full", "int8"):
                continue
            report = _step(_network_of(kind, method, norm, num_classes, resolution), size, stepping or _adam)
            rows.append(
                PaperRow(
                    method,
                    norm,
                    kind,
                    resolution,
                    table_2,
                    formula,
                    weights=report.frozen + report.buffers,
                    trained=report.trained,
                    activations=report.activations,
                    **report.at_peak,
                )
            )
            if progress is not None:
                progress(rows[-1])
    return PaperMemory({"model": "proxylessnas_mobile", "batch": batch, "classes": num_classes, **_machine()}, rows)


def stock_network(method: str, norm: str, num_classes: int = NUM_CLASSES) -> nn.Module:
    """ProxylessNAS-Mobile with lite residuals in plain ``torch.nn``, set to train what ``method`` trains.

    BatchNorms whose statistics the method leaves alone are in evaluation mode, as in the converted network.
    """
    model = _network(norm, num_classes).train()
    set_trained(model, method, model.classifier)
    if method not in ("full", "norm+last"):
        in_branches = {m for lite in model.modules() if isinstance(lite, LiteResidual) for m in lite.modules()}
        trained_branches = in_branches if method.startswith("lite_residual") else set()
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d) and module not in trained_branches:
                module.eval()
    return to_torch(model)


def converted_network(
    method: str, norm: str, weight_bits: int = 32, num_classes: int = NUM_CLASSES, resolution: int = 224
) -> nn.Module:
    """ProxylessNAS-Mobile with lite residuals, converted for ``method`` and in training mode."""
    example = torch.zeros(1, 3, resolution, resolution)
    model = _network(norm, num_classes).eval()
    return convert(model, method, example_input=example, inplace=True, weight_bits=weight_bits).train()


def _network(norm: str, num_classes: int) -> InvertedResidualNet:
    with torch.random.fork_rng(devices=[]):
        return proxylessnas_mobile(num_classes, norm=norm, lite_residual=True)


def _network_of(kind: str, method: str, norm: str, num_classes: int, resolution: int) -> nn.Module:
    if kind == "stock":
        return stock_network(method, norm, num_classes).to(memory_format=torch.channels_last)
    return converted_network(method, norm, 8 if kind == "int8" else 32, num_classes, resolution)


def _step(model: nn.Module, size: tuple[int, ...], stepping: Stepping) -> MemoryReport:
    images = torch.randn(size, generator=torch.Generator().manual_seed(0)).contiguous(memory_format=torch.channels_last)
    with stepping([parameter for parameter in model.parameters() if parameter.requires_grad]) as optimizer:
        return measure_memory(model, images, optimizer=optimizer)


def _adam(parameters: Iterable[nn.Parameter]) -> AbstractContextManager[torch.optim.Optimizer]:
    return nullcontext(torch.optim.Adam(parameters))


def _machine() -> dict[str, str | int]:
    return {"torch": torch.__version__, "threads": torch.get_num_threads()}


def _megabytes(count: int, digits: int = 2) -> str:
    return f"{count / 1e6:.{digits}f}"


# Grey for what is said, colours for what is measured; apart for colour-blind readers too (Okabe and Ito).
_SERIES = {
    "Table 2": "#b0b7c3",
    "formula": "#6b7688",
    "stock": "#d55e00",
    "float32": "#56b4e9",
    "int8": "#0072b2",
}
_LABELS = {"stock": "stock PyTorch, measured", "float32": "ours, measured", "int8": "ours, int8 weights, measured"}


def _draw(axes, rows: list[PaperRow]) -> None:
    """Bars of one norm and resolution, on a logarithmic axis: stock PyTorch is an order of magnitude away."""
    methods = list(dict.fromkeys(row.method for row in rows))
    heights: dict[str, dict[str, int]] = {series: {} for series in _SERIES}
    for row in rows:
        heights[row.kind][row.method] = row.paper
        heights["formula"][row.method] = row.formula
        if row.table_2 is not None:
            heights["Table 2"][row.method] = row.table_2
    shown = [series for series in _SERIES if heights[series]]
    width = 0.84 / len(shown)
    for index, series in enumerate(shown):
        places = [methods.index(method) + (index - (len(shown) - 1) / 2) * width for method in heights[series]]
        values = [value / 1e6 for value in heights[series].values()]
        bars = axes.bar(places, values, width, label=_LABELS.get(series, series), color=_SERIES[series])
        axes.bar_label(bars, [f"{value:.0f}" for value in values], fontsize=6, padding=1)
    axes.set_yscale("log")
    axes.margins(y=0.15)
    axes.set_xticks(range(len(methods)), methods, fontsize=8)
    axes.set_ylabel("MB, as the paper counts")
    axes.spines[["top", "right"]].set_visible(False)
