"""Blocks that hold a GroupNorm, a smooth activation or a squeeze-and-excite keep their narrow input and are recomputed.

Which modules those are is told by structure, and whether it pays by measuring what autograd keeps of one image.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from tinytl_kernels.memory.report import format_bytes
from tinytl_kernels.nn import FrozenConvBias, LiteResidualBlock
from tinytl_kernels.nn.recomputed import kept_bytes, mixes_images, recompute

from .example import Capture, accelerators, deviation, evaluating, run_example
from .probe import tampered
from .report import ConversionReport, Note

# Keeping the input must save at least this factor, or the arithmetic of one more forward is not worth it.
_WORTHWHILE = 1.25

# For which batch the segments are planned: the paper's. With larger ones the kept inputs weigh more beside the
# temporaries of a few images, and the same inputs are the ones to drop.
_PLANNED_BATCH = 8

# Blocks that one kept input may serve. The arithmetic of longer segments is no more, but blocks late in a segment wait
# for the inputs of all before them, and by then an input is narrow.
_LONGEST_SEGMENT = 3

# What backward needs beside what autograd keeps of a chunk: the gradients on their way, about half as much again.
_BACKWARD_FACTOR = 1.5


def recompute_blocks(
    model: nn.Module, blocks: Sequence[nn.Module], example_input: Any, report: ConversionReport
) -> None:
    """Make those modules of a converted model recompute that keep less by it.

    Args:
        model: Converted, lite residuals added; changed in place.
        blocks: Modules of the model known to be blocks. Beside them, convolutions with what stands around them are
            considered.
        example_input: What the model takes.
        report: Gets a note for each module, with the bytes.
    """
    names = {module: name for name, module in model.named_modules()}
    blocks = _with_branches(model, [block for block in blocks if block in names])
    capture = run_example(model, example_input)
    like = next((p for p in model.parameters() if p.is_floating_point()), None)
    if capture.output is None or like is None:
        return
    with evaluating(model), torch.random.fork_rng(devices=accelerators(model)):
        steps = []
        for module in _candidates(model, blocks, capture):
            step = _measured(module, capture, like)
            if step.input * _WORTHWHILE > step.before:
                continue
            if reason := _refusal(module, capture, like):
                report.kept.append(Note(names[module], type(module).__name__, f"not recomputed: {reason}"))
            else:
                steps.append(step)
    for step in steps:
        recompute(step.module)
    if steps:
        _join_segments(model, steps, example_input)
    for step in steps:
        name = names[step.module]
        # What is kept inside while a few images are computed again is nobody's concern.
        report.kept = [note for note in report.kept if not f"{note.path}.".startswith(f"{name}.")]
        report.done.append(Note(name, type(step.module).__name__, step.text()))


def _with_branches(model: nn.Module, blocks: Sequence[nn.Module]) -> list[nn.Module]:
    """The blocks, each with the lite residual around it if that keeps no statistics: both read the same kept input."""
    around = {
        pair.main: pair
        for pair in model.modules()
        if isinstance(pair, LiteResidualBlock) and not any(map(_keeps_statistics, pair.lite.modules()))
    }
    return [around.get(block, block) for block in blocks]


def _keeps_statistics(module: nn.Module) -> bool:
    return isinstance(module, _NormBase) and module.track_running_stats


@dataclass
class _Step:
    """A module to recompute, in bytes of one image.

    Args:
        before: What autograd keeps of it as it is.
        input, output: Sizes.
        feeder: Index of the step whose output is its very input.
        keeps: Whether it is going to keep its input.
        held: What callers around it hold on to while it runs: the sizes of the inputs of the modules it stands in, and
            the step that reads the same tensor, if there is one.
    """

    module: nn.Module
    before: int
    input: int
    output: int
    feeder: int | None = None
    keeps: bool = True
    held: dict[int, tuple[int, int | None]] = field(default_factory=dict)

    def text(self) -> str:
        kept = f"keeps its input, {format_bytes(self.input)} an image" if self.keeps else "keeps nothing of its own"
        return f"recomputed in backward: {kept} instead of {format_bytes(self.before)}"


def _candidates(model: nn.Module, blocks: Sequence[nn.Module], capture: Capture) -> Iterator[nn.Module]:
    """Blocks, and outside of them the outermost modules with a single, frozen convolution; in order of execution."""
    taken = {inner for block in blocks for inner in block.modules()}
    found = [block for block in blocks if _maps_images(block, capture)]

    def walk(module: nn.Module) -> None:
        for child in module.children():
            if child in taken:
                continue
            convs = [inner for inner in child.modules() if isinstance(inner, nn.Conv2d)]
            frozen = len(convs) == 1 and isinstance(convs[0], FrozenConvBias)
            if frozen and _maps_images(child, capture) and not taken & set(child.modules()):
                found.append(child)
            elif convs:
                walk(child)

    walk(model)
    return iter(sorted(dict.fromkeys(found), key=lambda module: capture.calls[module].order))


def _maps_images(module: nn.Module, capture: Capture) -> bool:
    call = capture.calls.get(module)
    if call is None or call.count != 1 or call.input is None or call.output is None:
        return False
    return len(call.input) == len(call.output) == 4 and call.input[0] == call.output[0] and min(call.output) > 0


def _measured(module: nn.Module, capture: Capture, like: Tensor) -> _Step:
    call = capture.calls[module]
    image = torch.zeros((1, *call.input[1:]), device=like.device, dtype=like.dtype)
    image = image.contiguous(memory_format=torch.channels_last)
    before = kept_bytes(module, image, [*module.parameters(), *module.buffers()])
    output = like.element_size() * call.output[1] * call.output[2] * call.output[3]
    return _Step(module, before, image.nbytes, output)


def _refusal(module: nn.Module, capture: Capture, like: Tensor) -> str:
    """Why ``module`` cannot be computed a few images at a time, else an empty string."""
    for inner in module.modules():
        if _keeps_statistics(inner):
            return "a norm inside updates its statistics in training"
        if reason := tampered(inner):
            return reason
    if reason := mixes_images(module):
        return reason
    size = (2, *capture.calls[module].input[1:])
    images = torch.randn(size, generator=torch.Generator().manual_seed(0)).to(device=like.device, dtype=like.dtype)
    together, apart = module(images), torch.cat([module(image) for image in images.split(1)])
    if deviation([together], [apart]) > 100 * torch.finfo(like.dtype).eps ** 0.75:
        return "its output for an image depends on the other images of the batch"
    return ""


def _join_segments(model: nn.Module, steps: list[_Step], example_input: Any) -> None:
    """Let modules not keep an input that comes straight from another, as far as the estimated peak gets lower."""
    _watch(model, steps, example_input)
    plans = [steps]
    while (next_plan := _drop_one(plans[-1])) is not None:
        plans.append(next_plan)
    peaks = [max(_moments(plan)) for plan in plans]
    # The fewest that bring (nearly) all of it: each costs arithmetic.
    chosen = next(plan for plan, peak in zip(plans, peaks, strict=True) if peak <= 1.02 * min(peaks))
    for step, planned in zip(steps, chosen, strict=True):
        step.keeps = step.module.keep_input = planned.keeps


def _watch(model: nn.Module, steps: list[_Step], example_input: Any) -> None:
    """Find out which steps feed each other, and what the callers around each step hold."""
    order = {step.module: k for k, step in enumerate(steps)}
    running: list[Tensor | None] = []
    made: dict[int, tuple[Tensor, int, int]] = {}  # id of an output: it, its step, its version
    read: dict[int, int] = {}  # id of an input: its step

    def before(module: nn.Module, args: tuple) -> None:
        tensor = args[0] if args and isinstance(args[0], Tensor) else None
        if module in order:
            step = steps[order[module]]
            output, feeder, version = made.get(id(tensor), (None, None, 0))
            step.feeder = feeder if output is tensor and version == tensor._version else None
            read[id(tensor)] = order[module]
            # The model's own input, at the bottom, is there anyway. A tensor once, however many callers hold it.
            around = {id(t): t for t in running if t is not None and t is not running[0] and t is not tensor}
            step.held = {key: (t.nbytes // t.size(0), read.get(key)) for key, t in around.items() if t.dim() == 4}
        running.append(tensor)

    def after(module: nn.Module, args: tuple, output: Any) -> None:
        running.pop()
        if module in order:
            made[id(output)] = (output, order[module], output._version)

    handles = []
    for module in model.modules():
        handles += [module.register_forward_pre_hook(before), module.register_forward_hook(after)]
    try:
        run_example(model, example_input)
    finally:
        for handle in handles:
            handle.remove()


def _moments(plan: Sequence[_Step]) -> list[float]:
    """Estimated bytes alive at the forward of each step (the first half of the list) and at its backward."""
    forward, backward = [], []
    kept, start, wait = 0, 0, 0
    for k, step in enumerate(plan):
        if _starts_segment(step):
            start, wait = k, 0
            kept += _PLANNED_BATCH * step.input if k else 0  # the model's own input is there anyway
        held = sum(size for size, reader in step.held.values() if reader is None or not _starts_segment(plan[reader]))
        loose = _PLANNED_BATCH * (step.output + held + (0 if _starts_segment(step) else step.input))
        forward.append(kept + loose + step.before)
        wait += step.input  # of a single image
        gradients = _PLANNED_BATCH * (step.output + (plan[start].input if start else 0))
        ends = k + 1 == len(plan) or _starts_segment(plan[k + 1])
        largest = max(inner.before for inner in plan[start : k + 1])
        backward.append(kept + gradients + wait + _BACKWARD_FACTOR * largest if ends else 0)
    return forward + backward


def _starts_segment(step: _Step) -> bool:
    return step.keeps or step.feeder is None


def _drop_one(plan: list[_Step]) -> list[_Step] | None:
    """``plan`` without the largest input alive at its peak that can be computed again; None if there is none."""
    moments = _moments(plan)
    at = moments.index(max(moments)) % len(plan)
    able = [k for k in range(at + 1) if plan[k].keeps and plan[k].feeder is not None and _segment_with(plan, k)]
    if not able:
        return None
    largest = max(able, key=lambda k: plan[k].input)
    return [replace(step, keeps=step.keeps and k != largest) for k, step in enumerate(plan)]


def _segment_with(plan: Sequence[_Step], dropped: int) -> bool:
    """Whether no segment gets too long once ``dropped`` does not keep its input."""
    lengths: list[int] = []
    for k, step in enumerate(plan):
        joined = step.feeder is not None and (not step.keeps or k == dropped)
        lengths.append(lengths[step.feeder] + 1 if joined else 1)
    return max(lengths) <= _LONGEST_SEGMENT
