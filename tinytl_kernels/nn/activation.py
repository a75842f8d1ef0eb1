"""Stand-alone activations. The ReLU family keeps one bit an element; the smooth ones their input, as in PyTorch.

Each subclasses its ``torch.nn`` namesake: same arguments, same representation, ``isinstance`` still holds. ``inplace``
is accepted and has no effect: the result is a new tensor and the input stays as it was.
"""

from __future__ import annotations

from torch import Tensor, nn

from tinytl_kernels.core.activations import LEAKY_SLOPE
from tinytl_kernels.ops import activation


class ReLU(nn.ReLU):
    """``max(x, 0)``; keeps one bit an element for backward.

    Example:
        >>> import torch, tinytl_kernels.nn as tnn
        >>> tnn.ReLU()(torch.tensor([-1.0, 2.0]))
        tensor([0., 2.])
    """

    def forward(self, input: Tensor) -> Tensor:
        return activation(input, "relu")


class ReLU6(nn.ReLU6):
    """``min(max(x, 0), 6)``; keeps one bit an element for backward."""

    def forward(self, input: Tensor) -> Tensor:
        return activation(input, "relu6")


class LeakyReLU(nn.LeakyReLU):
    """``x if x > 0 else negative_slope * x``; keeps one bit an element for backward."""

    def forward(self, input: Tensor) -> Tensor:
        return activation(input, "leaky_relu", self.negative_slope)


class Hardsigmoid(nn.Hardsigmoid):
    """``relu6(x + 3) / 6``; keeps one bit an element for backward."""

    def forward(self, input: Tensor) -> Tensor:
        return activation(input, "hardsigmoid")


class Hardswish(nn.Hardswish):
    """``x * relu6(x + 3) / 6``; keeps its input."""

    def forward(self, input: Tensor) -> Tensor:
        return activation(input, "hardswish")


class SiLU(nn.SiLU):
    """``x * sigmoid(x)``; keeps its input."""

    def forward(self, input: Tensor) -> Tensor:
        return activation(input, "silu")


class GELU(nn.GELU):
    """``x * Phi(x)``, exact or with the tanh approximation; keeps its input."""

    def forward(self, input: Tensor) -> Tensor:
        return activation(input, "gelu_tanh" if self.approximate == "tanh" else "gelu")


def activation_name(module: nn.Module) -> str | None:
    """The name under which a ``torch.nn`` activation can be fused into ``FrozenConvBias``; None if it cannot.

    Example:
        >>> activation_name(nn.Hardtanh(0.0, 6.0))
        'relu6'
    """
    # Exact types first: a user's subclass may compute something else.
    kind = type(module)
    if kind in (nn.Hardtanh,):
        return "relu6" if (module.min_val, module.max_val) == (0.0, 6.0) else None
    if kind in (nn.LeakyReLU, LeakyReLU):
        return "leaky_relu" if module.negative_slope == LEAKY_SLOPE else None
    if kind in (nn.GELU, GELU):
        return "gelu_tanh" if module.approximate == "tanh" else "gelu"
    return _NAMES.get(kind)


_NAMES = {
    nn.ReLU: "relu",
    ReLU: "relu",
    nn.ReLU6: "relu6",
    ReLU6: "relu6",
    nn.Hardsigmoid: "hardsigmoid",
    Hardsigmoid: "hardsigmoid",
    nn.Hardswish: "hardswish",
    Hardswish: "hardswish",
    nn.SiLU: "silu",
    SiLU: "silu",
}
