"""Pooling: averages keep nothing for backward, maxima 4 bits an output element (PyTorch: input + int64 index)."""

from __future__ import annotations

from torch import Tensor, nn

from tinytl_kernels import ops
from tinytl_kernels.core.geometry import pair


class AvgPool2d(nn.AvgPool2d):
    """``torch.nn.AvgPool2d`` that keeps nothing for backward."""

    def forward(self, input: Tensor) -> Tensor:
        if input.dim() != 4:
            return super().forward(input)
        return ops.avg_pool2d(
            input,
            self.kernel_size,
            self.stride,
            self.padding,
            self.ceil_mode,
            self.count_include_pad,
            self.divisor_override,
        )


class AdaptiveAvgPool2d(nn.AdaptiveAvgPool2d):
    """``torch.nn.AdaptiveAvgPool2d`` that keeps nothing for backward, and whose gradient has the input's layout.

    To a single pixel PyTorch takes the mean, which keeps nothing either, but a convolution before it has to copy its
    gradient from NCHW.
    """

    def forward(self, input: Tensor) -> Tensor:
        if input.dim() != 4:
            return super().forward(input)
        return ops.adaptive_avg_pool2d(input, self.output_size)


class MaxPool2d(nn.MaxPool2d):
    """``torch.nn.MaxPool2d`` that keeps the winner's position in its window.

    4 bits an output element for windows of up to 16 elements, a byte up to 256. Larger windows, unbatched input and
    ``return_indices=True`` are PyTorch's own.
    """

    def forward(self, input: Tensor) -> Tensor:
        height, width = pair(self.kernel_size, "kernel_size")
        if input.dim() != 4 or self.return_indices or height * width > 256:
            return super().forward(input)
        return ops.max_pool2d(input, self.kernel_size, self.stride, self.padding, self.dilation, self.ceil_mode)
