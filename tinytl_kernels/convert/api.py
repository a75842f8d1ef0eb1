"""``convert``: from any convolutional model to one that is fine-tuned the TinyTL way."""

from __future__ import annotations

import copy
import difflib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from tinytl_kernels.core.derivative_code import check_code_bits
from tinytl_kernels.core.quantization import check_code
from tinytl_kernels.nn import FrozenConvBias, LiteResidualBlock

from .chains import Links
from .codes import keep_codes
from .example import Capture, accelerators, deviation, example_for, run_example
from .fuse import fuse_blocks
from .fuse_mbconv import fuse_mbconvs
from .head import find_head, new_head, outputs_of, set_num_classes
from .linears import swap_linears
from .lite import Block, add_branches, block_modules, find_blocks, group_norm, named_blocks, uses_group_norm
from .own_branches import keep_branches, set_aside
from .quantize import quantize_weights
from .recompute import recompute_blocks
from .remarks import note_operations
from .report import METHODS, ConversionReport, Note, attach_report, base_name, is_converted
from .rewrite import owners_of_functions, rewrite_forward
from .rows import owners_of_rows
from .surgery import Surgery, untrained_statistics
from .trace import Flow, trace_model
from .training import set_trained

RESOLUTIONS = ("real", "paper")
WEIGHT_BITS = (32, 8)


def convert(
    model: nn.Module,
    method: str = "lite_residual+bias",
    *,
    num_classes: int | None = None,
    example_input: Any = None,
    inplace: bool = False,
    lite_resolution: str = "real",
    blocks: Sequence[str] | None = None,
    weight_bits: int = 32,
    weight_code: str = "int8",
    recompute: bool | None = None,
    code_bits: int | None = None,
) -> nn.Module:
    """Make a model ready for memory-efficient fine-tuning, unmodified source, by swapping its layers.

    Convolutions become :class:`~tinytl_kernels.nn.FrozenConvBias` with the BatchNorm and the activation behind them
    merged in; the other activations, pools and dropout keep bits; lite residuals go around the blocks, unless the model
    has some already, which stay instead. The model keeps its class, methods and names. What was done and what could not
    be made lean is told by ``print(tinytl_kernels.conversion_report(model))``.

    ===================== ==================================================== =========================
    method                trained                                              BatchNorm
    ===================== ==================================================== =========================
    full                  everything (modules stay stock)                      live
    norm+last             weights and biases of norms, head                    live
    last                  head                                                 folded, statistics frozen
    bias                  every bias, head                                     folded, statistics frozen
    lite_residual         lite residuals, head                                 folded, statistics frozen
    lite_residual+bias    every bias, lite residuals, head                     folded, statistics frozen
    ===================== ==================================================== =========================

    Args:
        model: Any module. Its outputs in evaluation mode stay the same up to rounding (until a new head is asked for).
        method: One of the six of TinyTL (arXiv 2007.11622, section 4.1).
        num_classes: Gives the model a new, trained classifier; None keeps the one it has (and trains it).
        example_input: A tensor, a tuple of positional or a dict of keyword arguments, on the model's device. The model
            is run on it in evaluation mode to learn its shapes. Default: a picture of the size in timm's
            configuration, else (1, C, 224, 224).
        inplace: Change ``model`` itself; otherwise a deep copy is changed and ``model`` stays as it is.
        lite_resolution: ``"real"`` sizes the kernels of lite residuals by the resolutions of ``example_input``,
            ``"paper"`` by the authors' rule (128 at the first block), which their checkpoints need.
        blocks: Names of the modules that get a lite residual; default: found by structure.
        weight_bits: 8 holds the weights of the frozen convolutions in 8 bits, a quarter of their bytes; gradients are
            exact for the weights that the 8 bits stand for. Trained parameters, norms and linear layers stay as they
            are. 32 leaves every weight in the model's dtype.
        weight_code: How 8 bits code a weight: ``"int8"``, multiples of one scale an output channel, or ``"kmeans"``,
            256 centroids a layer, as the authors trained. The report tells the error.
        recompute: Blocks in which GroupNorm, smooth activations or squeeze-and-excite keep full values keep their
            narrow input instead and are computed again in backward, a few images at a time
            (:func:`tinytl_kernels.nn.recompute`), or as one operator (:class:`tinytl_kernels.nn.MBConv`). Gradients
            stay exact; False saves the arithmetic of a second forward.
            None: True, unless there are ``code_bits``.
        code_bits: 8 lets GroupNorms and smooth activations (modules, and functions right behind a convolution) keep
            one byte an element for backward in place of 2 or 4. Gradients are then not exact: the report tells who
            keeps codes and how far each is off (:func:`tinytl_kernels.ops.activation`,
            :func:`tinytl_kernels.ops.group_norm_activation`); on the way down the layers that adds up. It is the way to
            keep less without a second forward, and keeps more than ``recompute``; with ``recompute=True`` there are
            codes where nothing is recomputed. None: exact gradients.

    Returns:
        The converted model, in ``channels_last``, on the same device, in the same dtype and mode. Frozen parameters
        have ``requires_grad=False``.

    Raises:
        TypeError: ``model`` is not a module.
        ValueError: An argument does not fit, the model was converted already, or lite residuals are asked for and the
            model cannot be run or has no place for them. The model is unchanged then.

    Example:
        >>> import torch
        >>> import tinytl_kernels as tk
        >>> net = torch.nn.Sequential(
        ...     torch.nn.Conv2d(3, 8, 3, bias=False), torch.nn.BatchNorm2d(8), torch.nn.ReLU(),
        ...     torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(8, 10))
        >>> lean = tk.convert(net, "bias", num_classes=4)
        >>> [name for name, p in lean.named_parameters() if p.requires_grad]
        ['0.bias', '5.weight', '5.bias']
    """
    _check(model, method, num_classes, lite_resolution, blocks)
    _check_weight_bits(method, weight_bits, weight_code)
    check_code_bits(code_bits)
    if code_bits is not None and method == "full":
        raise ValueError("code_bits: expected None with method 'full', where every module stays stock")
    if not inplace:
        model = copy.deepcopy(model)
    report = ConversionReport(base_name(model), method)
    with set_aside(model) as own:
        flow = trace_model(model)
        example_input = example_for(model) if example_input is None else example_input
        stock = run_example(model, example_input)
        links = Links(flow, stock)
        head = find_head(model, stock, links)
        if num_classes is not None and head is None:
            raise ValueError("num_classes: expected None, for the model has no classifier (no linear layer at its end)")
        if own:
            places = [Block(name, block.main, (), ()) for name, block in own.items()]  # no shapes: no branch is made
        else:
            places = _lite_places(model, method, flow, stock, head, blocks, report)
        group_norms = uses_group_norm(model)
        may_recompute = block_modules(model, flow, stock, head)
        if method != "full":
            # Making layers draws numbers that are thrown away: random state is spent on branches and a new head alone.
            with torch.random.fork_rng(devices=accelerators(model)):
                _make_lean(model, method, flow, stock, links, head, places, report, code_bits)
            fuse_blocks(model, report, [block.path for block in places])
            _compare(model, example_input, stock, report)
            like = next(model.parameters(), torch.empty(0)).new_empty(0)  # before any of them is in 8 bits
            if weight_bits == 8:
                report.quantization = quantize_weights(model, weight_code)
                if stock.output is not None:
                    report.quantization.deviation = deviation(run_example(model, example_input).output, stock.output)
            if own:
                keep_branches(own, method, report)
                if report.quantization is not None:
                    for name, block in own.items():
                        quantize_weights(block.lite, weight_code, report.quantization, prefix=f"{name}.lite.")
            elif places:
                norm = group_norm if group_norms else nn.BatchNorm2d
                report.branches = add_branches(_replacer(model), places, lite_resolution, norm, like)
        else:
            report.warnings.append("method 'full': every module stays stock, nothing was made lean")
            report.deviation = None if stock.output is None else 0.0
    if (code_bits is None if recompute is None else recompute) and method != "full":
        recompute_blocks(model, may_recompute, example_input, report)
        fuse_mbconvs(model, report)
    if code_bits is not None:
        keep_codes(model, code_bits, report)
    head = _renew_head(model, head, num_classes, stock, report)
    if method != "full":
        swap_linears(model, head, stock, report)
    report.trained = set_trained(model, method, head)
    report.trained_elements = sum(p.numel() for p in model.parameters() if p.requires_grad)
    report.frozen_elements = sum(p.numel() for p in model.parameters() if not p.requires_grad)
    model.to(memory_format=torch.channels_last)
    attach_report(model, report)
    return model


def _check(model: nn.Module, method: str, num_classes, lite_resolution: str, blocks) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    if method not in METHODS:
        close = difflib.get_close_matches(str(method), METHODS, n=1, cutoff=0.5)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise ValueError(f"method: expected one of {', '.join(map(repr, METHODS))}, got {method!r}.{hint}")
    if num_classes is not None and (
        isinstance(num_classes, bool) or not isinstance(num_classes, int) or num_classes < 1
    ):
        raise ValueError(f"num_classes: expected None or a positive int, got {num_classes!r}")
    if lite_resolution not in RESOLUTIONS:
        raise ValueError(
            f"lite_resolution: expected one of {', '.join(map(repr, RESOLUTIONS))}, got {lite_resolution!r}"
        )
    if is_converted(model) or any(isinstance(m, FrozenConvBias) for m in model.modules()):
        raise ValueError(
            "model: expected a stock model, got one that was converted already; convert the original again, or go back "
            "with tinytl_kernels.to_torch(model)"
        )
    if isinstance(model, (nn.parallel.DistributedDataParallel, nn.DataParallel)) or "_orig_mod" in model._modules:
        raise ValueError(f"model: expected the bare model, got it inside {type(model).__name__}; convert, then wrap")
    if isinstance(model, LiteResidualBlock):
        raise ValueError("model: expected a whole network, got a single LiteResidualBlock; convert what it stands in")
    if not any(True for _ in model.children()):
        raise ValueError(
            f"model: expected a module with layers inside, got a single {type(model).__name__}; for one convolution "
            "use FrozenConvBias.from_conv"
        )
    _check_blocks(model, method, blocks)
    unready = [name for name, p in model.named_parameters() if nn.parameter.is_lazy(p) or p.is_meta]
    if unready:
        raise ValueError(f"model: expected initialised parameters, but {unready[0]!r} holds no data yet; run it first")


def _check_weight_bits(method: str, weight_bits: int, weight_code: str) -> None:
    if isinstance(weight_bits, bool) or weight_bits not in WEIGHT_BITS:
        raise ValueError(f"weight_bits: expected one of {', '.join(map(str, WEIGHT_BITS))}, got {weight_bits!r}")
    check_code(weight_code, "weight_code")
    if weight_bits == 8 and method == "full":
        raise ValueError("weight_bits: expected 32 with method 'full', which trains every weight")


def _check_blocks(model: nn.Module, method: str, blocks) -> None:
    if blocks is None:
        return
    if isinstance(blocks, str) or not blocks:
        raise ValueError(f"blocks: expected a list of module names, got {blocks!r}")
    if not method.startswith("lite_residual"):
        raise ValueError(f"blocks: expected None with method {method!r}, which adds no lite residuals")
    if any(isinstance(module, LiteResidualBlock) for module in model.modules()):
        raise ValueError("blocks: expected None for a model that has lite residuals of its own: no others are added")
    names = [name for name, _ in model.named_modules() if name]
    for path in blocks:
        if path not in names:
            close = difflib.get_close_matches(str(path), names, n=3)
            hint = f"; close to it: {', '.join(map(repr, close))}" if close else ""
            raise ValueError(f"blocks: the model has no module {path!r}{hint}")
    if len(set(blocks)) != len(blocks):
        raise ValueError("blocks: expected each name once")


def _lite_places(
    model: nn.Module, method: str, flow: Flow, stock: Capture, head, blocks, report: ConversionReport
) -> list[Block]:
    if not method.startswith("lite_residual"):
        return []
    if stock.output is None:
        raise ValueError(
            f"example_input: method {method!r} needs to run the model to learn its shapes, which failed: {stock.error} "
            "-- pass an input that the model takes"
        )
    if blocks is not None:
        return named_blocks(model, stock, blocks, dict(model.named_modules()))
    places, remark = find_blocks(model, flow, stock, head)
    if not places:
        raise ValueError(
            "model: found no place for a lite residual (no residual or inverted residual blocks, fewer than two k x k "
            "convolutions); name modules with blocks=[...], or use method 'bias'"
        )
    if remark:
        report.warnings.append(remark)
    return places


def _make_lean(
    model: nn.Module,
    method: str,
    flow: Flow,
    stock: Capture,
    links: Links,
    head: nn.Module | None,
    places: list[Block],
    report: ConversionReport,
    code_bits: int | None,
) -> None:
    fold = method != "norm+last"
    untrained = untrained_statistics(model) if fold else []
    if untrained:
        report.warnings.append(
            f"BatchNorm statistics were never updated (num_batches_tracked=0) in {len(untrained)} layers, first "
            f"{untrained[0]!r}, and are frozen as they are: load weights, or train them, before converting"
        )
    names = {module: name for name, module in model.named_modules()}
    for module, why in flow.opaque:
        report.kept.append(Note(names[module], type(module).__name__, f"torch.fx cannot trace its forward: {why}"))
    links.unmerged = {block.module for block in places}
    apart = _Boundary([block.path for block in places], names)
    owners = owners_of_functions([graph for region in flow.regions for graph in region.graphs.values()])
    surgery = Surgery(model, links, report, head, apart, code_bits)
    surgery.swap_layers(fold=fold)
    stock_of = {twin: old for old, twin in surgery.twins.items()}
    for owner in dict.fromkeys((*owners, *owners_of_rows(model))):

        def may_fuse(conv: nn.Module, owner: nn.Module = owner) -> bool:
            old = stock_of.get(conv)
            # As often as its caller: called from nowhere else.
            called = old in stock.calls and owner in stock.calls and stock.calls[old].count == stock.calls[owner].count
            return called and not apart(old, owner)

        done, kept = rewrite_forward(owner, may_fuse)
        kind = type(owner).__name__
        report.done += [Note(names[owner], kind, text) for text in done]
        report.kept += [Note(names[owner], kind, text) for text in kept]
    note_operations(flow, report, names)
    order = {name: i for i, name in enumerate(names.values())}
    for notes in (report.done, report.kept):
        notes.sort(key=lambda note: order[note.path])


class _Boundary:
    """Whether an activation must stay out of a convolution: a lite residual is going to be added between them."""

    def __init__(self, blocks: list[str], names: dict[nn.Module, str]) -> None:
        self.blocks = blocks
        self.names = names

    def __call__(self, conv: nn.Module, activation: nn.Module | None) -> bool:
        path = self.names[conv]
        if path in self.blocks:
            return True
        around = [block for block in self.blocks if path.startswith(f"{block}.")]
        if not around or activation is None:
            return False
        other = self.names.get(activation, path)
        return not f"{other}.".startswith(f"{around[0]}.")


def _compare(model: nn.Module, example_input: Any, stock: Capture, report: ConversionReport) -> None:
    if stock.output is None:
        report.warnings.append(f"the model could not be run on the example input, so shapes are unknown: {stock.error}")
        return
    converted = run_example(model, example_input)
    if converted.output is None:
        raise RuntimeError(f"the converted model cannot be run where the stock one could: {converted.error}")
    report.deviation = deviation(converted.output, stock.output)
    tolerance = _tolerance(stock.output)
    if not report.deviation <= tolerance:
        report.warnings.append(
            f"outputs differ from the stock model's by {report.deviation:.1e} (expected {tolerance:.0e}): its forward "
            "is random in evaluation mode, or it does something that conversion does not see"
        )


def _tolerance(outputs: list[torch.Tensor]) -> float:
    # A hundred layers, each a few roundings: far below any real difference, far above rounding.
    return max((100 * torch.finfo(t.dtype).eps ** 0.75 for t in outputs if t.is_floating_point()), default=0.0)


def _renew_head(
    model: nn.Module, head: nn.Module | None, num_classes: int | None, stock: Capture, report: ConversionReport
) -> nn.Module | None:
    if head is None:
        report.warnings.append("no classifier found: only what the method names is trained")
        return None
    paths = [name for name, module in model.named_modules(remove_duplicate=False) if module is head]
    report.head = paths[0]
    if num_classes is None:
        return head
    others = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module is not head and module.out_features == outputs_of(head)
    ]
    if others and outputs_of(head) > 1:
        report.warnings.append(
            f"{', '.join(others)} has as many outputs as the classifier and was not replaced: an auxiliary classifier?"
        )
    fresh = new_head(head, num_classes)
    for path in paths:
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, fresh)
    set_num_classes(model, num_classes)
    return fresh


def _replacer(model: nn.Module) -> Callable[[str, Callable[[nn.Module], nn.Module]], None]:
    def replace(path: str, make: Callable[[nn.Module], nn.Module]) -> None:
        old = model.get_submodule(path)
        new = make(old)
        # Wherever it is registered: a model may hold a module under two names.
        for parent in list(model.modules()):
            for name, child in parent._modules.items():
                if child is old and parent is not new:
                    parent._modules[name] = new

    return replace
