"""What a contestant keeps for backward and holds at its peak, counted the same way for everybody."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.contestants import Entry
from tinytl_kernels.memory import measure_memory

_ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Memory:
    """Bytes of one step.

    Args:
        saved: Kept between forward and backward, beyond parameters and buffers. Inside a network it includes the
            input, if the module keeps it; of a network it does not, for the caller holds the pictures anyway.
        peak: Most bytes alive at once beyond parameters, buffers and input, optimizer state left out; None where
            nobody counts (inference, compiled code, layers that train nothing).
        counted_by: ``"storages"`` (:func:`tinytl_kernels.measure_memory`) or ``"saved tensor hooks"``.
    """

    saved: int
    peak: int | None
    counted_by: str


def memory_of(entry: Entry) -> Memory:
    """Run one step of ``entry`` and count."""
    if entry.contestant.kind == "inference":
        return Memory(0, None, "storages")
    if entry.contestant.compiled or not entry.parameters:
        return Memory(_hooked(entry), None, "saved tensor hooks")
    entry.clear()
    # SGD without momentum has no state: the optimizer is the same for everybody who trains the same tensors.
    optimizer = torch.optim.SGD(entry.parameters, lr=0.0)
    target = None if entry.case.inner else entry.target
    with entry.setting():
        report = measure_memory(entry.module, entry.input, target, optimizer)
    saved = report.saved + (report.saved_input if entry.case.inner else 0)
    return Memory(saved, report.peak, "storages")


def _hooked(entry: Entry) -> int:
    """Bytes that pass through autograd's hooks. Enough for compiled code, which saves in no other way."""
    known = {t.untyped_storage().data_ptr() for t in (*entry.module.parameters(), *entry.module.buffers())}
    if not entry.case.inner:
        known.add(entry.input.untyped_storage().data_ptr())
    seen: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            seen[storage.data_ptr()] = storage.nbytes()
        return tensor.detach()  # with its history, a node that keeps its output would keep itself alive

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        entry.run()
    return sum(seen.values())


def process_peaks(case: str, keys: Sequence[str], *, quick: bool) -> dict[str, int | None]:
    """Growth of resident memory over one step, in a fresh process whose big blocks are mapped one by one.

    Args:
        case: Name of a network.
        keys: Of the contestants.
        quick: As ``--quick``.

    Returns:
        Key -> bytes; empty where the operating system does not tell.

    Raises:
        RuntimeError: The process failed; the message holds the end of what it wrote.
    """
    command = [sys.executable, "-m", "benchmarks.process_peak", case, *keys, f"--threads={torch.get_num_threads()}"]
    run = subprocess.run([*command, *(["--quick"] if quick else [])], cwd=_ROOT, capture_output=True, text=True)
    if run.returncode:
        raise RuntimeError(f"benchmarks.process_peak {case} exited with {run.returncode}: {run.stderr[-2000:]}")
    with contextlib.suppress(IndexError):
        return json.loads(run.stdout.splitlines()[-1])
    raise RuntimeError(f"benchmarks.process_peak {case} printed nothing")
