"""Who runs a case: a contestant says how a stock module is prepared, an entry is that contestant ready to run."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import tinytl_kernels as tk
from benchmarks.cases import SEED, Case

PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def always(case: Case) -> None:
    """The contestant runs everywhere."""
    return None


@dataclass(frozen=True)
class Contestant:
    """One way to run a case.

    Args:
        key: Unique; the pytest parameter.
        label: What tables call it.
        build: ``build(stock, case) -> module``; ``stock`` is a copy of its own, with every parameter frozen.
        kind: ``"inference"``, or ``"step"``: zero_grad, forward, loss, backward. The optimizer is left out, for it is
            the same for everybody who trains the same tensors.
        method: What is trained, in the words of :func:`tinytl_kernels.convert`.
        precision: ``"float32"``, or ``"bfloat16"`` by autocast.
        backend: For our own contestants, who computes; None for peers.
        unavailable: ``unavailable(case) -> reason or None``.
        compiled: Its allocations happen in generated code that no operator-level count sees.
    """

    key: str
    label: str
    build: Callable[[nn.Module, Case], nn.Module]
    kind: Literal["inference", "step"] = "step"
    method: str = "bias"
    precision: str = "float32"
    backend: str | None = None
    unavailable: Callable[[Case], str | None] = always
    compiled: bool = False

    @property
    def ours(self) -> bool:
        """Whether it is this package."""
        return self.backend is not None


class Entry:
    """A contestant with its module built and its input ready.

    Args:
        contestant: Who.
        case: What.
        stock: The stock module; it is copied.
    """

    def __init__(self, contestant: Contestant, case: Case, stock: nn.Module) -> None:
        self.contestant = contestant
        self.case = case
        module = copy.deepcopy(stock).requires_grad_(False)
        self.module = contestant.build(module, case)
        self.parameters = [p for p in self.module.parameters() if p.requires_grad]
        self.input = case.input()
        # Inside a network autocast hands half precision on from layer to layer.
        if case.inner:
            self.input = self.input.to(PRECISIONS[contestant.precision])
        self.input.requires_grad_(case.inner and contestant.kind == "step")
        self.target = torch.arange(case.batch)
        self._grad_output: Tensor | None = None

    @contextlib.contextmanager
    def backend(self) -> Iterator[None]:
        """Our backend forced, if this is one of ours."""
        with tk.use_backend(self.contestant.backend) if self.contestant.ours else contextlib.nullcontext():
            yield

    @contextlib.contextmanager
    def setting(self) -> Iterator[None]:
        """Backend and autocast, as the forward pass wants them."""
        half = self.contestant.precision == "bfloat16"
        with self.backend(), torch.autocast("cpu", torch.bfloat16, enabled=half):
            yield

    def run(self) -> Tensor:
        """One inference or one step; gradients are left in ``.grad``.

        Returns:
            The module's output.
        """
        if self.contestant.kind == "inference":
            with torch.inference_mode(), self.setting():
                return self.module(self.input)
        self.clear()
        with self.setting():
            output = self.module(self.input)
        with self.backend():
            if self.case.inner:
                if self._grad_output is None:
                    self._grad_output = self.grad_output(output)
                output.backward(self._grad_output)
            else:
                F.cross_entropy(output.float(), self.target).backward()
        return output

    def clear(self) -> None:
        """Drop the gradients of the last step."""
        self.input.grad = None
        for parameter in self.parameters:
            parameter.grad = None

    @staticmethod
    def grad_output(output: Tensor) -> Tensor:
        """The gradient that a layer or block is given: (N, C, H, W), the same at every call, as ``output`` is."""
        generator = torch.Generator(output.device).manual_seed(SEED + 1)
        return torch.empty_like(output).copy_(torch.randn(output.shape, generator=generator, device=output.device))
