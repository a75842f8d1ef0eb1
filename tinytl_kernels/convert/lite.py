"""Where lite residuals go: around each residual or inverted residual block, found by structure, not by class name."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from tinytl_kernels.nn import LiteResidual, LiteResidualBlock
from tinytl_kernels.nn.lite_residual import make_divisible

from .example import Capture, Shape
from .functional import ADDITIONS
from .report import Note
from .trace import Flow

PAPER_RESOLUTION = 128  # the authors' code assumes it at the first block, whatever the image's size


@dataclass
class Block:
    """A module that gets a lite residual.

    Args:
        path: Its name.
        module: The module.
        input, output: Shapes (N, C, H, W) on the example input.
    """

    path: str
    module: nn.Module
    input: Shape
    output: Shape

    @property
    def stride(self) -> int:
        """How many times smaller the output is, rounded."""
        sides = zip(self.input[2:], self.output[2:], strict=True)
        return max(1, *(round(before / after) for before, after in sides))


def find_blocks(model: nn.Module, flow: Flow, capture: Capture, head: nn.Module | None) -> tuple[list[Block], str]:
    """The blocks of ``model`` that get a lite residual, in order of execution.

    A block maps one image tensor to one, holds at least two convolutions (or linear layers), one of them larger than
    1x1, and adds a shortcut or has a depthwise convolution. Of nested candidates the innermost counts; where that is
    the ``Sequential`` of a block class, the block. Others of the same class are blocks too. The first block gets none
    if it starts with its depthwise convolution (expand ratio 1), as in the paper.

    Args:
        model: The stock model.
        flow: Its traces, for the shortcuts.
        capture: Its run, for the shapes.
        head: The classifier, which is no part of a block.

    Returns:
        The blocks, and a remark for the report.
    """
    images = {m: p for p, m in model.named_modules() if p and _maps_image(m, capture)}
    ordered = block_modules(model, flow, capture, head)
    if ordered:
        first = next((m for m in ordered if _starts_depthwise(m, capture)), None)
        if first is ordered[0]:
            ordered = ordered[1:]
        return [_block(images[m], m, capture) for m in ordered], ""
    convs = [m for m in images if isinstance(m, nn.Conv2d) and max(m.kernel_size) > 1 and m is not head]
    convs.sort(key=lambda m: capture.calls[m].order)
    remark = "no residual or inverted residual blocks: a lite residual around each k x k convolution but the first"
    return [_block(images[m], m, capture) for m in convs[1:]], remark


def block_modules(model: nn.Module, flow: Flow, capture: Capture, head: nn.Module | None) -> list[nn.Module]:
    """What :func:`find_blocks` calls a block, the first included, in order of execution."""
    adders = _modules_that_add(flow)
    images = {m: p for p, m in model.named_modules() if p and _maps_image(m, capture)}
    layers = {m: frozenset(_layers(m)) - {head} for m in images}
    candidates = [m for m in images if _is_candidate(m, layers[m], adders)]
    blocks = {_with_wrapper(m, images, layers) for m in candidates if _is_innermost(m, candidates, images, layers)}
    blocks = _not_nested(blocks | _siblings(blocks, images, layers), images)
    return sorted(blocks, key=lambda m: capture.calls[m].order)


def named_blocks(model: nn.Module, capture: Capture, paths: Sequence[str], known: dict[str, nn.Module]) -> list[Block]:
    """The blocks that a user named.

    Args:
        model: The stock model.
        capture: Its run.
        paths: Names of modules, each mapping one image tensor to one.
        known: Every module of the model by name.

    Raises:
        ValueError: A name is unknown, or its module has other inputs or outputs.
    """
    blocks = []
    for path in paths:
        module = known[path]
        if not _maps_image(module, capture):
            call = capture.calls.get(module)
            what = "was not called" if call is None else f"mapped {call.input} to {call.output} in {call.count} calls"
            raise ValueError(
                f"blocks: expected modules called once that map one (N, C, H, W) tensor to one, but {path!r} {what}"
            )
        blocks.append(_block(path, module, capture))
    nested = [a.path for a in blocks for b in blocks if a is not b and f"{a.path}.".startswith(f"{b.path}.")]
    if nested:
        raise ValueError(f"blocks: {nested[0]!r} lies inside another named block; name one of them")
    return sorted(blocks, key=lambda b: capture.calls[b.module].order)


def branch_geometry(resolution: int) -> tuple[int, int | None]:
    """Kernel size and pooling factor of a lite residual.

    Args:
        resolution: Height or width of the block's input, the smaller.

    Returns:
        The kernel, 5, shrunk by 2 while it is larger than the resolution inside the branch; and 2, or None for global
        pooling where the resolution inside is 1.
    """
    inside = max(1, resolution // 2)
    kernel = 5
    while kernel > inside:
        kernel -= 2
    return kernel, None if inside == 1 else 2


def branch_width(module: nn.Module, channels: int) -> tuple[int, int]:
    """Inner channels and groups of a lite residual around ``module``, whose input has ``channels`` channels.

    The paper's branch is as wide as the block's input, in 2 groups: its blocks are narrow at their ends. Around a
    bottleneck, which is narrow in its middle (ResNet's last: 2048, 512, 512, 2048), that branch would have a dozen
    times the weights of the block. There it is as wide as the bottleneck, in so many more groups that its first
    convolution has as many weights as the paper's around a block of that width.

    Returns:
        The inner width, and a number of groups that divides it and ``channels``.
    """
    convs = [m for m in module.modules() if isinstance(m, nn.Conv2d) and max(m.kernel_size) > 1]
    inner = make_divisible(min([channels, *(min(conv.in_channels, conv.out_channels) for conv in convs)]))
    for groups in (2 * max(1, round(channels / inner)), 2):
        if channels % groups == 0 and inner % groups == 0:
            return inner, groups
    return inner, 1


def branch_for(block: Block, resolution: int, norm, like: torch.Tensor) -> LiteResidual:
    """The lite residual of one block.

    Args:
        block: What it goes around.
        resolution: Height or width of the block's input, the smaller.
        norm: ``norm(channels) -> nn.Module``.
        like: A tensor on the device and in the dtype to use.

    Returns:
        The branch, with the geometry of :func:`branch_geometry` and :func:`branch_width`.
    """
    kernel, downsample = branch_geometry(resolution)
    channels_in, channels_out = block.input[1], block.output[1]
    inner, groups = branch_width(block.module, channels_in)
    lite = LiteResidual(
        channels_in,
        channels_out,
        stride=1 if downsample is None else block.stride,
        kernel_size=kernel,
        expand=inner / channels_in,
        groups=groups,
        downsample=downsample,
        norm=norm,
    )
    return lite.to(device=like.device, dtype=like.dtype).train(block.module.training)


def add_branches(replace, blocks: list[Block], resolution_rule: str, norm, like: torch.Tensor) -> list[Note]:
    """Wrap every block into a ``LiteResidualBlock``.

    Args:
        replace: ``replace(path, make)`` puts ``make(module now at path)`` there.
        blocks: In order of execution.
        resolution_rule: ``"real"`` or ``"paper"``.
        norm, like: As in :func:`branch_for`.

    Returns:
        Notes for the report.
    """
    notes = []
    paper = PAPER_RESOLUTION
    for block in blocks:
        resolution = paper if resolution_rule == "paper" else min(block.input[2:])
        paper = max(1, paper // block.stride)
        lite = branch_for(block, resolution, norm, like)
        replace(block.path, lambda main, lite=lite: LiteResidualBlock(main, lite).train(main.training))
        k = lite.conv1.kernel_size[0]
        pooling = "global pooling" if lite.downsample is None else f"pooling {lite.downsample}"
        text = (
            f"{block.input[1]} -> {block.output[1]}, stride {block.stride}, {pooling}, {k}x{k}, resolution {resolution}"
        )
        if (inner := lite.conv1.out_channels) < block.input[1]:
            text += f", as wide as the bottleneck: {inner} in {lite.conv1.groups} groups"
        notes.append(Note(block.path, type(block.module).__name__, text))
    return notes


def _block(path: str, module: nn.Module, capture: Capture) -> Block:
    call = capture.calls[module]
    return Block(path, module, call.input, call.output)


def _maps_image(module: nn.Module, capture: Capture) -> bool:
    call = capture.calls.get(module)
    if call is None or call.count != 1 or call.input is None or call.output is None:
        return False
    return len(call.input) == len(call.output) == 4 and min(call.output) > 0


def _layers(module: nn.Module) -> list[nn.Module]:
    return [m for m in module.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]


def _modules_that_add(flow: Flow) -> set[nn.Module]:
    graphs = [graph for region in flow.regions for graph in region.graphs.values()]
    nodes = [node for graph in graphs for node in graph.nodes if node.op in ("call_function", "call_method")]
    return {
        node.meta["owner"]
        for node in nodes
        if node.target in ADDITIONS and len([a for a in node.args if isinstance(a, torch.fx.Node)]) == 2
    }


def _is_depthwise(module: nn.Module) -> bool:
    return isinstance(module, nn.Conv2d) and module.groups == module.in_channels > 1 and max(module.kernel_size) > 1


def _is_candidate(module: nn.Module, layers: frozenset[nn.Module], adders: set[nn.Module]) -> bool:
    if len(layers) < 2 or not any(isinstance(m, nn.Conv2d) and max(m.kernel_size) > 1 for m in layers):
        return False
    return module in adders or any(map(_is_depthwise, layers))


def _is_innermost(module: nn.Module, candidates: list[nn.Module], images: dict, layers: dict) -> bool:
    def inside(other: nn.Module) -> bool:
        return layers[other] < layers[module] or (layers[other] == layers[module] and _within(images, other, module))

    return not any(inside(other) for other in candidates if other is not module)


def _with_wrapper(block: nn.Module, images: dict, layers: dict) -> nn.Module:
    """A ``Sequential`` that is all a block class holds stands for that block (the shortcut may be missing there)."""
    if not isinstance(block, nn.Sequential):
        return block
    parent = images[block].rpartition(".")[0]
    around = [m for m in images if images[m] == parent and layers[m] == layers[block]]
    return around[0] if around and not isinstance(around[0], nn.Sequential) else block


def _siblings(blocks: set[nn.Module], images: dict, layers: dict) -> set[nn.Module]:
    classes = {type(m) for m in blocks} - {nn.Sequential}
    return {
        m
        for m in images
        if type(m) in classes and len(layers[m]) >= 2 and sum(_within(images, block, m) for block in blocks) < 3
    }


def _within(images: dict, inner: nn.Module, outer: nn.Module) -> bool:
    return inner is not outer and f"{images[inner]}.".startswith(f"{images[outer]}.")


def _not_nested(blocks: set[nn.Module], images: dict) -> set[nn.Module]:
    return {m for m in blocks if not any(_within(images, m, other) for other in blocks)}


def _starts_depthwise(block: nn.Module, capture: Capture) -> bool:
    convs = [m for m in block.modules() if isinstance(m, nn.Conv2d) and m in capture.calls]
    return bool(convs) and _is_depthwise(min(convs, key=lambda m: capture.calls[m].order))


def group_norm(channels: int) -> nn.GroupNorm:
    """The authors' norm for backbones without BatchNorm: groups of 8 channels."""
    return nn.GroupNorm(max(1, channels // 8) if channels % 8 == 0 else 1, channels)


def uses_group_norm(model: nn.Module) -> bool:
    """Whether ``model`` normalises by groups and not by batches."""
    norms = [m for m in model.modules() if isinstance(m, (nn.GroupNorm, nn.BatchNorm2d))]
    return bool(norms) and not any(isinstance(m, nn.BatchNorm2d) for m in norms)
