"""A linear layer. No operator: PyTorch's, or one call of a backend that moves a weight of few rows only once.

    output = input weight^T + bias
    grad_input = grad_output weight      grad_weight = grad_output^T input      grad_bias = sum grad_output

With a row an image the time of a classifier is that of reading its weight and writing the gradient. What is kept is
what PyTorch's keeps: the input for the gradient of a trained weight, and the weight.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from tinytl_kernels.backends import fused_implementation


def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``torch.nn.functional.linear``, faster for few rows where a backend has a kernel.

    On a CPU it has, for up to 32 rows and a weight in float32; more rows, other dtypes and other dimensions are
    PyTorch's own, as everything is while compiling. Under autocast the output is in its dtype, and the rows are rounded
    to it, but neither the weight nor its gradient are.

    Args:
        input: (..., I).
        weight: (O, I).
        bias: (O,).

    Returns:
        (..., O), differentiable any number of times.

    Raises:
        RuntimeError: shapes or dtypes do not fit; the message is PyTorch's.

    Example:
        >>> import torch
        >>> from tinytl_kernels import ops
        >>> ops.linear(torch.randn(8, 1280), torch.randn(1000, 1280)).shape
        torch.Size([8, 1000])
    """
    fused = None
    if type(input) is Tensor and not torch.compiler.is_compiling() and torch._C._get_tracing_state() is None:
        fused = fused_implementation("linear", input)
    return F.linear(input, weight, bias) if fused is None else fused(input, weight, bias)
