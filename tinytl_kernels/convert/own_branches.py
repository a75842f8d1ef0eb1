"""Lite residuals that a stock model has already, as a network has that was trained with them.

They are set aside while the backbone is converted, and then put back around the converted blocks: one that is trained
as it was, a frozen one with its convolutions made lean.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from tinytl_kernels.nn import AvgPool2d, FrozenConvBias, LiteResidual, LiteResidualBlock

from .probe import read_norm, tampered, unreadable_conv
from .report import ConversionReport, Note


@contextmanager
def set_aside(model: nn.Module) -> Iterator[dict[str, LiteResidualBlock]]:
    """Inside, the main branch of every ``LiteResidualBlock`` stands in its place; afterwards the block is back there.

    Yields:
        The blocks by name, in order.
    """
    blocks = {name: module for name, module in model.named_modules() if isinstance(module, LiteResidualBlock)}
    for block in blocks.values():
        _put(model, block, block.main)
    try:
        yield blocks
    finally:
        for name, block in blocks.items():
            main = model.get_submodule(name)
            _put(model, main, block)
            block.main = main


def keep_branches(blocks: dict[str, LiteResidualBlock], method: str, report: ConversionReport) -> None:
    """Make the branches lean where ``method`` leaves their weights alone.

    Args:
        blocks: Of a stock model, by name.
        method: Any but ``"full"``.
        report: Told about the branches; what it says of the main branches gets their names in the stock model.
    """
    trained = method.startswith("lite_residual")
    for name, block in blocks.items():
        text = f"{'trained' if trained else 'frozen'}: the model's own {type(block.lite).__name__}"
        if not trained:
            block.lite = _frozen(block.lite, fold=method != "norm+last")
        report.branches.append(Note(name, type(block.main).__name__, text))
        for note in (*report.done, *report.kept):
            if f"{note.path}.".startswith(f"{name}."):
                note.path = f"{name}.main{note.path.removeprefix(name)}"


def _frozen(lite: nn.Module, *, fold: bool) -> nn.Module:
    """The lean twin of ``lite``, or itself, changed in place as far as it can be."""
    if not isinstance(lite, LiteResidual) or any(map(tampered, lite.modules())):
        return lite
    if any(unreadable_conv(conv) for conv in (lite.conv1, lite.conv2)):
        return lite
    norms = [read_norm(norm) for norm in (lite.bn1, lite.final_bn)]
    if not fold or any(isinstance(facts, str) or facts.tail for facts in norms):
        # Behind each convolution stays a norm that needs its input: the branch goes on to be computed again.
        lite.conv1, lite.conv2 = FrozenConvBias.from_conv(lite.conv1), FrozenConvBias.from_conv(lite.conv2)
        return lite
    layers = OrderedDict(
        pool=nn.AdaptiveAvgPool2d(1) if lite.downsample is None else AvgPool2d(lite.downsample),
        conv1=FrozenConvBias.from_conv(lite.conv1, norms[0].norm, lite.act),
        conv2=FrozenConvBias.from_conv(lite.conv2, norms[1].norm),
    )
    return nn.Sequential(layers).train(lite.training)


def _put(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Put ``new`` wherever ``old`` is registered, but not inside ``new`` itself."""
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if child is old and parent is not new:
                parent._modules[name] = new
