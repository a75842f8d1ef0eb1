"""The recipe: the paper's hyper-parameters as defaults, by data set and batch size."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

import torch

from ..core.quantization import CODES
from ..errors import TinyTLError
from .adam8bit import Adam8bit

OPTIMIZERS: dict[str, type[torch.optim.Optimizer]] = {"adam": torch.optim.Adam, "adam8bit": Adam8bit}

# Learning rate and label smoothing at batch 8 for the paper's data sets (the authors' training code).
_PAPER: dict[str, tuple[float, float]] = {
    "aircraft": (1.6e-3, 0.7),
    "cars": (8e-4, 0.7),
    "cub200": (6e-4, 0.7),
    "cifar10": (3e-4, 0.1),
    "cifar100": (3e-4, 0.1),
    "flowers102": (2e-4, 0.7),
    "food101": (2e-4, 0.1),
    "pets": (5e-5, 0.7),
}
# At batch 1 the authors searched again; the square-root rule below would give 5.7e-4, 2.8e-4 and 0.7e-4.
_PAPER_BATCH_1 = {"aircraft": 3e-4, "cars": 2e-4, "flowers102": 3e-4}
# torchvision's names of the same data sets.
_ALIASES = {
    "fgvcaircraft": "aircraft",
    "stanfordcars": "cars",
    "cub_200_2011": "cub200",
    "oxfordiiitpet": "pets",
    "flowers": "flowers102",
    "food": "food101",
}
# What the embedded digits take instead: small grey pictures, minutes on a laptop.
_DIGITS = {"epochs": 3, "resolution": 64, "learning_rate": 1e-3, "crop_scale": 1.0, "flip": False}


@dataclass(frozen=True)
class Recipe:
    """How one model is fine-tuned. Adam, cosine to zero at every step, no warm-up: section 4.1 of the paper.

    Args:
        learning_rate: Adam's, at the first step; :meth:`for_data` chooses it by data set and batch size.
        epochs: Passes over the training pictures.
        batch_size: Pictures a forward pass, in one process.
        accumulate: Forward passes a step; gradients are averaged over all their pictures.
        label_smoothing: Share of the target spread over all classes.
        weight_decay: Adam's L2 penalty.
        dropout: Before the classifier, where the model has a dropout there.
        resolution: Height and width in pixels.
        crop_scale: Smallest share of a training picture's area that a random crop keeps; 1 turns crops off.
        flip: Mirror training pictures left to right with probability 1/2.
        amp: None, "bfloat16" or "float16": the dtype of ``torch.autocast``.
        weight_bits: 8 holds the frozen weights in 8 bits, 32 leaves them; see :func:`tinytl_kernels.convert`.
        weight_code: How 8 bits code a weight: "int8" or "kmeans".
        channels_last: Keep activations in channels_last, the layout the kernels compute in.
        seed: Of everything random: new layers, order, crops, dropout.
        optimizer: "adam", or "adam8bit" with a quarter of its state; see :class:`~tinytl_kernels.finetune.Adam8bit`.
    """

    learning_rate: float = 3e-4
    epochs: int = 50
    batch_size: int = 8
    accumulate: int = 1
    label_smoothing: float = 0.1
    weight_decay: float = 0.0
    dropout: float = 0.2
    resolution: int = 224
    crop_scale: float = 0.22
    flip: bool = True
    amp: str | None = None
    weight_bits: int = 32
    weight_code: str = "int8"
    channels_last: bool = True
    seed: int = 0
    optimizer: str = "adam"

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "accumulate", "resolution"):
            if getattr(self, name) < 1:
                raise TinyTLError(f"{name}: expected at least 1, got {getattr(self, name)}")
        if not (math.isfinite(self.learning_rate) and self.learning_rate > 0):
            raise TinyTLError(f"learning_rate: expected a positive number, got {self.learning_rate}")
        if not self.weight_decay >= 0:
            raise TinyTLError(f"weight_decay: expected 0 or more, got {self.weight_decay}")
        for name in ("label_smoothing", "dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise TinyTLError(f"{name}: expected a number in [0, 1), got {getattr(self, name)}")
        if not 0 < self.crop_scale <= 1:
            raise TinyTLError(f"crop_scale: expected a share in (0, 1], got {self.crop_scale}")
        if self.optimizer not in OPTIMIZERS:
            raise TinyTLError(f"optimizer: expected one of {', '.join(OPTIMIZERS)}, got {self.optimizer!r}")
        if self.weight_bits not in (8, 32):
            raise TinyTLError(f"weight_bits: expected 8 or 32, got {self.weight_bits}")
        if self.weight_code not in CODES:
            raise TinyTLError(f"weight_code: expected one of {', '.join(CODES)}, got {self.weight_code!r}")
        if self.amp not in (None, "bfloat16", "float16"):
            raise TinyTLError(f"amp: expected bfloat16 or float16, got {self.amp!r}")

    @classmethod
    def for_data(cls, name: str, *, world_size: int = 1, **overrides: object) -> Recipe:
        """The defaults for a data set, changed by what is given.

        Args:
            name: As :func:`~tinytl_kernels.finetune.load_data` takes it; an unknown data set gets CIFAR's values.
            world_size: Processes that train together; the learning rate looks at the pictures of a whole step.
            **overrides: Fields of the recipe; None means the default.

        Example:
            >>> Recipe.for_data("torchvision:FGVCAircraft", batch_size=8).learning_rate
            0.0016
        """
        unknown = set(overrides) - {field.name for field in fields(cls)}
        if unknown:
            raise TypeError(f"Recipe has no field {sorted(unknown)[0]!r}")
        chosen: dict = {key: value for key, value in overrides.items() if value is not None}
        defaults: dict = {}
        if name == "digits":
            defaults.update(_DIGITS)
        if is_drawn(name):
            defaults["flip"] = False
        key = _paper_key(name)
        if key in _PAPER:
            defaults["label_smoothing"] = _PAPER[key][1]
        step = chosen.get("batch_size", cls.batch_size) * chosen.get("accumulate", 1) * world_size
        base = defaults.get("learning_rate", _PAPER.get(key, (cls.learning_rate, 0.0))[0])
        defaults["learning_rate"] = base * math.sqrt(step / 8)
        if step == 1 and key in _PAPER_BATCH_1:
            defaults["learning_rate"] = _PAPER_BATCH_1[key]
        return cls(**{**defaults, **chosen})

    def learning_rate_at(self, step: int, total_steps: int) -> float:
        """The cosine: ``learning_rate * (1 + cos(pi * step / total_steps)) / 2`` for step 0, 1, ...; 0 at the end."""
        return self.learning_rate * 0.5 * (1 + math.cos(math.pi * step / total_steps))


def _paper_key(name: str) -> str:
    short = name.rpartition(":")[2].lower()
    return _ALIASES.get(short, short)


def is_drawn(name: str) -> bool:
    """Whether the data set is of characters or signs, which a mirror turns into others."""
    return _paper_key(name) in {
        "digits",
        "mnist",
        "emnist",
        "kmnist",
        "qmnist",
        "usps",
        "svhn",
        "omniglot",
        "semeion",
        "gtsrb",
        "renderedsst2",
    }
