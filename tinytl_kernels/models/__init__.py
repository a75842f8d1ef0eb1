"""Backbones: timm's and torchvision's by name, TinyTL's own built here, and the authors' checkpoints."""

from .architectures import ARCHITECTURES, efficientnet_lite0, mcunet_320kb, mobilenet_v2, proxylessnas_mobile
from .inverted_residual import (
    BlockConfig,
    InvertedResidual,
    InvertedResidualNet,
    LiteConfig,
    NetworkConfig,
    build,
    stage,
    with_lite_residuals,
)
from .net_config import from_config
from .official import load_official_checkpoint
from .standardized import StandardizedConv2d
from .zoo import InputConfig, build_model, import_timm, import_torchvision, input_config, set_dropout

__all__ = [
    "ARCHITECTURES",
    "BlockConfig",
    "InputConfig",
    "InvertedResidual",
    "InvertedResidualNet",
    "LiteConfig",
    "NetworkConfig",
    "StandardizedConv2d",
    "build",
    "build_model",
    "efficientnet_lite0",
    "from_config",
    "import_timm",
    "import_torchvision",
    "input_config",
    "load_official_checkpoint",
    "mcunet_320kb",
    "mobilenet_v2",
    "proxylessnas_mobile",
    "set_dropout",
    "stage",
    "with_lite_residuals",
]
