"""The ``net.config`` files that lie beside the authors' networks: the once-for-all code base's JSON, read strictly.

Whatever the builder cannot represent exactly is refused by name; nothing is passed over in silence.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import Any

from ..errors import TinyTLError
from .inverted_residual import BlockConfig, InvertedResidualNet, LiteConfig, NetworkConfig, build

SE_RATIO = 0.25
_ACTIVATIONS = {"relu": "relu", "relu6": "relu6", "h_swish": "hardswish"}
_REQUIRED = object()


def from_config(
    config: str | PathLike[str] | Mapping[str, Any], *, num_classes: int | None = None
) -> InvertedResidualNet:
    """Build the network of a ``net.config``: ProxylessNAS and MCUNet networks, and TinyTL's specialised ones.

    Read are inverted residual blocks (``MBConvLayer``, also with squeeze-and-excite and grouped convolutions), reduced
    ones (``ReducedMBConvLayer``), lite residuals around them (``LiteResidualModule``), and ``ZeroLayer``, which leaves
    a block out; BatchNorm or GroupNorm, with or without weight standardisation.

    Args:
        config: Path of the JSON file, or what was read from it.
        num_classes: Outputs of the classifier; None takes the file's.

    Returns:
        The network with random weights, in training mode. :func:`load_official_checkpoint` takes the same ``config``
        together with the weights.

    Raises:
        TinyTLError: The file cannot be read, or an entry is missing, unknown, or says something that cannot be built;
            the message names the entry.

    Example:
        >>> conv = dict(name="ConvLayer", kernel_size=3, stride=2, in_channels=3, out_channels=8, act_func="relu6")
        >>> block = dict(name="MBConvLayer", in_channels=8, out_channels=8, kernel_size=5, expand_ratio=4)
        >>> model = from_config(dict(
        ...     name="ProxylessNASNets", first_conv=conv, feature_mix_layer=None,
        ...     blocks=[dict(name="ResidualBlock", conv=block, shortcut=dict(name="IdentityLayer"))],
        ...     classifier=dict(name="LinearLayer", in_features=8, out_features=10)))
        >>> model.blocks[0].shortcut
        True
    """
    network = read_net_config(config)
    if num_classes is not None:
        network = replace(network, num_classes=num_classes)
    try:
        return build(network)
    except ValueError as error:
        raise TinyTLError(f"net.config: {error}") from None


def read_net_config(config: str | PathLike[str] | Mapping[str, Any]) -> NetworkConfig:
    """The configuration in a ``net.config``; arguments and errors as :func:`from_config`."""
    top = _Entry(config if isinstance(config, Mapping) else _read_json(Path(config)), "")
    top.only("name", "ProxylessNASNets")
    norm = top.entry("bn", {"momentum": 0.1, "eps": 1e-3})
    stem = _conv(top.entry("first_conv"))
    width = stem["out_channels"]
    blocks: list[BlockConfig] = []
    entries = top.take("blocks", list)
    for index, value in enumerate(entries):
        block = _block(_Entry(value, f"blocks[{index}]"), width)
        if block is not None:
            blocks.append(block)
            width = block.out_channels
    mix = top.take("feature_mix_layer", (dict, None))
    head = None
    if mix is not None:
        head = _conv(_Entry(mix, "feature_mix_layer"), width)
        for name, expected in (("kernel_size", 1), ("stride", 1), ("activation", stem["activation"])):
            if head[name] != expected:
                raise _error(f"feature_mix_layer: {name}", f"{expected!r}, as this builder knows it", head[name])
        width = head["out_channels"]
    if not blocks:
        raise _error("blocks", "at least one with a convolution", f"{len(entries)} without")
    classifier = _classifier(top.entry("classifier"), width)
    resolution = top.take("resolution", int, 224)
    per_group = norm.take("gn_channel_per_group", (int, None), None)
    momentum = norm.take("momentum", (float, None), None)
    options = {
        "norm": "bn" if per_group is None else "gn",
        "norm_eps": norm.take("eps", float),
        "norm_momentum": 0.1 if momentum is None else momentum,
        "weight_standardization": norm.take("ws_eps", (float, None), None),
    }
    if per_group is not None:
        options["channels_per_group"] = per_group
    norm.finish()
    top.finish()
    try:
        return NetworkConfig(
            name="net.config",
            blocks=tuple(blocks),
            in_channels=stem["in_channels"],
            stem_channels=stem["out_channels"],
            stem_kernel_size=stem["kernel_size"],
            stem_stride=stem["stride"],
            head_channels=None if head is None else head["out_channels"],
            activation=stem["activation"],
            resolution=resolution,
            **classifier,
            **options,
        )
    except ValueError as error:
        raise TinyTLError(f"net.config: {error}") from None


def _block(entry: _Entry, width: int) -> BlockConfig | None:
    """One residual block; None where it passes its input on."""
    entry.only("name", "MobileInvertedResidualBlock", "ResidualBlock")
    key = "conv" if "conv" in entry.left else "mobile_inverted_conv"
    conv = entry.take(key, (dict, None))
    shortcut = _shortcut(entry)
    entry.finish()
    # In the authors' code a block without a convolution is the identity, with a shortcut or without.
    if conv is None or conv.get("name") == "ZeroLayer":
        return None
    conv = _Entry(conv, f"{entry.where}.{key}")
    if conv.left.get("name") != "LiteResidualModule":
        block = _inverted_residual(conv, width, shortcut)
    else:
        conv.take("name", str)
        block = _inverted_residual(conv.entry("main"), width, shortcut)
        block = replace(block, lite=_lite(conv.entry("lite_residual"), width, block))
        conv.finish()
    return block


def _shortcut(entry: _Entry) -> bool:
    value = entry.take("shortcut", (dict, None))
    if value is None:
        return False
    shortcut = _Entry(value, f"{entry.where}.shortcut")
    if shortcut.only("name", "IdentityLayer", "ZeroLayer") == "ZeroLayer":
        return False
    # The channels are not read: they cannot differ, and some files have them as a number, some in a list.
    for name in ("in_channels", "out_channels"):
        shortcut.left.pop(name, None)
    _plain_layer(shortcut, use_bn=False)
    shortcut.only("act_func", None, default=None)
    shortcut.finish()
    return True


def _inverted_residual(entry: _Entry, width: int, shortcut: bool) -> BlockConfig:
    fused = entry.only("name", "MBConvLayer", "MBInvertedConvLayer", "ReducedMBConvLayer") == "ReducedMBConvLayer"
    entry.only("in_channels", width)
    expand_ratio = entry.take("expand_ratio", float, 6)
    mid_channels = entry.take("mid_channels", (int, None), None)
    hidden = mid_channels or round(width * expand_ratio)
    groups = entry.take("groups", (int, None), 1 if fused else None)
    if groups is not None:
        if groups < 1:
            raise _error(f"{entry.where}.groups", "at least 1", groups)
        # The authors' code takes the next smaller number that divides.
        groups = max(n for n in range(1, min(groups, hidden) + 1) if hidden % n == 0)
    options = {
        "out_channels": entry.take("out_channels", int),
        "kernel_size": entry.take("kernel_size", int, 3),
        "stride": entry.take("stride", int, 1),
        "activation": entry.activation("act_func", "relu6"),
        "se_ratio": SE_RATIO if entry.take("use_se", bool, False) else None,
    }
    entry.finish()
    try:
        return BlockConfig(
            expand_ratio=expand_ratio,
            mid_channels=mid_channels,
            groups=hidden if fused and groups is None else groups,
            fused=fused,
            shortcut=shortcut,
            **options,
        )
    except ValueError as error:
        raise TinyTLError(f"net.config: {entry.where}: {error}") from None


def _lite(entry: _Entry, width: int, block: BlockConfig) -> LiteConfig:
    entry.only("in_channels", width)
    entry.only("out_channels", block.out_channels)
    entry.only("stride", block.stride, default=1)
    entry.only("upsample_type", "bilinear", default="bilinear")
    activation = entry.activation("act_func", "relu")
    if activation not in ("relu", "relu6"):
        raise _error(f"{entry.where}.act_func", "'relu' or 'relu6'", activation)
    downsample = entry.take("downsample_ratio", (int, None), 2)
    kernel_size = entry.take("kernel_size", int, 3)
    lite = LiteConfig(
        kernel_size=1 if downsample is None else kernel_size,
        expand=entry.take("expand", float, 1.0),
        groups=entry.take("n_groups", int, 2),
        downsample=downsample,
        activation=activation,
    )
    entry.finish()
    return lite


def _conv(entry: _Entry, width: int | None = None) -> dict[str, Any]:
    """A convolution with norm and activation outside the blocks."""
    entry.only("name", "ConvLayer")
    if width is not None:
        entry.only("in_channels", width)
    read = {
        "in_channels": width or entry.take("in_channels", int),
        "out_channels": entry.take("out_channels", int),
        "kernel_size": entry.take("kernel_size", int, 3),
        "stride": entry.take("stride", int, 1),
        "activation": entry.activation("act_func", "relu"),
    }
    entry.only("dilation", 1, default=1)
    entry.only("groups", 1, default=1)
    for name in ("bias", "has_shuffle", "use_se"):
        entry.only(name, False, default=False)
    _plain_layer(entry, use_bn=True)
    entry.finish()
    return read


def _classifier(entry: _Entry, width: int) -> dict[str, Any]:
    entry.only("name", "LinearLayer")
    entry.only("in_features", width)
    entry.only("bias", True, default=True)
    entry.only("act_func", None, default=None)
    entry.only("use_bn", False, default=False)
    entry.only("ops_order", "weight_bn_act", default="weight_bn_act")
    read = {"num_classes": entry.take("out_features", int), "dropout": entry.take("dropout_rate", float, 0.0)}
    entry.finish()
    return read


def _plain_layer(entry: _Entry, *, use_bn: bool) -> None:
    entry.only("use_bn", use_bn, default=use_bn)
    entry.only("dropout_rate", 0, default=0)
    entry.only("ops_order", "weight_bn_act", default="weight_bn_act")


class _Entry:
    """One object of the file: every entry is taken once, and none may be left over."""

    def __init__(self, value: Any, where: str) -> None:
        if not isinstance(value, Mapping):
            raise _error(where, "an object", value)
        self.where = where
        self.left = dict(value)

    def take(self, name: str, kinds: Any, default: Any = _REQUIRED) -> Any:
        """The entry ``name``, of one of ``kinds`` (``float`` takes whole numbers too; None stands for null)."""
        value = self.left.pop(name, default)
        if value is _REQUIRED:
            raise TinyTLError(f"net.config: {self._path(name)}: missing")
        kinds = kinds if isinstance(kinds, tuple) else (kinds,)
        if not any(_is_a(value, kind) for kind in kinds):
            expected = " or ".join("null" if kind is None else _KINDS[kind] for kind in kinds)
            raise _error(self._path(name), expected, value)
        return value

    def only(self, name: str, *allowed: Any, default: Any = _REQUIRED) -> Any:
        """The entry ``name``, which has to be one of ``allowed``."""
        value = self.left.pop(name, default)
        if value is _REQUIRED:
            raise TinyTLError(f"net.config: {self._path(name)}: missing")
        if not any(value == one and type(value) in (type(one), int, float) for one in allowed):
            raise _error(self._path(name), " or ".join(map(repr, allowed)), value)
        return value

    def activation(self, name: str, default: str) -> str:
        return _ACTIVATIONS[self.only(name, *_ACTIVATIONS, default=default)]

    def entry(self, name: str, default: Any = _REQUIRED) -> _Entry:
        return _Entry(self.take(name, dict, default), self._path(name))

    def finish(self) -> None:
        if self.left:
            raise TinyTLError(f"net.config: {self._path(next(iter(self.left)))}: unknown entry")

    def _path(self, name: str) -> str:
        return f"{self.where}.{name}" if self.where else name


_KINDS = {int: "a whole number", float: "a number", str: "a string", bool: "true or false", dict: "an object"} | {
    list: "a list"
}


def _is_a(value: Any, kind: Any) -> bool:
    if kind is None:
        return value is None
    if kind is not bool and isinstance(value, bool):
        return False
    return isinstance(value, {float: (int, float), dict: Mapping, list: (list, tuple)}.get(kind, kind))


def _error(where: str, expected: str, got: Any) -> TinyTLError:
    return TinyTLError(f"net.config: {where or 'the file'}: expected {expected}, got {str(got)[:80]!r}")


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise TinyTLError(f"net.config: no such file: {path}") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise TinyTLError(f"net.config: cannot read {path} as JSON ({type(error).__name__}: {error})") from error
