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
from tinytl_kernels.nn.pooling import AvgPool2d


def make_divisible(channels: float, divisor: int = 8) -> int:
    """The multiple of ``divisor`` nearest to ``channels``, never below 90 % of it (the MobileNet rule)."""
    rounded = max(divisor, int(channels + divisor / 2) // divisor * divisor)
    return rounded + divisor if rounded < 0.9 * channels else rounded


class LiteResidual(nn.Module):
    """The trained side branch of a frozen block, at a quarter of its pixels.

        x -> average pool -> grouped k x k conv -> norm -> activation -> 1x1 conv -> norm

    Its result has the branch's own small resolution: :class:`LiteResidualBlock` interpolates it while adding it to the
    main branch. The last norm's weight starts at zero, so that a new branch changes nothing.

    With BatchNorms or GroupNorms everything after the pooling is one operator
    (:func:`tinytl_kernels.ops.lite_branch`): the children hold its parameters, and their forward hooks do not run. With
    the attribute ``fused`` set to False, as with any other norm, they are called one after the other instead. For
    backward the pooled input and the result of the first convolution are kept; what follows is computed again.

    Args:
        in_channels, out_channels: of the block that the branch goes around.
        stride: of the block.
        kernel_size: odd.
        expand: the inner width is ``make_divisible(in_channels * expand, 8)``.
        groups: of the k x k convolution; must divide ``in_channels`` and the inner width.
        downsample: factor of the average pooling; None pools globally (1x1 convolutions then: pass kernel_size=1).
        activation: ``"relu"`` or ``"relu6"``.
        norm: ``norm(channels) -> nn.Module``.
        recompute: keep only the pooled input for backward and compute the first convolution, about nine tenths of the
            branch's arithmetic, again too.

    Shape:
        (N, in_channels, H, W) in; (N, out_channels, h, w) out, with h = ceil(floor(H / downsample) / stride).

    Raises:
        ValueError: a number does not fit; the message names it.

    Example:
        >>> import torch, tinytl_kernels as tk
        >>> tk.LiteResidual(16, 24, stride=2)(torch.randn(1, 16, 28, 28)).shape
        torch.Size([1, 24, 7, 7])
    """

    fused = True

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
        recompute: bool = False,
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
        if self.fused and self._is_one_operator(pooled):
            return self._one_operator(pooled)
        # A trained convolution that computes its weight (weight standardisation) would keep that computation, three
        # times the weight.
        recompute = self.recompute or (type(self.conv1) is not nn.Conv2d and self.conv1.weight.requires_grad)
        kept, rest = (pooled, self._branch) if recompute else (self.conv1(pooled), self._after_conv1)
        # The compiler decides by itself what to recompute.
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            return checkpoint(
                rest,
                kept,
                use_reentrant=False,
                preserve_rng_state=False,  # nothing in the branch is random
                context_fn=lambda: (contextlib.nullcontext(), self._as_in_forward(self._norm_modes())),
            )
        return rest(kept)

    def pool(self, input: Tensor) -> Tensor:
        """Average pooling of the block's input: (N, C, H, W) -> (N, C, H / downsample, W / downsample)."""
        if self.downsample is None:
            return input.mean((2, 3), keepdim=True)
        return ops.avg_pool2d(input, self.downsample)

    def _children(self) -> tuple[nn.Module, ...]:
        # A small branch computes for about as long as nn.Module.__getattr__ takes to look its children up twice.
        children = self._modules
        return children["conv1"], children["bn1"], children["act"], children["conv2"], children["final_bn"]

    def _one_operator(self, pooled: Tensor) -> Tensor:
        output, *statistics = ops.lite_branch(pooled, *self._as_branch().operands)
        _update_running_statistics((self.bn1, self.final_bn), statistics, output.numel() // output.size(1))
        return output

    def _as_branch(self, *running: ops.Running) -> ops.Branch:
        conv1, norm1, act, conv2, norm2 = self._children()
        return ops.Branch(
            conv1._parameters["weight"],
            _as_operand(norm1),
            conv2._parameters["weight"],
            _as_operand(norm2),
            conv1.stride[0],
            conv1.groups,
            _ACTIVATION_NAMES[type(act)],
            not self.recompute,
            *running,
        )

    def _is_one_operator(self, image: Tensor | ops.Described, downsampled: int = 1) -> bool:
        """Whether the operator computes what the children would, which may have been replaced since, for ``image``
        pooled by ``downsampled``."""
        conv1, norm1, act, conv2, norm2 = self._children()
        if not (
            type(conv1) is nn.Conv2d
            and type(conv2) is nn.Conv2d
            and type(norm1) in (nn.BatchNorm2d, nn.GroupNorm)
            and type(norm2) in (nn.BatchNorm2d, nn.GroupNorm)
            and type(act) in _ACTIVATION_NAMES
        ):
            return False
        held1, held2 = conv1._parameters, conv2._parameters
        weight1, weight2 = held1.get("weight"), held2.get("weight")
        # Pruning and weight_norm compute the weight in a hook.
        if weight1 is None or weight2 is None or held1["bias"] is not None or held2["bias"] is not None:
            return False
        if norm1._parameters.get("weight") is None or norm2._parameters.get("weight") is None:
            return False
        k, stride = conv1.kernel_size[0], conv1.stride[0]
        if (
            (conv1.kernel_size, conv1.stride, conv1.dilation) != ((k, k), (stride, stride), (1, 1))
            or (k % 2, conv1.padding, conv1.padding_mode) != (1, (k // 2, k // 2), "zeros")
            or (conv2.kernel_size, conv2.stride, conv2.padding, conv2.groups) != ((1, 1), (1, 1), (0, 0), 1)
        ):
            return False
        # PyTorch's own errors name what does not fit, and what cannot be normalised.
        if len(image.shape) != 4 or image.shape[1] != conv1.in_channels:
            return False
        batch, _, height, width = image.shape
        height, width = height // downsampled, width // downsampled
        if 0 in (batch, height, width):
            return False
        # In this order: the meta device knows no autocast.
        same = weight1.dtype == weight2.dtype == image.dtype
        if not (same or torch.is_autocast_enabled(image.device.type)):
            return False
        one_pixel = batch == 1 and max(height, width) <= stride
        return not (one_pixel and any(map(_normalises_channels, (norm1, norm2))))

    def _branch(self, pooled: Tensor) -> Tensor:
        return self._after_conv1(self.conv1(pooled))

    def _after_conv1(self, filtered: Tensor) -> Tensor:
        return self.final_bn(self.conv2(self.act(self.bn1(filtered))))

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
_ACTIVATION_NAMES = {ReLU: "relu", ReLU6: "relu6", nn.ReLU: "relu", nn.ReLU6: "relu6"}


def _as_operand(norm: nn.BatchNorm2d | nn.GroupNorm) -> ops.Norm:
    weight, bias = norm._parameters["weight"], norm._parameters["bias"]
    if isinstance(norm, nn.GroupNorm):
        return ops.Norm(weight, bias, groups=norm.num_groups, eps=norm.eps)
    running = (None, None) if _uses_batch(norm) else (norm.running_mean, norm.running_var)
    return ops.Norm(weight, bias, *running, eps=norm.eps)


def _uses_batch(norm: nn.BatchNorm2d) -> bool:
    return norm.training or (norm.running_mean is None and norm.running_var is None)


def _normalises_channels(norm: nn.BatchNorm2d | nn.GroupNorm) -> bool:
    """Whether each channel has statistics of its own, taken from the input."""
    return norm.num_groups == norm.num_channels if isinstance(norm, nn.GroupNorm) else _uses_batch(norm)


def _running(norm: nn.BatchNorm2d | nn.GroupNorm) -> ops.Running | None:
    """The statistics that a batch is counted in, or None where one call cannot count it."""
    if isinstance(norm, nn.GroupNorm) or not (norm.training and norm.track_running_stats):
        return ops.Running()
    buffers, momentum = norm._buffers, norm.momentum
    mean, var, counter = buffers["running_mean"], buffers["running_var"], buffers["num_batches_tracked"]
    if momentum is None or mean is None or var is None or not mean.dtype == var.dtype == torch.float32:
        return None
    return ops.Running([mean, var] if counter is None else [mean, var, counter], momentum)


def _update_running_statistics(norms: tuple[nn.Module, ...], statistics: list[Tensor], values: int) -> None:
    """As ``BatchNorm2d.forward``: ``statistics`` holds mean and biased variance of ``values`` values a channel."""
    tracking = [
        (norm._buffers, norm.momentum, *measured.unbind())
        for norm, measured in zip(norms, statistics, strict=True)
        if isinstance(norm, nn.BatchNorm2d) and norm.training and norm.track_running_stats
    ]
    counters = [buffers["num_batches_tracked"] for buffers, *_ in tracking]
    if counters := [counter for counter in counters if counter is not None]:
        torch._foreach_add_(counters, 1)
    names = ("running_mean", "running_var")
    tracking = [norm for norm in tracking if all(norm[0][name] is not None for name in names)]
    unbiased = values / (values - 1) if tracking else 1.0
    for momentum in {momentum for _, momentum, *_ in tracking}:
        group = [norm for norm in tracking if norm[1] == momentum]
        if momentum is None:  # the average of all batches
            for buffers, _, mean, var in group:
                if buffers["num_batches_tracked"] is None:
                    continue  # as BatchNorm2d: it does not know how many there were
                share = buffers["num_batches_tracked"].reciprocal()
                for running, measured in ((buffers["running_mean"], mean), (buffers["running_var"], var * unbiased)):
                    running.lerp_(measured.to(running.dtype), share.to(running.dtype))
            continue
        # All norms in three calls: one by one, they took as long as the branch.
        means, vars = ([buffers[name] for buffers, *_ in group] for name in names)
        torch._foreach_mul_(means + vars, 1 - momentum)
        torch._foreach_add_(means, [mean for *_, mean, _ in group], alpha=momentum)
        torch._foreach_add_(vars, [var for *_, var in group], alpha=momentum * unbiased)


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
        if ops.offers_block_chain(input):
            image = ops.autocast_input(input)
            link = self.chain_link(image)
            if link is not None and (output := ops.block_chain(image, [link])) is not None:
                return output
        after_pooling = self._after_pooling()
        if after_pooling is None:
            output = self.main(input)
            return ops.upsample_add(output, self.lite(input))
        output, pooled = self.main.forward_with_pooled(input)
        branch = after_pooling(pooled)
        del pooled  # a frozen branch does not need it any more, and the sum is the widest moment
        return ops.upsample_add(output, branch)

    def chain_link(self, image: Tensor | ops.Described) -> ops.Block | None:
        """What it is in a chain of blocks, for that input; None where no chain computes it."""
        main, lite = self._modules["main"], self._modules["lite"]
        # A class derived from these two may compute something else.
        if (
            getattr(type(main), "forward_with_pooled", None) is not FrozenInvertedResidual.forward_with_pooled
            or getattr(type(lite), "forward_pooled", None) is not LiteResidual.forward_pooled
        ):
            return None
        if not (main.fused and lite.fused and lite.downsample == 2 and lite._is_one_operator(image, 2)):
            return None
        _, norm1, _, _, norm2 = lite._children()
        running1, running2 = _running(norm1), _running(norm2)
        if running1 is None or running2 is None:
            return None
        return main._block(image, lite._as_branch(running1, running2))

    def _after_pooling(self) -> Callable[[Tensor], Tensor] | None:
        """The branch without its pooling, where the fused block averages its input 2 x 2 while it streams it anyway."""
        if not (isinstance(self.main, FrozenInvertedResidual) and self.main.fused):
            return None
        if isinstance(self.lite, LiteResidual):
            return self.lite.forward_pooled if self.lite.downsample == 2 else None
        # A frozen branch is a Sequential of what is left of it.
        if type(self.lite) is nn.Sequential and len(self.lite) > 1 and type(self.lite[0]) is AvgPool2d:
            pool = self.lite[0]
            plain = (pool.kernel_size, pool.stride, pool.padding, pool.divisor_override) == (2, 2, 0, None)
            return self.lite[1:] if plain and not pool.ceil_mode else None
        return None

    def __getattr__(self, name: str):
        try:
            return super().__getattr__(name)
        except AttributeError:
            # Model code reads attributes of its blocks (out_channels, use_res_connect): they stay reachable. Names
            # with underscores belong to protocols (pickle, copy) that must not see the block's.
            if name.startswith("_") or "main" not in self.__dict__.get("_modules", {}):
                raise
            return getattr(self._modules["main"], name)
