"""Weight standardisation, as TinyTL trained its GroupNorm backbones."""

from __future__ import annotations

import torch
from torch import Tensor, nn

WEIGHT_STANDARDIZATION_EPS = 1e-5


class StandardizedConv2d(nn.Conv2d):
    """``nn.Conv2d`` whose filters have mean 0 and standard deviation 1 whenever it is applied.

        w[o] -> (w[o] - mean(w[o])) / (std(w[o]) + eps)

    The standard deviation is the unbiased one over the elements of a filter, and ``eps`` stands outside the root, as in
    the authors' code (other implementations put it inside, on the biased variance). Same parameters and state_dict as
    ``nn.Conv2d``. A frozen one is standardised once and for all by :func:`tinytl_kernels.convert`.

    Args:
        *args, **kwargs: as ``nn.Conv2d``.
        eps: added to the standard deviation.

    Raises:
        ValueError: a filter holds a single number, which has no standard deviation.

    Example:
        >>> weight = StandardizedConv2d(4, 6, 3).standardized_weight()
        >>> torch.allclose(weight.std(dim=(1, 2, 3)), torch.ones(6), atol=1e-3)
        True
    """

    def __init__(self, *args, eps: float = WEIGHT_STANDARDIZATION_EPS, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        if self.weight[0].numel() < 2:
            raise ValueError(
                f"weight standardisation: expected at least two numbers a filter, got weight {tuple(self.weight.shape)}"
            )
        self.eps = eps

    def standardized_weight(self) -> Tensor:
        """The weight that is applied, (out_channels, in_channels / groups, kH, kW)."""
        filters = self.weight.flatten(1)
        std, mean = torch.std_mean(filters, dim=1, keepdim=True)
        return ((filters - mean) / (std + self.eps)).view_as(self.weight)

    def forward(self, input: Tensor) -> Tensor:
        return self._conv_forward(input, self.standardized_weight(), self.bias)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, eps={self.eps}"
