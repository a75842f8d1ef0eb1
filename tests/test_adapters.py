"""Adapters: only what was trained, put back in place, and refused where they do not belong."""

from __future__ import annotations

import copy
import errno
import os
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from tests.convert.models import SmallNet, with_statistics
from tinytl_kernels.adapters import fingerprint, load_adapter, save_adapter
from tinytl_kernels.convert import METHODS, conversion_report, convert

X = torch.zeros(1, 3, 32, 32)


@pytest.fixture(scope="module")
def backbone() -> nn.Module:
    torch.manual_seed(5)
    return with_statistics(SmallNet())


def trained(backbone: nn.Module, method: str = "lite_residual+bias", classes: int = 4) -> nn.Module:
    """Converted and moved away from the start, statistics included."""
    model = convert(backbone, method, num_classes=classes, example_input=X).train()
    with torch.no_grad():
        for name in conversion_report(model).trained:
            model.get_parameter(name).add_(torch.randn_like(model.get_parameter(name)))
        model(torch.randn(4, 3, 32, 32))
    return model.eval()


def snapshot(model: nn.Module) -> dict[str, torch.Tensor]:
    return copy.deepcopy(model.state_dict())


def same_content(first: Path, second: Path) -> bool:
    contents = []
    for path in (first, second):
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            contents.append((tensors, file.metadata()))
    (a, x), (b, y) = contents
    return x == y and a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def unchanged(model: nn.Module, before: dict[str, torch.Tensor]) -> bool:
    now = model.state_dict()
    return now.keys() == before.keys() and all(torch.equal(now[name], before[name]) for name in before)


@pytest.mark.parametrize("method", METHODS)
def test_round_trip(backbone: nn.Module, method: str, tmp_path: Path) -> None:
    model, other = trained(backbone, method), trained(backbone, method)
    x = torch.randn(2, 3, 32, 32)
    assert not torch.equal(model(x), other(x))
    save_adapter(model, tmp_path / "a.safetensors")
    load_adapter(other, tmp_path / "a.safetensors")
    assert torch.equal(model(x), other(x))


@pytest.mark.parametrize("method", ["bias", "lite_residual+bias"])
def test_the_file_holds_what_was_trained_and_nothing_else(backbone: nn.Module, method: str, tmp_path: Path) -> None:
    model = trained(backbone, method)
    save_adapter(model, tmp_path / "a.safetensors")
    with safe_open(tmp_path / "a.safetensors", framework="pt") as file:
        names, metadata = set(file.keys()), file.metadata()
    statistics = {n for n, _ in model.named_buffers() if ".lite." in n}
    assert names == {n for n, p in model.named_parameters() if p.requires_grad} | statistics
    assert metadata["model"] == "SmallNet"
    assert metadata["method"] == method
    assert metadata["fingerprint"] == fingerprint(model)


def test_switching_keeps_the_parameters_where_they_are(backbone: nn.Module, tmp_path: Path) -> None:
    first, second = trained(backbone), trained(backbone)
    save_adapter(first, tmp_path / "1")
    save_adapter(second, tmp_path / "2")
    model = trained(backbone)
    pointers = [p.data_ptr() for p in model.parameters()]
    x = torch.randn(2, 3, 32, 32)
    for file, source in (("1", first), ("2", second), ("1", first)):
        load_adapter(model, tmp_path / file)
        assert torch.equal(model(x), source(x))
    assert [p.data_ptr() for p in model.parameters()] == pointers


def test_another_number_of_classes_rebuilds_the_head(backbone: nn.Module, tmp_path: Path) -> None:
    flowers, pets = trained(backbone, classes=9), trained(backbone, classes=4)
    save_adapter(flowers, tmp_path / "a")
    load_adapter(pets, tmp_path / "a")
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(pets(x), flowers(x))
    assert pets.num_classes == pets.fc.out_features == 9
    assert pets.fc.weight.requires_grad
    save_adapter(pets, tmp_path / "b")
    assert same_content(tmp_path / "a", tmp_path / "b")


def test_a_compiled_model_refuses_another_head_and_takes_the_same(backbone: nn.Module, tmp_path: Path) -> None:
    save_adapter(trained(backbone, classes=9), tmp_path / "9")
    same = trained(backbone)
    save_adapter(torch.compile(same), tmp_path / "4")
    model = trained(backbone)
    compiled = torch.compile(model, backend="eager")
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"9 classes.*bare model, then wrap it in OptimizedModule again"):
        load_adapter(compiled, tmp_path / "9")
    assert unchanged(model, before)
    load_adapter(compiled, tmp_path / "4")
    assert unchanged(model, snapshot(same))


def test_the_fingerprint_is_of_the_frozen_weights_alone(backbone: nn.Module) -> None:
    model = trained(backbone)
    assert fingerprint(model) == fingerprint(trained(backbone, classes=7))
    assert fingerprint(model) == fingerprint(copy.deepcopy(model).to(memory_format=torch.contiguous_format))
    assert fingerprint(model) != fingerprint(trained(backbone, "bias"))
    changed = copy.deepcopy(model)
    with torch.no_grad():
        changed.blocks[0].main.conv1.weight[0, 0, 0, 0] *= 1.0000002
    assert fingerprint(model) != fingerprint(changed)


def one_line(error: pytest.ExceptionInfo) -> bool:
    return "\n" not in str(error.value)


def test_the_wrong_backbone_method_or_model_is_refused(backbone: nn.Module, tmp_path: Path) -> None:
    file = tmp_path / "a"
    save_adapter(trained(backbone), file)

    class OtherNet(SmallNet):
        pass

    strangers = {
        "fingerprints of the frozen weights differ": trained(with_statistics(SmallNet())),
        "method 'lite_residual\\+bias', but the model's is 'bias'": trained(backbone, "bias"),
        "model 'SmallNet', but the model's is 'OtherNet'": trained(with_statistics(OtherNet())),
    }
    for text, model in strangers.items():
        before = snapshot(model)
        with pytest.raises(ValueError, match=text) as error:
            load_adapter(model, file)
        assert one_line(error)
        assert unchanged(model, before)


@pytest.mark.parametrize("kind", ["cut", "noise", "empty", "other", "version", "metadata"])
def test_damaged_files_are_refused_and_change_nothing(backbone: nn.Module, kind: str, tmp_path: Path) -> None:
    model = trained(backbone)
    file = tmp_path / "a"
    save_adapter(model, file)
    data = file.read_bytes()
    if kind == "cut":
        file.write_bytes(data[:-1])
    elif kind == "noise":
        file.write_bytes(b"not a safetensors file at all")
    elif kind == "empty":
        file.write_bytes(b"")
    elif kind == "other":
        save_file({"x": torch.zeros(3)}, file)
    elif kind == "version":
        save_file({"x": torch.zeros(3)}, file, {"format": "tinytl-adapter", "version": "99"})
    else:
        save_file({"x": torch.zeros(3)}, file, {"format": "tinytl-adapter", "version": "1", "model": "SmallNet"})
    before = snapshot(model)
    with pytest.raises(ValueError, match=str(file)) as error:
        load_adapter(model, file)
    assert one_line(error)
    assert unchanged(model, before)


@pytest.mark.parametrize("trouble", ["missing", "extra", "shape", "dtype", "head"])
def test_tensors_that_do_not_fit_are_refused_whole(backbone: nn.Module, trouble: str, tmp_path: Path) -> None:
    model = trained(backbone)
    save_adapter(model, tmp_path / "a")
    with safe_open(tmp_path / "a", framework="pt") as file:
        tensors, metadata = {n: file.get_tensor(n) for n in file.keys()}, file.metadata()  # noqa: SIM118
    name = "stem.0.bias"
    if trouble == "missing":
        del tensors[name]
    elif trouble == "extra":
        tensors["stem.0.wieght"] = torch.zeros(1)
    elif trouble == "shape":
        tensors[name] = torch.zeros(3)
    elif trouble == "dtype":
        tensors[name] = tensors[name].half()
    else:
        name, tensors["fc.bias"] = "fc", torch.zeros(7)
    save_file(tensors, tmp_path / "a", metadata)
    other = trained(backbone)
    before = snapshot(other)
    with pytest.raises(ValueError, match="stem.0.wieght" if trouble == "extra" else name):
        load_adapter(other, tmp_path / "a")
    assert unchanged(other, before)


def test_a_missing_file_and_a_stock_model_are_refused(backbone: nn.Module, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no such adapter file"):
        load_adapter(trained(backbone), tmp_path / "nowhere")
    with pytest.raises(ValueError, match="not converted"):
        save_adapter(backbone, tmp_path / "a")


def test_training_beyond_the_method_is_not_lost_silently(backbone: nn.Module, tmp_path: Path) -> None:
    model = trained(backbone, "bias")
    conv = nn.Conv2d(3, 3, 1)
    model.extra = conv
    with pytest.raises(ValueError, match=r"'extra.weight' requires a gradient, but method 'bias' keeps it frozen"):
        save_adapter(model, tmp_path / "a")
    assert list(tmp_path.iterdir()) == []


def test_frozen_after_training_still_saves(backbone: nn.Module, tmp_path: Path) -> None:
    model = trained(backbone)
    save_adapter(model, tmp_path / "a")
    model.requires_grad_(False)
    save_adapter(model, tmp_path / "b")
    assert same_content(tmp_path / "a", tmp_path / "b")


def test_a_full_disk_leaves_the_old_adapter_whole(
    backbone: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "a"
    save_adapter(trained(backbone), file)
    old = file.read_bytes()

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        save_adapter(trained(backbone), file)
    assert file.read_bytes() == old
    assert [p.name for p in tmp_path.iterdir()] == ["a"]
