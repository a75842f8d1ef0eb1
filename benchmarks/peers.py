"""What a user would pick instead: stock PyTorch, and what can be had on top of it."""

from __future__ import annotations

import importlib.util
import os
import shutil

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torch.utils.checkpoint import checkpoint

from benchmarks.cases import Case
from benchmarks.contestants import Contestant
from benchmarks.networks import FULL_LINEUP

# The block classes of the networks here, in torchvision and timm.
BLOCKS = {
    "InvertedResidual",
    "_InvertedResidual",
    "DepthwiseSeparableConv",
    "EdgeResidual",
    "ConvBnAct",
    "BasicBlock",
    "Bottleneck",
}
# Set by --everything.
EVERYTHING = False

FULL_LINEUP_ONLY = f"completes the picture of {FULL_LINEUP} only; --everything runs it on every network"


def frozen(stock: nn.Module, case: Case) -> nn.Module:
    """Nothing is trained."""
    return stock


def biases_trained(stock: nn.Module, case: Case) -> nn.Module:
    """Every bias is trained, and the classifier."""
    for name, parameter in stock.named_parameters():
        parameter.requires_grad_(name.endswith("bias"))
    linears = [module for module in stock.modules() if isinstance(module, nn.Linear)]
    for classifier in linears[-1:]:
        classifier.requires_grad_(True)
    return stock


def everything_trained(stock: nn.Module, case: Case) -> nn.Module:
    """Full fine-tuning; the statistics of BatchNorm stay frozen, so that the answer can be compared."""
    return stock.requires_grad_(True)


def folded(stock: nn.Module, case: Case) -> nn.Module:
    """BatchNorm folded into the convolutions, as one would by hand; every bias is trained."""
    pairs = _convs_before_norms(stock, case)
    for name, norm in list(stock.named_modules()):
        if norm not in pairs:
            continue
        conv_name, conv = pairs[norm]
        _replace(stock, conv_name, fuse_conv_bn_eval(conv, norm))
        # timm's BatchNormAct2d is a norm with the activation inside.
        _replace(stock, name, getattr(norm, "act", nn.Identity()))
    return biases_trained(stock, case)


def checkpointed(stock: nn.Module, case: Case) -> nn.Module:
    """Folded, and every block keeps only its input and runs again in backward."""
    module = folded(stock, case)
    if type(module).__name__ in BLOCKS:
        return Checkpointed(module)
    for name, child in list(module.named_modules()):
        if type(child).__name__ in BLOCKS:
            _replace(module, name, Checkpointed(child))
    return module


def compiled(stock: nn.Module, case: Case) -> nn.Module:
    """Folded, and compiled by Inductor for the one shape of the case."""
    return torch.compile(folded(stock, case), dynamic=False)


def memsave(stock: nn.Module, case: Case) -> nn.Module:
    """Folded, with memsave_torch's layers swapped in."""
    from memsave_torch.nn import convert_to_memory_saving

    return convert_to_memory_saving(folded(stock, case), clone_params=True)


class Checkpointed(nn.Module):
    """``torch.utils.checkpoint`` around a block."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, input: Tensor) -> Tensor:
        return checkpoint(self.block, input, use_reentrant=False, preserve_rng_state=False)


def _convs_before_norms(stock: nn.Module, case: Case) -> dict[nn.Module, tuple[str, nn.Conv2d]]:
    """For each BatchNorm that a convolution alone feeds: that convolution and its name. Found by running once."""
    made: dict[int, tuple[str, nn.Conv2d, Tensor]] = {}
    pairs: dict[nn.Module, tuple[str, nn.Conv2d]] = {}
    hooks = []

    def note(name: str):
        def hook(conv: nn.Conv2d, args: tuple[Tensor, ...], output: Tensor) -> None:
            made[id(output)] = (name, conv, output)  # held, so that the id stays its own

        return hook

    def pair(norm: nn.Module, args: tuple[Tensor, ...]) -> None:
        if id(args[0]) in made:
            name, conv, _ = made[id(args[0])]
            pairs[norm] = (name, conv)

    for name, module in stock.named_modules():
        if isinstance(module, nn.Conv2d):
            hooks.append(module.register_forward_hook(note(name)))
        elif isinstance(module, _BatchNorm):
            hooks.append(module.register_forward_pre_hook(pair))
    with torch.no_grad():
        stock(torch.zeros(1, *case.input_size[1:]))
    for hook in hooks:
        hook.remove()
    return pairs


def _replace(root: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(root.get_submodule(parent), child, module)


def no_norm(case: Case) -> str | None:
    """Pooling and activations have nothing to fold."""
    return None if case.has_norm else "there is no norm to fold"


def only_full_lineup(case: Case) -> str | None:
    """Contestants that complete the picture of one network."""
    return None if EVERYTHING or case.name == FULL_LINEUP else FULL_LINEUP_ONLY


def no_compiler(case: Case) -> str | None:
    """Inductor writes C++ for the CPU."""
    if os.environ.get("CXX") or any(map(shutil.which, ("g++", "c++", "clang++"))):
        return only_full_lineup(case)
    return "Inductor needs a C++ compiler, and none is on the PATH"


def no_memsave(case: Case) -> str | None:
    """memsave_torch is not on PyPI."""
    found = importlib.util.find_spec("memsave_torch")
    return None if found else "memsave_torch is not installed (it is not on PyPI; install it from its repository)"


STOCK_INFERENCE = Contestant("stock_inference", "PyTorch, inference", frozen, kind="inference", method="none")
STOCK_BIAS = Contestant("stock_bias", "PyTorch, bias only", biases_trained)
STOCK_BIAS_BF16 = Contestant(
    "stock_bias_bf16", "PyTorch, bias only, bf16 autocast", biases_trained, precision="bfloat16"
)
FOLDED = Contestant("folded", "+ BN folded by hand", folded, unavailable=no_norm)
CHECKPOINTED = Contestant("checkpointed", "+ checkpoint per block", checkpointed)
COMPILED = Contestant("compiled", "+ torch.compile", compiled, unavailable=no_compiler, compiled=True)
MEMSAVE = Contestant("memsave", "+ memsave_torch", memsave, unavailable=no_memsave)
STOCK_FULL = Contestant("stock_full", "PyTorch, full", everything_trained, method="full", unavailable=only_full_lineup)
