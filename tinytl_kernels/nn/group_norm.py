"""GroupNorm with the activation behind it in one operator."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from tinytl_kernels import ops
from tinytl_kernels.core.activations import check_activation


class GroupNorm(nn.GroupNorm):
    """``nn.GroupNorm``, optionally with an activation; keeps its input (by reference) for backward and nothing else.

    The input gradient of a GroupNorm needs the normalised input, whatever is frozen. Inside a block under
    :func:`~tinytl_kernels.nn.recompute` it lives for a few images at a time. Same parameters and state_dict as
    ``nn.GroupNorm``; weight and bias are trained where they require a gradient.

    Args:
        num_groups, num_channels, eps, affine, device, dtype: as ``nn.GroupNorm``.
        activation: None or a name that :func:`~tinytl_kernels.ops.activation` knows.
        code_bits: None, or 8 to keep one byte an element with gradients 1 to 5 % off; see
            :func:`~tinytl_kernels.ops.group_norm_activation`.

    Shape:
        (N, C, H, W), or any other (N, C, ...), which is left to PyTorch's operator.

    Example:
        >>> import torch, tinytl_kernels.nn as tnn
        >>> tnn.GroupNorm(2, 16, activation="relu6")(torch.randn(2, 16, 7, 7)).shape
        torch.Size([2, 16, 7, 7])
    """

    def __init__(
        self,
        num_groups: int,
        num_channels: int,
        eps: float = 1e-5,
        affine: bool = True,
        device=None,
        dtype=None,
        *,
        activation: str | None = None,
        code_bits: int | None = None,
    ) -> None:
        check_activation(activation)
        super().__init__(num_groups, num_channels, eps, affine, device, dtype)
        self.activation = activation
        self.code_bits = code_bits

    @classmethod
    def from_norm(cls, norm: nn.GroupNorm, activation: str | None = None) -> GroupNorm:
        """The twin of ``norm`` with its very parameters, in its train/eval mode.

        Raises:
            TypeError: ``norm`` is no ``nn.GroupNorm``, or a subclass with a forward of its own.
        """
        if not isinstance(norm, nn.GroupNorm) or type(norm).forward is not nn.GroupNorm.forward:
            raise TypeError(f"norm: expected an nn.GroupNorm, got {type(norm).__name__}")
        twin = cls(norm.num_groups, norm.num_channels, norm.eps, norm.affine, "meta", activation=activation)
        twin.weight, twin.bias = norm.weight, norm.bias
        return twin.train(norm.training)

    def forward(self, input: Tensor) -> Tensor:
        if input.dim() == 4:
            return ops.group_norm_activation(
                input, self.num_groups, self.weight, self.bias, self.eps, self.activation, self.code_bits
            )
        output = F.group_norm(input, self.num_groups, self.weight, self.bias, self.eps)
        return output if self.activation is None else ops.activation(output, self.activation)

    def extra_repr(self) -> str:
        text = super().extra_repr()
        if self.activation is not None:
            text += f", activation={self.activation}"
        return text if self.code_bits is None else f"{text}, code_bits={self.code_bits}"
