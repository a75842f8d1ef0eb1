"""The operators: one file each, with its schema, checks, fake, autocast and autograd. Backends compute them."""

from tinytl_kernels.ops.activation import activation
from tinytl_kernels.ops.avg_pool import adaptive_avg_pool2d, avg_pool2d
from tinytl_kernels.ops.block import Block, Branch, Described, Last, Running, Stem
from tinytl_kernels.ops.block_chain import block_chain, block_output, offers_block_chain
from tinytl_kernels.ops.dropout import dropout
from tinytl_kernels.ops.frozen_conv import frozen_conv
from tinytl_kernels.ops.frozen_conv_add import frozen_conv_add
from tinytl_kernels.ops.frozen_inverted_residual import frozen_inverted_residual, frozen_inverted_residual_pooled
from tinytl_kernels.ops.group_norm import group_norm_activation
from tinytl_kernels.ops.library import autocast_input
from tinytl_kernels.ops.linear import linear
from tinytl_kernels.ops.lite_branch import Norm, lite_branch
from tinytl_kernels.ops.max_pool import max_pool2d
from tinytl_kernels.ops.mbconv import SqueezeExcite, mbconv, offers_mbconv
from tinytl_kernels.ops.pad import pad2d
from tinytl_kernels.ops.upsample_add import upsample_add

__all__ = [
    "Block",
    "Branch",
    "Described",
    "Last",
    "Norm",
    "Running",
    "SqueezeExcite",
    "Stem",
    "activation",
    "adaptive_avg_pool2d",
    "autocast_input",
    "avg_pool2d",
    "block_chain",
    "block_output",
    "dropout",
    "frozen_conv",
    "frozen_conv_add",
    "frozen_inverted_residual",
    "frozen_inverted_residual_pooled",
    "group_norm_activation",
    "linear",
    "lite_branch",
    "max_pool2d",
    "mbconv",
    "offers_block_chain",
    "offers_mbconv",
    "pad2d",
    "upsample_add",
]
