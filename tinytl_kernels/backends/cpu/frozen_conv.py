"""Frozen convolutions on the CPU: ``pointwise.cpp``, ``depthwise_conv.cpp``, ``dense_conv.cpp``; oneDNN for the rest.

What a dense or grouped k x k convolution is computed with is decided by :func:`_dense_kernel`, by measurement. Where it
is oneDNN's, through ATen, bias, activation and bit mask are one pass over its output (``activation.cpp``), and in
backward the masked gradient and the bias gradient are one pass over a few images at a time, which oneDNN then takes to
the input gradient; smooth activations are ATen's there, too. Weights in 8 bits are unpacked by the C++ kernels while
they pack their operands, and a slice of channels at a time for oneDNN.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from tinytl_kernels.backends.cpu.layout import channels_last, in_layout
from tinytl_kernels.backends.reference import frozen_conv as reference
from tinytl_kernels.backends.reference.slabs import image_chunks
from tinytl_kernels.backends.reference.weights import dequantize_if_small
from tinytl_kernels.core.activations import FULL_VALUE, LEAKY_SLOPE
from tinytl_kernels.core.layout import format_of, memory_format

# Channels a group that fill the vectors of ``dense_conv.cpp``: what it computes has to be at least as wide.
_DENSE_WIDTH = 16
# Elements of the largest weight that it is given where packing takes long: 128 x 128 x 3 x 3.
_DENSE_WEIGHT = 128 * 128 * 3 * 3

# What winograd.h asks for: terms of a sum, whole vectors of them, and squares of 2 x 2 results.
_SQUARE_TERMS = 32
_TERMS_OF_A_VECTOR = 16
_SQUARES = 64


def frozen_conv(
    input: Tensor, weight: Tensor, bias: Tensor | None, stride, padding, dilation, groups: int,
    activation: str | None, needs_saved: bool, weight_scale: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    layout = memory_format(input, weight)
    kernel = _forward_kernel(input, weight, stride, padding, dilation, groups)
    if kernel == "onednn":
        if activation in FULL_VALUE:
            return reference.frozen_conv(
                input, weight, bias, stride, padding, dilation, groups, activation, needs_saved, weight_scale
            )
        # The bias goes to oneDNN too: added after its output was rounded, it would turn signs, and mask bits, around.
        output = reference.convolve(
            channels_last(input), weight, bias, stride, padding, dilation, groups, torch.channels_last, weight_scale
        )
        saved = input.new_empty(0, dtype=torch.uint8)
        if activation is not None:
            saved = torch.ops.tinytl_cpu.bias_activation_(output, None, None, activation, LEAKY_SLOPE, needs_saved)
        return in_layout(output, layout), saved
    if kernel == "pointwise":
        output, saved = torch.ops.tinytl_cpu.pointwise_forward(
            channels_last(input), weight, weight_scale, bias, None, stride, activation or "none", needs_saved
        )
    elif kernel == "depthwise":
        output, saved = torch.ops.tinytl_cpu.depthwise_forward(
            channels_last(input), weight, weight_scale, bias, stride, padding, dilation, activation or "none",
            needs_saved,
        )  # fmt: skip
    else:
        output, saved = torch.ops.tinytl_cpu.dense_forward(
            channels_last(input), weight, weight_scale, bias, stride, padding, dilation, groups,
            activation or "none", needs_saved,
        )  # fmt: skip
    if needs_saved and activation in FULL_VALUE:
        saved = in_layout(saved, layout)
    return in_layout(output, layout), saved


def frozen_conv_add(
    input: Tensor, shortcut: Tensor, weight: Tensor, bias: Tensor | None, stride, padding, dilation, groups: int,
    activation: str | None, needs_saved: bool, weight_scale: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    layout, input = memory_format(input, weight), channels_last(input)
    if _is_pointwise(weight, groups, padding):
        output, mask = torch.ops.tinytl_cpu.pointwise_forward(
            input, weight, weight_scale, bias, shortcut, stride, activation or "none", needs_saved
        )
    else:
        output, _ = frozen_conv(input, weight, bias, stride, padding, dilation, groups, None, False, weight_scale)
        mask = torch.ops.tinytl_cpu.bias_activation_(
            output, None, shortcut, activation or "none", LEAKY_SLOPE, needs_saved
        )
    return in_layout(output, layout), mask


def frozen_conv_backward(
    grad_output: Tensor, weight: Tensor, saved: Tensor, input_size, stride, padding, dilation, groups: int,
    activation: str | None, is_channels_last: bool, need_input: bool, need_bias: bool,
    weight_scale: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    kernel = _backward_kernel(input_size, grad_output.dtype, weight, stride, padding, dilation, groups)
    if kernel == "onednn" and activation in FULL_VALUE:
        return reference.frozen_conv_backward(
            grad_output, weight, saved, input_size, stride, padding, dilation, groups, activation, is_channels_last,
            need_input, need_bias, weight_scale,
        )  # fmt: skip
    grad_output = channels_last(grad_output)
    if kernel == "pointwise":
        grad_input, grad_bias = torch.ops.tinytl_cpu.pointwise_backward(
            grad_output, saved, weight, weight_scale, input_size, stride, activation or "none", need_input, need_bias
        )
    elif kernel == "depthwise":
        grad_input, grad_bias = torch.ops.tinytl_cpu.depthwise_backward(
            grad_output, saved, weight, weight_scale, input_size, stride, padding, dilation, activation or "none",
            need_input, need_bias,
        )  # fmt: skip
    elif kernel == "dense":
        grad_input, grad_bias = torch.ops.tinytl_cpu.dense_backward(
            grad_output, saved, weight, weight_scale, input_size, stride, padding, dilation, groups,
            activation or "none", need_input, need_bias,
        )  # fmt: skip
    else:
        grad_input, grad_bias = _onednn_backward(
            grad_output, weight, saved, input_size, stride, padding, dilation, groups, activation, need_input,
            need_bias, weight_scale,
        )  # fmt: skip
    return in_layout(grad_input, format_of(is_channels_last)) if need_input else grad_input, grad_bias


def differentiable(input: Tensor, *arguments) -> tuple[Tensor, Tensor] | None:
    """:func:`frozen_conv` with its derivative in C++ (``autograd.cpp``)."""
    return _differentiable(input, None, *arguments)


def differentiable_add(input: Tensor, shortcut: Tensor, *arguments) -> tuple[Tensor, Tensor] | None:
    """:func:`frozen_conv_add` with its derivative in C++ (``autograd.cpp``)."""
    return _differentiable(input, shortcut, *arguments)


def _differentiable(
    input: Tensor, shortcut: Tensor | None, weight: Tensor, bias: Tensor | None, stride, padding, dilation,
    groups: int, activation: str | None, needs_saved: bool, weight_scale: Tensor | None = None,
) -> tuple[Tensor, Tensor] | None:  # fmt: skip
    if memory_format(input, weight) is not torch.channels_last:
        return None
    forward = backward = _forward_kernel(input, weight, stride, padding, dilation, groups)
    if forward == "dense" and input.requires_grad:  # without an input gradient any of them adds up the bias's
        backward = _backward_kernel(input.shape, input.dtype, weight, stride, padding, dilation, groups)
    if "onednn" in (forward, backward):
        return None
    return torch.ops.tinytl_cpu.frozen_conv(
        input, shortcut, weight, bias, stride, padding, dilation, groups, activation, needs_saved, weight_scale,
        forward, backward,
    )  # fmt: skip


def _onednn_backward(
    grad_output, weight, saved, input_size, stride, padding, dilation, groups, activation, need_input, need_bias,
    weight_scale,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    if activation is None:
        return reference.frozen_conv_backward(
            grad_output, weight, saved, input_size, stride, padding, dilation, groups, None, True, need_input,
            need_bias, weight_scale,
        )  # fmt: skip
    if not need_input:
        return torch.ops.tinytl_cpu.activation_backward(grad_output, saved, activation, LEAKY_SLOPE, False, need_bias)
    grad_input = torch.empty(input_size, dtype=grad_output.dtype, memory_format=torch.channels_last)
    grad_bias = torch.zeros(weight.size(0) if need_bias else 0)
    weight, weight_scale = dequantize_if_small(weight, weight_scale, grad_output.dtype)
    for images in image_chunks(grad_output):
        grad, bias = torch.ops.tinytl_cpu.activation_backward(
            grad_output[images], saved[images], activation, LEAKY_SLOPE, True, need_bias
        )
        grad_bias += bias
        reference.transposed_convolution(
            grad, weight, stride, padding, dilation, groups, grad_input[images], weight_scale
        )
    return grad_input, grad_bias


def _forward_kernel(input: Tensor, weight: Tensor, stride, padding, dilation, groups: int) -> str:
    """Who computes a convolution."""
    if kernel := _plain_kernel(weight, groups, padding):
        return kernel
    height, width = input.shape[2:]
    result = (input.size(0), height + padding[0] + padding[1] - 2, width + padding[2] + padding[3] - 2)  # if 3 x 3
    terms, results = weight.size(1), weight.size(0) // groups
    return _dense_kernel(weight, groups, stride, dilation, input.dtype, terms, results, result)


def _backward_kernel(input_size, dtype: torch.dtype, weight: Tensor, stride, padding, dilation, groups: int) -> str:
    """Who computes its input gradient."""
    if kernel := _plain_kernel(weight, groups, padding):
        return kernel
    result = (input_size[0], *input_size[2:])
    terms, results = weight.size(0) // groups, weight.size(1)
    return _dense_kernel(weight, groups, stride, dilation, dtype, terms, results, result)


def _plain_kernel(weight: Tensor, groups: int, padding) -> str | None:
    """Who computes a 1x1 or a depthwise convolution, in both directions; None for any other."""
    if _is_pointwise(weight, groups, padding):
        return "pointwise"
    return "depthwise" if groups == weight.size(0) and weight.size(1) == 1 else None


def _dense_kernel(
    weight: Tensor, groups: int, stride, dilation, dtype: torch.dtype, terms: int, results: int, result
) -> str:
    """Who computes a ``result`` of images, rows, columns: ``results`` channels a group, sums over ``terms``."""
    if groups > 1 and results % 8:
        return "onednn"  # two groups would share a byte of the mask
    squares = _in_squares(weight, stride, dilation, terms, result)
    return "dense" if _dense_is_faster(weight, dtype, results, squares) else "onednn"


def _is_pointwise(weight: Tensor, groups: int, padding) -> bool:
    return groups == 1 and weight.shape[2:] == (1, 1) and not any(padding)


def _in_squares(weight: Tensor, stride, dilation, terms: int, result: tuple[int, int, int]) -> bool:
    """Whether ``winograd.h`` computes sums over ``terms`` channels for a ``result`` of images, rows, columns."""
    images, height, width = result
    return (
        weight.shape[2:] == (3, 3)
        and all(s == 1 for s in (*stride, *dilation))
        and terms >= _SQUARE_TERMS
        and terms % _TERMS_OF_A_VECTOR == 0
        and images * ((height + 1) // 2) * ((width + 1) // 2) >= _SQUARES
    )


def _dense_is_faster(weight: Tensor, dtype: torch.dtype, width: int, squares: bool) -> bool:
    # Time of oneDNN with our pass over its output / time of dense_conv.cpp, one thread of a Zen 5 (AVX-512, bfloat16
    # dot products), 3 x 3 unless it says otherwise, ReLU and mask, batch 8; forward, backward:
    #                                     float32       bfloat16
    #     3 -> 32, 224, stride 2          1.06  -       1.26  -
    #     3 -> 64, 7 x 7, 224, stride 2   1.03  -       1.23  -
    #     64 -> 64, 56                    1.03  1.00    1.19  1.08
    #     128 -> 128, 56, stride 2        1.07  1.20    1.21  1.15
    #     128 -> 128, 28                  1.05  1.02    1.14  1.04
    #     256 -> 256, 14                  0.99  0.93    1.04  0.97
    #     512 -> 512, 7                   1.13  1.10    1.08  0.98
    #     512 -> 512, 7, batch 1          1.36  1.09    1.06  0.99
    #     groups of 32, 14                1.25  1.07    1.74  1.31      (7 x 7)
    #     groups of 24, 28                1.12  1.15    1.68  1.42
    #     groups of 16, 28                0.92  1.63    1.43  1.00
    #     groups of 8, 28                 0.81  1.04    1.11  0.88
    #     3 channels' gradient, 224        -    0.94     -    0.81
    # That is with the weight in cache. In a model a large one comes from memory, and where packing has to convert it or
    # to turn it, oneDNN reorders it faster: a step of a ResNet-50 (batch 4) in bfloat16 took 1.01 of oneDNN's time with
    # the weights up to 128 x 128 x 3 x 3 computed here, 1.15 with all of them. Hence the limit on their elements.
    # A float32 weight in channels_last is packed as it is read, whatever its size. Zen 3 (AVX2), weight from memory:
    #     128 -> 128, 56, stride 2        1.04  1.3
    #     512 -> 512, 14, stride 2        1.1   1.4
    #     256 -> 256, 5 x 5, 14           1.5   1.5
    #     groups of 32, 14                1.8   1.9
    # and with fewer multiplications (winograd.h):
    #     64 -> 64, 56                    1.4   1.7
    #     128 -> 128, 28                  1.6   1.8
    #     256 -> 256, 14                  1.6   1.7
    #     512 -> 512, 7                   1.5   1.4
    # Half precision where oneDNN has no arithmetic for it: float16 4 to 80 times as fast, at any width; bfloat16 on a
    # Zen 3 (AVX2) 5 to 24 times in forward and 6 to 45 in backward.
    if _onednn_knows_more(dtype):
        return False
    if dtype == torch.float16 or (dtype == torch.bfloat16 and _ONEDNN_LACKS_BFLOAT16):
        return True
    as_read = weight.dtype == torch.float32 and memory_format(weight) is torch.channels_last
    return width >= _DENSE_WIDTH and (squares or as_read or weight.numel() <= _DENSE_WEIGHT)


@cache
def _onednn_knows_more(dtype: torch.dtype) -> bool:
    """Whether this processor has arithmetic in ``dtype`` that oneDNN uses and ``dense_conv.cpp`` does not."""
    features = {torch.bfloat16: ("amx_bf16",), torch.float16: ("avx512_fp16", "amx_fp16")}.get(dtype, ())
    capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return any(capabilities.get(feature, False) for feature in features)


def _onednn_lacks_bfloat16() -> bool:
    """Whether oneDNN has no bfloat16 on this processor: PyTorch then convolves pixel by pixel."""
    supported = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", None)
    return torch.backends.mkldnn.is_available() and supported is not None and not supported()


_ONEDNN_LACKS_BFLOAT16 = _onednn_lacks_bfloat16()

DIFFERENTIABLE = {"frozen_conv": differentiable, "frozen_conv_add": differentiable_add}
OPERATORS = {
    "frozen_conv": frozen_conv,
    "frozen_conv_add": frozen_conv_add,
    "frozen_conv_backward": frozen_conv_backward,
}
