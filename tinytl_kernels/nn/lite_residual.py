"""The lite residual module of TinyTL (section 3.2), without a full-resolution tensor beyond its input."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tinytl_kernels import ops
from tinytl_kernels.core.activations import check_activation
from tinytl_kernels.nn.activation import ReLU, ReLU6
from tinytl_kernels.nn.frozen_inverted_residual import FrozenInvertedResidual


def make_divisible(channels: float, divisor: int = 8) -> int:
    """The multiple of ``divisor`` nearest to ``channels``, never below 90 % of it (the MobileNet rule)."""
    rounded = max(divisor, int(channels + divisor / 2) // divisor * divisor)
    return rounded + divisor if rounded < 0.9 * channels else rounded


class LiteResidual(nn.Module):
    """The trained side branch of a frozen block, at a quarter of its pixels.

        x -> average pool -> grouped k x k conv -> norm -> activation -> 1x1 conv -> norm

    Its result has the branch's own small resolution: :class:`LiteResidualBlock` interpolates it while adding it to the
    main branch. The last norm's weight starts at zero, so that a new branch changes nothing. For backward only the
    pooled input is kept and the rest of the branch (about 4 % of a block's arithmetic) is computed again.

    Args:
        in_channels, out_channels: of the block that the branch goes around.
        stride: of the block.
        kernel_size: odd.
        expand: the inner width is ``make_divisible(in_channels * expand, 8)``.
        groups: of the k x k convolution; must divide ``in_channels`` and the inner width.
        downsample: factor of the average pooling; None pools globally (1x1 convolutions then: pass kernel_size=1).
        activation: ``"relu"`` or ``"relu6"``.
        norm: ``norm(channels) -> nn.Module``.
        recompute: keep only the pooled input for backward; False keeps what autograd keeps, and saves the arithmetic.

    Shape:
        (N, in_channels, H, W) in; (N, out_channels, h, w) out, with h = ceil(floor(H / downsample) / stride).

    Raises:
        ValueError: a number does not fit; the message names it.

    Example:
        >>> import torch, tinytl_kernels as tk
        >>> tk.LiteResidual(16, 24, stride=2)(torch.randn(1, 16, 28, 28)).shape
        torch.Size([1, 24, 7, 7])
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        stride: int = 1,
        kernel_size: int = 5,
        expand: float = 1.0,
        groups: int = 2,
        downsample: int | None = 2,
        activation: str = "relu",
        norm: Callable[[int], nn.Module] = nn.BatchNorm2d,
        recompute: bool = True,
    ) -> None:
        super().__init__()
        inner = make_divisible(in_channels * expand)
        if kernel_size < 1 or kernel_size % 2 == 0:
            raise ValueError(f"kernel_size: expected an odd number, got {kernel_size}")
        if groups < 1 or in_channels % groups or inner % groups:
            raise ValueError(
                f"groups: expected a divisor of in_channels {in_channels} and of the inner width {inner}, got {groups}"
            )
        if downsample is not None and downsample < 1:
            raise ValueError(f"downsample: expected None or at least 1, got {downsample}")
        check_activation(activation)
        if activation not in _ACTIVATIONS:
            raise ValueError(f"activation: expected one of {', '.join(map(repr, _ACTIVATIONS))}, got {activation!r}")
        self.downsample = downsample
        self.recompute = recompute
        # Names of the authors' code, for their checkpoints.
        self.conv1 = nn.Conv2d(
            in_channels, inner, kernel_size, stride, padding=kernel_size // 2, groups=groups, bias=False
        )
        self.bn1 = norm(inner)
        self.act = _ACTIVATIONS[activation]()
        self.conv2 = nn.Conv2d(inner, out_channels, 1, bias=False)
        self.final_bn = norm(out_channels)
        for conv in (self.conv1, self.conv2):
            nn.init.kaiming_normal_(conv.weight, mode="fan_out")
        nn.init.zeros_(self.final_bn.weight)

    def forward(self, input: Tensor) -> Tensor:
        return self.forward_pooled(self.pool(input))

    def forward_pooled(self, pooled: Tensor) -> Tensor:
        """The branch after its pooling: (N, in_channels, H / downsample, W / downsample) -> (N, out_channels, h, w)."""
        # The compiler decides by itself what to recompute.
        if self.recompute and torch.is_grad_enabled() and not torch.compiler.is_compiling():
            return checkpoint(
                self._branch,
                pooled,
                use_reentrant=False,
                preserve_rng_state=False,  # nothing in the branch is random
                context_fn=lambda: (contextlib.nullcontext(), self._as_in_forward(self._norm_modes())),
            )
        return self._branch(pooled)

    def pool(self, input: Tensor) -> Tensor:
        """Average pooling of the block's input: (N, C, H, W) -> (N, C, H / downsample, W / downsample)."""
        if self.downsample is None:
            return input.mean((2, 3), keepdim=True)
        return ops.avg_pool2d(input, self.downsample)

    def _branch(self, pooled: Tensor) -> Tensor:
        return self.final_bn(self.conv2(self.act(self.bn1(self.conv1(pooled)))))

    def _norm_modes(self) -> list[bool]:
        return [norm.training for norm in (self.bn1, self.final_bn)]

    @contextlib.contextmanager
    def _as_in_forward(self, modes: list[bool]) -> Iterator[None]:
        """While the branch is computed again its norms are in the modes of its forward (``eval()`` may have come
        between), and BatchNorms in training update copies: a batch counts once in the statistics."""
        own = [(norm, norm.training, dict(norm._buffers)) for norm in (self.bn1, self.final_bn)]
        for (norm, _, buffers), training in zip(own, modes, strict=True):
            norm.training = training
            if training:
                norm._buffers.update({name: None if b is None else b.clone() for name, b in buffers.items()})
        try:
            yield
        finally:
            for norm, training, buffers in own:
                norm.training = training
                norm._buffers.update(buffers)

    def extra_repr(self) -> str:
        return f"downsample={self.downsample}, recompute={self.recompute}"


_ACTIVATIONS = {"relu": ReLU, "relu6": ReLU6}


class LiteResidualBlock(nn.Module):
    """``main(x) + lite(x)``, where the small result of ``lite`` is interpolated while it is added.

    TinyTL, section 3.2: one lite residual around each block; the block keeps its own shortcut. Attributes that the
    block does not have itself are looked up on ``main``.

    Args:
        main: the frozen block, (N, C, H, W) -> (N, O, H', W').
        lite: the branch, (N, C, H, W) -> (N, O, h, w) of any size.

    Example:
        >>> import torch, tinytl_kernels as tk
        >>> main = tk.FrozenConvBias(16, 24, 3, stride=2, padding=1)
        >>> tk.LiteResidualBlock(main, tk.LiteResidual(16, 24, stride=2))(torch.randn(1, 16, 28, 28)).shape
        torch.Size([1, 24, 14, 14])
    """

    def __init__(self, main: nn.Module, lite: nn.Module) -> None:
        super().__init__()
        self.main = main
        self.lite = lite

    def forward(self, input: Tensor) -> Tensor:
        if self._shares_pooling():
            output, pooled = self.main.forward_with_pooled(input)
            return ops.upsample_add(output, self.lite.forward_pooled(pooled))
        output = self.main(input)
        return ops.upsample_add(output, self.lite(input))

    def _shares_pooling(self) -> bool:
        # The fused block averages its input 2 x 2 while it streams it anyway.
        return (
            isinstance(self.main, FrozenInvertedResidual)
            and self.main.fused
            and isinstance(self.lite, LiteResidual)
            and self.lite.downsample == 2
        )

    def __getattr__(self, name: str):
        try:
            return super().__getattr__(name)
        except AttributeError:
            # Model code reads attributes of its blocks (out_channels, use_res_connect): they stay reachable. Names
            # with underscores belong to protocols (pickle, copy) that must not see the block's.
            if name.startswith("_") or "main" not in self.__dict__.get("_modules", {}):
                raise
            return getattr(self._modules["main"], name)
