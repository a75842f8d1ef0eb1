"""The authors' files: every tensor in its place, and every file that is not one told in a line."""

from __future__ import annotations

from collections import OrderedDict

import pytest
import torch
from torch import nn

import tinytl_kernels as tk
from tests.memory.proxyless import Proxyless
from tests.models.official import in_double, official_forward, official_state
from tinytl_kernels.errors import TinyTLError
from tinytl_kernels.models import build_model, load_official_checkpoint
from tinytl_kernels.nn import FrozenConvBias, LiteResidualBlock

pytestmark = pytest.mark.usefixtures("reference_backend")

NAME = "proxylessnas_mobile+lite_residual@imagenet@ws+gn"
PICTURE = (2, 3, 44, 35)


def write(folder, state, name: str = NAME):
    path = folder / name
    torch.save({"state_dict": OrderedDict(state), "epoch": 150, "best_acc": 74.0}, path)
    return path


def assert_computes(model: nn.Module, state, *, standardized: bool = True) -> None:
    x = torch.randn(PICTURE, dtype=torch.float64)
    with torch.no_grad():
        expected = official_forward(in_double(state), x, standardized=standardized)
        torch.testing.assert_close(model.double()(x), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("norm", ["gn", "bn"])
@pytest.mark.parametrize("lite", [True, False])
def test_the_loaded_network_computes_what_the_file_says(norm: str, lite: bool, tmp_path) -> None:
    state = official_state(norm=norm, lite=lite, num_classes=17)
    model = load_official_checkpoint(write(tmp_path, state))
    assert not model.training
    assert sum(isinstance(module, LiteResidualBlock) for module in model.modules()) == (19 if lite else 0)
    assert_computes(model, state, standardized=norm == "gn")


def test_weight_standardization_can_be_said(tmp_path) -> None:
    state = official_state(norm="bn", num_classes=3)
    assert_computes(load_official_checkpoint(write(tmp_path, state), weight_standardization=True), state)
    state = official_state(norm="gn", num_classes=3)
    model = load_official_checkpoint(write(tmp_path, state), weight_standardization=False)
    assert_computes(model, state, standardized=False)


def test_it_is_the_network_that_the_papers_table_was_reproduced_with(tmp_path) -> None:
    """Against tests/memory/proxyless.py, which knows neither the authors' names nor ours."""
    state = official_state(num_classes=102)
    independent = Proxyless(102).double()
    values = []
    for name, value in in_double(state).items():
        if value.dim() == 4:
            rows = value.flatten(1)
            value = ((rows - rows.mean(1, keepdim=True)) / (rows.std(1, keepdim=True) + 1e-5)).view_as(value)
        values.append((name, value))
    own = independent.state_dict()
    assert [tuple(value.shape) for value in own.values()] == [tuple(value.shape) for _, value in values]
    independent.load_state_dict(dict(zip(own, (value for _, value in values), strict=True)))
    x = torch.randn(1, 3, 64, 64, dtype=torch.float64)
    with torch.no_grad():
        model = load_official_checkpoint(write(tmp_path, state)).double()
        torch.testing.assert_close(model(x), independent(x), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("rename", [lambda n: n.replace("conv.main", "mobile_inverted_conv.main"), "module.{}".format])
def test_older_spellings_are_understood(rename, tmp_path) -> None:
    state = official_state(num_classes=5)
    assert_computes(load_official_checkpoint(write(tmp_path, {rename(n): v for n, v in state.items()})), state)


def test_blocks_may_be_numbered_without_gaps(tmp_path) -> None:
    state = official_state(num_classes=5)
    numbers = {int(name.split(".")[1]) for name in state if name.startswith("blocks.")}
    renumbered = {f"blocks.{old}.": f"blocks.{new}." for new, old in enumerate(sorted(numbers))}
    closed = {}
    for name, value in state.items():
        old = next((old for old in renumbered if name.startswith(old)), "")
        closed[name.replace(old, renumbered[old], 1) if old else name] = value
    assert "blocks.19.conv.main_branch.depth_conv.conv.weight" in closed
    assert_computes(load_official_checkpoint(write(tmp_path, closed)), state)


def test_a_bare_state_dict_and_files_without_counters_are_read(tmp_path) -> None:
    state = official_state(norm="bn", num_classes=5)
    path = tmp_path / "bare"
    torch.save({name: value for name, value in state.items() if not name.endswith("num_batches_tracked")}, path)
    assert_computes(load_official_checkpoint(path), state, standardized=False)


def test_num_classes_replaces_the_classifier_alone(tmp_path) -> None:
    state = official_state(num_classes=5)
    model = load_official_checkpoint(write(tmp_path, state), num_classes=7)
    assert (model.classifier.out_features, model.num_classes) == (7, 7)
    assert torch.equal(model.head.conv.weight, state["feature_mix_layer.conv.weight"])


@pytest.mark.parametrize(("norm", "method"), [*(("gn", m) for m in tk.METHODS), ("bn", "norm+last"), ("bn", "bias")])
def test_converted_for_a_method_it_still_computes_what_the_file_says(norm: str, method: str, tmp_path) -> None:
    state = official_state(norm=norm, num_classes=6)
    # Folding rounds to the dtype of the weights: in float64 before, so that the comparison can be sharp.
    stock = load_official_checkpoint(write(tmp_path, state)).double()
    model = tk.convert(stock, method, example_input=torch.randn(1, 3, 32, 32, dtype=torch.float64), inplace=True)
    assert len(tk.conversion_report(model).branches) == (0 if method == "full" else 19)
    assert_computes(model, state, standardized=norm == "gn")


def test_with_a_method_it_comes_converted(tmp_path) -> None:
    path, example = write(tmp_path, official_state(norm="bn", num_classes=6)), torch.randn(1, 3, 32, 32)
    model = load_official_checkpoint(path, "lite_residual+bias", example_input=example)
    expected = tk.convert(load_official_checkpoint(path), "lite_residual+bias", example_input=example)
    assert tk.conversion_report(model).trained == tk.conversion_report(expected).trained
    for (name, value), other in zip(model.state_dict().items(), expected.state_dict().values(), strict=True):
        assert torch.equal(value, other), name
    fused = sum(isinstance(module, tk.FrozenInvertedResidual) for module in model.modules())
    assert fused == 20


def test_lite_residuals_of_the_file_are_trained_and_standardised_anew_in_each_step(tmp_path) -> None:
    state = official_state(num_classes=6)
    model = load_official_checkpoint(
        write(tmp_path, state), "lite_residual+bias", num_classes=102, example_input=torch.randn(1, 3, 64, 64)
    )
    assert model.classifier.out_features == 102
    blocks = [module for module in model.modules() if isinstance(module, LiteResidualBlock)]
    assert len(blocks) == 19
    assert all(isinstance(module, FrozenConvBias) for module in (model.stem.conv, blocks[0].main.depthwise.conv))
    # A picture without a gradient: PyTorch 2.13's own GroupNorm crashes on that in channels_last.
    model.train()(torch.randn(1, 3, 64, 64)).sum().backward()
    for name in ("conv1", "conv2"):
        weight = getattr(blocks[3].lite, name).weight
        # A gradient through the standardisation has mean 0 over each filter; one past it has not.
        gradient = weight.grad.flatten(1)
        assert gradient.abs().max() > 0
        assert gradient.mean(1).abs().max() < 1e-4 * gradient.abs().max()
    assert not blocks[3].lite.final_bn.bias.requires_grad
    assert blocks[3].main.project.norm.bias.requires_grad


def test_what_does_not_fit_is_told_by_the_authors_names(tmp_path) -> None:
    state = official_state(num_classes=5)
    for number in (5, 6, 7, 8):
        del state[f"blocks.{number}.conv.lite_residual.conv2.weight"]
    state["blocks.9.conv.main_branch.depth_conv.conv.weight"] = torch.zeros(240, 1, 5, 5)
    state["extra.weight"] = torch.zeros(1)
    with pytest.raises(TinyTLError) as caught:
        load_official_checkpoint(write(tmp_path, state))
    text = str(caught.value)
    assert NAME in text
    assert "\n" not in text
    assert "4 missing (blocks.5.conv.lite_residual.conv2.weight, blocks.6." in text
    assert "blocks.8." not in text  # the first three
    assert "1 unexpected (extra.weight)" in text
    assert "depth_conv.conv.weight: expected (240, 1, 7, 7), got (240, 1, 5, 5)" in text


def test_not_strict_loads_what_fits_and_warns(tmp_path) -> None:
    state = official_state(num_classes=5)
    state["extra.weight"] = torch.zeros(1)
    del state["feature_mix_layer.bn.bias"]
    with pytest.warns(UserWarning, match=r"1 missing \(feature_mix_layer.bn.bias\); 1 unexpected"):
        model = load_official_checkpoint(write(tmp_path, state), strict=False)
    state["feature_mix_layer.bn.bias"] = torch.zeros(1280)
    assert_computes(model, state)


def test_another_number_of_blocks_is_told(tmp_path) -> None:
    state = {name: value for name, value in official_state().items() if not name.startswith("blocks.21.")}
    with pytest.raises(TinyTLError, match="expected 20 blocks, got 19"):
        load_official_checkpoint(write(tmp_path, state))


def test_foreign_and_damaged_files_are_one_line(tmp_path) -> None:
    with pytest.raises(TinyTLError, match=r"no network of the authors.*'features\.0\.weight'"):
        load_official_checkpoint(write(tmp_path, {"features.0.weight": torch.zeros(1)}, "foreign"))
    damaged = write(tmp_path, {"first_conv.conv.weight": torch.zeros(32, 3, 3, 3)}, "damaged")
    damaged.write_bytes(damaged.read_bytes()[:-100])
    text = tmp_path / "text"
    text.write_text("<html>404 Not Found</html>")
    empty = tmp_path / "empty"
    empty.write_bytes(b"")
    for path in (damaged, text, empty, tmp_path / "nothing"):
        with pytest.raises(TinyTLError, match=str(path)) as caught:
            load_official_checkpoint(path)
        assert "\n" not in str(caught.value)


class Payload:
    """Unpickling this would write a file."""

    def __init__(self, path) -> None:
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def test_code_in_a_file_is_not_run(tmp_path) -> None:
    proof = tmp_path / "proof"
    torch.save({"state_dict": {"first_conv.conv.weight": Payload(proof)}}, tmp_path / "file")
    with pytest.raises(TinyTLError, match="could run code"):
        load_official_checkpoint(tmp_path / "file")
    assert not proof.exists()


def test_the_command_lines_weights_may_be_the_authors_file(tmp_path) -> None:
    state = official_state(num_classes=5)
    path = write(tmp_path, state)
    assert_computes(build_model("tinytl:proxylessnas_mobile", weights=path), state)
    model = build_model("tinytl:proxylessnas_mobile", weights=path, num_classes=4)
    assert model.classifier.out_features == 4
