"""The authors' checkpoints: files with the names of the once-for-all code base, into our networks."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from os import PathLike
from typing import Any

from torch import Tensor, nn

from ..convert import convert
from ..errors import TinyTLError
from .architectures import PROXYLESSNAS_MOBILE
from .inverted_residual import InvertedResidualNet, NetworkConfig, build, with_lite_residuals
from .net_config import read_net_config
from .standardized import WEIGHT_STANDARDIZATION_EPS
from .weights import read_state_dict

_ENDS = {"stem": "first_conv", "head": "feature_mix_layer"}
_PARTS = {"expand": "inverted_bottleneck", "depthwise": "depth_conv", "project": "point_linear"}
_FUSED_PARTS = {"expand": "expand_conv", "project": "reduce_conv"}
_BLOCK = re.compile(r"blocks\.(\d+)\.")
_SHOWN = 3


def load_official_checkpoint(
    path: str | PathLike[str],
    method: str | None = None,
    *,
    num_classes: int | None = None,
    config: str | PathLike[str] | Mapping[str, Any] | None = None,
    weight_standardization: bool | None = None,
    example_input: Any = None,
    strict: bool = True,
) -> nn.Module:
    """Load a network that the authors of TinyTL published.

    Their ``proxylessnas_mobile+lite_residual@imagenet@ws+gn`` is ProxylessNAS-Mobile with lite residuals, GroupNorm and
    weight standardisation. Its lite residuals were trained on ImageNet together with the backbone, so they are in the
    network whatever the method: trained where the method trains them, else frozen. Read without unpickling objects.

    Args:
        path: A ``torch.save`` file: a dictionary with ``state_dict``, or the state_dict itself.
        method: One of ``tinytl_kernels.METHODS``: the network comes back converted for it. None gives the stock network
            (a ``torch.nn`` model), for :func:`tinytl_kernels.convert` or anything else.
        num_classes: Gives it a new classifier; None keeps the file's.
        config: The ``net.config`` of a specialised network, as a path or what was read from it. None is
            ProxylessNAS-Mobile; whether it has BatchNorm or GroupNorm and lite residuals is seen in the file.
        weight_standardization: Of every convolution. The file does not tell; None standardises beside GroupNorm, as the
            authors do, and follows ``config`` where that says more.
        example_input: As for :func:`tinytl_kernels.convert`; default: a picture of the network's resolution.
        strict: All of the file has to fit. False loads what fits and warns about the rest.

    Returns:
        The network, in evaluation mode.

    Raises:
        TinyTLError: The file is missing, damaged or not the authors', or does not fit: with the first names that are
            missing, unexpected or of another shape.
        ValueError: See :func:`tinytl_kernels.convert`.

    Example:
        >>> file = "proxylessnas_mobile+lite_residual@imagenet@ws+gn"
        >>> model = load_official_checkpoint(file, "lite_residual+bias", num_classes=102)  # doctest: +SKIP
    """
    network = network_from_state(
        read_state_dict(path),
        path,
        None if config is None else read_net_config(config),
        weight_standardization=weight_standardization,
        strict=strict,
    ).eval()
    if method is not None:
        return convert(network, method, num_classes=num_classes, example_input=example_input, inplace=True)
    if num_classes is not None:
        network.reset_classifier(num_classes)
    return network


def has_official_names(state: Mapping[str, Tensor]) -> bool:
    """Whether a state_dict is named as in the authors' code."""
    return "first_conv.conv.weight" in state


def network_from_state(
    state: Mapping[str, Tensor],
    source: str | PathLike[str],
    config: NetworkConfig | None = None,
    *,
    weight_standardization: bool | None = None,
    strict: bool = True,
) -> InvertedResidualNet:
    """The network of a state_dict with the authors' names; ``source`` names it in errors.

    Arguments and errors as :func:`load_official_checkpoint`.
    """
    if not has_official_names(state):
        raise TinyTLError(
            f"checkpoint: {source} is no network of the authors: it has no 'first_conv.conv.weight'; its first name is "
            f"{next(iter(state))!r}"
        )
    # Older files say mobile_inverted_conv where newer ones say conv.
    state = {name.replace(".mobile_inverted_conv.", ".conv."): value for name, value in state.items()}
    config = _proxylessnas_mobile(state) if config is None else config
    standardized = weight_standardization
    if standardized is None:
        standardized = config.norm == "gn" or config.weight_standardization is not None
    eps = config.weight_standardization or WEIGHT_STANDARDIZATION_EPS
    config = replace(config, weight_standardization=eps if standardized else None)
    classifier = state.get("classifier.linear.weight")
    if classifier is not None and classifier.dim() == 2:
        config = replace(config, num_classes=classifier.size(0))
    try:
        model = build(config)
    except ValueError as error:
        raise TinyTLError(f"net.config: {error}") from None
    _load(model, state, f"checkpoint: {source} does not fit {config.name}", strict)
    return model


def official_names(model: InvertedResidualNet, numbers: Sequence[int] | None = None) -> dict[str, str]:
    """How the authors' code names the tensors of ``model``.

    Args:
        model: Ours.
        numbers: Of its blocks in their network, where some blocks may pass their input on; default: 0, 1, 2, ...

    Returns:
        Their name to ours, in the order of ``model.state_dict()``.
    """
    numbers = range(len(model.blocks)) if numbers is None else numbers
    names = {}
    for name in model.state_dict():
        part, *rest = name.split(".")
        if part == "blocks":
            index = int(rest[0])
            parts = _FUSED_PARTS if model.config.blocks[index].fused else _PARTS
            theirs = f"blocks.{numbers[index]}.conv.{_name_in_block(rest[1:], parts)}"
        elif part == "classifier":
            theirs = ".".join(["classifier.linear", *rest])
        else:
            theirs = _dotted(_ENDS[part], rest)
        names[theirs] = name
    return names


def _name_in_block(path: list[str], parts: dict[str, str]) -> str:
    part, *rest = path
    if part == "lite":
        return ".".join(["lite_residual", *rest])
    if part == "main":
        return f"main_branch.{_name_in_block(rest, parts)}"
    if part == "se":
        spatial = parts.get("depthwise", parts["expand"])
        return ".".join([spatial, "se.fc", *rest])
    return _dotted(parts[part], rest)


def _dotted(part: str, rest: list[str]) -> str:
    return ".".join([part, *("bn" if name == "norm" else name for name in rest)])


def _proxylessnas_mobile(state: Mapping[str, Tensor]) -> NetworkConfig:
    norm = "bn" if "first_conv.bn.running_mean" in state else "gn"
    config = replace(PROXYLESSNAS_MOBILE, norm=norm)
    return with_lite_residuals(config) if any(".lite_residual." in name for name in state) else config


def _load(model: InvertedResidualNet, state: Mapping[str, Tensor], trouble: str, strict: bool) -> None:
    numbers = sorted({int(match[1]) for name in state if (match := _BLOCK.match(name))})
    if len(numbers) != len(model.blocks):
        raise TinyTLError(f"{trouble}: expected {len(model.blocks)} blocks, got {len(numbers)}")
    names, own = official_names(model, numbers), model.state_dict()
    # A counter that files of old versions lack, and that nothing reads.
    missing = [name for name in names if name not in state and not name.endswith("num_batches_tracked")]
    reshaped = [name for name in names if name in state and state[name].shape != own[names[name]].shape]
    unexpected = [name for name in state if name not in names]
    told = [
        _first("missing", missing),
        _first("unexpected", unexpected),
        _first(
            "of another shape",
            [f"{n}: expected {tuple(own[names[n]].shape)}, got {tuple(state[n].shape)}" for n in reshaped],
        ),
    ]
    if any(told):
        text = f"{trouble}: {'; '.join(filter(None, told))}"
        if strict:
            raise TinyTLError(text)
        warnings.warn(text, stacklevel=4)
    fitting = {ours: state[name] for name, ours in names.items() if name in state and name not in reshaped}
    model.load_state_dict(fitting, strict=False)


def _first(trouble: str, names: list[str]) -> str:
    more = ", ..." if len(names) > _SHOWN else ""
    return f"{len(names)} {trouble} ({', '.join(names[:_SHOWN])}{more})" if names else ""
