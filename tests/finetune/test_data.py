"""Pictures to tensors and batches: exact, and a function of the seed alone."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from tinytl_kernels.errors import TinyTLError
from tinytl_kernels.finetune import PictureDataset
from tinytl_kernels.finetune.data import (
    TestBatches,
    TrainingBatches,
    central_box,
    make_loader,
    random_box,
)
from tinytl_kernels.finetune.sources import ArraySource
from tinytl_kernels.models import InputConfig

from .conftest import RECIPE, make_data

CONFIG = InputConfig((0.5, 0.4, 0.3), (0.2, 0.3, 0.4), crop=0.5)


def dataset(seed: int = 0, *, training: bool = True) -> PictureDataset:
    return PictureDataset(make_data().train, replace(RECIPE, seed=seed), CONFIG, training=training)


def test_a_picture_is_normalised_as_the_model_wants_it() -> None:
    pixels = np.arange(48, dtype=np.uint8).reshape(1, 6, 8)
    source = ArraySource(["a"], np.array([0]), pixels)
    recipe = replace(RECIPE, resolution=6, crop_scale=1.0, flip=False)
    image, label = PictureDataset(source, recipe, CONFIG, training=False)[0, 0]
    assert (image.shape, image.dtype, label) == ((3, 6, 6), torch.float32, 0)
    square = torch.tensor(pixels[0][:, 1:7]) / 255  # the central square, neither scaled nor cropped
    for channel in range(3):
        expected = (square - CONFIG.mean[channel]) / CONFIG.std[channel]
        torch.testing.assert_close(image[channel], expected)


def test_test_pictures_are_cropped_centrally() -> None:
    assert central_box(20, 10, 1.0) == (5, 0, 15, 10)
    assert central_box(10, 20, 0.5) == (2.5, 7.5, 7.5, 12.5)


def test_flip_mirrors_left_and_right() -> None:
    ramp = np.tile(np.arange(12, dtype=np.uint8) * 20, (1, 12, 1))
    source = ArraySource(["a"], np.array([0]), ramp)
    flipping = PictureDataset(source, replace(RECIPE, crop_scale=1.0), CONFIG, training=True)
    plain = PictureDataset(source, replace(RECIPE, crop_scale=1.0, flip=False), CONFIG, training=True)[0, 0][0]
    seen = {torch.equal(flipping[epoch, 0][0], plain.flip(2)) for epoch in range(20)}
    assert seen == {True, False}
    assert all(
        torch.equal(image, plain) or torch.equal(image, plain.flip(2))
        for image in (flipping[epoch, 0][0] for epoch in range(20))
    )


def test_random_crops_stay_inside_and_above_the_smallest_share() -> None:
    generator = np.random.default_rng(0)
    shares = []
    for _ in range(500):
        left, top, right, bottom = random_box(40, 36, 0.22, generator)
        assert 0 <= left < right <= 40
        assert 0 <= top < bottom <= 36
        shares.append((right - left) * (bottom - top) / (40 * 36))
    assert min(shares) > 0.22 * 0.9  # sides are whole pixels
    assert min(shares) < 0.3
    assert max(shares) > 0.9


def test_a_picture_too_thin_for_any_crop_falls_back_to_the_centre() -> None:
    assert random_box(1, 50, 0.9, np.random.default_rng(0)) == (0, 24.5, 1, 25.5)


def test_a_training_picture_depends_on_seed_epoch_and_index_alone() -> None:
    first = dataset()[2, 5][0]
    torch.manual_seed(99)
    np.random.seed(99)
    assert torch.equal(dataset()[2, 5][0], first)
    for other in (dataset()[3, 5], dataset()[2, 6], dataset(seed=1)[2, 5]):
        assert not torch.equal(other[0], first)


def test_workers_change_nothing() -> None:
    def batches(workers: int) -> list[torch.Tensor]:
        loader = make_loader(dataset(), TrainingBatches(22, 4, seed=3), workers=workers)
        return [part for _ in range(2) for batch in loader for part in batch]

    alone, helped = batches(0), batches(2)
    assert len(alone) == len(helped) == 24
    for one, other in zip(alone, helped, strict=True):
        assert torch.equal(one, other)


def test_a_loader_leaves_the_stream_of_dropout_alone() -> None:
    before = torch.get_rng_state()
    list(make_loader(dataset(), TrainingBatches(22, 4, seed=3)))
    assert torch.equal(torch.get_rng_state(), before)


def test_an_epoch_is_a_permutation_and_the_next_is_another() -> None:
    batches = TrainingBatches(22, 4, seed=3)
    first = [index for batch in batches for _, index in batch]
    batches.epoch = 1
    second = [index for batch in batches for _, index in batch]
    assert sorted(first) == sorted(second) == list(range(22))
    assert first != second


def test_a_start_skips_batches_without_reordering_the_rest() -> None:
    batches = TrainingBatches(22, 4, seed=3)
    whole = list(batches)
    batches.start = 2
    assert list(batches) == whole[2:]
    assert len(batches) == len(whole) - 2


@pytest.mark.parametrize(("count", "batch", "world"), [(22, 2, 2), (23, 2, 3), (9, 4, 2), (5, 1, 4)])
def test_processes_share_the_steps_of_one_process(count: int, batch: int, world: int) -> None:
    """World W and batch B see the steps of one process with batch W B, every picture at most once."""
    alone = [{index for _, index in step} for step in TrainingBatches(count, batch * world, seed=1)]
    ranks = [list(TrainingBatches(count, batch, seed=1, rank=rank, world_size=world)) for rank in range(world)]
    together = [
        [index for part in step for _, index in part]  # the parts of one step
        for step in zip(*ranks, strict=True)
    ]
    assert [set(step) for step in together] == alone[: len(together)]
    assert all(len(set(step)) == len(step) for step in together)
    assert sum(map(len, together)) >= count - world * min(2, batch) + 1
    assert all(batch_of_rank for rank in ranks for batch_of_rank in rank)


def test_a_lone_last_picture_is_left_out() -> None:
    assert TrainingBatches(9, 4, seed=0).sizes == [4, 4]  # one picture has no batch statistics
    assert TrainingBatches(10, 4, seed=0).sizes == [4, 4, 2]
    assert TrainingBatches(3, 1, seed=0).sizes == [1, 1, 1]


def test_too_few_pictures_are_an_error() -> None:
    with pytest.raises(TinyTLError, match="too few"):
        TrainingBatches(3, 1, seed=0, world_size=4)


@pytest.mark.parametrize(("count", "world"), [(7, 1), (7, 2), (1, 3), (8, 4)])
def test_every_test_picture_is_seen_once(count: int, world: int) -> None:
    seen = [index for rank in range(world) for batch in TestBatches(count, 2, rank, world) for _, index in batch]
    assert sorted(seen) == list(range(count))


def test_a_limit_keeps_the_share_of_every_class() -> None:
    data = make_data(train=60, test=7)  # classes follow each other as 0 1 2 0 1 2: every third picture is one class
    limited = data.limited(20, 3)
    assert np.bincount(limited.train.labels).tolist() in ([7, 7, 6], [7, 6, 7], [6, 7, 7])
    assert np.bincount(limited.test.labels).tolist() == [1, 1, 1]
    assert limited.train.indices.tolist() == sorted(set(limited.train.indices.tolist()))
    assert data.limited(None, 100).test is data.test
    with pytest.raises(TinyTLError, match="at least one"):
        make_data().limited(0, None)
