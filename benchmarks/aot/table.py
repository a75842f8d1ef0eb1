"""The table of all kernels: compiled for every architecture, and judged."""

from __future__ import annotations

import argparse
import functools
import multiprocessing
import os
from dataclasses import dataclass

import torch

from benchmarks import aot
from benchmarks.aot.machine_code import SHARED_LIMITS, TARGETS, Compiled, compile_for
from benchmarks.aot.traffic import traffic
from benchmarks.aot.workload import DTYPES, NETWORKS, workload
from tinytl_kernels.backends.triton.launch import Launch

MOST_BYTES = 1.15
# Kernels with a dot product, by how their names begin.
PRODUCTS = (
    "pointwise", "dense", "whole_block", "lite_branch_product", "lite_branch_gradient", "lite_branch_weight",
)  # fmt: skip
# Where float32 is compiled unless everything is: one of each maker, NVIDIA's with the least shared memory.
FLOAT32 = ("sm_80", "gfx942")


@dataclass
class Row:
    """A distinct kernel with the worst traffic of its launches."""

    kernel: str
    tile: str
    launch: Launch
    dtype: str
    launches: int = 0
    requested: float = 0.0
    memory: float = 0.0


def collect(networks: list[str], dtypes: list[str], kernel: str = "") -> list[Row]:
    """One row for every distinct kernel whose name starts with ``kernel`` that the networks launch."""
    rows: dict[object, Row] = {}
    for network in networks:
        for dtype in dtypes:
            for launch in workload(network, DTYPES[dtype]):
                if not launch.kernel.__name__.startswith(kernel):
                    continue
                row = rows.setdefault(configuration(launch), Row(launch.kernel.__name__, _tile(launch), launch, dtype))
                bytes_moved = traffic(launch)
                row.launches += 1
                row.requested = max(row.requested, bytes_moved.requested / bytes_moved.floor)
                row.memory = max(row.memory, bytes_moved.memory / bytes_moved.floor)
    return sorted(rows.values(), key=lambda row: (row.kernel, row.dtype, row.tile))


def configuration(launch: Launch) -> tuple:
    """What tells one compilation from another: all that is known at compile time, but for the divisibility of numbers.

    That is in the constants where it counts: ``launch.alignment``.
    """
    given = [
        (
            name,
            value.dtype if isinstance(value, torch.Tensor) else value if value is None or value == 1 else type(value),
        )
        for name, value in launch.arguments.items()
    ]
    return launch.kernel, *given, *launch.constants.items(), launch.num_warps, launch.num_stages


def _tile(launch: Launch) -> str:
    names = ("BLOCK_PIXELS", "BLOCK_OUT", "BLOCK_HIDDEN", "BLOCK_IN", "TILE_H", "TILE_W", "ROWS", "BLOCK_C", "BLOCK")
    parts = ["x".join(str(launch.constants[name]) for name in names if name in launch.constants)]
    if "KERNEL_H" in launch.constants:
        parts.append(f"k{launch.constants['KERNEL_H']}s{launch.constants['STRIDE_H']}")
    if (
        launch.arguments.get("scale") is not None
        and "weight" in launch.arguments
        and launch.arguments["weight"].dtype == torch.int8
    ):
        parts.append("int8")
    if launch.constants.get("ACTIVATION"):
        parts.append(launch.constants["ACTIVATION"])
    return " ".join([*parts, f"warps {launch.num_warps}"])


def complaints(row: Row, architecture: str, compiled: Compiled) -> list[str]:
    """What is wrong with a kernel; nothing if it may ship."""
    wrong = []
    if compiled.shared_bytes > SHARED_LIMITS[architecture]:
        wrong.append("too much shared memory")
    if compiled.spilled_bytes:
        wrong.append("spills")
    if row.kernel.startswith(PRODUCTS) and row.dtype != "float32" and not compiled.matrix_instructions:
        wrong.append("no tensor cores")
    if row.kernel.startswith(("pointwise", "depthwise")) and row.memory > MOST_BYTES:
        wrong.append(f"over {MOST_BYTES} x floor")
    return wrong


@functools.cache
def _collected(networks: tuple[str, ...], dtypes: tuple[str, ...], kernel: str) -> list[Row]:
    return collect(list(networks), list(dtypes), kernel)


def _compile_job(job: tuple[tuple[str, ...], tuple[str, ...], str, int, str]) -> Compiled:
    # A launch does not travel between processes, where it came from does.
    *where, index, architecture = job
    return compile_for(_collected(*where)[index].launch, architecture)


def main(arguments: list[str] | None = None) -> int:
    """Print the table; 1 if a kernel must not ship."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.aot", description=aot.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--network", choices=NETWORKS, nargs="*", default=list(NETWORKS))
    parser.add_argument("--dtype", choices=DTYPES, nargs="*", default=["bfloat16", "float32"])
    parser.add_argument("--arch", choices=TARGETS, nargs="*", default=list(TARGETS))
    parser.add_argument("--kernel", default="", help="only kernels whose name starts with this")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="compilations at a time")
    parser.add_argument("--everything", action="store_true", help="float32 on every architecture")
    options = parser.parse_args(arguments)
    where = (tuple(options.network), tuple(options.dtype), options.kernel)
    rows = _collected(*where)
    jobs = [
        (*where, index, arch)
        for index, row in enumerate(rows)
        for arch in options.arch
        if row.dtype != "float32" or arch in FLOAT32 or options.everything
    ]
    print(
        f"{'kernel':30} {'tile, activation':38} {'dtype':9} {'calls':>5} {'arch':7} {'regs':>4} {'spill':>5} "
        f"{'shared':>6} {'mma':>4} {'load':>4} {'l2':>5} {'memory':>6}"
    )
    failures = 0
    with multiprocessing.get_context("spawn").Pool(options.jobs) as pool:
        for job, compiled in zip(jobs, pool.imap(_compile_job, jobs), strict=True):
            row = rows[job[-2]]
            wrong = complaints(row, job[-1], compiled)
            failures += bool(wrong)
            print(
                f"{row.kernel:30} {row.tile:38} {row.dtype:9} {row.launches:5} {job[-1]:7} {compiled.registers:4} "
                f"{compiled.spilled_bytes:5} {compiled.shared_bytes:6} {compiled.matrix_instructions:4} "
                f"{compiled.widest_load_bits:4} {row.requested:5.2f} {row.memory:6.3f} {', '.join(wrong)}",
                flush=True,
            )
    print(f"{len(jobs)} compilations of {len(rows)} kernels, {failures} that must not ship")
    return 1 if failures else 0
