"""From a model's name to the converted model that trains."""

from __future__ import annotations

import torch
from torch import nn

from ..convert import METHODS, convert
from ..errors import TinyTLError
from ..models import build_model, set_dropout
from .recipe import Recipe

__all__ = ["METHODS", "prepare"]


def prepare(
    name: str,
    method: str,
    num_classes: int,
    recipe: Recipe,
    *,
    pretrained: bool = True,
    weights: str | None = None,
) -> nn.Module:
    """Build, set the dropout, convert. New layers are initialised from ``recipe.seed`` alone.

    Args:
        name: See :func:`tinytl_kernels.models.build_model`.
        method: One of ``METHODS``.
        num_classes: Outputs of the new classifier.
        recipe: Its seed, dropout, resolution and weight bits count here.
        pretrained: Load the library's weights.
        weights: A local state_dict instead.

    Returns:
        The converted model, on the CPU.

    Raises:
        TinyTLError: The model cannot be built or converted.
    """
    torch.manual_seed(recipe.seed)
    model = build_model(name, pretrained=pretrained, weights=weights)
    set_dropout(model, recipe.dropout)
    torch.manual_seed(recipe.seed)  # building a model draws random numbers, loading one does not
    example = torch.zeros(1, 3, recipe.resolution, recipe.resolution)
    try:
        return convert(
            model, method, num_classes=num_classes, example_input=example, inplace=True,
            weight_bits=recipe.weight_bits, weight_code=recipe.weight_code,
        )  # fmt: skip
    except (ValueError, NotImplementedError, RuntimeError) as error:
        raise TinyTLError(f"cannot convert {name} for {method!r}: {error}") from error
