"""Swap the layers of a model for their lean twins, one module at a time; names and classes around them stay."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from tinytl_kernels import nn as tnn
from tinytl_kernels.core.activations import FULL_VALUE
from tinytl_kernels.nn import FrozenConvBias, activation_name

from .chains import Chain, Links, find_chains
from .probe import NormFacts, looks_like_batchnorm, plain_activation, read_norm, tampered, unreadable_conv
from .report import ConversionReport, Note
from .trace import NORMS

_KEEPS_INPUT = (
    nn.Conv1d,
    nn.Conv3d,
    nn.modules.conv._ConvTransposeNd,
    nn.MultiheadAttention,
    nn.modules.rnn.RNNBase,
    nn.Bilinear,
)


class Surgery:
    """The operation on one model.

    Args:
        model: Changed in place.
        links: What alone feeds what in it.
        report: Written as things are done.
        head: The classifier, which stays stock.
        keep_apart: ``keep_apart(conv, activation)``: whether the activation must not go into the convolution.
        code_bits: 8 swaps smooth activations that stand alone for twins that can keep codes.
    """

    def __init__(
        self,
        model: nn.Module,
        links: Links,
        report: ConversionReport,
        head: nn.Module | None,
        keep_apart: Callable[[nn.Module, nn.Module | None], bool],
        code_bits: int | None = None,
    ) -> None:
        self.model = model
        self.links = links
        self.report = report
        self.head = head
        self.keep_apart = keep_apart
        self.code_bits = code_bits
        self.names = {module: name for name, module in model.named_modules()}
        self.twins: dict[nn.Module, nn.Module] = {}
        self._kept: set[nn.Module] = set()
        self._places: dict[nn.Module, list[tuple[nn.Module, str]]] = {}
        for parent in model.modules():
            for name, child in parent._modules.items():
                if child is not None:
                    self._places.setdefault(child, []).append((parent, name))

    def swap_layers(self, *, fold: bool) -> None:
        """Convolutions, norms, activations, pools, dropout; ``fold`` is False where norms are trained."""
        convs = []
        for conv in [m for m in self.names if isinstance(m, nn.Conv2d) and m is not self.head]:
            reason = self.links.out_of_reach(conv) or unreadable_conv(conv)
            if reason:
                self._keep(conv, f"keeps its input: {reason}")
            else:
                convs.append(conv)
        for chain in find_chains(convs, self.links, fold=fold):
            self._swap_conv(chain)
        for norm in self._left(looks_like_batchnorm):
            if fold:
                self._swap_norm(norm)
            else:
                self._keep(norm, "trained: keeps its input")
        for norm in self._left(lambda m: type(m) is nn.GroupNorm):
            self._swap_group_norm(norm)
        for module in self._left(lambda m: plain_activation(m) is not None):
            self._swap_activation(module)
        for module in self._left(lambda m: True):
            self._swap_other(module)

    def place(self, old: nn.Module, new: nn.Module) -> None:
        """Put ``new`` wherever ``old`` stands."""
        for parent, name in self._places.get(old, []):
            parent._modules[name] = new
        self._places[new] = self._places.pop(old, [])
        # What stood inside (the activation of a BatchNormAct2d) is gone, or part of the new.
        self.twins.update(dict.fromkeys(old.modules(), new))

    def _swap_conv(self, chain: Chain) -> None:
        facts = self._facts(chain.norm)
        if isinstance(facts, str):
            # What is behind a norm that stays must stay behind it.
            chain, facts = Chain(chain.conv), None
        activation, tail = self._tail(chain.conv, chain.activation, facts)
        norm = None if facts is None else facts.norm
        fused = None if activation is None else plain_activation(activation)
        frozen = FrozenConvBias.from_conv(chain.conv, norm, fused)
        texts = ["frozen"]
        if norm is not None:
            texts.append(f"{self.names[chain.norm]} folded")
            self.place(chain.norm, tail or self._identity(chain.norm))
        if activation is not None:
            texts.append(f"{type(activation).__name__} fused")
            if frozen.activation in FULL_VALUE:
                self._keep(chain.conv, f"keeps the value before {type(activation).__name__}: smooth")
        if chain.activation is not None and activation is chain.activation:
            self.place(chain.activation, self._identity(chain.activation))
        if frozen.padding == tnn.frozen_conv.TENSORFLOW_SAME:
            texts.append("TensorFlow SAME padding")
        self.place(chain.conv, frozen)
        self._done(chain.conv, ", ".join(texts))

    def _facts(self, norm: nn.Module | None) -> NormFacts | str | None:
        return None if norm is None else read_norm(norm)

    def _tail(
        self, conv: nn.Module, behind: nn.Module | None, facts: NormFacts | None
    ) -> tuple[nn.Module | None, nn.Module | None]:
        """The activation to fuse, and what has to stand in the norm's place (None: an identity)."""
        inside = [] if facts is None else facts.tail
        candidate = inside[0] if len(inside) == 1 else behind if not inside else None
        plain = None if candidate is None else plain_activation(candidate)
        if plain is None or activation_name(plain) is None or self.keep_apart(conv, candidate):
            candidate = None
        if not inside or candidate is inside[0]:
            return candidate, None
        modules = [self._lean_activation(module) or module for module in inside]
        return candidate, modules[0] if len(modules) == 1 else nn.Sequential(*modules)

    def _swap_norm(self, norm: nn.Module) -> None:
        facts = self.links.out_of_reach(norm) or self._facts(norm)
        if isinstance(facts, str):
            self._keep(norm, f"keeps its input, and its statistics stay live: {facts}")
            return
        # An evaluation BatchNorm is a 1x1 depthwise convolution with a bias.
        channels = facts.norm.num_features
        like = facts.norm.running_mean
        scale = nn.Conv2d(channels, channels, 1, groups=channels, bias=False, device=like.device, dtype=like.dtype)
        nn.init.ones_(scale.weight)
        behind = self.links.after(norm)
        if behind is not None and (plain_activation(behind) is None or behind in self.twins):
            behind = None
        activation, tail = self._tail(norm, behind, facts)
        fused = None if activation is None else plain_activation(activation)
        frozen = FrozenConvBias.from_conv(scale.train(norm.training), facts.norm, fused)
        if activation is not None and activation is behind:
            self.place(behind, self._identity(behind))
        self.place(norm, frozen if tail is None else nn.Sequential(frozen, tail).train(norm.training))
        self._done(norm, "statistics frozen: a scale and a bias" + (", activation fused" if activation else ""))

    def _swap_group_norm(self, norm: nn.GroupNorm) -> None:
        if reason := self.links.out_of_reach(norm) or tampered(norm):
            self._keep(norm, f"keeps its input: {reason}")
            return
        behind = self.links.after(norm)
        plain = None if behind is None or behind in self.twins else plain_activation(behind)
        name = None if plain is None or self.keep_apart(norm, behind) else activation_name(plain)
        self.place(norm, tnn.GroupNorm.from_norm(norm, name))
        if name is not None:
            self.place(behind, self._identity(behind))
        self._done(norm, "keeps its input" + (f", {type(behind).__name__} fused and keeps nothing" if name else ""))

    def _swap_activation(self, module: nn.Module) -> None:
        reason = tampered(module)
        inside_norm = any(isinstance(parent, NORMS) for parent, _ in self._places.get(module, []))
        if not reason and not inside_norm and not self.links.may_lose_in_place(module):
            reason = "it overwrites a tensor that may be read again"
        lean = None if reason else self._lean_activation(module)
        if lean is None:
            self._keep(module, reason or "keeps a full value: its derivative is smooth")
            return
        self.place(module, lean)
        if activation_name(lean) not in FULL_VALUE:  # what those keep is told once it is decided
            self._done(module, "one bit an element")

    def _lean_activation(self, module: nn.Module) -> nn.Module | None:
        plain = plain_activation(module)
        if isinstance(plain, nn.Hardtanh) and not isinstance(plain, nn.ReLU6):
            plain = nn.ReLU6().train(module.training)
        lean = {
            nn.ReLU: tnn.ReLU,
            nn.ReLU6: tnn.ReLU6,
            nn.Hardsigmoid: tnn.Hardsigmoid,
        }.get(type(plain))
        if self.code_bits is not None and type(plain) in (nn.Hardswish, nn.SiLU, nn.GELU):
            option = plain.approximate if type(plain) is nn.GELU else plain.inplace
            return getattr(tnn, type(plain).__name__)(option).train(module.training)
        if type(plain) is nn.LeakyReLU and plain.negative_slope >= 0:
            return tnn.LeakyReLU(plain.negative_slope).train(module.training)
        return None if lean is None else lean().train(module.training)

    def _swap_other(self, module: nn.Module) -> None:
        lean = _lean_pool(module)
        if lean is not None:
            reason = tampered(module)
            if not reason and not self.links.may_lose_in_place(module):
                reason = "it overwrites a tensor that may be read again"
            if reason:
                self._keep(module, reason)
                return
            self.place(module, lean.train(module.training))
            self._done(module, _POOL_TEXTS[type(module)])
        elif isinstance(module, _BatchNorm):
            self._keep(module, "keeps its input, and its statistics stay live: only 2-D BatchNorms are folded")
        elif isinstance(module, NORMS):
            self._keep(module, "needs its normalised input for backward")
        elif isinstance(module, _KEEPS_INPUT):
            self._keep(module, "no lean twin: keeps its input")
        elif isinstance(module, (nn.Sigmoid, nn.Tanh, nn.Mish, nn.ELU, nn.Softplus, nn.PReLU, nn.Softmax)):
            self._keep(module, "keeps a full value: its derivative is smooth or its weight is a parameter")

    def _left(self, wanted: Callable[[nn.Module], bool]) -> list[nn.Module]:
        settled = self.twins.keys() | self._kept
        return [m for m in self.names if m not in settled and m in self._places and wanted(m)]

    @staticmethod
    def _identity(old: nn.Module) -> nn.Identity:
        return nn.Identity().train(old.training)

    def _done(self, module: nn.Module, text: str) -> None:
        self.report.done.append(Note(self.names[module], type(module).__name__, text))

    def _keep(self, module: nn.Module, text: str) -> None:
        self._kept.add(module)
        self.report.kept.append(Note(self.names[module], type(module).__name__, text))


def _lean_pool(module: nn.Module) -> nn.Module | None:
    """The lean twin of a pool or dropout, None where there is none or nothing to save. Exact types only."""
    kind = type(module)
    if kind is nn.AvgPool2d:
        return tnn.AvgPool2d(
            module.kernel_size,
            module.stride,
            module.padding,
            module.ceil_mode,
            module.count_include_pad,
            module.divisor_override,
        )
    # To a single pixel PyTorch takes the mean, which keeps nothing already.
    if kind is nn.AdaptiveAvgPool2d and module.output_size not in (1, (1, 1)):
        return tnn.AdaptiveAvgPool2d(module.output_size)
    if kind is nn.MaxPool2d and not module.return_indices:
        return tnn.MaxPool2d(
            module.kernel_size, module.stride, module.padding, module.dilation, ceil_mode=module.ceil_mode
        )
    if kind is nn.Dropout and module.p > 0:
        return tnn.Dropout(module.p)
    return None


_POOL_TEXTS = {
    nn.AvgPool2d: "keeps nothing",
    nn.AdaptiveAvgPool2d: "keeps nothing",
    nn.MaxPool2d: "keeps the winner's position, 4 bits an output element",
    nn.Dropout: "one bit an element",
}


def untrained_statistics(model: nn.Module) -> list[str]:
    """Names of BatchNorms whose running statistics are still those of a new layer."""
    names = []
    for name, module in model.named_modules():
        count = getattr(module, "num_batches_tracked", None)
        if looks_like_batchnorm(module) and module.running_mean is not None and count is not None and count == 0:
            mean, var = module.running_mean, module.running_var
            if torch.equal(mean, torch.zeros_like(mean)) and torch.equal(var, torch.ones_like(var)):
                names.append(name)
    return names
