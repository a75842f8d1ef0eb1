"""The linear layer of a classifier."""

from __future__ import annotations

from torch import Tensor, nn

from tinytl_kernels import ops


class Linear(nn.Linear):
    """``nn.Linear``, with the same arguments, parameters and state_dict, faster for few rows: see
    :func:`tinytl_kernels.ops.linear`. Weight and bias are trained where they require a gradient.

    Example:
        >>> import torch, tinytl_kernels.nn as tnn
        >>> tnn.Linear(1280, 10)(torch.randn(8, 1280)).shape
        torch.Size([8, 10])
    """

    def forward(self, input: Tensor) -> Tensor:
        return ops.linear(input, self.weight, self.bias)
