"""Who keeps 8-bit codes for backward in a converted model."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from tinytl_kernels import nn as tnn
from tinytl_kernels.core.derivative_code import DERIVATIVE_CODES

from .report import ConversionReport, Note


def keep_codes(model: nn.Module, codable: Sequence[nn.Module], code_bits: int, report: ConversionReport) -> None:
    """Let modules keep codes, but for those inside of what is recomputed: full values live there for a few images only.

    Args:
        model: Converted, recomputed where it is going to be; changed in place.
        codable: Modules with an attribute ``code_bits``.
        code_bits: 8.
        report: Gets a note for each module that keeps codes.
    """
    exact = {inner for m in model.modules() if isinstance(m, tnn.Recomputed) for inner in m.modules()}
    for name, module in model.named_modules():
        if module not in codable or module in exact:
            continue
        module.code_bits = code_bits
        report.coded += 1
        report.done.append(Note(name, type(module).__name__, _text(module)))


def _text(module: nn.Module) -> str:
    if isinstance(module, tnn.GroupNorm):
        return "keeps its normalised input in 8 bits: gradients 1 to 5 % off"
    return f"keeps its derivative in 8 bits: off by at most {DERIVATIVE_CODES[module.function].error:.4f}"
