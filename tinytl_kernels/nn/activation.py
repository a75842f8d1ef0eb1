"""Stand-alone activations. The ReLU family keeps one bit an element; the smooth ones a full value, as in PyTorch.

Each subclasses its ``torch.nn`` namesake: same arguments, same representation, ``isinstance`` still holds. ``inplace``
is accepted and has no effect: the result is a new tensor and the input stays as it was. With ``code_bits=8`` the smooth
ones keep their derivative, one byte an element, and gradients are no longer exact; by how much is told by
:func:`tinytl_kernels.ops.activation`.
"""

from __future__ import annotations

from torch import Tensor, nn

from tinytl_kernels.core.activations import LEAKY_SLOPE
from tinytl_kernels.core.derivative_code import check_code_bits
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


class _Smooth(nn.Module):
    """What the smooth activations share.

    Attributes:
        function: what :func:`tinytl_kernels.ops.activation` calls it.
        code_bits: None, or 8 to keep the derivative in one byte an element; may be changed any time.
    """

    function: str
    code_bits: int | None = None

    def __init__(self, *args, code_bits: int | None = None) -> None:
        super().__init__(*args)
        check_code_bits(code_bits)
        self.code_bits = code_bits

    def forward(self, input: Tensor) -> Tensor:
        return activation(input, self.function, code_bits=self.code_bits)

    def extra_repr(self) -> str:
        text = super().extra_repr()
        return text if self.code_bits is None else f"{text}, code_bits={self.code_bits}".removeprefix(", ")


class Hardswish(_Smooth, nn.Hardswish):
    """``x * relu6(x + 3) / 6``; keeps its input, or with ``code_bits=8`` one byte an element.

    Args:
        inplace: as ``nn.Hardswish``; without effect.
        code_bits: None, or 8: gradients are off by at most 0.0040 of grad_output.
    """

    function = "hardswish"

    def __init__(self, inplace: bool = False, *, code_bits: int | None = None) -> None:
        super().__init__(inplace, code_bits=code_bits)


class SiLU(_Smooth, nn.SiLU):
    """``x * sigmoid(x)``; keeps its input, or with ``code_bits=8`` one byte an element.

    Args:
        inplace: as ``nn.SiLU``; without effect.
        code_bits: None, or 8: gradients are off by at most 0.0024 of grad_output.

    Example:
        >>> import torch, tinytl_kernels.nn as tnn
        >>> x = torch.tensor([-20.0, 0.0, 20.0], requires_grad=True)
        >>> tnn.SiLU(code_bits=8)(x).sum().backward()
        >>> x.grad
        tensor([0.0000, 0.5000, 1.0000])
    """

    function = "silu"

    def __init__(self, inplace: bool = False, *, code_bits: int | None = None) -> None:
        super().__init__(inplace, code_bits=code_bits)


class GELU(_Smooth, nn.GELU):
    """``x * Phi(x)``, or its tanh approximation; keeps its input, or with ``code_bits=8`` one byte an element.

    Args:
        approximate: as ``nn.GELU``.
        code_bits: None, or 8: gradients are off by at most 0.0025 of grad_output.
    """

    def __init__(self, approximate: str = "none", *, code_bits: int | None = None) -> None:
        super().__init__(approximate, code_bits=code_bits)

    @property
    def function(self) -> str:
        return "gelu_tanh" if self.approximate == "tanh" else "gelu"


class Sigmoid(_Smooth, nn.Sigmoid):
    """``1 / (1 + exp(-x))``; keeps its output, or with ``code_bits=8`` one byte an element.

    A product with the output (squeeze-and-excite) keeps the output anyway: then the byte comes on top.

    Args:
        code_bits: None, or 8: gradients are off by at most 0.0005 of grad_output.
    """

    function = "sigmoid"

    def __init__(self, *, code_bits: int | None = None) -> None:
        super().__init__(code_bits=code_bits)


def activation_name(module: nn.Module) -> str | None:
    """The name under which a ``torch.nn`` activation can be fused into ``FrozenConvBias``; None if it cannot.

    Example:
        >>> activation_name(nn.Hardtanh(0.0, 6.0))
        'relu6'
    """
    # Exact types first: a user's subclass may compute something else.
    kind = type(module)
    if getattr(module, "code_bits", None) is not None:
        return None  # fused, it would keep the full value
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
