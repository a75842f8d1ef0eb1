"""Networks of inverted residual blocks, built from a declarative configuration.

One builder serves ProxylessNAS, MobileNetV2, MCUNet and EfficientNet-Lite: they differ in numbers only. The modules are
those of ``torch.nn``; :func:`tinytl_kernels.convert` recognises the blocks by their structure.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from torch import Tensor, nn

from tinytl_kernels.convert.lite import PAPER_RESOLUTION, branch_geometry
from tinytl_kernels.nn import AdaptiveAvgPool2d, LiteResidual, LiteResidualBlock
from tinytl_kernels.nn.lite_residual import make_divisible

from .slices import run_in_slices
from .standardized import StandardizedConv2d

NORMS = ("bn", "gn")
ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "relu": lambda: nn.ReLU(inplace=True),
    "relu6": lambda: nn.ReLU6(inplace=True),
    "hardswish": lambda: nn.Hardswish(inplace=True),
    "silu": lambda: nn.SiLU(inplace=True),
}


@dataclass(frozen=True)
class LiteConfig:
    """The lite residual around a block; the arguments of :class:`~tinytl_kernels.nn.LiteResidual`."""

    kernel_size: int = 5
    expand: float = 1.0
    groups: int = 2
    downsample: int | None = 2
    activation: str = "relu"


@dataclass(frozen=True)
class BlockConfig:
    """One inverted residual block: expand (1x1), filter (k x k), project (1x1).

    Args:
        out_channels: Of the block; its inputs are the outputs of the block before.
        kernel_size: Odd.
        stride: Of the k x k convolution.
        expand_ratio: The hidden width is ``round(in_channels * expand_ratio)``; with 1 there is no expansion.
        mid_channels: The hidden width, where it is not that product.
        activation: One of ``ACTIVATIONS``.
        se_ratio: A squeeze-and-excite of ``make_divisible(hidden * se_ratio, 8)`` channels before the projection; None
            is without.
        fused: One k x k convolution expands and filters, as in EfficientNet-EdgeTPU.
        groups: Of the k x k convolution. None is one group a channel, or a single group in a fused block.
        shortcut: Whether the input is added; None adds it where stride is 1 and the channels match.
        lite: The lite residual around the block, if there is one.
    """

    out_channels: int
    kernel_size: int = 3
    stride: int = 1
    expand_ratio: float = 6.0
    mid_channels: int | None = None
    activation: str = "relu6"
    se_ratio: float | None = None
    fused: bool = False
    groups: int | None = None
    shortcut: bool | None = None
    lite: LiteConfig | None = None

    def __post_init__(self) -> None:
        for name in ("out_channels", "stride", "expand_ratio", "mid_channels", "groups"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ValueError(f"{name}: expected a positive number, got {value}")
        if self.kernel_size < 1 or self.kernel_size % 2 == 0:
            raise ValueError(f"kernel_size: expected an odd number, got {self.kernel_size}")
        _check_activation(self.activation)


@dataclass(frozen=True)
class NetworkConfig:
    """A whole network: first convolution, blocks, an optional 1x1 convolution before the pooling, classifier.

    Args:
        name: Of the architecture; adapters and reports carry it.
        blocks: In order. :func:`stage` writes the usual ones.
        in_channels: Of the picture.
        stem_channels, stem_kernel_size, stem_stride: Of the first convolution.
        head_channels: Of the 1x1 convolution after the last block; None is without.
        activation: After the first and the last convolution.
        norm: ``"bn"``, or ``"gn"``: GroupNorm with ``channels_per_group`` channels a group (the largest divisor of the
            channels up to that number).
        norm_eps, norm_momentum: Of the norms; GroupNorm has no momentum.
        weight_standardization: ``eps`` of :class:`~tinytl_kernels.models.StandardizedConv2d`, which every convolution
            then is but squeeze-and-excite's; None is without.
        num_classes: Outputs of the classifier.
        dropout: Before the classifier.
        resolution: Height and width of the pictures it was made for.
    """

    name: str
    blocks: tuple[BlockConfig, ...]
    in_channels: int = 3
    stem_channels: int = 32
    stem_kernel_size: int = 3
    stem_stride: int = 2
    head_channels: int | None = 1280
    activation: str = "relu6"
    norm: str = "bn"
    norm_eps: float = 1e-3
    norm_momentum: float = 0.1
    channels_per_group: int = 8
    weight_standardization: float | None = None
    num_classes: int = 1000
    dropout: float = 0.0
    resolution: int = 224

    def __post_init__(self) -> None:
        if self.norm not in NORMS:
            raise ValueError(f"norm: expected one of {', '.join(map(repr, NORMS))}, got {self.norm!r}")
        if not self.blocks:
            raise ValueError("blocks: expected at least one, got none")
        for name in ("stem_channels", "head_channels", "num_classes", "channels_per_group"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ValueError(f"{name}: expected a positive number, got {value}")
        _check_activation(self.activation)


def stage(
    out_channels: int, stride: int, kernel_sizes: Sequence[int], expand_ratios: Sequence[float], **options
) -> tuple[BlockConfig, ...]:
    """Blocks of one resolution: the first has the stride, all have ``options``.

    Example:
        >>> [(block.kernel_size, block.stride) for block in stage(32, 2, (5, 3), (3, 3))]
        [(5, 2), (3, 1)]
    """
    pairs = zip(kernel_sizes, expand_ratios, strict=True)
    return tuple(
        BlockConfig(out_channels, kernel, stride if index == 0 else 1, expand, **options)
        for index, (kernel, expand) in enumerate(pairs)
    )


def with_lite_residuals(config: NetworkConfig) -> NetworkConfig:
    """``config`` with a lite residual around every block but the first, sized by the authors' rule.

    The rule assumes a resolution of 128 at the second block, whatever the pictures' (TinyTL, section 3.2, and the
    authors' code); their checkpoints have these shapes.
    """
    first, *others = config.blocks
    blocks, resolution = [first], PAPER_RESOLUTION
    for block in others:
        kernel_size, downsample = branch_geometry(resolution)
        blocks.append(replace(block, lite=LiteConfig(kernel_size=kernel_size, downsample=downsample)))
        resolution = max(1, resolution // block.stride)
    return replace(config, blocks=tuple(blocks))


class SqueezeExcite(nn.Module):
    """``x * hardsigmoid(expand(relu(reduce(mean(x)))))``, as in MobileNetV3."""

    def __init__(self, channels: int, squeezed: int) -> None:
        super().__init__()
        self.reduce = nn.Conv2d(channels, squeezed, 1)
        self.act = nn.ReLU(inplace=True)
        self.expand = nn.Conv2d(squeezed, channels, 1)
        self.gate = nn.Hardsigmoid()

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gate(self.expand(self.act(self.reduce(x.mean((2, 3), keepdim=True)))))


class InvertedResidual(nn.Module):
    """Expand, filter, squeeze-and-excite, project; all but the last may be missing.

    Shape:
        (N, C, H, W) in; (N, O, ceil(H / stride), ceil(W / stride)) out.
    """

    def __init__(
        self,
        expand: nn.Module | None,
        depthwise: nn.Module | None,
        se: nn.Module | None,
        project: nn.Module,
        shortcut: bool,
    ) -> None:
        super().__init__()
        self.expand = expand
        self.depthwise = depthwise
        self.se = se
        self.project = project
        self.shortcut = shortcut

    def forward(self, x: Tensor) -> Tensor:
        out = x
        for part in (self.expand, self.depthwise, self.se):
            if part is not None:
                out = part(out)
        out = self.project(out)
        return x + out if self.shortcut else out

    def extra_repr(self) -> str:
        return f"shortcut={self.shortcut}"


class InvertedResidualNet(nn.Module):
    """What :func:`build` makes: ``stem``, ``blocks``, ``head``, ``classifier``.

    Args:
        config: Its numbers; kept as ``config``, as it was built.
    """

    def __init__(self, config: NetworkConfig) -> None:
        super().__init__()
        self.config = config
        self.num_classes = config.num_classes
        # timm's convention: convert and adapters find the name and the size of a picture here.
        size = (config.in_channels, config.resolution, config.resolution)
        self.default_cfg = {"architecture": config.name, "input_size": size}
        layers = _Layers(config)
        width = config.stem_channels
        self.stem = layers.conv_norm(
            config.in_channels, width, config.stem_kernel_size, config.stem_stride, activation=config.activation
        )
        blocks: list[nn.Module] = []
        for index, block in enumerate(config.blocks):
            try:
                blocks.append(layers.block(width, block))
            except ValueError as error:
                raise ValueError(f"blocks[{index}]: {error}") from None
            width = block.out_channels
        self.blocks = nn.Sequential(*blocks)
        self.head: nn.Module | None = None
        if config.head_channels is not None:
            self.head = layers.conv_norm(width, config.head_channels, activation=config.activation)
            width = config.head_channels
        # PyTorch's mean gives its gradient in NCHW, which the convolution before it would have to copy.
        self.pool = AdaptiveAvgPool2d(1)
        self.dropout = nn.Dropout(config.dropout)
        self.classifier = nn.Linear(width, config.num_classes)
        _initialise(self)

    def reset_classifier(self, num_classes: int) -> None:
        """Put a new classifier with ``num_classes`` outputs in the old one's place, on its device and in its dtype."""
        old = self.classifier
        new = nn.Linear(old.in_features, num_classes, device=old.weight.device, dtype=old.weight.dtype)
        _initialise(new)
        self.classifier = new.train(old.training)
        self.num_classes = num_classes

    def forward(self, x: Tensor) -> Tensor:
        """(N, in_channels, H, W) -> (N, num_classes)."""
        # One by one: a call of the Sequential would hold its input until its last block is done.
        first, *others = self.blocks
        x = run_in_slices((self.stem, first), x)
        for block in others:
            x = block(x)
        if self.head is not None:
            x = self.head(x)
        return self.classifier(self.dropout(self.pool(x).flatten(1)))


def build(config: NetworkConfig) -> InvertedResidualNet:
    """The network that ``config`` describes, with random weights, in training mode.

    Convolutions are initialised as He et al. do (fan out), the last norm of a lite residual with weight 0, so that a
    new one changes nothing.

    Raises:
        ValueError: Numbers that do not fit each other; the message names the block.

    Example:
        >>> import torch
        >>> blocks = stage(16, 1, (3,), (1,)) + stage(24, 2, (5, 3), (6, 6))
        >>> build(NetworkConfig("small", blocks, num_classes=10))(torch.zeros(2, 3, 32, 32)).shape
        torch.Size([2, 10])
    """
    return InvertedResidualNet(config)


class _Layers:
    """The layers of one network: its norm, with or without weight standardisation."""

    def __init__(self, config: NetworkConfig) -> None:
        self.config = config

    def norm(self, channels: int) -> nn.Module:
        config = self.config
        if config.norm == "bn":
            return nn.BatchNorm2d(channels, eps=config.norm_eps, momentum=config.norm_momentum)
        per_group = max(size for size in range(1, config.channels_per_group + 1) if channels % size == 0)
        return nn.GroupNorm(channels // per_group, channels, eps=config.norm_eps)

    def conv(self, cin: int, cout: int, kernel_size: int, stride: int, groups: int) -> nn.Conv2d:
        geometry = (cin, cout, kernel_size, stride, kernel_size // 2)
        if self.config.weight_standardization is None:
            return nn.Conv2d(*geometry, groups=groups, bias=False)
        eps = self.config.weight_standardization
        return StandardizedConv2d(*geometry, groups=groups, bias=False, eps=eps)

    def conv_norm(
        self,
        cin: int,
        cout: int,
        kernel_size: int = 1,
        stride: int = 1,
        groups: int = 1,
        activation: str | None = None,
    ) -> nn.Sequential:
        layers = OrderedDict(conv=self.conv(cin, cout, kernel_size, stride, groups), norm=self.norm(cout))
        if activation is not None:
            layers["act"] = ACTIVATIONS[activation]()
        return nn.Sequential(layers)

    def block(self, cin: int, block: BlockConfig) -> nn.Module:
        hidden = block.mid_channels or round(cin * block.expand_ratio)
        groups = block.groups or (1 if block.fused else hidden)
        if hidden % groups or (block.fused and cin % groups):
            raise ValueError(f"groups: expected a divisor of the hidden width {hidden}, got {groups}")
        fits = block.stride == 1 and cin == block.out_channels
        if block.shortcut and not fits:
            raise ValueError(
                f"shortcut: expected False with stride {block.stride} and {cin} -> {block.out_channels} channels"
            )
        spatial = (block.kernel_size, block.stride, groups, block.activation)
        expand = depthwise = None
        if block.fused:
            expand = self.conv_norm(cin, hidden, *spatial)
        else:
            if block.expand_ratio != 1:
                expand = self.conv_norm(cin, hidden, activation=block.activation)
            elif hidden != cin:
                raise ValueError(f"mid_channels: expected {cin} with expand_ratio 1, got {hidden}")
            depthwise = self.conv_norm(hidden, hidden, *spatial)
        se = None if block.se_ratio is None else SqueezeExcite(hidden, make_divisible(int(hidden * block.se_ratio)))
        project = self.conv_norm(hidden, block.out_channels)
        main = InvertedResidual(expand, depthwise, se, project, fits if block.shortcut is None else block.shortcut)
        return main if block.lite is None else LiteResidualBlock(main, self.lite(cin, block))

    def lite(self, cin: int, block: BlockConfig) -> LiteResidual:
        lite = LiteResidual(
            cin,
            block.out_channels,
            stride=1 if block.lite.downsample is None else block.stride,  # a single pixel has no strides
            kernel_size=block.lite.kernel_size,
            expand=block.lite.expand,
            groups=block.lite.groups,
            downsample=block.lite.downsample,
            activation=block.lite.activation,
            norm=self.norm,
        )
        for name in ("conv1", "conv2"):
            stock = getattr(lite, name)
            conv = self.conv(stock.in_channels, stock.out_channels, stock.kernel_size[0], stock.stride[0], stock.groups)
            setattr(lite, name, conv)
        return lite


def _initialise(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, 0, 0.01)
            nn.init.zeros_(module.bias)


def _check_activation(name: str) -> None:
    if name not in ACTIVATIONS:
        raise ValueError(f"activation: expected one of {', '.join(map(repr, ACTIVATIONS))}, got {name!r}")
