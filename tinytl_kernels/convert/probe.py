"""What a layer computes, told by running it, not by its name.

A subclass of ``nn.Conv2d`` may pad as TensorFlow does, standardise its weight, or do anything else; a subclass of
``nn.BatchNorm2d`` may hold an activation. Each is run on small random inputs and recognised only if a known formula
gives the same numbers.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tinytl_kernels.core.hooks import has_own_forward, hooks_of
from tinytl_kernels.nn import activation_name
from tinytl_kernels.nn.fold import applied_convolution

_TOLERANCE = 1e-9  # float64, relative to the largest output: the same arithmetic leaves 1e-13 or so


def tampered(module: nn.Module) -> str:
    """Why ``module`` must stay itself whatever it computes (hooks, parametrizations), else an empty string."""
    if hooks_of(module):
        return "it has hooks, which would be lost"
    if "parametrizations" in module._modules:
        return "it is parametrized"
    if has_own_forward(module):
        return "its forward was replaced on the instance"
    return ""


def unreadable_conv(conv: nn.Conv2d) -> str:
    """Why ``conv`` cannot become a ``FrozenConvBias``, else an empty string."""
    reason = tampered(conv)
    if reason or type(conv).forward is nn.Conv2d.forward:
        return reason
    mode = conv.training
    try:
        weights = [applied_convolution(conv.train(training)).weight for training in (True, False)]
    except ValueError as error:
        return str(error).splitlines()[0]
    finally:
        conv.train(mode)
    return "" if torch.equal(*weights) else "its weight in training differs from that in evaluation"


@dataclass
class NormFacts:
    """A BatchNorm as a plain ``nn.BatchNorm2d``, and what its module does after normalising.

    Args:
        norm: An equal stock BatchNorm, in evaluation mode.
        tail: Modules applied after it (timm's ``BatchNormAct2d`` holds dropout and activation), identities left out.
    """

    norm: nn.BatchNorm2d
    tail: list[nn.Module]


_STATISTICS = {"weight", "bias", "running_mean", "running_var"}


def looks_like_batchnorm(module: nn.Module) -> bool:
    """Whether ``module`` is a 2-D BatchNorm of some library, frozen ones with buffers included."""
    if isinstance(module, (nn.BatchNorm2d, nn.SyncBatchNorm)):
        return True
    return "BatchNorm" in type(module).__name__ and set(module._buffers) >= _STATISTICS


def read_norm(module: nn.Module) -> NormFacts | str:
    """The affine function ``module`` is in evaluation mode, or why it cannot be folded."""
    reason = tampered(module)
    if reason:
        return reason
    mean, var = getattr(module, "running_mean", None), getattr(module, "running_var", None)
    if mean is None or var is None:
        return "it keeps no running statistics (track_running_stats=False), so its output depends on the batch"
    eps = getattr(module, "eps", None)
    if not isinstance(eps, float):
        return "it has no eps to read"
    norm = nn.BatchNorm2d(mean.numel(), eps=eps, device=mean.device, dtype=mean.dtype).eval()
    with torch.no_grad():
        norm.running_mean.copy_(mean)
        norm.running_var.copy_(var)
        for name in ("weight", "bias"):
            if getattr(module, name) is not None:
                getattr(norm, name).copy_(getattr(module, name))
    if type(module) in (nn.BatchNorm2d, nn.SyncBatchNorm):
        return NormFacts(norm, [])
    tail = [child for child in module.children() if type(child) is not nn.Identity]
    try:
        same = _same_norm(module, norm, tail)
    except Exception as error:  # a user's forward may raise anything on a small float64 input
        return f"its own forward could not be probed: {type(error).__name__}"
    return NormFacts(norm, tail) if same else "its own forward computes something else than a BatchNorm"


def _same_norm(module: nn.Module, norm: nn.BatchNorm2d, tail: list[nn.Module]) -> bool:
    twin = copy.deepcopy(module).cpu().double().eval()
    expected = nn.Sequential(copy.deepcopy(norm), *copy.deepcopy(tail)).cpu().double().eval()
    generator = torch.Generator().manual_seed(0)
    x = 3 * torch.randn(2, norm.num_features, 4, 5, generator=generator, dtype=torch.float64)
    with torch.no_grad():
        return _close(twin(x.clone()), expected(x.clone()))


def plain_activation(module: nn.Module) -> nn.Module | None:
    """The ``torch.nn`` activation that ``module`` is or wraps, in its mode; None for any other module."""
    if activation_name(module) is not None or type(module) is nn.LeakyReLU:
        return module
    if type(module).__module__.startswith("timm.layers.activations"):
        plain = _TIMM_WRAPPERS.get(type(module).__name__)
        if plain is not None and _same_activation(module, plain()):
            return plain().train(module.training)
    return None


_TIMM_WRAPPERS = {
    "Swish": nn.SiLU,
    "SwishMe": nn.SiLU,
    "HardSwish": nn.Hardswish,
    "HardSwishMe": nn.Hardswish,
    "HardSigmoid": nn.Hardsigmoid,
    "HardSigmoidMe": nn.Hardsigmoid,
    "GELU": nn.GELU,
    "GELUTanh": lambda: nn.GELU(approximate="tanh"),
}


def _same_activation(module: nn.Module, plain: nn.Module) -> bool:
    x = torch.linspace(-8, 8, 129, dtype=torch.float64)
    return _close(module(x.clone()), plain(x.clone()))


def _close(actual: Tensor, expected: Tensor) -> bool:
    scale = expected.abs().amax().clamp_min(1e-30)
    return actual.shape == expected.shape and bool((actual - expected).abs().amax() <= _TOLERANCE * scale)
