"""How a result is judged: against float64, by the error that PyTorch's own operator makes in the same dtype."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def assert_as_exact_as_torch(name: str, ours: Tensor, stock: Tensor, exact: Tensor, bound: float = 0.0) -> None:
    """``ours`` may be off from ``exact`` (float64) by twice what ``stock`` is, plus 4 ulp of the largest value; or by
    ``bound``, for sums whose terms cancel: there the other order of ``stock`` may be exact by chance."""
    assert ours.shape == exact.shape, f"{name}: shape {tuple(ours.shape)}, expected {tuple(exact.shape)}"
    assert ours.dtype == stock.dtype, f"{name}: dtype {ours.dtype}, expected {stock.dtype}"
    if ours.numel() == 0:
        return
    error = (ours.double() - exact).abs().max().item()
    stock_error = (stock.double() - exact).abs().max().item()
    ulp = torch.finfo(ours.dtype).eps * exact.abs().max().item()
    allowed = max(2 * stock_error + 4 * ulp, bound)
    assert error <= allowed, f"{name}: error {error:.3e}, stock PyTorch's {stock_error:.3e}, allowed {allowed:.3e}"


def outputs_and_gradients(
    function: Callable[..., Tensor], inputs: Sequence[Tensor], grad_output: Tensor
) -> list[tuple[str, Tensor]]:
    """The output of ``function(*inputs)`` and the gradients of the inputs, each with a name for messages."""
    # Not cloned: a clone of a sliced tensor is dense.
    leaves = [t.detach().requires_grad_() for t in inputs]
    output = function(*leaves)
    gradients = torch.autograd.grad(output, leaves, grad_output.to(output.dtype))
    return [("output", output.detach()), *((f"grad of input {i}", g) for i, g in enumerate(gradients))]


def compare_with_torch(ours: Callable, stock: Callable, inputs: Sequence[Tensor], terms: int = 0) -> None:
    """Output and all gradients of ``ours`` are as exact as those of ``stock``, on fresh random gradients.

    ``terms``: of the longest sum of gradients, which may be off by 10 eps sqrt(terms) of the largest in float32.
    """
    exact_inputs = [t.double() for t in inputs]
    grad_output = torch.randn_like(stock(*exact_inputs))
    exact = outputs_and_gradients(stock, exact_inputs, grad_output.to(inputs[0].dtype))
    theirs = outputs_and_gradients(stock, inputs, grad_output)
    mine = outputs_and_gradients(ours, inputs, grad_output)
    largest = grad_output.abs().max().item() if terms else 0.0
    bound = 10 * torch.finfo(torch.float32).eps * terms**0.5 * largest
    for (name, a), (_, b), (_, c) in zip(mine, theirs, exact, strict=True):
        assert_as_exact_as_torch(name, a, b, c, 0.0 if name == "output" else bound)


def saved_tensors(function: Callable[[], object]) -> list[tuple[tuple[int, ...], torch.dtype]]:
    """Shape and dtype of every tensor that autograd keeps while ``function()`` runs, sorted."""
    saved = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append((tuple(tensor.shape), tensor.dtype))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        function()
    return sorted(saved, key=str)


def saved_bytes(function: Callable[[], Tensor], exclude: Sequence[Tensor] = ()) -> int:
    """Bytes that autograd keeps while ``function()`` runs, each storage once, without those of ``exclude``."""
    known = {t.untyped_storage().data_ptr() for t in exclude}
    seen: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            seen[storage.data_ptr()] = storage.nbytes()
        return tensor.detach()  # with its history, a node that keeps its output would keep itself alive

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        output = function()
    del output
    return sum(seen.values())
