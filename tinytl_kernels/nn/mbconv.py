"""``MBConv``: what ``convert`` makes of a block with a smooth activation or squeeze-and-excite."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tinytl_kernels import ops
from tinytl_kernels.core.hooks import every_module_hooked, watched
from tinytl_kernels.core.layout import memory_format
from tinytl_kernels.nn.frozen_conv import FrozenConvBias


class MBConv(nn.Module):
    """Mixed into the class of a block: computes it in one call where the backend does that, else layer by layer.

    In one call the block keeps its input and nothing else, and computes itself again in backward. That is what
    :func:`tinytl_kernels.nn.recompute` does with it layer by layer, on every device, so that a block is both.

    The layers stay where they are in the block; they are looked at in every forward, and with the attribute ``fused``
    set to False, or where one of them has a hook, the block's own forward runs.

    Attributes:
        fused: False for the block's own forward.
        mbconv_expand, mbconv_depthwise, mbconv_reduce, mbconv_restore, mbconv_project: The frozen convolutions; the
            first, and the two of a squeeze-and-excite, may be None. No block has these names: its own stay theirs.
        mbconv_gate: The name of the activation behind ``restore`` that is a module of its own, or None.
        mbconv_drop: The module between projection and addition that drops paths, or None.
        mbconv_residual: Whether the block adds its input.
    """

    fused = True

    mbconv_expand: FrozenConvBias | None
    mbconv_depthwise: FrozenConvBias
    mbconv_reduce: FrozenConvBias | None
    mbconv_restore: FrozenConvBias | None
    mbconv_project: FrozenConvBias
    mbconv_gate: str | None
    mbconv_drop: nn.Module | None
    mbconv_residual: bool

    def forward(self, input: Tensor) -> Tensor:
        output = self.in_one_call(input) if self.keeps_input_alone(input) else None
        return super().forward(input) if output is None else output

    def keeps_input_alone(self, input: Tensor) -> bool:
        """Whether autograd will keep nothing of this block but ``input``, without more being done for it."""
        return (
            self.fused
            and memory_format(input) is torch.channels_last
            and ops.offers_mbconv(input)
            and not every_module_hooked()
            and not any(watched(inner) for inner in self.modules() if inner is not self)
        )

    def in_one_call(self, input: Tensor, compute: bool = True) -> Tensor | None:
        """What ``forward`` returns where :meth:`keeps_input_alone`, or None; without ``compute`` its history, but no
        particular values."""
        input = ops.autocast_input(input)
        expand, depthwise, project = self.mbconv_expand, self.mbconv_depthwise, self.mbconv_project
        reduce, restore, drop = self.mbconv_reduce, self.mbconv_restore, self.mbconv_drop
        squeeze_excite = None
        if reduce is not None:
            gate = restore.activation or self.mbconv_gate
            squeeze_excite = ops.SqueezeExcite(reduce.operands(), restore.operands(), reduce.activation, gate)
        dropping = drop is not None and drop.training
        output = ops.mbconv(
            input,
            None if expand is None else expand.operands(),
            depthwise.operands(),
            project.operands(),
            depthwise.stride,
            depthwise.four_paddings(input),
            depthwise.activation,
            squeeze_excite,
            self.mbconv_residual and not dropping,
            compute=compute,
        )
        if output is None or not dropping:
            return output
        return drop(output) + input if self.mbconv_residual else drop(output)
