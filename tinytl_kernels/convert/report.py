"""What a conversion did to a model, layer by layer, and what it could not make lean, and why."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import nn

METHODS = ("full", "norm+last", "last", "bias", "lite_residual", "lite_residual+bias")
_ATTRIBUTE = "_tinytl_report"
_ROOT = "(the model)"


@dataclass
class Note:
    """One line of the report.

    Args:
        path: The module's name in the stock model.
        kind: Its class.
        text: What happened to it, or why nothing did.
    """

    path: str
    kind: str
    text: str


@dataclass
class Quantization:
    """Frozen weights in 8 bits.

    Args:
        code: ``"int8"`` or ``"kmeans"``.
        layers: How many convolutions hold such a weight.
        elements: How many numbers those are.
        error: The largest relative error of a weight, ``|w - w8| / |w|`` in the Euclidean norm.
        worst: The name of that layer.
        deviation: As :attr:`ConversionReport.deviation`, with the weights in 8 bits; None if the model was not run.
    """

    code: str
    layers: int = 0
    elements: int = 0
    error: float = 0.0
    worst: str = ""
    deviation: float | None = None


@dataclass
class ConversionReport:
    """Printable account of :func:`tinytl_kernels.convert`.

    Args:
        model: The backbone's name (timm's architecture, else the class).
        method: One of the six methods.
        done: What was swapped, folded, fused or rewritten.
        kept: What still keeps more for backward than it must, and why.
        warnings: What deserves a look before training.
        branches: Where lite residuals were added, with their geometry.
        head: Path of the classifier, empty if there is none.
        trained: Names of the trained parameters.
        trained_elements: How many numbers those are.
        frozen_elements: How many parameters are frozen.
        deviation: Largest difference between the outputs of the stock and the converted backbone on the example
            input, relative to the largest output; None if the model could not be run. Of weights in 8 bits,
            :attr:`Quantization.deviation` tells.
        quantization: What ``weight_bits=8`` did, else None.
        coded: How many layers keep 8-bit codes (``code_bits=8``) instead of what exact gradients need.
    """

    model: str
    method: str
    done: list[Note] = field(default_factory=list)
    kept: list[Note] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    branches: list[Note] = field(default_factory=list)
    head: str = ""
    trained: tuple[str, ...] = ()
    trained_elements: int = 0
    frozen_elements: int = 0
    deviation: float | None = None
    quantization: Quantization | None = None
    coded: int = 0

    def __str__(self) -> str:
        total = self.trained_elements + self.frozen_elements
        share = 100 * self.trained_elements / max(total, 1)
        lines = [
            f"{self.model} converted for {self.method!r}",
            f"trained parameters: {self.trained_elements:,} of {total:,} ({share:.1f} %)",
            f"head: {self.head or 'none found'}",
        ]
        if self.deviation is None:
            lines.append("outputs: not compared with the stock model's (it was not run)")
        else:
            lines.append(f"outputs: as the stock model's in evaluation mode, relative difference {self.deviation:.1e}")
        if self.quantization is not None:
            lines += _quantization_lines(self.quantization, self.frozen_elements)
        if self.coded:
            lines.append(f"8-bit codes for backward: kept by {self.coded} layers, so gradients are not exact")
        for title, notes in (
            ("swapped", self.done),
            ("lite residuals", self.branches),
            ("not lean", self.kept),
        ):
            if notes:
                lines.append(f"{title} ({len(notes)}):")
                lines += _table(notes)
        if self.warnings:
            lines.append("warnings:")
            lines += [f"  {text}" for text in self.warnings]
        return "\n".join(lines)


def _quantization_lines(done: Quantization, frozen: int) -> list[str]:
    lines = [
        f"8-bit weights ({done.code}): {done.elements:,} of {frozen:,} frozen parameters, in {done.layers} "
        f"convolutions; largest relative error {done.error:.1e} ({done.worst or 'none'})"
    ]
    if done.deviation is not None:
        lines.append(f"outputs with 8-bit weights: relative difference {done.deviation:.1e} from the stock model's")
    return lines


def _table(notes: list[Note]) -> list[str]:
    path = max(len(note.path or _ROOT) for note in notes)
    kind = max(len(note.kind) for note in notes)
    return [f"  {note.path or _ROOT:<{path}}  {note.kind:<{kind}}  {note.text}" for note in notes]


def conversion_report(model: nn.Module) -> ConversionReport:
    """The report of a converted model.

    Args:
        model: What :func:`tinytl_kernels.convert` returned, also inside ``DistributedDataParallel`` or
            ``torch.compile``.

    Returns:
        The report; ``print`` it.

    Raises:
        ValueError: The model was not converted.

    Example:
        >>> import torch
        >>> import tinytl_kernels as tk
        >>> model = tk.convert(torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU()), "bias")
        >>> tk.conversion_report(model).method
        'bias'
    """
    report = getattr(unwrap(model), _ATTRIBUTE, None)
    if report is None:
        raise ValueError("model: expected one that tinytl_kernels.convert returned, got one that was not converted")
    return report


def attach_report(model: nn.Module, report: ConversionReport) -> None:
    """Keep ``report`` with the model, through deepcopy and pickle."""
    setattr(model, _ATTRIBUTE, report)


def detach_report(model: nn.Module) -> None:
    """Forget the report, if there is one."""
    vars(model).pop(_ATTRIBUTE, None)


def is_converted(model: nn.Module) -> bool:
    """Whether the model carries a report."""
    return hasattr(model, _ATTRIBUTE)


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside ``DistributedDataParallel``, ``DataParallel`` and ``torch.compile`` wrappers."""
    while True:
        inner = vars(model).get("_modules", {})
        if isinstance(model, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
            model = inner["module"]
        elif "_orig_mod" in inner:
            model = inner["_orig_mod"]
        else:
            return model


def base_name(model: nn.Module) -> str:
    """timm's name of an architecture, else the name of the model's class."""
    for attribute in ("pretrained_cfg", "default_cfg"):
        config = getattr(model, attribute, None)
        if isinstance(config, dict) and config.get("architecture"):
            return str(config["architecture"])
    return type(model).__name__
