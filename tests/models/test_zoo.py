"""Backbones by name: what comes back, and what is said when nothing can."""

from __future__ import annotations

import importlib
import logging

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from tinytl_kernels.errors import TinyTLError
from tinytl_kernels.models import build_model, import_timm, import_torchvision, input_config, set_dropout, zoo

TINY = "timm:test_efficientnet"  # 0.4 million parameters


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("timm:mobilnetv2_100", "timm:mobilenetv2_100"),
        ("torchvision:mobilenetv2", "torchvision:mobilenet_v2"),
        ("mobilenet_v2", "torchvision:mobilenet_v2"),  # the library was forgotten
        ("tim:resnet18", "timm"),
        ("demo:mobilenet", "demo:efficientnet_lite0"),
        ("tinytl:proxyless", "tinytl:proxylessnas_mobile"),
    ],
)
def test_an_unknown_name_is_told_with_the_closest(name: str, hint: str) -> None:
    with pytest.raises(TinyTLError, match="unknown model") as caught:
        build_model(name)
    assert hint in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_name_far_from_all_gets_no_suggestion() -> None:
    with pytest.raises(TinyTLError) as caught:
        build_model("timm:qqqqqqqq")
    assert "did you mean" not in str(caught.value)


def test_a_missing_package_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> None:
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    monkeypatch.setattr(importlib, "import_module", absent)
    with pytest.raises(TinyTLError, match=r"tinytl_kernels\[models\]"):
        import_torchvision()


def test_only_the_missing_operators_are_worked_around(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(name: str) -> None:
        raise RuntimeError("another trouble of the wheel")

    monkeypatch.setattr(importlib, "import_module", broken)
    with pytest.raises(RuntimeError, match="another trouble"):
        import_timm()


@pytest.mark.parametrize(
    "name", [TINY, "torchvision:squeezenet1_1", "torchvision:mobilenet_v3_small", "tinytl:mcunet_320kb"]
)
def test_num_classes_replaces_the_classifier(name: str) -> None:
    model = build_model(name, pretrained=False, num_classes=7)
    assert not model.training
    assert model(torch.zeros(1, 3, 64, 64)).shape == (1, 7)


def test_demo_model_is_the_network_of_its_weights() -> None:
    """TensorFlow's padding, eps and input scale, and ImageNet labels for two photographs."""
    datasets = pytest.importorskip("sklearn.datasets")
    image = pytest.importorskip("PIL.Image")
    model = build_model("demo:efficientnet_lite0")
    assert {module.eps for module in model.modules() if isinstance(module, nn.BatchNorm2d)} == {1e-3}
    strided = [module for module in model.modules() if isinstance(module, nn.Conv2d) and module.stride == (2, 2)]
    assert {type(module).__name__ for module in strided} == {"Conv2dSame"}
    config = input_config("demo:efficientnet_lite0")
    pictures = []
    for name in ("china.jpg", "flower.jpg"):
        whole = image.fromarray(datasets.load_sample_image(name))
        width, height = whole.size
        left = (width - height) // 2
        square = whole.crop((left, 0, left + height, height)).resize((224, 224), image.Resampling.BICUBIC)
        pictures.append(torch.tensor(np.asarray(square)).permute(2, 0, 1) / 255)
    mean, std = torch.tensor(config.mean).view(3, 1, 1), torch.tensor(config.std).view(3, 1, 1)
    with torch.no_grad():
        best = model((torch.stack(pictures) - mean) / std).argmax(1)
    assert best.tolist() == [698, 985]  # palace, daisy


def test_demo_input_is_x_minus_127_over_128() -> None:
    config = input_config("demo:efficientnet_lite0")
    x = torch.tensor([0.0, 127.0, 255.0])
    torch.testing.assert_close((x / 255 - config.mean[0]) / config.std[0], (x - 127) / 128)


def test_input_config_is_the_librarys() -> None:
    assert input_config("timm:mobilenetv3_large_100").mean == (0.485, 0.456, 0.406)
    assert input_config("timm:tf_efficientnet_lite0").mean == (0.5, 0.5, 0.5)
    assert input_config("torchvision:efficientnet_b0").crop == pytest.approx(224 / 256)
    assert input_config("tinytl:mcunet_320kb").resolution == 176


@pytest.mark.parametrize("name", [TINY, "tinytl:mcunet_320kb"])
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_local_weights_are_loaded_whole(suffix: str, name: str, tmp_path) -> None:
    source = build_model(name, pretrained=False)
    path = tmp_path / f"weights{suffix}"
    state = {key: value.contiguous() for key, value in source.state_dict().items()}
    if suffix == ".pt":  # as training scripts write it
        torch.save({"state_dict": {f"module.{key}": value for key, value in state.items()}}, path)
    else:
        save_file(state, path)
    loaded = build_model(name, weights=path)
    for key, value in loaded.state_dict().items():
        assert torch.equal(value, state[key]), key


class Payload:
    """Unpickling this would write a file."""

    def __init__(self, path) -> None:
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def test_pickled_code_is_refused_and_not_run(tmp_path) -> None:
    path, proof = tmp_path / "weights.pt", tmp_path / "proof"
    torch.save({"state_dict": Payload(proof)}, path)
    with pytest.raises(TinyTLError, match="could run code"):
        build_model(TINY, weights=path)
    assert not proof.exists()


def test_a_pickled_model_is_refused(tmp_path) -> None:
    path = tmp_path / "model.pt"
    torch.save(nn.Linear(2, 2), path)
    with pytest.raises(TinyTLError, match="state_dict"):
        build_model(TINY, weights=path)


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_a_damaged_file_is_one_line(suffix: str, tmp_path) -> None:
    path = tmp_path / f"weights{suffix}"
    save_file({"a": torch.zeros(3)}, path) if suffix == ".safetensors" else torch.save({"a": torch.zeros(3)}, path)
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(TinyTLError, match=str(path)) as caught:
        build_model(TINY, weights=path)
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_told(tmp_path) -> None:
    with pytest.raises(TinyTLError, match="no such file"):
        build_model(TINY, weights=tmp_path / "nothing.pt")


def test_weights_of_another_model_are_told_apart(tmp_path) -> None:
    path = tmp_path / "weights.safetensors"
    state = dict(build_model(TINY, pretrained=False).state_dict())
    state["classifier.bias"] = torch.zeros(3)
    del state["conv_stem.weight"]
    state["extra"] = torch.zeros(1)
    save_file(state, path)
    with pytest.raises(TinyTLError) as caught:
        build_model(TINY, weights=path)
    assert "1 missing (conv_stem.weight" in str(caught.value)
    assert "1 unknown (extra" in str(caught.value)
    assert "1 of another shape (classifier.bias" in str(caught.value)


def test_weights_that_cannot_be_downloaded_are_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    levels = []

    def offline(name: str, pretrained: bool) -> nn.Module:
        levels.append(logging.getLogger("huggingface_hub").level)
        raise OSError("We could not connect.\nCheck your connection.\nTraceback of the hub")

    monkeypatch.setattr(zoo.import_timm(), "create_model", offline)
    with pytest.raises(TinyTLError, match="--weights") as caught:
        build_model("timm:mobilenetv2_100")
    assert "We could not connect" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert levels == [logging.ERROR]


def test_networks_of_our_own_have_no_weights_to_download() -> None:
    with pytest.raises(TinyTLError, match=r"--weights .*--no-pretrained"):
        build_model("tinytl:proxylessnas_mobile")


def test_set_dropout_reaches_functional_and_module_dropout() -> None:
    by_rate = build_model(TINY, pretrained=False)
    by_module = build_model("torchvision:mobilenet_v3_small", pretrained=False)
    for model in (by_rate, by_module):
        set_dropout(model, 0.37)
    assert by_rate.drop_rate == 0.37
    assert [module.p for module in by_module.modules() if isinstance(module, nn.Dropout)] == [0.37]
    with pytest.raises(TinyTLError, match="dropout"):
        set_dropout(by_rate, 1.0)
