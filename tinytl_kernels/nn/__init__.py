"""``torch.nn`` modules to swap in: same arguments, same state_dict, a fraction of what is kept for backward."""

from tinytl_kernels.nn.activation import (
    GELU,
    Hardsigmoid,
    Hardswish,
    LeakyReLU,
    ReLU,
    ReLU6,
    Sigmoid,
    SiLU,
    activation_name,
)
from tinytl_kernels.nn.dropout import Dropout
from tinytl_kernels.nn.frozen_conv import FrozenConvBias
from tinytl_kernels.nn.frozen_inverted_residual import FrozenInvertedResidual
from tinytl_kernels.nn.fused_sequential import FusedSequential
from tinytl_kernels.nn.group_norm import GroupNorm
from tinytl_kernels.nn.linear import Linear
from tinytl_kernels.nn.lite_residual import LiteResidual, LiteResidualBlock
from tinytl_kernels.nn.mbconv import MBConv
from tinytl_kernels.nn.pooling import AdaptiveAvgPool2d, AvgPool2d, MaxPool2d
from tinytl_kernels.nn.recomputed import Recomputed, recompute, stop_recomputing

__all__ = [
    "GELU",
    "AdaptiveAvgPool2d",
    "AvgPool2d",
    "Dropout",
    "FrozenConvBias",
    "FrozenInvertedResidual",
    "FusedSequential",
    "GroupNorm",
    "Hardsigmoid",
    "Hardswish",
    "LeakyReLU",
    "Linear",
    "LiteResidual",
    "LiteResidualBlock",
    "MBConv",
    "MaxPool2d",
    "ReLU",
    "ReLU6",
    "Recomputed",
    "SiLU",
    "Sigmoid",
    "activation_name",
    "recompute",
    "stop_recomputing",
]
