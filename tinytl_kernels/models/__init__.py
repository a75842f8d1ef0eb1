"""Backbones by name: timm's, torchvision's, and the one the demo uses."""

from .zoo import InputConfig, build_model, import_timm, import_torchvision, input_config, set_dropout

__all__ = ["InputConfig", "build_model", "import_timm", "import_torchvision", "input_config", "set_dropout"]
