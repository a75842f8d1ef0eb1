"""Where pictures come from: an image folder, a torchvision data set, or scikit-learn's handwritten digits."""

from __future__ import annotations

import difflib
import inspect
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np

from ..errors import TinyTLError, missing_extra
from ..models import import_torchvision

if TYPE_CHECKING:
    from PIL.Image import Image

EXTENSIONS = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".ppm", ".pgm", ".tif", ".tiff", ".webp")
_TRAIN_NAMES = ("train", "training")
_TEST_NAMES = ("val", "valid", "validation", "test")


class Source(Protocol):
    """Labelled pictures: ``labels[i]`` is an index into ``classes``; ``load(i)`` decodes picture i as RGB."""

    classes: list[str]
    labels: np.ndarray

    def load(self, index: int) -> Image: ...


@dataclass
class ArraySource:
    """Grey pictures in memory, uint8, shape (pictures, H, W)."""

    classes: list[str]
    labels: np.ndarray
    pictures: np.ndarray

    def load(self, index: int) -> Image:
        return _pillow().fromarray(self.pictures[index]).convert("RGB")


@dataclass
class FileSource:
    """Picture files; read when asked for."""

    classes: list[str]
    labels: np.ndarray
    paths: list[Path]

    def load(self, index: int) -> Image:
        path = self.paths[index]
        try:
            with _pillow().open(path) as picture:
                return picture.convert("RGB")
        except Exception as error:  # Pillow's decoders raise OSError, SyntaxError, ValueError, zlib.error, ...
            raise TinyTLError(f"data: cannot read the image {path} ({_reason(error)}); mend or remove it") from error


@dataclass
class TorchvisionSource:
    """A torchvision data set that gives (PIL picture, class index)."""

    classes: list[str]
    labels: np.ndarray
    dataset: object
    name: str

    def load(self, index: int) -> Image:
        try:
            return self.dataset[index][0].convert("RGB")
        except Exception as error:
            raise TinyTLError(f"data: cannot read picture {index} of {self.name} ({_reason(error)})") from error


@dataclass
class Subset:
    """Some pictures of another source, in the order of ``indices``."""

    source: Source
    indices: np.ndarray

    def __post_init__(self) -> None:
        self.classes = self.source.classes
        self.labels = self.source.labels[self.indices]

    def load(self, index: int) -> Image:
        return self.source.load(int(self.indices[index]))


def digits() -> tuple[Source, Source]:
    """scikit-learn's 1797 handwritten digits, 8x8, 16 grey levels: the first 80 % to train, the rest to test.

    Cut in the order of the file and not shuffled, whatever the seed: neighbours in the file are of one hand, and a
    shuffled split would test on the hands it trained on.
    """
    try:
        from sklearn.datasets import load_digits
    except ModuleNotFoundError:
        raise missing_extra("scikit-learn", "demo", "--data digits") from None
    data = load_digits()
    pictures = np.rint(data.images * (255 / 16)).astype(np.uint8)
    everything = ArraySource([str(name) for name in data.target_names], data.target.astype(np.int64), pictures)
    cut = len(pictures) * 4 // 5
    return Subset(everything, np.arange(cut)), Subset(everything, np.arange(cut, len(pictures)))


def image_folder(root: Path, *, test_share: float, split_seed: int) -> tuple[Source, Source]:
    """Pictures in one folder a class, either below ``train/`` and ``val/`` or all in ``root`` and split here.

    Args:
        root: The folder.
        test_share: Share of each class that is split off to test, where there is no ``val/``.
        split_seed: Of that split. Not the training seed: several seeds are compared on one test set.

    Raises:
        TinyTLError: The folder cannot be read, has no classes, a class is empty, or ``val/`` has an unknown class.
    """
    folders = {path.name.lower(): path for path in _subfolders(root)}
    train = next((folders[name] for name in _TRAIN_NAMES if name in folders), None)
    test = next((folders[name] for name in _TEST_NAMES if name in folders), None)
    if train is None and test is None:
        return split(read_folder(root), test_share, split_seed)
    if train is None or test is None:
        there, wanted = (train or test).name, "val" if test is None else "train"
        raise TinyTLError(f"data: {root} has {there}/ but no {wanted}/; give both, or one folder a class in {root}")
    source = read_folder(train)
    return source, read_folder(test, classes=source.classes)


def read_folder(root: Path, classes: list[str] | None = None) -> FileSource:
    """All picture files below the class folders of ``root``, sorted by name so that every machine sees one order."""
    names = [path.name for path in _subfolders(root)]
    if not names:
        raise TinyTLError(f"data: no class folders in {root}: expected {root}/CLASS/picture.jpg")
    for name in names:
        if classes is not None and name not in classes:
            raise TinyTLError(f"data: class {name!r} in {root} is not among the training classes")
    classes = names if classes is None else classes
    paths: list[Path] = []
    labels: list[int] = []
    for name in names:
        found = _pictures(root / name)
        if not found:
            raise TinyTLError(f"data: class {name!r} has no pictures in {root / name} ({', '.join(EXTENSIONS)})")
        paths += found
        labels += [classes.index(name)] * len(found)
    return FileSource(classes, np.array(labels, dtype=np.int64), paths)


def split(source: Source, test_share: float, seed: int) -> tuple[Source, Source]:
    """Split every class by the same share; each keeps at least one picture on either side.

    Raises:
        TinyTLError: A class has a single picture.
    """
    if not 0 < test_share < 1:
        raise TinyTLError(f"test_share: expected a share between 0 and 1, got {test_share}")
    generator = np.random.default_rng(seed)
    train, test = [], []
    for label, name in enumerate(source.classes):
        indices = generator.permutation(np.flatnonzero(source.labels == label))
        if len(indices) < 2:
            raise TinyTLError(f"data: class {name!r} has {len(indices)} picture(s); a split needs two or more")
        cut = min(max(1, round(len(indices) * test_share)), len(indices) - 1)
        test.append(indices[:cut])
        train.append(indices[cut:])
    return Subset(source, np.sort(np.concatenate(train))), Subset(source, np.sort(np.concatenate(test)))


def torchvision_dataset(
    name: str, root: Path, *, download: bool, test_share: float, split_seed: int
) -> tuple[Source, Source]:
    """A classification data set of torchvision by its class name, such as ``CIFAR10``.

    Raises:
        TinyTLError: Unknown name, not on this machine and ``download`` is False, or not of (picture, class) pairs.
    """
    datasets = import_torchvision().datasets
    known = [entry for entry in datasets.__all__ if inspect.isclass(getattr(datasets, entry))]
    if name not in known:
        close = difflib.get_close_matches(name.lower(), [entry.lower() for entry in known], n=3)
        names = ", ".join(f"torchvision:{entry}" for entry in known if entry.lower() in close)
        raise TinyTLError(f"data: torchvision has no data set {name!r}" + (f"; did you mean {names}?" if names else ""))
    build = getattr(datasets, name)
    accepted = inspect.signature(build.__init__).parameters
    options: dict = {"root": str(root)} if "root" in accepted else {}
    if "download" in accepted:
        options["download"] = download
    try:
        if "train" in accepted:
            return tuple(_torchvision_source(build(train=part, **options), name) for part in (True, False))
        if "split" in accepted:
            parts = _SPLITS.get(name, ("train", "test"))
            return tuple(_torchvision_source(build(split=part, **options), name) for part in parts)
        whole = _torchvision_source(build(**options), name)
    except TinyTLError:
        raise
    except Exception as error:
        hint = "" if download or "download" not in accepted else "; add --download to fetch it, or set --data-root"
        raise TinyTLError(f"data: cannot open torchvision:{name} in {root} ({_reason(error)}){hint}") from error
    return split(whole, test_share, split_seed)


_SPLITS = {
    "FGVCAircraft": ("trainval", "test"),
    "OxfordIIITPet": ("trainval", "test"),
    "ImageNet": ("train", "val"),
    "Imagenette": ("train", "val"),
    "Country211": ("train", "test"),
}


def _torchvision_source(dataset: object, name: str) -> TorchvisionSource:
    for attribute in ("targets", "labels", "_labels", "y"):
        if hasattr(dataset, attribute):
            labels = getattr(dataset, attribute)
            break
    else:
        labels = [dataset[index][1] for index in range(len(dataset))]
    labels = np.asarray(labels)
    if labels.ndim != 1 or not np.issubdtype(labels.dtype, np.integer):
        raise TinyTLError(f"data: torchvision:{name} does not label each picture with one class")
    count = int(labels.max()) + 1
    classes = [str(entry) for entry in getattr(dataset, "classes", range(count))]
    return TorchvisionSource(classes, labels.astype(np.int64), dataset, f"torchvision:{name}")


def _subfolders(root: Path) -> list[Path]:
    try:
        with os.scandir(root) as entries:
            return sorted(Path(entry.path) for entry in entries if entry.is_dir() and not entry.name.startswith("."))
    except OSError as error:
        raise TinyTLError(f"data: cannot read the folder {root} ({error.strerror})") from error


def _pictures(folder: Path) -> list[Path]:
    def stop(error: OSError) -> None:
        raise TinyTLError(f"data: cannot read the folder {error.filename} ({error.strerror})") from error

    return sorted(
        Path(parent, name)
        for parent, _, names in os.walk(folder, onerror=stop, followlinks=True)
        for name in names
        if name.lower().endswith(EXTENSIONS) and not name.startswith(".")
    )


def _reason(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}"[:200] if lines else type(error).__name__


def _pillow():
    try:
        from PIL import Image
    except ModuleNotFoundError:
        raise missing_extra("Pillow", "demo", "reading pictures") from None
    return Image
