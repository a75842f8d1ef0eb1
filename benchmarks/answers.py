"""Is the answer right? Checked before anything is timed.

The truth is stock PyTorch in float64. A contestant may be as far from it as stock PyTorch in the contestant's precision
is, twice. Errors are relative in the Euclidean norm, one for the output and one for each gradient.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import tinytl_kernels as tk
from benchmarks.cases import Case
from benchmarks.contestants import PRECISIONS, Contestant, Entry
from benchmarks.peers import biases_trained

# Where a pre-activation is within rounding of a kink of ReLU, its gradient passes in one computation and is stopped in
# another. A gradient sums over the elements that pass, so each such flip moves it by about 1 / sqrt(passing) of itself.
# Stock PyTorch's own error carries this noise too, but how many elements it hits is chance (a few in a million): where
# it hit none there, this many are allowed here.
FLIPS = 16

_ACTIVATIONS = (nn.ReLU, nn.ReLU6, nn.Hardtanh, nn.Hardswish, nn.SiLU)


class WrongAnswer(AssertionError):
    """A contestant computes something else than stock PyTorch."""


@dataclass(frozen=True)
class Answer:
    """What a run gave.

    Args:
        output: The module's output.
        gradients: Name -> gradient, in order: the input's inside a network, the biases', the classifier's.
    """

    output: Tensor
    gradients: dict[str, Tensor]


@dataclass(frozen=True)
class Verdict:
    """How far an answer is from the truth, and how far it may be; relative.

    Args:
        output_error, output_allowed: Of the output.
        gradient_error, gradient_allowed: Of the gradient that came nearest to its bound.
        gradients: How many were compared.
        telling: How many of them had a bound below 1, so that a missing gradient would have been noticed. All, in
            float32; in the early layers of a deep network of half precision, stock PyTorch is itself that far off.
    """

    output_error: float
    output_allowed: float
    gradient_error: float
    gradient_allowed: float
    gradients: int
    telling: int


def answer_of(entry: Entry) -> Answer:
    """Run once and gather the output and the gradients that stock PyTorch's bias-only step has as well.

    Left out: what lite residuals train (their branch adds zero at first, so that all else is comparable), and the
    weights that full fine-tuning trains.
    """
    output = entry.run().detach().clone()
    gradients = {}
    if entry.input.grad is not None:
        gradients["input"] = entry.input.grad
    for name, parameter in _comparable(entry.module):
        if parameter.grad is None:
            raise WrongAnswer(f"{name}: expected a gradient, got none")
        gradients[name] = parameter.grad.detach().clone()
    return Answer(output, gradients)


def _comparable(module: nn.Module) -> list[tuple[str, nn.Parameter]]:
    lite = {p for m in module.modules() if isinstance(m, tk.LiteResidual) for p in m.parameters()}
    classifier = {p for m in module.modules() if isinstance(m, nn.Linear) for p in m.parameters()}
    return [
        (name, p)
        for name, p in module.named_parameters()
        if p.requires_grad and p not in lite and (name.endswith("bias") or p in classifier)
    ]


def exact_answer(case: Case, stock: nn.Module, input: Tensor | None = None) -> tuple[Answer, int]:
    """Stock PyTorch in float64 on the same weights and input.

    Args:
        case: What.
        stock: The stock module; it is copied.
        input: In place of the case's; where it is, the answer is computed.

    Returns:
        The answer, and how many elements pass the activation that the fewest pass (0, if there is none).
    """
    # Contiguous: PyTorch's float64 convolutions are many times slower in channels_last.
    module = biases_trained(copy.deepcopy(stock), case).double().to(memory_format=torch.contiguous_format)
    passing: list[int] = []
    for child in module.modules():
        if isinstance(child, _ACTIVATIONS):
            child.register_forward_hook(lambda m, args, output: passing.append(int((output % 6 != 0).sum())))
    input = case.input() if input is None else input
    module = module.to(input.device)
    input = input.double().contiguous().requires_grad_(case.inner)
    output = module(input)
    if case.inner:
        output.backward(Entry.grad_output(output))
    else:
        F.cross_entropy(output, torch.arange(case.batch, device=input.device)).backward()
    gradients = {"input": input.grad} if case.inner else {}
    gradients |= {name: p.grad for name, p in _comparable(module)}
    return Answer(output.detach(), gradients), min(passing, default=0)


def judge(contestant: Contestant, got: Answer, stock: Answer, exact: Answer, passing: int) -> Verdict:
    """Compare an answer with the truth.

    Args:
        contestant: Whose answer it is.
        got: The answer.
        stock: Stock PyTorch's in the same precision.
        exact: Stock PyTorch's in float64.
        passing: From :func:`exact_answer`; 0 if there is no activation.

    Raises:
        WrongAnswer: It is off by more than allowed; the message names the tensor and the numbers.
    """
    rounding = 4 * torch.finfo(PRECISIONS[contestant.precision]).eps
    output_allowed = 2 * _error("output", stock.output, exact.output) + rounding
    output_error = _error("output", got.output, exact.output)
    _require("output", output_error, output_allowed)
    if contestant.kind == "inference":
        return Verdict(output_error, output_allowed, 0.0, 0.0, 0, 0)
    own = {name: _error(name, stock.gradients[name], truth) for name, truth in exact.gradients.items()}
    # In float32 a handful of bits flips, and which layer they hit is chance: stock's worst gradient measures them all.
    # In half precision thousands do, and each gradient is measured by stock's own.
    worst = max(own.values()) if contestant.precision == "float32" else 0.0
    flips = (FLIPS / passing) ** 0.5 if passing else 0.0
    judged: list[tuple[float, float]] = []
    for name, gradient, exact_name in _pairs(contestant, got.gradients, exact.gradients):
        error = _error(f"gradient of {name}", gradient, exact.gradients[exact_name])
        allowed = 2 * max(own[exact_name], worst) + rounding + flips
        _require(f"gradient of {name}", error, allowed)
        judged.append((error, allowed))
    closest = max(judged, key=lambda pair: pair[0] / pair[1])
    telling = sum(allowed < 1 for _, allowed in judged)
    return Verdict(output_error, output_allowed, *closest, len(judged), telling)


def _pairs(contestant: Contestant, got: dict[str, Tensor], exact: dict[str, Tensor]) -> list[tuple[str, Tensor, str]]:
    """(name, gradient, name of the truth) by order, not by name: a folded norm's bias is the convolution's."""
    names = list(exact)
    if contestant.method == "last":
        names = names[-2:]  # the classifier's weight and bias
    if len(got) != len(names):
        raise WrongAnswer(f"gradients: expected {len(names)}, got {len(got)}: {', '.join(got)}")
    return [(name, gradient, truth) for (name, gradient), truth in zip(got.items(), names, strict=True)]


def _error(what: str, got: Tensor, exact: Tensor) -> float:
    if got.shape != exact.shape:
        raise WrongAnswer(f"{what}: expected shape {tuple(exact.shape)}, got {tuple(got.shape)}")
    scale = exact.norm().item()
    return (got.double() - exact).norm().item() / scale if scale else got.double().norm().item()


def _require(what: str, error: float, allowed: float) -> None:
    # Not "error > allowed": a NaN must fail.
    if not error <= allowed:
        raise WrongAnswer(f"{what}: relative error {error:.2e}, allowed {allowed:.2e}")
