"""What the machine can do, measured: the rates that every kernel is held against."""

from __future__ import annotations

import functools
import platform
import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

_ROOT = Path(__file__).parents[1]


def machine(*, rates: bool = True) -> dict[str, str | int | float]:
    """Device, versions, threads, commit, and with ``rates`` the measured ones, ready for ``extra_info``."""
    about = {
        "cpu": _cpu(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "commit": _commit(),
    }
    if not rates:
        return about
    return about | {"sgemm_gflops": sgemm_gflops(), "conv_gflops": conv_gflops(), "copy_gb_s": copy_gb_s()}


def arithmetic_gflops(measured: Mapping[str, Any]) -> float:
    """GFLOP/s that arithmetic is held against: the best of what :func:`machine` measured.

    Args:
        measured: From :func:`machine`; results of before there was ``conv_gflops`` lack it.
    """
    return max(measured["sgemm_gflops"], measured.get("conv_gflops", 0.0))


@functools.cache
def sgemm_gflops() -> float:
    """GFLOP/s of the best float32 matrix product of a few sizes, on all threads."""
    best = 0.0
    for size in (512, 1024, 2048):
        a, b = torch.randn(2, size, size)
        out = torch.empty(size, size)
        best = max(best, 2 * size**3 / _fastest(lambda a=a, b=b, out=out: torch.mm(a, b, out=out)))
    return round(best / 1e9, 1)


@functools.cache
def conv_gflops() -> float:
    """GFLOP/s of a float32 convolution as oneDNN likes it best, on all threads.

    PyTorch's sgemm is MKL's on x86, which on AMD uses half of the vector width that the processor has; oneDNN uses all.
    """
    image = torch.randn(8, 256, 28, 28).contiguous(memory_format=torch.channels_last)
    weight = torch.randn(256, 256, 3, 3).contiguous(memory_format=torch.channels_last)
    with torch.inference_mode():
        seconds = _fastest(lambda: F.conv2d(image, weight, padding=1))
    return round(2 * image.numel() * weight[0].numel() / seconds / 1e9, 1)


@functools.cache
def copy_gb_s() -> float:
    """GB/s of a copy that no cache holds, bytes read and bytes written counted."""
    source = torch.zeros(1 << 26)  # 256 MB
    target = torch.empty_like(source)
    return round(2 * source.nbytes / _fastest(lambda: target.copy_(source)) / 1e9, 1)


def _fastest(run: Callable[[], object], times: int = 5) -> float:
    run()
    durations = []
    for _ in range(times):
        start = time.perf_counter()
        run()
        durations.append(time.perf_counter() - start)
    return min(durations)  # of a limit the best counts


def _cpu() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass  # not Linux
    return platform.processor() or platform.machine()


@functools.cache
def _commit() -> str:
    """The commit under test, with ``-dirty`` if files differ from it; ``unknown`` outside of a repository."""
    try:
        command = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
        run = subprocess.run(command, cwd=_ROOT, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    return run.stdout.strip() or "unknown"
