"""The widest layers of a network, a part of the batch at a time."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from tinytl_kernels.nn import FrozenConvBias, FrozenInvertedResidual
from tinytl_kernels.nn.recomputed import Recomputed

# With more, putting the parts together is the worst moment already.
SLICES = 4


def run_in_slices(modules: Sequence[nn.Module], input: Tensor) -> Tensor:
    """The output of ``modules``, one after the other, computed for a quarter of the batch at a time where that is lean.

    A network's first convolution has by far its largest output: with ProxylessNAS-Mobile at batch 8 and 224x224, 12.8
    of the 19.3 MB that are alive at the worst moment of forward and backward, once nothing but bits is saved. In slices
    a quarter of it exists at a time, in backward too.

    Args:
        modules: Converted: frozen convolutions and blocks of such, possibly with norms; anything else runs whole. So do
            BatchNorms in training, whose statistics are of the whole batch.
        input: (N, C, H, W).

    Returns:
        What ``modules`` return for ``input``, up to the order in which the pictures' bias gradients are summed.
    """
    # In this order: torch.fx traces the stock network through here, and knows no batch.
    if _treat_pictures_one_by_one(modules) and input.size(0) > 1:
        return torch.cat([_run(modules, part) for part in input.split(-(-input.size(0) // SLICES))])
    return _run(modules, input)


def _treat_pictures_one_by_one(modules: Sequence[nn.Module]) -> bool:
    layers = [module for whole in modules for module in whole.modules()]
    if any(isinstance(module, Recomputed) for module in layers):
        return False  # they see to it themselves, and would not know each other in the tensor put together again
    frozen = any(isinstance(module, (FrozenConvBias, FrozenInvertedResidual)) for module in layers)
    return frozen and not any(
        isinstance(module, nn.modules.batchnorm._BatchNorm) and module.training for module in layers
    )


def _run(modules: Sequence[nn.Module], input: Tensor) -> Tensor:
    for module in modules:
        input = module(input)
    return input
