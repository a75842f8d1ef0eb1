"""Which parameters a method trains."""

from __future__ import annotations

from torch import nn

from tinytl_kernels.nn import LiteResidualBlock

from .trace import NORMS


def set_trained(model: nn.Module, method: str, head: nn.Module | None) -> tuple[str, ...]:
    """Set ``requires_grad`` of every parameter as ``method`` asks.

    Args:
        model: The converted model.
        method: One of the six.
        head: The classifier now in the model; always trained.

    Returns:
        Names of the trained parameters.
    """
    trained: set[nn.Parameter] = set()
    parameters = list(model.parameters())
    if head is not None:
        trained.update(head.parameters())
    branches = [module.lite for module in model.modules() if isinstance(module, LiteResidualBlock)]
    in_branches = {p for branch in branches for p in branch.parameters()}
    if method == "full":
        trained.update(parameters)
    if method == "norm+last":
        trained.update(p for m in model.modules() if is_norm(m) for p in m.parameters(recurse=False))
    if method in ("bias", "lite_residual+bias"):
        trained.update(p for n, p in model.named_parameters() if n.endswith("bias"))
    if method in ("lite_residual", "lite_residual+bias"):
        trained.update(in_branches)
    if method == "lite_residual+bias":
        # It duplicates the block's last bias (the authors freeze it too).
        for branch in branches:
            trained.discard(branch.final_bn.bias)
    for parameter in parameters:
        parameter.requires_grad_(parameter in trained)
    return tuple(name for name, p in model.named_parameters() if p in trained)


def is_norm(module: nn.Module) -> bool:
    """Whether ``module`` normalises: torch's norms, their subclasses, and libraries' own by name."""
    return isinstance(module, NORMS) or ("Norm" in type(module).__name__ and hasattr(module, "weight"))
