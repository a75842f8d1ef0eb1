"""Pictures to tensors: crops, flips, normalisation, and batches whose order depends on the seed alone.

What happens to picture ``index`` in epoch ``epoch`` is a function of ``(seed, epoch, index)``: the same with any
number of worker processes, and after a resume.
"""

from __future__ import annotations

import math
import signal
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate

from ..errors import TinyTLError
from ..models import InputConfig
from . import sources
from .recipe import Recipe


@dataclass(frozen=True)
class Data:
    """A data set ready to train on: its name, its classes, and the pictures of both parts."""

    name: str
    classes: list[str]
    train: sources.Source
    test: sources.Source

    def limited(self, train: int | None, test: int | None) -> Data:
        """The same with at most so many pictures a part, every class keeping its share; None keeps all."""
        return replace(self, train=_spread(self.train, train), test=_spread(self.test, test))


def load_data(
    name: str,
    *,
    root: str | Path = "data",
    download: bool = False,
    test_share: float = 0.2,
    split_seed: int = 0,
) -> Data:
    """Open a data set.

    Args:
        name: ``digits`` (in scikit-learn, nothing to download), ``torchvision:NAME``, or a folder of pictures:
            ``FOLDER/CLASS/x.jpg``, or the same below ``FOLDER/train`` and ``FOLDER/val``.
        root: Where torchvision keeps its data sets.
        download: Let torchvision fetch what is not there.
        test_share: Share of each class to test on, where the data come in one part.
        split_seed: Of that split; it does not follow the training seed.

    Raises:
        TinyTLError: Nothing of that name, or it cannot be read.
    """
    if name == "digits":
        train, test = sources.digits()
    elif name.startswith("torchvision:"):
        short = name.removeprefix("torchvision:")
        train, test = sources.torchvision_dataset(
            short, Path(root), download=download, test_share=test_share, split_seed=split_seed
        )
    elif Path(name).exists():
        train, test = sources.image_folder(Path(name), test_share=test_share, split_seed=split_seed)
    else:
        raise TinyTLError(f"data: no folder {name!r}; data are digits, torchvision:NAME (CIFAR10, ...) or a folder")
    return Data(name, train.classes, train, test)


def _spread(source: sources.Source, count: int | None) -> sources.Source:
    if count is None or count >= len(source.labels):
        return source
    if count < 1:
        raise TinyTLError(f"expected at least one picture a part, got {count}")
    # Evenly over the pictures sorted by class: every class keeps its share, whatever the order they come in.
    by_class = np.argsort(source.labels, kind="stable")
    return sources.Subset(source, np.sort(by_class[(2 * np.arange(count) + 1) * len(by_class) // (2 * count)]))


class PictureDataset(Dataset):
    """Pictures as float32 tensors, shape (3, resolution, resolution), normalised for the model.

    Indexed by ``(epoch, index)``; training pictures are cropped and flipped at random, test pictures centrally.

    Args:
        source: The pictures.
        recipe: Resolution, crops, flips, seed.
        config: The model's normalisation and test crop.
        training: Random crops and flips.
    """

    def __init__(self, source: sources.Source, recipe: Recipe, config: InputConfig, *, training: bool) -> None:
        self.source, self.recipe, self.training = source, recipe, training
        self.crop = config.crop
        self.scale = torch.tensor([1 / (255 * std) for std in config.std]).view(3, 1, 1)
        self.shift = torch.tensor([-mean / std for mean, std in zip(config.mean, config.std, strict=True)]).view(
            3, 1, 1
        )

    def __len__(self) -> int:
        return len(self.source.labels)

    def __getitem__(self, key: tuple[int, int]) -> tuple[torch.Tensor, int]:
        epoch, index = key
        picture = self.source.load(index)
        width, height = picture.size
        side = self.recipe.resolution
        box, flip = central_box(width, height, self.crop if self.recipe.crop_scale < 1 else 1.0), False
        if self.training:
            generator = np.random.default_rng((self.recipe.seed, epoch, index))
            flip = self.recipe.flip and generator.random() < 0.5
            if self.recipe.crop_scale < 1:
                box = random_box(width, height, self.recipe.crop_scale, generator)
        picture = picture.resize((side, side), resample=2, box=box)  # 2: bilinear, antialiased when shrinking
        pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1)
        if flip:
            pixels = pixels.flip(2)
        return pixels * self.scale + self.shift, int(self.source.labels[index])


def central_box(width: int, height: int, share: float) -> tuple[float, float, float, float]:
    """The central square of ``share`` times the shorter side: what a resize and a central crop leave."""
    side = min(width, height) * share
    left, top = (width - side) / 2, (height - side) / 2
    return left, top, left + side, top + side


def random_box(
    width: int, height: int, smallest: float, generator: np.random.Generator
) -> tuple[float, float, float, float]:
    """A random-resized-crop: area share uniform in [smallest, 1], aspect ratio log-uniform in [3/4, 4/3]."""
    for _ in range(10):
        area = width * height * generator.uniform(smallest, 1)
        ratio = math.exp(generator.uniform(math.log(3 / 4), math.log(4 / 3)))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            left, top = generator.integers(width - w + 1), generator.integers(height - h + 1)
            return left, top, left + w, top + h
    return central_box(width, height, 1.0)


class TrainingBatches(Sampler[list[tuple[int, int]]]):
    """The shuffled batches of one epoch for one process, as lists of ``(epoch, index)``.

    All processes draw the same permutation of the pictures, cut it into steps of ``world_size * batch_size`` and take
    every ``world_size``-th picture of each, so that N processes of batch B see the same steps as one of batch N B.
    The last step may be smaller; it is left out if a process would get nothing, or a lone picture (which has no
    batch statistics).

    Args:
        count: Pictures in the data set.
        batch_size: Pictures a batch, in one process.
        seed: With the epoch, decides the order.
        rank: This process.
        world_size: Processes.
    """

    def __init__(self, count: int, batch_size: int, seed: int, rank: int = 0, world_size: int = 1) -> None:
        self.count, self.batch_size, self.seed = count, batch_size, seed
        self.rank, self.world_size = rank, world_size
        self.epoch, self.start = 0, 0
        step = batch_size * world_size
        whole, rest = divmod(count, step)
        least = world_size * min(2, batch_size)
        self.sizes = [step] * whole + ([rest] if rest >= least else [])
        if not self.sizes:
            raise TinyTLError(f"data: {count} training picture(s) are too few for {world_size} process(es)")

    def __len__(self) -> int:
        return len(self.sizes) - self.start

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        order = np.random.default_rng((self.seed, self.epoch)).permutation(self.count)
        first = self.start * self.batch_size * self.world_size
        for size in self.sizes[self.start :]:
            yield [(self.epoch, int(index)) for index in order[first + self.rank : first + size : self.world_size]]
            first += size


class TestBatches(Sampler[list[tuple[int, int]]]):
    """Every test picture exactly once over all processes, in order: process ``rank`` takes each ``world_size``-th."""

    __test__ = False  # not a test case, whatever pytest thinks of the name

    def __init__(self, count: int, batch_size: int, rank: int = 0, world_size: int = 1) -> None:
        self.indices, self.batch_size = range(rank, count, world_size), batch_size

    def __len__(self) -> int:
        return math.ceil(len(self.indices) / self.batch_size)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for first in range(0, len(self.indices), self.batch_size):
            yield [(0, index) for index in self.indices[first : first + self.batch_size]]


def make_loader(dataset: PictureDataset, batches: Sampler, *, workers: int = 0, pin_memory: bool = False) -> DataLoader:
    """A DataLoader over ``batches``; it draws from a generator of its own, so that dropout's stream is left alone."""
    return DataLoader(
        _Guarded(dataset),
        batch_sampler=batches,
        num_workers=workers,
        pin_memory=pin_memory,
        generator=torch.Generator(),
        persistent_workers=workers > 0,
        worker_init_fn=_start_worker,
        collate_fn=_collate,
    )


def batches_of(loader: DataLoader) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """The batches of a loader that :func:`make_loader` made.

    Raises:
        TinyTLError: A picture cannot be read.
    """
    for batch in loader:
        if isinstance(batch, str):
            raise TinyTLError(batch)
        yield batch


class _Guarded(Dataset):
    """Hands an error over as its text: raised in a worker it would arrive wrapped in that process's traceback, and
    the loader would wait five seconds a worker before it lets go (torch 2.13)."""

    def __init__(self, dataset: PictureDataset) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, key: tuple[int, int]) -> tuple[torch.Tensor, int] | str:
        try:
            return self.dataset[key]
        except TinyTLError as error:
            return str(error)


def _collate(samples: list[tuple[torch.Tensor, int] | str]) -> list[torch.Tensor] | str:
    """Stack the samples, or hand over the first error among them."""
    return next((sample for sample in samples if isinstance(sample, str)), None) or default_collate(samples)


def _start_worker(worker: int) -> None:
    torch.set_num_threads(1)
    # Ctrl-C reaches every process of the terminal; the training process decides what it means.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
