"""Published architectures in numbers: what TinyTL trains, and its relatives."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from .inverted_residual import InvertedResidualNet, NetworkConfig, build, stage, with_lite_residuals
from .standardized import WEIGHT_STANDARDIZATION_EPS

PROXYLESSNAS_MOBILE = NetworkConfig(
    name="proxylessnas_mobile",
    blocks=(
        *stage(16, 1, (3,), (1,)),
        *stage(32, 2, (5, 3), (3, 3)),
        *stage(40, 2, (7, 3, 5, 5), (3, 3, 3, 3)),
        *stage(80, 2, (7, 5, 5, 5), (6, 3, 3, 3)),
        *stage(96, 1, (5, 5, 5, 5), (6, 3, 3, 3)),
        *stage(192, 2, (7, 7, 7, 7), (6, 6, 3, 3)),
        *stage(320, 1, (7,), (6,)),
    ),
)

MOBILENET_V2 = NetworkConfig(
    name="mobilenet_v2",
    blocks=(
        *stage(16, 1, (3,), (1,)),
        *stage(24, 2, (3,) * 2, (6,) * 2),
        *stage(32, 2, (3,) * 3, (6,) * 3),
        *stage(64, 2, (3,) * 4, (6,) * 4),
        *stage(96, 1, (3,) * 3, (6,) * 3),
        *stage(160, 2, (3,) * 3, (6,) * 3),
        *stage(320, 1, (3,), (6,)),
    ),
    norm_eps=1e-5,
    dropout=0.2,
)

EFFICIENTNET_LITE0 = NetworkConfig(
    name="efficientnet_lite0",
    blocks=(
        *stage(16, 1, (3,), (1,)),
        *stage(24, 2, (3,) * 2, (6,) * 2),
        *stage(40, 2, (5,) * 2, (6,) * 2),
        *stage(80, 2, (3,) * 3, (6,) * 3),
        *stage(112, 1, (5,) * 3, (6,) * 3),
        *stage(192, 2, (5,) * 4, (6,) * 4),
        *stage(320, 1, (3,), (6,)),
    ),
    norm_eps=1e-5,
    dropout=0.2,
)

# MCUNet (arXiv 2007.10319), the network found for 320 kB of SRAM and 1 MB of flash.
MCUNET_320KB = NetworkConfig(
    name="mcunet_320kb",
    stem_channels=16,
    blocks=(
        *stage(8, 1, (3,), (1,)),
        *stage(16, 2, (7, 3, 7, 5), (3, 5, 5, 4)),
        *stage(24, 2, (5, 5, 5), (5, 5, 5)),
        *stage(40, 2, (3, 7, 5), (5, 6, 4)),
        *stage(48, 1, (5, 7, 3), (5, 5, 5)),
        *stage(96, 2, (3, 7, 3), (6, 5, 4)),
        *stage(160, 1, (7,), (5,)),
    ),
    head_channels=None,
    norm_eps=1e-5,
    resolution=176,
)


def proxylessnas_mobile(
    num_classes: int = 1000,
    *,
    norm: str = "gn",
    weight_standardization: bool | None = None,
    lite_residual: bool = False,
    dropout: float | None = None,
) -> InvertedResidualNet:
    """ProxylessNAS-Mobile (arXiv 1812.00332), the backbone of TinyTL's Table 2. Random weights.

    Args:
        num_classes: Outputs of the classifier.
        norm: ``"gn"`` as TinyTL trained it (8 channels a group, eps 1e-3), ``"bn"`` as it was published.
        weight_standardization: Of every convolution; None standardises with ``"gn"``, as TinyTL did.
        lite_residual: With a lite residual around every block but the first, at the authors' resolutions, as in their
            checkpoints and in every row of Table 2. :func:`tinytl_kernels.convert` keeps and trains those that are
            there, and adds them itself where there are none.
        dropout: Before the classifier (the recipe: 0.2); None is the architecture's own.

    Returns:
        The network, in training mode.

    Raises:
        ValueError: ``norm`` is neither.

    Example:
        >>> import torch
        >>> import tinytl_kernels as tk
        >>> model = proxylessnas_mobile(num_classes=10, norm="bn")
        >>> lean = tk.convert(model.eval(), "bias", example_input=torch.zeros(1, 3, 32, 32))
        >>> isinstance(lean.blocks[1], tk.FrozenInvertedResidual)
        True
    """
    return _build(PROXYLESSNAS_MOBILE, num_classes, norm, weight_standardization, lite_residual, dropout)


def mobilenet_v2(
    num_classes: int = 1000,
    *,
    norm: str = "bn",
    weight_standardization: bool | None = None,
    lite_residual: bool = False,
    dropout: float | None = None,
) -> InvertedResidualNet:
    """MobileNetV2 (arXiv 1801.04381). Arguments as :func:`proxylessnas_mobile`."""
    return _build(MOBILENET_V2, num_classes, norm, weight_standardization, lite_residual, dropout)


def efficientnet_lite0(
    num_classes: int = 1000,
    *,
    norm: str = "bn",
    weight_standardization: bool | None = None,
    lite_residual: bool = False,
    dropout: float | None = None,
) -> InvertedResidualNet:
    """EfficientNet-Lite0 with symmetric padding. Arguments as :func:`proxylessnas_mobile`."""
    return _build(EFFICIENTNET_LITE0, num_classes, norm, weight_standardization, lite_residual, dropout)


def mcunet_320kb(
    num_classes: int = 1000,
    *,
    norm: str = "bn",
    weight_standardization: bool | None = None,
    lite_residual: bool = False,
    dropout: float | None = None,
) -> InvertedResidualNet:
    """MCUNet (arXiv 2007.10319) for 320 kB of SRAM, at 176x176. Arguments as :func:`proxylessnas_mobile`."""
    return _build(MCUNET_320KB, num_classes, norm, weight_standardization, lite_residual, dropout)


ARCHITECTURES: dict[str, Callable[..., InvertedResidualNet]] = {
    function.__name__: function for function in (proxylessnas_mobile, mobilenet_v2, efficientnet_lite0, mcunet_320kb)
}


def _build(
    config: NetworkConfig,
    num_classes: int,
    norm: str,
    weight_standardization: bool | None,
    lite_residual: bool,
    dropout: float | None,
) -> InvertedResidualNet:
    standardized = norm == "gn" if weight_standardization is None else weight_standardization
    config = replace(
        config,
        num_classes=num_classes,
        norm=norm,
        weight_standardization=WEIGHT_STANDARDIZATION_EPS if standardized else None,
        dropout=config.dropout if dropout is None else dropout,
    )
    return build(with_lite_residuals(config) if lite_residual else config)
