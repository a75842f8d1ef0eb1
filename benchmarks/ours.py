"""This package: each method that is worth a row, on each backend."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import torch
from torch import nn

import tinytl_kernels as tk
from benchmarks.cases import Case
from benchmarks.contestants import Contestant
from benchmarks.peers import only_full_lineup
from tinytl_kernels.backends import backend_module


def converted(method: str, stock: nn.Module, case: Case, *, recompute: bool = True) -> nn.Module:
    """``convert`` as a user calls it; the norms of lite residuals train, all else is frozen."""
    if case.level == "network" or method == "bias":
        module = tk.convert(stock, method, example_input=case.input(), inplace=True, recompute=recompute)
    else:
        module = _with_lite_residual(stock, case)
    for child in module.modules():
        if isinstance(child, tk.LiteResidual):
            child.train()
    return module


def _with_lite_residual(block: nn.Module, case: Case) -> nn.Module:
    with torch.no_grad():
        output = block(case.input())
    main = converted("bias", block, case)
    lite = tk.LiteResidual(case.input_size[1], output.size(1), stride=case.input_size[2] // output.size(2))
    lite.final_bn.bias.requires_grad_(False)  # it duplicates the block's last bias
    return tk.LiteResidualBlock(main, lite).to(memory_format=torch.channels_last)


def contestants(backend: str, *methods: str, half: bool) -> tuple[Contestant, ...]:
    """One contestant a method on one backend, and ``bias`` once more in bfloat16 if ``half``."""
    lineup = []
    for method in methods:
        lineup.append(_contestant(backend, method, "float32"))
        if half and method == "bias":
            lineup.append(_contestant(backend, method, "bfloat16"))
    return tuple(lineup)


def kept(backend: str) -> Contestant:
    """``bias`` without computing anything again."""
    plain = _contestant(backend, "bias", "float32")
    return replace(
        plain,
        key=f"{plain.key}_kept",
        label=f"{plain.label}, recompute=False",
        build=partial(converted, "bias", recompute=False),
        unavailable=partial(_nothing_recomputed, backend),
    )


def _nothing_recomputed(backend: str, case: Case) -> str | None:
    return _unavailable(backend, "bias", case) if case.recomputed else "no block of it is computed again"


def _contestant(backend: str, method: str, precision: str) -> Contestant:
    half = precision == "bfloat16"
    return Contestant(
        key=f"ours_{backend}_{method}" + ("_bf16" if half else ""),
        label=f"**tinytl** {method}, {backend}" + (", bf16 autocast" if half else ""),
        build=partial(converted, method),
        method=method,
        precision=precision,
        backend=backend,
        unavailable=partial(_unavailable, backend, method),
    )


def _unavailable(backend: str, method: str, case: Case) -> str | None:
    state = tk.available_backends()[backend]
    if state != "available":
        return f"backend {backend}: {state}"
    if reason := backend_module(backend).cannot_take(torch.empty(1)):
        return f"backend {backend}: {reason}"
    return only_full_lineup(case) if method == "last" and case.level == "network" else None
