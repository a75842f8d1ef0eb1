"""The paper's hyper-parameters."""

from __future__ import annotations

import math

import pytest

from tinytl_kernels.errors import TinyTLError
from tinytl_kernels.finetune import Recipe


@pytest.mark.parametrize(
    ("name", "rate", "smoothing"),
    [
        ("torchvision:FGVCAircraft", 1.6e-3, 0.7),
        ("torchvision:StanfordCars", 8e-4, 0.7),
        ("torchvision:CIFAR10", 3e-4, 0.1),
        ("torchvision:CIFAR100", 3e-4, 0.1),
        ("torchvision:Flowers102", 2e-4, 0.7),
        ("torchvision:Food101", 2e-4, 0.1),
        ("torchvision:OxfordIIITPet", 5e-5, 0.7),
    ],
)
def test_the_papers_data_sets_get_the_papers_values(name: str, rate: float, smoothing: float) -> None:
    recipe = Recipe.for_data(name)
    assert (recipe.learning_rate, recipe.label_smoothing) == (rate, smoothing)
    assert (recipe.epochs, recipe.batch_size, recipe.resolution) == (50, 8, 224)
    assert (recipe.weight_decay, recipe.dropout, recipe.crop_scale) == (0.0, 0.2, 0.22)
    assert recipe.flip


def test_batch_one_takes_the_papers_own_search() -> None:
    assert Recipe.for_data("torchvision:FGVCAircraft", batch_size=1).learning_rate == 3e-4
    assert Recipe.for_data("torchvision:Flowers102", batch_size=1).learning_rate == 3e-4


def test_learning_rate_follows_the_pictures_of_a_step() -> None:
    by_batch = Recipe.for_data("x", batch_size=32).learning_rate
    assert by_batch == pytest.approx(3e-4 * 2)
    assert Recipe.for_data("x", batch_size=8, accumulate=4).learning_rate == pytest.approx(by_batch)
    assert Recipe.for_data("x", batch_size=8, world_size=4).learning_rate == pytest.approx(by_batch)
    assert Recipe.for_data("x", batch_size=32, learning_rate=0.5).learning_rate == 0.5


@pytest.mark.parametrize("name", ["digits", "torchvision:MNIST", "torchvision:SVHN", "torchvision:EMNIST"])
def test_characters_are_not_mirrored(name: str) -> None:
    assert not Recipe.for_data(name).flip
    assert Recipe.for_data(name, flip=True).flip


def test_cosine_starts_full_halves_midway_and_ends_at_zero() -> None:
    recipe = Recipe(learning_rate=0.4)
    assert recipe.learning_rate_at(0, 10) == 0.4
    assert recipe.learning_rate_at(5, 10) == pytest.approx(0.2)
    assert recipe.learning_rate_at(10, 10) == pytest.approx(0, abs=1e-12)
    rates = [recipe.learning_rate_at(step, 10) for step in range(11)]
    assert rates == sorted(rates, reverse=True)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("epochs", 0),
        ("batch_size", -1),
        ("accumulate", 0),
        ("resolution", 0),
        ("learning_rate", 0.0),
        ("learning_rate", math.nan),
        ("learning_rate", math.inf),
        ("weight_decay", -1e-4),
        ("weight_decay", math.nan),
        ("label_smoothing", 1.0),
        ("dropout", -0.1),
        ("crop_scale", 0.0),
        ("crop_scale", 1.5),
        ("amp", "float64"),
        ("weight_bits", 4),
        ("weight_code", "int4"),
    ],
)
def test_a_value_out_of_range_names_its_field(field: str, value: object) -> None:
    with pytest.raises(TinyTLError, match=field):
        Recipe(**{field: value})


def test_an_unknown_field_is_a_type_error() -> None:
    with pytest.raises(TypeError, match="'epoch'"):
        Recipe.for_data("digits", epoch=3)
