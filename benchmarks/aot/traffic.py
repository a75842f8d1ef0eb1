"""Bytes that a launch moves, by its geometry, against the floor."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from tinytl_kernels.backends.triton.launch import Launch, l2_bytes


@dataclass(frozen=True)
class Traffic:
    """Bytes of one launch: the floor, what all programs ask for, what reaches memory."""

    floor: int
    requested: int
    memory: int


def traffic(launch: Launch) -> Traffic:
    """Bytes of a launch from its geometry; see the head of this file."""
    sums = launch.arguments.get("grad_bias")
    tensors = {
        name: value
        for name, value in launch.arguments.items()
        if isinstance(value, Tensor) and name != "grad_bias" and not (name == "output" and _in_place(launch))
    }
    once = sum(value.numel() * value.element_size() for value in tensors.values())
    if _in_place(launch):  # read and written
        once += launch.arguments["output"].numel() * launch.arguments["output"].element_size()
    floor = once + (sums.size(1) * 4 if sums is not None else 0)
    # Partial sums are written, read, and added up.
    partial = 2 * sums.numel() * 4 if sums is not None else 0
    again, distance = _asked_again(launch)
    from_memory = again if distance > l2_bytes(torch.device("meta")) // 2 else 0
    return Traffic(floor, once + again + partial, once + from_memory + partial)


def _in_place(launch: Launch) -> bool:
    return "output" in launch.arguments and launch.arguments.get("input") is launch.arguments["output"]


def _asked_again(launch: Launch) -> tuple[int, int]:
    """(bytes that programs ask for beyond once, bytes that pass through between two programs that ask for the same)."""
    name, arguments, constants = launch.kernel.__name__, launch.arguments, launch.constants
    if not name.startswith(("pointwise", "dense", "depthwise", "whole_block")):
        return 0, 0
    size = constants["DTYPE"].primitive_bitwidth // 8
    if name.startswith("pointwise"):
        forward = name == "pointwise_kernel"
        read, written = ("input", "output") if forward else ("grad_output", "grad_input")
        columns = arguments[written].size(1)
        column_tiles = math.ceil(columns / constants["BLOCK_OUT" if forward else "BLOCK_IN"])
        weight = arguments["weight"].numel() * arguments["weight"].element_size()
        row_bytes = constants["BLOCK_PIXELS"] * (arguments[read].size(1) + columns) * size
        rows = launch.grid[0] // column_tiles
        again = (column_tiles - 1) * arguments[read].numel() * size + (rows - 1) * weight
        return again, row_bytes + weight
    if name.startswith("dense"):
        return _asked_again_by_dense(launch, size)
    forward = not name.endswith("backward_kernel")
    read = arguments["input" if forward else "grad_output"]
    height, width = constants["TILE_H"], constants["TILE_W"]
    span_h, span_w = constants["KERNEL_H"] - 1, constants["KERNEL_W"] - 1
    if forward:
        patch = ((height - 1) * constants["STRIDE_H"] + 1 + span_h) * ((width - 1) * constants["STRIDE_W"] + 1 + span_w)
    else:
        patch = (height - 1 + constants["TAPS_H"]) * (width - 1 + constants["TAPS_W"])
    # A whole block's programs take all channels.
    asked = launch.grid[0] * patch * constants.get("BLOCK_C", read.size(1)) * size
    row_of_tiles = arguments["tiles_w"] * patch * read.size(1) * size
    return max(0, asked - read.numel() * size), 4 * row_of_tiles


def _asked_again_by_dense(launch: Launch, size: int) -> tuple[int, int]:
    """An implicit product's programs ask for the pixels around their tile, and for their columns of the weight."""
    arguments, constants = launch.arguments, launch.constants
    forward = launch.kernel.__name__ == "dense_kernel"
    read, written = (arguments[n] for n in (("input", "output") if forward else ("grad_output", "grad_input")))
    block = constants["BLOCK_OUT" if forward else "BLOCK_IN"]
    groups = arguments["groups"]
    column_tiles = groups * math.ceil(written.size(1) // groups / block)
    pixels, weight = constants["BLOCK_PIXELS"], arguments["weight"].numel() * arguments["weight"].element_size()
    # Tiles follow the rows of an image: the pixels between the first and the last, and the window's rows around them.
    if forward:
        patch = pixels * constants["STRIDE_H"] * constants["STRIDE_W"]
        patch += max(0, constants["KERNEL_H"] - constants["STRIDE_H"]) * read.size(3)
    else:
        patch = pixels + math.ceil(constants["KERNEL_H"] / constants["STRIDE_H"] - 1) * read.size(3)
    phases = 1 if forward else constants["STRIDE_H"] * constants["STRIDE_W"]
    tiles = launch.grid[0] // column_tiles
    # A phase reads its own taps of the weight.
    asked = tiles * (patch * read.size(1) * size * (column_tiles // groups) + weight // phases)
    once = read.numel() * size + weight
    # The next tile's programs start where these end; the phases of a strided backward read the same pixels.
    return max(0, asked - once), (patch + pixels) * phases * (read.size(1) + written.size(1)) * size + weight
