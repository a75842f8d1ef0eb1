"""Linear layers that see a row an image: the classifier, and those in front of it in VGG's and AlexNet's day."""

from __future__ import annotations

from torch import nn

from tinytl_kernels import nn as tnn

from .example import Capture
from .report import ConversionReport, Note

# Of a smaller weight a call takes longer to be made than the weight to be moved.
_WORTH = 100_000


def swap_linears(model: nn.Module, head: nn.Module | None, stock: Capture, report: ConversionReport) -> None:
    """Make linear layers :class:`~tinytl_kernels.nn.Linear`: in place, the module and its hooks stay.

    Args:
        model: Changed in place.
        head: Its classifier.
        stock: The run on the example input, which tells who sees rows, and not, say, the tokens of an image.
        report: Gets a note for each.
    """
    for name, module in model.named_modules():
        if type(module) is not nn.Linear or module.weight.numel() < _WORTH:
            continue
        call = stock.calls.get(module)
        if module is head or (call is not None and call.input is not None and len(call.input) == 2):
            module.__class__ = tnn.Linear
            report.done.append(Note(name, "Linear", "few rows: its weight is moved once"))
