"""Every operator, small and at the sizes of a network: what the answers are checked on, and what Nsight looks at.

Images and weights are small whole numbers, of which all sums are exact, so that no rounding turns a mask's bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

import tinytl_kernels as tk
from tinytl_kernels import ops

Size = tuple[int, int, int, int]

# What float32 is rounded to in TF32: 10 bits of mantissa.
_TF32_EPS = 2.0**-10
DTYPES = {"float32": torch.float32, "tf32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Sample:
    """An operator with its arguments.

    Args:
        function: Of the inputs and the constants; gives a tensor or several.
        inputs: Differentiated.
        constants: Frozen.
    """

    function: Callable[..., Tensor | tuple[Tensor, ...]]
    inputs: tuple[Tensor, ...]
    constants: tuple[Tensor, ...] = ()

    def doubled(self) -> Sample:
        """The same in float64."""
        inputs, constants = (
            tuple(t.double() if t.is_floating_point() else t for t in tensors)
            for tensors in (self.inputs, self.constants)
        )
        return Sample(self.function, inputs, constants)

    def outputs(self, inputs: tuple[Tensor, ...] | None = None) -> tuple[Tensor, ...]:
        """The outputs."""
        outputs = self.function(*(self.inputs if inputs is None else inputs), *self.constants)
        return outputs if isinstance(outputs, tuple) else (outputs,)

    def leaves(self) -> tuple[Tensor, ...]:
        """The inputs, to be differentiated."""
        return tuple(t.detach().requires_grad_() for t in self.inputs)

    def answers(self, grads: list[Tensor]) -> list[Tensor]:
        """The outputs, and the gradients of the inputs for these gradients of the outputs."""
        leaves = self.leaves()
        outputs = self.outputs(leaves)
        given = [g.to(o.dtype) for g, o in zip(grads, outputs, strict=True)]
        return [*(o.detach() for o in outputs), *torch.autograd.grad(outputs, leaves, given)]


@dataclass(frozen=True)
class OperatorCase:
    """An operator at one shape.

    Args:
        name: Unique.
        build: ``build(dtype, device) -> Sample``, drawing from PyTorch's generator.
    """

    name: str
    build: Callable[[torch.dtype, torch.device], Sample]


def _image(size: Size, dtype: torch.dtype, device: torch.device, channels_last: bool = True) -> Tensor:
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return torch.randint(-3, 4, size, device=device).to(dtype).contiguous(memory_format=layout)


def _weight(*size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.randint(-1, 2, size, device=device).to(dtype)


def _bias(channels: int, device: torch.device) -> Tensor:
    # float32 beside half images, as under autocast.
    return torch.randint(-4, 5, (channels,), device=device) * 0.5


def conv(
    size: Size, out_channels: int, kernel: int, stride: int = 1, groups: int = 1, activation: str | None = "relu6",
    dilation: int = 1, channels_last: bool = True, int8: bool = False,
) -> Callable[[torch.dtype, torch.device], Sample]:  # fmt: skip
    """A frozen convolution with "same" padding, fused bias and activation; ``int8``: of a weight in 8 bits."""

    def build(dtype: torch.dtype, device: torch.device) -> Sample:
        shape = (out_channels, size[1] // groups, kernel, kernel)
        weight = _weight(*shape, dtype=torch.int8 if int8 else dtype, device=device)
        # Halves and wholes, which no product rounds.
        scale = torch.randint(1, 3, (out_channels,), device=device) * 0.5 if int8 else None
        padding = dilation * (kernel // 2)

        def function(x: Tensor, bias: Tensor, weight: Tensor) -> Tensor:
            return ops.frozen_conv(x, weight, bias, stride, padding, dilation, groups, activation, weight_scale=scale)

        return Sample(function, (_image(size, dtype, device, channels_last), _bias(out_channels, device)), (weight,))

    return build


def conv_add(size: Size, out_channels: int, kernel: int = 1) -> Callable[[torch.dtype, torch.device], Sample]:
    """The last convolution of a residual block, its shortcut and the ReLU behind the sum."""

    def build(dtype: torch.dtype, device: torch.device) -> Sample:
        weight = _weight(out_channels, size[1], kernel, kernel, dtype=dtype, device=device)
        shortcut = _image((size[0], out_channels, *size[2:]), dtype, device)

        def function(x: Tensor, shortcut: Tensor, bias: Tensor, weight: Tensor) -> Tensor:
            return ops.frozen_conv_add(x, shortcut, weight, bias, 1, kernel // 2, activation="relu")

        return Sample(function, (_image(size, dtype, device), shortcut, _bias(out_channels, device)), (weight,))

    return build


def block(
    size: Size, out_channels: int, ratio: int = 6, kernel: int = 3, stride: int = 1, pooled: bool = False,
    activation: str | None = "relu6",
) -> Callable[[torch.dtype, torch.device], Sample]:  # fmt: skip
    """An inverted residual block; its shortcut where the shapes allow it; ``ratio`` 1 is without expansion."""
    channels, hidden = size[1], size[1] * ratio
    residual = stride == 1 and channels == out_channels

    def build(dtype: torch.dtype, device: torch.device) -> Sample:
        shapes = [(hidden, 1, kernel, kernel), (out_channels, hidden, 1, 1)]
        biases = [_bias(hidden, device), _bias(out_channels, device)]
        if ratio > 1:
            shapes.insert(0, (hidden, channels, 1, 1))
            biases.insert(0, _bias(hidden, device))
        weights = tuple(_weight(*shape, dtype=dtype, device=device) for shape in shapes)

        def function(x: Tensor, *rest: Tensor) -> Tensor | tuple[Tensor, Tensor]:
            b, w = list(rest[: len(shapes)]), list(rest[len(shapes) :])
            if ratio == 1:
                b, w = [None, *b], [None, *w]
            operator = ops.frozen_inverted_residual_pooled if pooled else ops.frozen_inverted_residual
            return operator(x, w[0], b[0], w[1], b[1], w[2], b[2], stride, kernel // 2, activation, residual)

        return Sample(function, (_image(size, dtype, device), *biases), weights)

    return build


def stem_block(size: Size, hidden: int, out_channels: int) -> Callable[[torch.dtype, torch.device], Sample]:
    """A 3x3 stem of stride 2 and the block without expansion behind it, in one call where the backend has one.

    The image is given, not differentiated.
    """

    def build(dtype: torch.dtype, device: torch.device) -> Sample:
        def function(b1, b2, b3, image, w1, w2, w3) -> Tensor:
            stem = ops.Stem(w1, b1, None, (2, 2), (1, 1, 1, 1))
            convs = (None, None, w2, b2, w3, b3)
            block = ops.Block(stem.output(image), convs, (None, None, None), (1, 1), (1, 1, 1, 1), "relu6", False)
            output = ops.block_chain(image, [block], stem)
            if output is None:
                made = ops.frozen_conv(image, w1, b1, 2, 1, activation="relu6")
                output = ops.frozen_inverted_residual(*block._replace(image=made).arguments)
            return output

        shapes = (hidden, size[1], 3, 3), (hidden, 1, 3, 3), (out_channels, hidden, 1, 1)
        weights = (_weight(*shape, dtype=dtype, device=device) for shape in shapes)
        biases = tuple(_bias(channels, device) for channels in (hidden, hidden, out_channels))
        return Sample(function, biases, (_image(size, dtype, device), *weights))

    return build


def mbconv(
    size: Size, out_channels: int, hidden: int, kernel: int = 3, stride: int = 1, squeezed: int = 0,
    activation: str = "silu", gate: str = "sigmoid",
) -> Callable[[torch.dtype, torch.device], Sample]:  # fmt: skip
    """A block of MobileNetV3 or EfficientNet, in one call where the backend has one; ``squeezed`` 0 is without
    squeeze-and-excite."""
    channels = size[1]
    residual = stride == 1 and channels == out_channels

    def build(dtype: torch.dtype, device: torch.device) -> Sample:
        shapes = [(hidden, channels, 1, 1), (hidden, 1, kernel, kernel), (out_channels, hidden, 1, 1)]
        if squeezed:
            shapes += [(squeezed, hidden, 1, 1), (hidden, squeezed, 1, 1)]

        def function(x: Tensor, *rest: Tensor) -> Tensor:
            biases, weights = rest[: len(shapes)], rest[len(shapes) :]
            layers = [(weight, bias, None) for weight, bias in zip(weights, biases, strict=True)]
            excite = ops.SqueezeExcite(*layers[3:], "relu", gate) if squeezed else None
            numbers = (stride, stride), (kernel // 2,) * 4, activation, excite, residual
            output = ops.mbconv(x, *layers[:3], *numbers)
            return _layer_by_layer(x, layers, *numbers) if output is None else output

        weights = [_weight(*shape, dtype=dtype, device=device) for shape in shapes]
        # A gate of large numbers is their difference: its rounding would be all that is left of it.
        weights[3:] = (weight / weight.size(1) for weight in weights[3:])
        biases = [_bias(shape[0], device) for shape in shapes]
        # Behind h-swish of halves there are multiples of 1 / 24: off those where its derivative jumps, as rounding may
        # fall on either side.
        biases[1] += 0.02
        return Sample(function, (_image(size, dtype, device), *biases), tuple(weights))

    return build


def _layer_by_layer(x: Tensor, layers, stride, padding, activation, excite, residual) -> Tensor:
    (w1, b1, _), (w2, b2, _), (w3, b3, _), *_ = layers
    h = ops.frozen_conv(x, w1, b1, activation=activation)
    h = ops.frozen_conv(h, w2, b2, stride, padding, groups=w2.size(0), activation=activation)
    if excite is not None:
        (wr, br, _), (ws, bs, _) = excite.reduce, excite.restore
        squeezed = ops.frozen_conv(h.mean((2, 3), keepdim=True), wr, br, activation=excite.activation)
        h = h * ops.activation(ops.frozen_conv(squeezed, ws, bs), excite.gate)
    y = ops.frozen_conv(h, w3, b3)
    return x + y if residual else y


def unary(
    size: Size, function: Callable[[Tensor], Tensor], channels_last: bool = True
) -> Callable[[torch.dtype, torch.device], Sample]:
    """An operator of one image."""
    return lambda dtype, device: Sample(function, (_image(size, dtype, device, channels_last),))


def max_pool(size: Size, kernel: int = 3, stride: int = 2) -> Callable[[torch.dtype, torch.device], Sample]:
    """A max pooling whose windows have one winner each: all numbers of a channel differ."""

    def build(dtype: torch.dtype, device: torch.device) -> Sample:
        n, c, h, w = size
        # Half precision tells a thousand whole numbers apart; beyond them windows still hold different ones.
        numbers = torch.arange(h * w, device=device).mul(37) % min(h * w, 251)
        image = numbers.view(1, 1, h, w).expand(size) + torch.zeros(n, c, 1, 1, dtype=torch.long, device=device)
        image = image.to(dtype).contiguous(memory_format=torch.channels_last)
        return Sample(lambda x: ops.max_pool2d(x, kernel, stride, kernel // 2), (image,))

    return build


def upsample_add(size: Size) -> Callable[[torch.dtype, torch.device], Sample]:
    """A branch of half the height and width, added to an image."""
    half = (*size[:2], max(1, size[2] // 2), max(1, size[3] // 2))
    return lambda dtype, device: Sample(
        ops.upsample_add, (_image(size, dtype, device), _image(half, dtype, device))
    )  # fmt: skip


def group_norm(size: Size, groups: int, activation: str | None) -> Callable[[torch.dtype, torch.device], Sample]:
    """A group normalisation and the activation behind it, with trained weight and bias."""

    def build(dtype: torch.dtype, device: torch.device) -> Sample:
        # Not 0, where a channel would have no gradient of its input.
        weight = torch.randint(1, 4, (size[1],), device=device) * 0.5

        def function(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
            return ops.group_norm_activation(x, groups, weight, bias, activation=activation)

        return Sample(function, (_image(size, dtype, device), weight, _bias(size[1], device)))

    return build


def lite_branch(
    size: Size, out_channels: int, kernel: int = 5, stride: int = 1, norm: str = "batch", keep_conv: bool = True,
    channels_last: bool = True,
) -> Callable[[torch.dtype, torch.device], Sample]:  # fmt: skip
    """The branch of a lite residual behind its pooling; ``norm``: "batch", "running" (constants) or "group"."""
    inner = size[1]

    def build(dtype: torch.dtype, device: torch.device) -> Sample:
        weight1 = _weight(inner, inner // 2, kernel, kernel, dtype=dtype, device=device)
        weight2 = _weight(out_channels, inner, 1, 1, dtype=dtype, device=device)
        gains = [torch.randint(1, 4, (c,), device=device) * 0.5 for c in (inner, out_channels)]
        # Thirds: where the statistics are constants no value lies at 0, and no rounding decides what passes.
        shifts = [_bias(c, device) + 1 / 3 for c in (inner, out_channels)]

        def function(pooled: Tensor, *trained: Tensor) -> Tensor:
            norms = []
            for gain, shift in zip(trained[2:4], trained[4:], strict=True):
                constants = (torch.zeros_like(gain), torch.ones_like(gain) * 16) if norm == "running" else (None, None)
                groups = 4 if norm == "group" else 0
                norms.append(ops.Norm(gain, shift, *constants, groups))
            return ops.lite_branch(
                pooled, trained[0], norms[0], trained[1], norms[1], stride, 2, keep_conv=keep_conv
            )[0]  # fmt: skip

        return Sample(function, (_image(size, dtype, device, channels_last), weight1, weight2, *gains, *shifts))

    return build


# For Nsight: name -> (of a size, at a size of MobileNetV2 or ResNet-50 with batch 128).
OPERATORS: dict[str, tuple[Callable[[Size], Callable[[torch.dtype, torch.device], Sample]], Size]] = {
    "pointwise": (lambda size: conv(size, 6 * size[1], 1), (128, 24, 56, 56)),
    "project": (lambda size: conv(size, max(8, size[1] // 6), 1, activation=None), (128, 144, 56, 56)),
    "depthwise": (lambda size: conv(size, size[1], 3, groups=size[1]), (128, 144, 56, 56)),
    "depthwise_stride_2": (lambda size: conv(size, size[1], 3, 2, groups=size[1]), (128, 96, 112, 112)),
    "dense": (lambda size: conv(size, size[1], 3, activation="relu"), (128, 64, 56, 56)),
    "grouped": (lambda size: conv(size, size[1], 5, groups=2, activation="relu"), (128, 32, 28, 28)),
    "inverted_residual": (lambda size: block(size, size[1]), (128, 32, 28, 28)),
    "inverted_residual_pooled": (lambda size: block(size, size[1], pooled=True), (128, 32, 28, 28)),
    "activation": (lambda size: unary(size, partial(ops.activation, name="relu6")), (128, 96, 112, 112)),
    "group_norm": (lambda size: group_norm(size, max(1, size[1] // 8), "relu6"), (128, 144, 56, 56)),
    "avg_pool": (lambda size: unary(size, lambda x: ops.avg_pool2d(x, 2)), (128, 24, 56, 56)),
    "max_pool": (max_pool, (128, 64, 112, 112)),
    "upsample_add": (upsample_add, (128, 24, 56, 56)),
    "lite_branch": (lambda size: lite_branch(size, size[1]), (128, 24, 28, 28)),
    "lite_branch_wide": (lambda size: lite_branch(size, size[1]), (128, 160, 3, 3)),
}


def cases(tiny: bool = False) -> Iterator[OperatorCase]:
    """Every operator, in the shapes that take different paths through its kernels."""

    def size(n: int, c: int, h: int, w: int) -> Size:
        return (min(n, 2), c, min(h, 6), min(w, 5)) if tiny else (n, c, h, w)

    for layout in (True, False):
        suffix = "" if layout else ", NCHW"
        for name, build in {
            "pointwise": conv(size(8, 24, 28, 28), 144, 1, channels_last=layout),
            "pointwise, stride 2": conv(size(4, 64, 15, 14), 96, 1, 2, channels_last=layout),
            "depthwise": conv(size(8, 72, 28, 28), 72, 3, groups=72, channels_last=layout),
            "dense": conv(size(4, 16, 14, 14), 32, 3, activation="relu", channels_last=layout),
            "relu6": unary(size(4, 24, 14, 13), partial(ops.activation, name="relu6"), layout),
        }.items():
            yield OperatorCase(name + suffix, build)
    yield OperatorCase("pointwise, odd channels", conv(size(3, 13, 9, 7), 19, 1))
    yield OperatorCase(
        "pointwise, deep, no activation", conv(size(8, 320 if tiny else 960, 7, 7), 160, 1, activation=None)
    )
    yield OperatorCase("pointwise, silu", conv(size(4, 24, 14, 14), 40, 1, activation="silu"))
    yield OperatorCase("depthwise 5x5, stride 2", conv(size(4, 40, 29, 28), 40, 5, 2, groups=40))
    yield OperatorCase("depthwise 7x7", conv(size(4, 24, 14, 14), 24, 7, groups=24))
    yield OperatorCase("depthwise, dilation 2, hardswish", conv(size(2, 13, 14, 13), 13, 3, 1, 13, "hardswish", 2))
    yield OperatorCase("dense, stride 2", conv(size(4, 3, 31, 30), 32, 3, 2, activation="relu6"))
    yield OperatorCase("grouped 5x5", conv(size(4, 32, 14, 14), 32, 5, groups=2, activation="relu"))
    yield OperatorCase("pointwise, int8 weight", conv(size(4, 24, 14, 14), 40, 1, int8=True))
    yield OperatorCase("depthwise, int8 weight", conv(size(4, 24, 14, 14), 24, 3, groups=24, int8=True))
    yield OperatorCase("grouped, int8 weight", conv(size(4, 32, 14, 14), 32, 3, groups=2, int8=True))
    yield OperatorCase("pointwise, shortcut", conv_add(size(4, 16, 14, 14), 64))
    yield OperatorCase("dense, shortcut", conv_add(size(4, 16, 14, 14), 16, 3))
    yield OperatorCase("group norm", group_norm(size(4, 24, 14, 14), 3, None))
    yield OperatorCase("group norm, silu", group_norm(size(4, 96, 14, 14), 12, "silu"))
    yield OperatorCase("block", block(size(8, 16, 14, 14), 16))
    yield OperatorCase("block, stride 2", block(size(4, 16, 15, 14), 24, stride=2))
    yield OperatorCase("block, no expansion", block(size(4, 32, 14, 14), 16, ratio=1))
    yield OperatorCase("block, 7x7, pooled", block(size(4, 16, 14, 14), 16, ratio=3, kernel=7, pooled=True))
    for name in ("relu", "leaky_relu", "hardsigmoid", "hardswish", "silu", "gelu", "gelu_tanh"):
        yield OperatorCase(name, unary(size(2, 13, 9, 7), partial(ops.activation, name=name)))
    yield OperatorCase("average pooling", unary(size(4, 24, 15, 14), lambda x: ops.avg_pool2d(x, 3, 2, 1)))
    yield OperatorCase("global average pooling", unary(size(4, 24, 7, 7), lambda x: ops.adaptive_avg_pool2d(x, 1)))
    yield OperatorCase("max pooling", max_pool(size(4, 24, 15, 14)))
    yield OperatorCase("upsample and add", upsample_add(size(4, 24, 14, 14)))
    yield OperatorCase("lite branch", lite_branch(size(8, 24, 14, 13), 32))
    yield OperatorCase("lite branch, NCHW", lite_branch(size(4, 24, 14, 13), 32, channels_last=False))
    yield OperatorCase("lite branch, group norms, stride 2", lite_branch(size(4, 16, 15, 14), 24, 3, 2, "group"))
    yield OperatorCase("lite branch, constants, again", lite_branch(size(4, 32, 7, 7), 40, 3, 1, "running", False))
    yield OperatorCase("empty batch", conv((0, 24, 7, 7), 40, 1))


@dataclass(frozen=True)
class Difference:
    """How far the worst tensor of an answer is from float64's, and how far it may be; absolute."""

    tensor: str
    error: float
    allowed: float

    @property
    def right(self) -> bool:
        """Whether it may stand; a NaN may not."""
        return self.error <= self.allowed


def difference(case: OperatorCase, dtype: str, device: torch.device, backend: str) -> Difference:
    """Ours against the reference in the same precision and in float64.

    A tensor may be off by twice what the reference in the same precision is, plus 4 ulp of its largest number.
    """
    torch.manual_seed(20260101)
    sample = case.build(DTYPES[dtype], device)
    exact_sample = sample.doubled()
    with tk.use_backend("reference"):
        shapes = [o.shape for o in exact_sample.outputs()]
        grads = [torch.randn(shape, device=device).to(DTYPES[dtype]) for shape in shapes]
        grads = [g.contiguous(memory_format=torch.channels_last) if g.dim() == 4 else g for g in grads]
        exact = exact_sample.answers(grads)
        stock = sample.answers(grads)
    with tk.use_backend(backend):
        ours = sample.answers(grads)
    outputs = len(shapes)
    worst: Difference | None = None
    for index, (a, b, c) in enumerate(zip(ours, stock, exact, strict=True)):
        name = f"output {index}" if index < outputs else f"gradient of input {index - outputs}"
        if (a.shape, a.dtype) != (b.shape, b.dtype):
            got, expected = (f"{tuple(t.shape)} {t.dtype}" for t in (a, b))
            raise ValueError(f"{name}: expected {expected}, got {got}")
        if a.numel() == 0:
            continue
        eps = _TF32_EPS if dtype == "tf32" else torch.finfo(a.dtype).eps
        largest = c.abs().max().item()
        error, stock_error = ((t.double() - c).abs().max().item() for t in (a, b))
        this = Difference(name, error, 2 * stock_error + 4 * eps * largest)
        if worst is None or not this.right or (worst.right and _share(this) > _share(worst)):
            worst = this
    return worst or Difference("nothing", 0.0, 0.0)


def _share(difference: Difference) -> float:
    return difference.error / difference.allowed if difference.allowed else 0.0
