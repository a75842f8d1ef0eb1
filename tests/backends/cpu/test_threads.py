"""At a given number of threads the kernels give the same bits run after run, also with more threads than cores."""

from __future__ import annotations

import pytest
import torch

from tests.threads import num_threads
from tinytl_kernels import ops

pytestmark = pytest.mark.usefixtures("cpu_kernels")


def block(x):
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(s, generator=generator) for s in ((96, 24, 1, 1), (96, 1, 3, 3), (24, 96, 1, 1))]
    biases = [torch.zeros(w.size(0), requires_grad=True) for w in weights]
    pairs = [t for pair in zip(weights, biases, strict=True) for t in pair]
    y, pooled = ops.frozen_inverted_residual_pooled(x, *pairs, 1, 1, "relu6", True)
    return biases, y.square().sum() + pooled.square().sum()


def convolution(out, kernel, groups, padding):
    def run(x):
        generator = torch.Generator().manual_seed(1)
        weight = torch.randn(out, 24 // groups, kernel, kernel, generator=generator)
        bias = torch.zeros(out, requires_grad=True)
        return [bias], ops.frozen_conv(x, weight, bias, 1, padding, 1, groups, "relu").square().sum()

    return run


NETWORKS = {
    "block": block,
    "pointwise": convolution(40, 1, 1, 0),
    "depthwise": convolution(24, 5, 24, 2),
    "dense": convolution(16, 3, 1, 1),
    "pooling": lambda x: ([], ops.max_pool2d(x, 3, 2, 1).square().sum() + ops.avg_pool2d(x, 3, 2, 1).square().sum()),
    "upsampling": lambda x: ([], ops.upsample_add(x, ops.avg_pool2d(x, 2)).square().sum()),
}


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("images", [1, 3])
@pytest.mark.parametrize("network", NETWORKS)
def test_same_bits_run_after_run(network, images, threads):
    x = torch.randn(images, 24, 29, 31).contiguous(memory_format=torch.channels_last).requires_grad_()

    def run() -> list[torch.Tensor]:
        parameters, loss = NETWORKS[network](x)
        return [loss.detach(), *torch.autograd.grad(loss, [x, *parameters])]

    with num_threads(threads):
        first = run()
        for _ in range(5):
            for a, b in zip(run(), first, strict=True):
                assert torch.equal(a, b)
