"""``to_torch``: back to plain ``torch.nn`` modules with the same outputs, for export and for training weights."""

from __future__ import annotations

import copy
from collections import OrderedDict

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from tinytl_kernels import nn as tnn
from tinytl_kernels.core.geometry import same_padding, window_extent
from tinytl_kernels.nn.frozen_conv import TENSORFLOW_SAME

from .fuse import restore_block
from .report import detach_report, unwrap
from .rewrite import restore_forward


def to_torch(model: nn.Module) -> nn.Module:
    """A copy of ``model`` in plain PyTorch: no class of this package is left in it.

    Args:
        model: A converted model, or any model with layers of this package.

    Returns:
        A deep copy with the same outputs, on the same device, in the same dtype and mode. ``requires_grad`` stays as
        it is, and any weight may be set to train. It exports with ``torch.export`` and ``torch.onnx``. Folded
        BatchNorms stay folded, and a fused activation stands behind its convolution in an ``nn.Sequential``.

    Raises:
        TypeError: ``model`` is not a module.

    Example:
        >>> import torch
        >>> import tinytl_kernels as tk
        >>> tk.to_torch(torch.nn.Sequential(tk.FrozenConvBias(3, 8, 3, activation="relu")))
        Sequential(
          (0): Sequential(
            (0): Conv2d(3, 8, kernel_size=(3, 3), stride=(1, 1))
            (1): ReLU()
          )
        )
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    model = copy.deepcopy(unwrap(model))
    detach_report(model)
    for module in list(model.modules()):
        tnn.stop_recomputing(module)
        restore_block(module)
        restore_forward(module)
    return _plain(model, {})


def _plain(module: nn.Module, done: dict[nn.Module, nn.Module]) -> nn.Module:
    """The plain twin of ``module``; children first, and shared modules stay shared."""
    if module in done:
        return done[module]
    for name, child in list(module._modules.items()):
        if child is not None:
            module._modules[name] = _plain(child, done)
    build = _BUILDERS.get(type(module))
    done[module] = module if build is None else build(module).train(module.training)
    return done[module]


def _conv(frozen: tnn.FrozenConvBias) -> nn.Module:
    padding, before = frozen.padding, []
    if padding == TENSORFLOW_SAME and frozen.stride == (1, 1):
        sides = (same_padding(k, d) for k, d in zip(frozen.kernel_size, frozen.dilation, strict=True))
        padding = tuple(pixels for side in sides for pixels in side)
    if padding == TENSORFLOW_SAME:
        extents = tuple(window_extent(k, d) for k, d in zip(frozen.kernel_size, frozen.dilation, strict=True))
        before, padding = [_as_graph(SamePadding(extents, frozen.stride))], 0
    elif not isinstance(padding, str) and len(padding) == 4:
        top, bottom, left, right = padding
        if top == bottom and left == right:
            padding = (top, left)
        else:
            before, padding = [_PADS[frozen.padding_mode]((left, right, top, bottom))], 0
    conv = nn.Conv2d(
        frozen.in_channels,
        frozen.out_channels,
        frozen.kernel_size,
        frozen.stride,
        padding,
        frozen.dilation,
        frozen.groups,
        frozen.bias is not None,
        frozen.padding_mode if not before else "zeros",
        device="meta",
    )
    coded = frozen.weight_code is not None
    conv.weight = nn.Parameter(frozen.float_weight(), requires_grad=False) if coded else frozen.weight
    conv.bias = frozen.bias
    after = [] if frozen.activation is None else [_FUSED[frozen.activation]()]
    return nn.Sequential(*before, conv, *after) if before or after else conv


_PADS = {
    "zeros": nn.ZeroPad2d,
    "reflect": nn.ReflectionPad2d,
    "replicate": nn.ReplicationPad2d,
    "circular": nn.CircularPad2d,
}
_FUSED = {
    "relu": nn.ReLU,
    "relu6": nn.ReLU6,
    "leaky_relu": nn.LeakyReLU,
    "hardsigmoid": nn.Hardsigmoid,
    "hardswish": nn.Hardswish,
    "silu": nn.SiLU,
    "gelu": nn.GELU,
    "gelu_tanh": lambda: nn.GELU(approximate="tanh"),
}


class _Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True


def _as_graph(module: nn.Module) -> fx.GraphModule:
    """``module``'s forward as code of its own, so that nothing of this package has to be there to run it."""
    graph = _Tracer().trace(module)
    for node in graph.nodes:
        node.type = None  # annotations are strings here, which a GraphModule cannot pickle
    return fx.GraphModule(module, graph, type(module).__name__)


class SamePadding(nn.Module):
    """TensorFlow's SAME: pads so that the output has ``ceil(length / stride)`` positions."""

    def __init__(self, extents: tuple[int, int], strides: tuple[int, int]) -> None:
        super().__init__()
        self.extents = extents
        self.strides = strides

    def forward(self, x: Tensor) -> Tensor:
        spans = []
        for dim in (1, 0):
            length, extent, stride = x.shape[2 + dim], self.extents[dim], self.strides[dim]
            total = (length - 1) // stride * stride + extent - length
            if extent < stride:  # else it cannot be negative, and exporters have less to understand
                total = torch.sym_max(total, 0)
            spans += [total // 2, total - total // 2]
        return F.pad(x, spans)


class BlockWithBranch(nn.Module):
    """``main(x) + interpolate(lite(x))``."""

    def __init__(self, main: nn.Module, lite: nn.Module) -> None:
        super().__init__()
        self.main = main
        self.lite = lite

    def forward(self, x: Tensor) -> Tensor:
        main = self.main(x)
        return main + F.interpolate(self.lite(x), size=main.shape[2:], mode="bilinear", align_corners=False)


class WithShortcut(nn.Module):
    """``x + convs(x)``."""

    def __init__(self, convs: nn.Module) -> None:
        super().__init__()
        self.convs = convs

    def forward(self, x: Tensor) -> Tensor:
        return x + self.convs(x)


def _group_norm(norm: tnn.GroupNorm) -> nn.Module:
    plain = nn.GroupNorm(norm.num_groups, norm.num_channels, norm.eps, norm.affine, "meta")
    plain.weight, plain.bias = norm.weight, norm.bias
    return plain if norm.activation is None else nn.Sequential(plain, _FUSED[norm.activation]())


def _linear(linear: tnn.Linear) -> nn.Linear:
    linear.__class__ = nn.Linear  # as it was made, and keeps its hooks
    return linear


def _lite(lite: tnn.LiteResidual) -> nn.Sequential:
    pool = nn.AdaptiveAvgPool2d(1) if lite.downsample is None else nn.AvgPool2d(lite.downsample)
    names = ("conv1", "bn1", "act", "conv2", "final_bn")
    return nn.Sequential(OrderedDict(pool=pool, **{name: lite._modules[name] for name in names}))


def _block(block: tnn.LiteResidualBlock) -> fx.GraphModule:
    return _as_graph(BlockWithBranch(block.main, block.lite))


def _inverted_residual(block: tnn.FrozenInvertedResidual) -> nn.Module:
    names = [name for name in ("expand", "depthwise", "project") if block._modules[name] is not None]
    convs = nn.Sequential(OrderedDict((name, block._modules[name]) for name in names))
    return _as_graph(WithShortcut(convs)) if block.residual else convs


_BUILDERS = {
    tnn.FrozenInvertedResidual: _inverted_residual,
    tnn.FrozenConvBias: _conv,
    tnn.GroupNorm: _group_norm,
    tnn.Linear: _linear,
    tnn.LiteResidual: _lite,
    tnn.LiteResidualBlock: _block,
    tnn.ReLU: lambda m: nn.ReLU(m.inplace),
    tnn.ReLU6: lambda m: nn.ReLU6(m.inplace),
    tnn.LeakyReLU: lambda m: nn.LeakyReLU(m.negative_slope, m.inplace),
    tnn.Hardsigmoid: lambda m: nn.Hardsigmoid(m.inplace),
    tnn.Hardswish: lambda m: nn.Hardswish(m.inplace),
    tnn.SiLU: lambda m: nn.SiLU(m.inplace),
    tnn.GELU: lambda m: nn.GELU(m.approximate),
    tnn.Sigmoid: lambda m: nn.Sigmoid(),
    tnn.AvgPool2d: lambda m: nn.AvgPool2d(
        m.kernel_size, m.stride, m.padding, m.ceil_mode, m.count_include_pad, m.divisor_override
    ),
    tnn.AdaptiveAvgPool2d: lambda m: nn.AdaptiveAvgPool2d(m.output_size),
    tnn.MaxPool2d: lambda m: nn.MaxPool2d(
        m.kernel_size, m.stride, m.padding, m.dilation, m.return_indices, m.ceil_mode
    ),
    tnn.Dropout: lambda m: nn.Dropout(m.p, m.inplace),
}
