"""``FrozenInvertedResidual``: a whole MobileNet block as one operator."""

from __future__ import annotations

from torch import Tensor, nn

from tinytl_kernels import ops
from tinytl_kernels.core.activations import BIT_MASK
from tinytl_kernels.nn.frozen_conv import FrozenConvBias


class FrozenInvertedResidual(nn.Module):
    """Expand (1x1), filter depthwise (k x k), project (1x1), with frozen weights and trained biases.

    Its children ``expand`` (None for ``expand_ratio=1``), ``depthwise`` and ``project`` are ``FrozenConvBias`` modules
    that hold the parameters; they are computed together, so that a backend need not write the expanded activations to
    memory, and their forward hooks do not run. Kept for backward: one bit an element of the two activations. With the
    attribute ``fused`` set to False they are called one after the other instead, for hooks and for looking inside.

    Args:
        in_channels, out_channels: of the block.
        expand_ratio: the hidden width is ``round(in_channels * expand_ratio)``.
        kernel_size, stride: of the depthwise convolution.
        padding: of the depthwise convolution, as :class:`FrozenConvBias`; None is ``kernel_size // 2``.
        activation: after ``expand`` and ``depthwise``: None, ``"relu"``, ``"relu6"``, ``"leaky_relu"`` or
            ``"hardsigmoid"``.
        residual: add the input to the output; None does it where stride is 1 and the channels match.
        device, dtype: of the parameters.

    Shape:
        (N, in_channels, H, W) in, (N, out_channels, H', W') out.

    Raises:
        ValueError: an argument does not fit; the message names it.

    Example:
        >>> import torch, tinytl_kernels as tk
        >>> tk.FrozenInvertedResidual(16, 24, stride=2)(torch.randn(1, 16, 8, 8)).shape
        torch.Size([1, 24, 4, 4])
    """

    fused = True

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        expand_ratio: float = 6.0,
        kernel_size: int = 3,
        stride: int = 1,
        padding: int | tuple[int, ...] | str | None = None,
        activation: str | None = "relu6",
        residual: bool | None = None,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        hidden = round(in_channels * expand_ratio)
        to = {"device": device, "dtype": dtype}
        expand = None
        if expand_ratio != 1:
            expand = FrozenConvBias(in_channels, hidden, 1, activation=activation, **to)
        depthwise = FrozenConvBias(
            hidden,
            hidden,
            kernel_size,
            stride,
            kernel_size // 2 if padding is None else padding,
            groups=hidden,
            activation=activation,
            **to,
        )
        project = FrozenConvBias(hidden, out_channels, 1, **to)
        if residual is None:
            residual = stride == 1 and in_channels == out_channels
        self._adopt(expand, depthwise, project, residual)

    @classmethod
    def from_convs(
        cls,
        expand: FrozenConvBias | None,
        depthwise: FrozenConvBias,
        project: FrozenConvBias,
        residual: bool,
    ) -> FrozenInvertedResidual:
        """The block made of these very modules (they are adopted, not copied).

        Raises:
            ValueError: they do not form an inverted residual block; the message says why.
        """
        block = cls.__new__(cls)
        nn.Module.__init__(block)
        block._adopt(expand, depthwise, project, residual)
        return block.train(depthwise.training)

    def _adopt(self, expand, depthwise, project, residual: bool) -> None:
        if reason := not_a_block(expand, depthwise, project):
            raise ValueError(reason)
        self.register_module("expand", expand)  # None is registered too, as nn.Module does for absent children
        self.depthwise, self.project = depthwise, project
        self.residual = residual

    @property
    def activation(self) -> str | None:
        return self.depthwise.activation

    def forward(self, input: Tensor) -> Tensor:
        if not self.fused:
            output = self.project(self.depthwise(input if self.expand is None else self.expand(input)))
            return input + output if self.residual else output
        block = self._block(input)
        return ops.frozen_inverted_residual(*block.arguments, **block.named_scales)

    def forward_with_pooled(self, input: Tensor) -> tuple[Tensor, Tensor]:
        """(output, 2x2 average pooling of the input): the port that a lite residual joins by."""
        block = self._block(input)
        return ops.frozen_inverted_residual_pooled(*block.arguments, **block.named_scales)

    def chain_link(self, image: Tensor | ops.Described) -> ops.Block | None:
        """What it is in a chain of blocks, for that input; None where it is not computed as one operator."""
        return self._block(image) if self.fused else None

    def _block(self, image: Tensor | ops.Described, branch: ops.Branch | None = None) -> ops.Block:
        return block_of(self.expand, self.depthwise, self.project, self.residual, image, branch)

    def quantize_(self, code: str = "int8") -> FrozenInvertedResidual:
        """Hold the three weights in 8 bits; see :meth:`FrozenConvBias.quantize_`. Returns the block itself."""
        for conv in (self.expand, self.depthwise, self.project):
            if conv is not None:
                conv.quantize_(code)
        return self

    def dequantize_(self) -> FrozenInvertedResidual:
        """Hold the three weights in floating point again. Returns the block itself."""
        for conv in (self.expand, self.depthwise, self.project):
            if conv is not None:
                conv.dequantize_()
        return self

    def extra_repr(self) -> str:
        return f"residual={self.residual}"


def block_of(
    expand: FrozenConvBias | None,
    depthwise: FrozenConvBias,
    project: FrozenConvBias,
    residual: bool,
    image: Tensor | ops.Described,
    branch: ops.Branch | None = None,
) -> ops.Block:
    """What these modules, and the branch around them, are to an operator, for that input.

    Raises:
        RuntimeError: as :meth:`FrozenConvBias.operands`.
    """
    weight1, bias1, scale1 = (None, None, None) if expand is None else expand.operands()
    weight2, bias2, scale2 = depthwise.operands()
    weight3, bias3, scale3 = project.operands()
    return ops.Block(
        image,
        (weight1, bias1, weight2, bias2, weight3, bias3),
        (scale1, scale2, scale3),
        depthwise.stride,
        depthwise.four_paddings(image),
        depthwise.activation,
        residual,
        branch,
    )


def not_a_block(
    expand: FrozenConvBias | None,
    depthwise: FrozenConvBias,
    project: FrozenConvBias,
    activations: tuple[str, ...] = BIT_MASK,
) -> str | None:
    """Why these modules, with one of the ``activations``, cannot be computed as one inverted residual block, or None
    if they can."""
    for name, conv in (("expand", expand), ("project", project)):
        if conv is not None and (reason := not_pointwise(name, conv)):
            return reason
    if project.activation is not None:
        return f"project: expected no activation, got {project.activation!r}"
    if depthwise.groups != depthwise.in_channels or depthwise.out_channels != depthwise.in_channels:
        return f"depthwise: expected as many groups as input and output channels, got {depthwise}"
    if depthwise.dilation != (1, 1) or depthwise.padding_mode != "zeros":
        return f"depthwise: expected no dilation and zero padding, got {depthwise}"
    if depthwise.activation is not None and depthwise.activation not in activations:
        return f"depthwise: expected no activation or one of {activations}, got {depthwise.activation!r}"
    if expand is not None and expand.activation != depthwise.activation:
        return f"expand: expected the activation {depthwise.activation!r} of depthwise, got {expand.activation!r}"
    if project.in_channels != depthwise.out_channels or (
        expand is not None and expand.out_channels != depthwise.in_channels
    ):
        return "expand, depthwise, project: their channels do not follow from each other"
    return None


def not_pointwise(name: str, conv: FrozenConvBias) -> str | None:
    """Why ``conv`` is no matrix product at every pixel, or None if it is."""
    # A 1x1 convolution of stride 1 pads nothing under any of the named paddings.
    unpadded = isinstance(conv.padding, str) or not any(conv.padding)
    if conv.kernel_size == conv.stride == (1, 1) and conv.groups == 1 and unpadded:
        return None
    return f"{name}: expected a 1x1 convolution of stride 1, groups 1, no padding, got {conv}"
