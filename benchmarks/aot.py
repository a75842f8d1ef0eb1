"""The Triton kernels held to account without a GPU: compiled ahead of time, and their bytes counted.

    python -m benchmarks.aot [--network mobilenet_v2] [--dtype bfloat16] [--arch sm_90] [--jobs 2]

Runs the convolutions of MobileNetV2 and ResNet-50 (batch 128, 224x224, channels_last) on tensors without memory, and
so collects the very launches that a GPU would get. Each distinct kernel is compiled for every architecture; the table
gives registers, spilled bytes, shared memory, tensor-core instructions and the widest load, read from the machine code.

Bytes come from the launch geometry, over the floor (every tensor read or written once):
``l2`` is what all programs ask for, each counting what it needs once; ``memory`` is what reaches DRAM, where a tile
asked for again comes from L2 if what passes through in between fits in half of it. Partial sums count in both.

Exits with 1 where a kernel spills or does not fit shared memory, where half precision has a dot product without tensor
cores, or where a pointwise or depthwise kernel moves more than 1.15 times the floor.
"""

from __future__ import annotations

import argparse
import collections
import math
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from tinytl_kernels.backends.triton.launch import Launch, l2_bytes, record
from tinytl_kernels.backends.triton.operators import OPERATORS

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
MOST_BYTES = 1.15
# What a program may use of a multiprocessor's shared memory (a compute unit's LDS).
SHARED_LIMITS = {"sm_80": 163 << 10, "sm_90": 227 << 10, "sm_100": 227 << 10, "gfx942": 64 << 10}

_POINTERS = {torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.uint8: "*u8"}


@dataclass(frozen=True)
class Layer:
    """A frozen convolution of a network: (C, H, H) -> (O, H / stride, H / stride)."""

    channels: int
    out_channels: int
    kernel: int
    stride: int
    groups: int
    size: int
    activation: str | None


@dataclass(frozen=True)
class Compiled:
    """What the machine code of one kernel says."""

    registers: int
    spilled_bytes: int
    shared_bytes: int
    matrix_instructions: int
    widest_load_bits: int


@dataclass(frozen=True)
class Traffic:
    """Bytes of one launch: the floor, what all programs ask for, what reaches memory."""

    floor: int
    requested: int
    memory: int


def mobilenet_v2() -> list[Layer]:
    """The convolutions of MobileNetV2 (Sandler et al. 2018, table 2) but the stem."""
    layers, channels, size = [], 32, 112
    blocks = [(1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1)]
    for expand, out_channels, count, first_stride in blocks:
        for stride in [first_stride] + [1] * (count - 1):
            hidden = channels * expand
            if expand > 1:
                layers.append(Layer(channels, hidden, 1, 1, 1, size, "relu6"))
            layers.append(Layer(hidden, hidden, 3, stride, hidden, size, "relu6"))
            size //= stride
            layers.append(Layer(hidden, out_channels, 1, 1, 1, size, None))
            channels = out_channels
    return [*layers, Layer(320, 1280, 1, 1, 1, 7, "relu6")]


def resnet50() -> list[Layer]:
    """The convolutions of ResNet-50 (He et al. 2016, table 1) but the stem; the stride is in the 3x3."""
    layers, channels, size = [], 64, 56
    for width, count, first_stride in [(64, 3, 1), (128, 4, 2), (256, 6, 2), (512, 3, 2)]:
        for stride in [first_stride] + [1] * (count - 1):
            layers.append(Layer(channels, width, 1, 1, 1, size, "relu"))
            layers.append(Layer(width, width, 3, stride, 1, size, "relu"))
            if channels != 4 * width:
                layers.append(Layer(channels, 4 * width, 1, stride, 1, size, None))
            size //= stride
            layers.append(Layer(width, 4 * width, 1, 1, 1, size, None))
            channels = 4 * width
    return layers


NETWORKS = {"mobilenet_v2": mobilenet_v2, "resnet50": resnet50}


def launches(layer: Layer, dtype: torch.dtype, batch: int = 128) -> list[Launch]:
    """The launches of a layer's forward and backward, on tensors without memory."""

    def image(*size: int) -> Tensor:
        return torch.empty(size, dtype=dtype, device="meta", memory_format=torch.channels_last)

    x = image(batch, layer.channels, layer.size, layer.size)
    weight = torch.empty(
        (layer.out_channels, layer.channels // layer.groups, layer.kernel, layer.kernel), dtype=dtype, device="meta"
    )
    bias = torch.empty(layer.out_channels, dtype=torch.float32, device="meta")
    geometry = ([layer.stride] * 2, [layer.kernel // 2] * 4, [1, 1], layer.groups)
    with record() as recorded:
        output, saved = OPERATORS["frozen_conv"](x, weight, bias, *geometry, layer.activation, True)
        OPERATORS["frozen_conv_backward"](
            torch.empty_like(output), weight, saved, x.shape, *geometry, layer.activation, True, True, True
        )
    return recorded


def source(launch: Launch) -> ASTSource:
    """What Triton would compile for a launch, with the specialisation that it would choose."""
    signature, constants, attributes = {}, {}, {}
    for place, parameter in enumerate(launch.kernel.params):
        name = parameter.name
        if name in launch.constants:
            signature[name], constants[name] = "constexpr", launch.constants[name]
            continue
        value = launch.arguments[name]
        if value is None or (type(value) is int and value == 1 and not parameter.do_not_specialize):
            signature[name], constants[name] = "constexpr", value
        elif isinstance(value, Tensor):
            signature[name] = _POINTERS[value.dtype]
            attributes[(place,)] = [["tt.divisibility", 16]]
        elif isinstance(value, float):
            signature[name] = "fp32"
        else:
            signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if value % 16 == 0 and not parameter.do_not_specialize:
                attributes[(place,)] = [["tt.divisibility", 16]]
    return ASTSource(fn=launch.kernel, signature=signature, constexprs=constants, attrs=attributes)


def compile_for(launch: Launch, architecture: str) -> Compiled:
    """Compile a launch's kernel and read its machine code."""
    target = TARGETS[architecture]
    options = dict(num_warps=launch.warps_of(target.warp_size), num_stages=launch.num_stages)
    kernel = triton.compile(source(launch), target=target, options=options)
    if "amdgcn" in kernel.asm:
        return _read_amdgcn(kernel.asm["amdgcn"], kernel.metadata.shared)
    return _read_cubin(kernel.asm["cubin"], kernel.metadata.shared)


def _read_cubin(cubin: bytes, shared_bytes: int) -> Compiled:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        usage = _cuobjdump("-res-usage", path)
        sass = _cuobjdump("-sass", path)
    spills = re.findall(r"\b(?:STL|LDL)(?:\.(64|128))?\b", sass)
    loads = re.findall(r"\b(?:LDG|LDGSTS)\.[\w.]*", sass)
    widths = [int(width) for load in loads for width in re.findall(r"\.(64|128|256)\b", load)]
    return Compiled(
        registers=int(re.search(r"REG:(\d+)", usage).group(1)),
        spilled_bytes=sum(int(width or 32) // 8 for width in spills),
        shared_bytes=shared_bytes,
        matrix_instructions=len(re.findall(r"\b(?:HMMA|HGMMA|UTC\w*MMA)\b", sass)),
        widest_load_bits=max([32 if loads else 0, *widths]),
    )


def _cuobjdump(option: str, path: Path) -> str:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return subprocess.run([tool, option, path], check=True, capture_output=True, text=True, timeout=120).stdout


def _read_amdgcn(assembly: str, shared_bytes: int) -> Compiled:
    def number(key: str) -> int:
        found = re.search(rf"\.{key}:\s*(\d+)", assembly)
        return int(found.group(1)) if found else 0

    words = [int(n or 1) for n in re.findall(r"(?:global|buffer)_load_dword(?:x(\d))?", assembly)]
    return Compiled(
        registers=number("vgpr_count") + number("agpr_count"),
        # Scalar registers spill into lanes of vector registers; what reaches memory is the private segment.
        spilled_bytes=number("private_segment_fixed_size"),
        shared_bytes=shared_bytes,
        matrix_instructions=len(re.findall(r"\bv_mfma", assembly)),
        widest_load_bits=32 * max([0, *words]),
    )


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
    size = constants["DTYPE"].primitive_bitwidth // 8
    if name.startswith("pointwise"):
        forward = name == "pointwise_kernel"
        read, written = ("input", "output") if forward else ("grad_output", "grad_input")
        columns = arguments[written].size(1)
        column_tiles = math.ceil(columns / constants["BLOCK_OUT" if forward else "BLOCK_IN"])
        weight = arguments["weight"].numel() * size
        row_bytes = constants["BLOCK_PIXELS"] * (arguments[read].size(1) + columns) * size
        rows = launch.grid[0] // column_tiles
        again = (column_tiles - 1) * arguments[read].numel() * size + (rows - 1) * weight
        return again, row_bytes + weight
    if name.startswith("depthwise"):
        forward = name == "depthwise_kernel"
        read = arguments["input" if forward else "grad_output"]
        height, width = constants["TILE_H"], constants["TILE_W"]
        span_h, span_w = constants["KERNEL_H"] - 1, constants["KERNEL_W"] - 1
        if forward:
            patch = ((height - 1) * constants["STRIDE_H"] + 1 + span_h) * (
                (width - 1) * constants["STRIDE_W"] + 1 + span_w
            )
        else:
            patch = (height - 1 + constants["TAPS_H"]) * (width - 1 + constants["TAPS_W"])
        asked = launch.grid[0] * patch * constants["BLOCK_C"] * size
        row_of_tiles = arguments["tiles_w"] * patch * read.size(1) * size
        return max(0, asked - read.numel() * size), 4 * row_of_tiles
    return 0, 0


@dataclass
class _Row:
    kernel: str
    tile: str
    launch: Launch
    dtype: str
    layers: int = 0
    requested: float = 0.0
    memory: float = 0.0


def collect(networks: list[str], dtypes: list[str]) -> list[_Row]:
    """One row for every distinct kernel that the networks launch, with its worst traffic."""
    rows: dict[object, _Row] = {}
    for network in networks:
        counted = collections.Counter(NETWORKS[network]())
        for dtype in dtypes:
            for layer, count in counted.items():
                for launch in launches(layer, DTYPES[dtype]):
                    key = (source(launch).hash(), launch.num_warps, launch.num_stages)
                    row = rows.setdefault(key, _Row(launch.kernel.__name__, _tile(launch), launch, dtype))
                    bytes_moved = traffic(launch)
                    row.layers += count
                    row.requested = max(row.requested, bytes_moved.requested / bytes_moved.floor)
                    row.memory = max(row.memory, bytes_moved.memory / bytes_moved.floor)
    return sorted(rows.values(), key=lambda row: (row.kernel, row.dtype, row.tile))


def _tile(launch: Launch) -> str:
    names = ("BLOCK_PIXELS", "BLOCK_OUT", "BLOCK_IN", "TILE_H", "TILE_W", "ROWS", "BLOCK_C")
    tile = "x".join(str(launch.constants[name]) for name in names if name in launch.constants)
    window = ""
    if "KERNEL_H" in launch.constants:
        window = f" k{launch.constants['KERNEL_H']}s{launch.constants['STRIDE_H']}"
    return f"{tile}{window} {launch.constants.get('ACTIVATION')} warps {launch.num_warps}"


def complaints(row: _Row, architecture: str, compiled: Compiled) -> list[str]:
    """What is wrong with a kernel; nothing if it may ship."""
    wrong = []
    if compiled.shared_bytes > SHARED_LIMITS[architecture]:
        wrong.append("too much shared memory")
    if compiled.spilled_bytes:
        wrong.append("spills")
    if row.kernel.startswith("pointwise") and row.dtype != "float32" and not compiled.matrix_instructions:
        wrong.append("no tensor cores")
    if row.kernel.startswith(("pointwise", "depthwise")) and row.memory > MOST_BYTES:
        wrong.append(f"over {MOST_BYTES} x floor")
    return wrong


def _compile_job(job: tuple[list[str], list[str], int, str]) -> Compiled:
    # A launch does not travel between processes, where it came from does.
    networks, dtypes, index, architecture = job
    return compile_for(_collected(tuple(networks), tuple(dtypes))[index].launch, architecture)


_cache: dict[tuple, list[_Row]] = {}


def _collected(networks: tuple[str, ...], dtypes: tuple[str, ...]) -> list[_Row]:
    if (networks, dtypes) not in _cache:
        _cache[networks, dtypes] = collect(list(networks), list(dtypes))
    return _cache[networks, dtypes]


def main(arguments: list[str] | None = None) -> int:
    """Print the table; 1 if a kernel must not ship."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", choices=NETWORKS, nargs="*", default=list(NETWORKS))
    parser.add_argument("--dtype", choices=DTYPES, nargs="*", default=["bfloat16", "float32"])
    parser.add_argument("--arch", choices=TARGETS, nargs="*", default=list(TARGETS))
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="compilations at a time")
    options = parser.parse_args(arguments)
    rows = _collected(tuple(options.network), tuple(options.dtype))
    jobs = [
        (options.network, options.dtype, index, arch) for index in range(len(rows)) for arch in options.arch
    ]  # fmt: skip
    print(
        f"{'kernel':26} {'tile, activation':38} {'dtype':9} {'layers':>6} {'arch':7} {'regs':>4} {'spill':>5} "
        f"{'shared':>6} {'mma':>4} {'load':>4} {'l2':>5} {'memory':>6}"
    )
    failures = 0
    with multiprocessing.get_context("spawn").Pool(options.jobs) as pool:
        for job, compiled in zip(jobs, pool.imap(_compile_job, jobs), strict=True):
            row = rows[job[2]]
            wrong = complaints(row, job[3], compiled)
            failures += bool(wrong)
            print(
                f"{row.kernel:26} {row.tile:38} {row.dtype:9} {row.layers:6} {job[3]:7} {compiled.registers:4} "
                f"{compiled.spilled_bytes:5} {compiled.shared_bytes:6} {compiled.matrix_instructions:4} "
                f"{compiled.widest_load_bits:4} {row.requested:5.2f} {row.memory:6.3f} {', '.join(wrong)}",
                flush=True,
            )
    print(f"{len(jobs)} compilations of {len(rows)} kernels, {failures} that must not ship")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
