"""Where pictures come from, and what is said when they do not."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tinytl_kernels.errors import TinyTLError
from tinytl_kernels.finetune import load_data
from tinytl_kernels.finetune.sources import ArraySource, _torchvision_source, split

Pictures = Callable[..., Path]


def test_digits_are_cut_in_the_order_of_the_file() -> None:
    from sklearn.datasets import load_digits

    data = load_data("digits")
    assert data.classes == [str(digit) for digit in range(10)]
    assert (len(data.train.labels), len(data.test.labels)) == (1437, 360)
    raw = load_digits()
    assert np.array_equal(np.concatenate([data.train.labels, data.test.labels]), raw.target)
    first = np.asarray(data.test.load(0))
    assert first.shape == (8, 8, 3)
    assert np.array_equal(first[..., 0], np.rint(raw.images[1437] * 255 / 16))
    assert np.bincount(data.test.labels).min() >= 30  # every class is tested


def test_train_and_val_folders_are_taken_as_they_are(pictures: Pictures) -> None:
    root = pictures({"train/ant": 3, "train/bee": 2, "val/bee": 1, "val/ant": 2})
    (root / "train" / ".cache").mkdir()
    (root / "train" / "ant" / "notes.txt").write_text("not a picture")
    data = load_data(str(root))
    assert data.classes == ["ant", "bee"]
    assert data.train.labels.tolist() == [0, 0, 0, 1, 1]
    assert data.test.labels.tolist() == [0, 0, 1]


def test_one_folder_is_split_class_by_class(pictures: Pictures) -> None:
    root = pictures({"ant": 10, "bee": 5, "cat": 2})
    data = load_data(str(root), test_share=0.2)
    assert np.bincount(data.train.labels).tolist() == [8, 4, 1]
    assert np.bincount(data.test.labels).tolist() == [2, 1, 1]
    both = {path for part in (data.train, data.test) for path in np.array(part.source.paths)[part.indices]}
    assert len(both) == 17


def test_the_split_follows_its_own_seed() -> None:
    source = ArraySource(["a", "b"], np.arange(40) % 2, np.zeros((40, 2, 2), np.uint8))
    first, again, other = (split(source, 0.25, seed)[1].indices.tolist() for seed in (0, 0, 1))
    assert first == again
    assert first != other


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK", "1", "I;16"])
def test_every_colour_mode_becomes_rgb(mode: str, pictures: Pictures) -> None:
    from PIL import Image

    root = pictures({"train/ant": 1, "val/ant": 1})
    name = "a.jpg" if mode == "CMYK" else "a.png"
    Image.new(mode, (5, 4)).save(root / "train" / "ant" / name)
    source = load_data(str(root)).train
    assert {source.load(index).mode for index in range(2)} == {"RGB"}


def test_an_empty_class_is_named(pictures: Pictures) -> None:
    root = pictures({"train/ant": 1, "train/bee": 0, "val/ant": 1})
    with pytest.raises(TinyTLError, match="class 'bee' has no pictures"):
        load_data(str(root))


@pytest.mark.parametrize("damage", ["cut", "garbage", "empty"])
def test_a_corrupt_picture_is_named(damage: str, pictures: Pictures) -> None:
    root = pictures({"train/ant": 2, "val/ant": 1}, size=(200, 200))
    path = root / "train" / "ant" / "01.png"
    whole = path.read_bytes()
    path.write_bytes({"cut": whole[: len(whole) // 2], "garbage": b"not a picture", "empty": b""}[damage])
    source = load_data(str(root)).train
    source.load(0)
    with pytest.raises(TinyTLError, match=str(path)) as caught:
        source.load(1)
    assert "\n" not in str(caught.value)


def test_a_folder_that_cannot_be_read_is_named(tmp_path: Path, pictures: Pictures) -> None:
    with pytest.raises(TinyTLError, match="no folder"):
        load_data(str(tmp_path / "nothing"))
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(TinyTLError, match=f"cannot read the folder {file}"):
        load_data(str(file))
    (tmp_path / "bare").mkdir()
    with pytest.raises(TinyTLError, match="no class folders"):
        load_data(str(tmp_path / "bare"))


def test_half_of_a_split_is_refused(pictures: Pictures) -> None:
    with pytest.raises(TinyTLError, match="train/ but no val/"):
        load_data(str(pictures({"train/ant": 2})))


def test_a_class_that_is_only_tested_is_refused(pictures: Pictures) -> None:
    with pytest.raises(TinyTLError, match="'bee'"):
        load_data(str(pictures({"train/ant": 2, "val/ant": 1, "val/bee": 1})))


def test_a_class_of_one_cannot_be_split(pictures: Pictures) -> None:
    with pytest.raises(TinyTLError, match="class 'bee' has 1 picture"):
        load_data(str(pictures({"ant": 2, "bee": 1})))


@pytest.mark.parametrize("share", [0.0, 1.0, -0.5])
def test_a_share_that_leaves_nothing_is_refused(share: float, pictures: Pictures) -> None:
    with pytest.raises(TinyTLError, match="test_share"):
        load_data(str(pictures({"ant": 4})), test_share=share)


def write_idx(path: Path, array: np.ndarray) -> None:
    """MNIST's own file format."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape) + array.tobytes())


def test_a_torchvision_data_set_by_name(tmp_path: Path) -> None:
    raw = tmp_path / "MNIST" / "raw"
    for part, count in (("train", 12), ("t10k", 5)):
        pixels = np.full((count, 28, 28), count, np.uint8)
        write_idx(raw / f"{part}-images-idx3-ubyte", pixels)
        write_idx(raw / f"{part}-labels-idx1-ubyte", np.arange(count, dtype=np.uint8) % 10)
    data = load_data("torchvision:MNIST", root=tmp_path)
    assert (len(data.train.labels), len(data.test.labels), len(data.classes)) == (12, 5, 10)
    picture = data.test.load(3)
    assert (picture.mode, picture.getpixel((0, 0))) == ("RGB", (5, 5, 5))
    assert data.test.labels[3] == 3


def test_a_torchvision_data_set_that_is_not_there_says_how_to_get_it(tmp_path: Path) -> None:
    with pytest.raises(TinyTLError, match="--download") as caught:
        load_data("torchvision:CIFAR10", root=tmp_path)
    assert "\n" not in str(caught.value)


def test_an_unknown_torchvision_name_is_told_with_the_closest() -> None:
    with pytest.raises(TinyTLError, match="torchvision:CIFAR10"):
        load_data("torchvision:cifar-10")


def test_labels_that_are_not_one_class_a_picture_are_refused() -> None:
    class Attributes:  # as CelebA labels its pictures
        targets = np.zeros((4, 40), dtype=np.int64)

    with pytest.raises(TinyTLError, match="torchvision:CelebA does not label each picture with one class"):
        _torchvision_source(Attributes(), "CelebA")
