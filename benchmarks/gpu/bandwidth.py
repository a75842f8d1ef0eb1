"""How near each kernel comes to what the memory can do: bytes that must move, over the time, over a copy's rate."""

from __future__ import annotations

import time
from collections.abc import Iterator

import torch
from torch import Tensor

import tinytl_kernels as tk
from benchmarks.gpu.operators import DTYPES, OPERATORS, OperatorCase, Sample, conv
from benchmarks.gpu.schedule import Row
from benchmarks.gpu.worker import Context
from tinytl_kernels.backends.triton.timing import Run, Stopwatch, captured

BATCH = 128
# Operators that are made of ATen's too: a second row of each is of these.
BESIDE_ATEN = ("lite_branch", "lite_branch_wide")


def copy_bytes_per_second(context: Context) -> float:
    """The rate of a copy that no cache holds, bytes read and bytes written counted."""
    source = torch.zeros((1 << 16) if context.tiny else (1 << 30), dtype=torch.uint8, device=context.device)
    target = torch.empty_like(source)
    stopwatch = Stopwatch(context.device, flush=False)
    # Of a limit the best counts.
    best = min(stopwatch.once(lambda: target.copy_(source)) for _ in range(3 if context.tiny else 20))
    return 2 * source.nbytes / best


def layers(tiny: bool) -> Iterator[tuple[str, OperatorCase]]:
    """(kind, case): the pointwise and depthwise convolutions of MobileNetV2, each shape once; other operators."""
    from benchmarks.aot.workload import mobilenet_v2  # needs Triton

    for layer in dict.fromkeys(mobilenet_v2()):
        kind = "pointwise" if layer.kernel == 1 else "depthwise" if layer.groups > 1 else "dense"
        side = 4 if tiny else layer.size
        size = (1 if tiny else BATCH, layer.channels, side, side)
        name = f"{layer.channels}->{layer.out_channels} {layer.kernel}x{layer.kernel}/{layer.stride} {layer.size}"
        build = conv(size, layer.out_channels, layer.kernel, layer.stride, layer.groups, layer.activation)
        yield kind, OperatorCase(name, build)
    for kind in (
        "dense",
        "grouped",
        "inverted_residual",
        "activation",
        "group_norm",
        "avg_pool",
        "max_pool",
        "upsample_add",
        *BESIDE_ATEN,
    ):
        make, size = OPERATORS[kind]
        size = (1, size[1], 4, 4) if tiny else size
        yield kind, OperatorCase("x".join(map(str, size)), make(size))


def rows(context: Context, dtype: str = "bfloat16") -> Iterator[Row]:
    """One row a case (two of ``BESIDE_ATEN``): seconds and share of the copy's rate, forward and backward."""
    copy = copy_bytes_per_second(context)
    if not context.warm:
        yield {"copy_bytes_per_s": copy}
    stopwatch = Stopwatch(context.device)
    for kind, case in layers(context.tiny):
        if context.left < 0:
            return
        backends = {kind: context.backend}
        if kind in BESIDE_ATEN:
            backends[f"{kind}, ATen"] = "reference"
        for label, backend in backends.items():
            row: Row = {"kind": label, "case": case.name, "dtype": dtype}
            try:
                row |= _measure(case.build(DTYPES[dtype], context.device), stopwatch, copy, context, backend)
            except Exception as error:
                row["wrong"] = f"{type(error).__name__}: {error}".splitlines()[0][:300]
            yield row


def _measure(sample: Sample, stopwatch: Stopwatch, copy: float, context: Context, backend: str) -> Row:
    on_gpu = context.device.type == "cuda"
    # A backward runs on the stream of its forward, and the one that is recorded is not the default one.
    stream = torch.cuda.Stream() if on_gpu else None
    if on_gpu:
        torch.cuda.synchronize()
    with tk.use_backend(backend), torch.cuda.stream(stream):
        parts = prepared(sample)
        if on_gpu:
            stream.synchronize()
    if context.warm:
        return {}
    row: Row = {}
    with tk.use_backend(backend):
        for name, (run, moved) in parts.items():
            python_s = _python_seconds(run, context)
            # As a graph: the kernels alone, without the time that Python takes to launch them.
            replay = captured(run, stream=stream) if on_gpu else run
            seconds = stopwatch.median(replay, rounds=1 if context.tiny else 15)
            row |= {
                f"{name}_s": seconds, f"{name}_bytes": moved, f"{name}_python_s": python_s,
                f"{name}_of_copy": moved / seconds / copy,
            }  # fmt: skip
    return row


def prepared(sample: Sample) -> dict[str, tuple[Run, int]]:
    """``"forward"``, ``"backward"`` -> what runs it, and the bytes that it has to read and write, each once."""
    leaves = sample.leaves()
    saved: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        saved[tensor.data_ptr()] = tensor.nbytes
        return tensor.detach()  # with its history, a node that keeps its output would keep itself alive

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        outputs = sample.outputs(leaves)
    grads = [torch.randn_like(o) for o in outputs]

    def forward() -> object:
        return sample.outputs(leaves)

    def backward() -> tuple[Tensor, ...]:
        return torch.autograd.grad(outputs, leaves, grads, retain_graph=True)

    # Weights and inputs are kept by reference: forward does not write them, backward reads them.
    given = {t.data_ptr() for t in (*leaves, *sample.constants)}
    kept = sum(count for pointer, count in saved.items() if pointer not in given)
    handed_on = {g.data_ptr() for g in grads}
    written = sum(t.nbytes for t in backward() if t.data_ptr() not in handed_on)
    constants = sum(t.nbytes for t in sample.constants)
    return {
        "forward": (forward, sum(t.nbytes for t in (*leaves, *outputs)) + kept + constants),
        "backward": (backward, sum(g.nbytes for g in grads) + sum(saved.values()) + written),
    }


def _python_seconds(run: Run, context: Context, times: int = 10) -> float:
    """Seconds that the processor needs to queue a call."""
    times = 1 if context.tiny else times
    if context.device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(times):
        run()
    return (time.perf_counter() - start) / times
