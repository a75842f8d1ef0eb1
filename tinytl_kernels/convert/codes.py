"""Who keeps 8-bit codes for backward in a converted model."""

from __future__ import annotations

from torch import nn

from tinytl_kernels import nn as tnn
from tinytl_kernels.core.activations import FULL_VALUE
from tinytl_kernels.core.derivative_code import DERIVATIVE_CODES

from .report import ConversionReport, Note


def keep_codes(model: nn.Module, code_bits: int, report: ConversionReport) -> None:
    """Let whatever keeps full values for a smooth activation or a GroupNorm keep codes.

    Not inside of what is recomputed, where full values live for a few images only, and not inside lite residuals, which
    are trained and small.

    Args:
        model: Converted, recomputed where it is going to be; changed in place.
        code_bits: 8.
        report: Gets a note for each module that keeps codes.
    """
    apart = (tnn.Recomputed, tnn.LiteResidual)
    exact = {inner for outer in model.modules() if isinstance(outer, apart) for inner in outer.modules()}
    for name, module in model.named_modules():
        text = "" if module in exact else _text(module)
        if text:
            module.code_bits = code_bits
            report.coded += 1
            report.kept = [note for note in report.kept if note.path != name]
            report.done.append(Note(name, type(module).__name__, text))


def _text(module: nn.Module) -> str:
    """What ``module`` is going to keep; empty if there is nothing to code."""
    if isinstance(module, tnn.GroupNorm):
        return "keeps its normalised input in 8 bits instead: its gradients are 1 to 5 % off"
    if isinstance(module, (tnn.Hardswish, tnn.SiLU, tnn.GELU)):
        activation = module.function
    else:
        activation = module.activation if isinstance(module, tnn.FrozenConvBias) else None
    if activation not in FULL_VALUE:
        return ""
    return f"keeps the derivative of {activation} in 8 bits: off by at most {DERIVATIVE_CODES[activation].error:.4f}"
