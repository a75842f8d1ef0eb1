"""``to_torch``: the same outputs from plain torch.nn modules, which export."""

from __future__ import annotations

import copy
import io
import pickle

import onnx.reference
import pytest
import torch
from torch import nn

from tests.convert.models import FunctionalNet, FusableNet, SmallNet, conv_norm, with_statistics, zoo_model
from tinytl_kernels import nn as tnn
from tinytl_kernels.convert import METHODS, conversion_report, convert, to_torch


def assert_plain(model: nn.Module) -> None:
    for name, module in model.named_modules():
        for cls in type(module).__mro__:
            assert not cls.__module__.startswith("tinytl_kernels"), f"{name} is a {cls}"
        assert not any(key.startswith("_tinytl") for key in vars(module)), name


def woken(model: nn.Module) -> nn.Module:
    """With branches that count."""
    for module in model.modules():
        if isinstance(module, tnn.LiteResidual):
            nn.init.uniform_(module.final_bn.weight, 0.5, 1.0)
            nn.init.normal_(module.final_bn.bias)
    return model


@pytest.mark.parametrize("method", METHODS)
def test_same_outputs_and_nothing_of_ours_left(method: str) -> None:
    x = torch.randn(2, 3, 37, 32)
    model = woken(convert(with_statistics(SmallNet()), method, example_input=x)).eval()
    plain = to_torch(model)
    assert_plain(plain)
    torch.testing.assert_close(plain(x), model(x))
    assert type(plain) is SmallNet
    with pytest.raises(ValueError, match="not converted"):
        conversion_report(plain)


@pytest.mark.parametrize("kind", [FunctionalNet, FusableNet])
def test_rewritten_forwards_are_the_original_ones_again(kind: type[nn.Module]) -> None:
    x = torch.randn(2, 3, 17, 14)
    model = convert(with_statistics(kind(), 16), "bias", example_input=x).eval()
    plain = to_torch(model)
    assert_plain(plain)
    assert type(plain) is kind
    torch.testing.assert_close(plain(x), model(x))


@pytest.mark.parametrize("name", ["timm:tf_efficientnet_lite0", "torchvision:mobilenet_v3_small", "timm:resnet18"])
def test_zoo_models_come_back(name: str) -> None:
    # In float64: with branches that count these networks make 20 ulp of either side's float32 out of one.
    x = torch.randn(2, 3, 65, 62, dtype=torch.float64)
    model = woken(convert(zoo_model(name).double(), "lite_residual+bias", example_input=x))
    plain = to_torch(model)
    assert_plain(plain)
    with torch.no_grad():
        torch.testing.assert_close(plain(x), model(x), rtol=1e-9, atol=1e-9)


LAYERS = [
    tnn.FrozenConvBias(4, 6, 3, padding=(0, 1, 2, 0), activation="gelu_tanh"),
    tnn.FrozenConvBias(4, 6, 3, padding=(1, 1, 2, 2), bias=False),
    tnn.FrozenConvBias(4, 6, (3, 4), stride=2, padding="tf_same", activation="hardsigmoid"),
    tnn.FrozenConvBias(4, 6, 1, stride=(2, 3), padding="tf_same"),
    tnn.FrozenConvBias(4, 6, (3, 4), padding="tf_same", dilation=2, activation="leaky_relu"),
    tnn.FrozenConvBias(4, 6, 4, padding="same", padding_mode="reflect"),
    tnn.FrozenConvBias(4, 6, 3, padding=(0, 1, 2, 0), padding_mode="circular", activation="silu"),
    tnn.FrozenConvBias(4, 4, 3, padding="valid", groups=2, activation="hardswish"),
    tnn.LiteResidual(4, 6, downsample=None, kernel_size=1),
    tnn.LiteResidual(4, 6, stride=2, kernel_size=3),
    tnn.AvgPool2d(3, 2, 1, ceil_mode=True, count_include_pad=False),
    tnn.AvgPool2d(2, divisor_override=3),
    tnn.MaxPool2d((2, 3), (2, 1), (1, 0), ceil_mode=True),
    tnn.AdaptiveAvgPool2d((3, None)),
    tnn.LeakyReLU(0.3),
    tnn.Hardsigmoid(),
    tnn.GELU("tanh"),
    tnn.Dropout(0.4),
]


@pytest.mark.parametrize("layer", LAYERS, ids=str)
def test_every_layer_has_a_plain_twin(layer: nn.Module) -> None:
    x = torch.randn(2, 4, 11, 10)
    model = woken(nn.Sequential(layer)).eval()
    plain = to_torch(model)
    assert_plain(plain)
    torch.testing.assert_close(plain(x), model(x))


def test_weights_train_again() -> None:
    plain = to_torch(convert(with_statistics(SmallNet()), "bias", example_input=torch.randn(1, 3, 32, 32)))
    assert not plain.stem[0][0].weight.requires_grad
    plain.requires_grad_(True)
    plain(torch.randn(2, 3, 32, 32)).sum().backward()
    assert plain.stem[0][0].weight.grad.abs().sum() > 0


def test_the_converted_model_is_untouched() -> None:
    x = torch.randn(2, 3, 17, 14)
    model = convert(with_statistics(FusableNet(), 16), "bias", example_input=x).eval()
    before = model(x)
    plain = to_torch(model)
    with torch.no_grad():
        for parameter in plain.parameters():
            parameter.zero_()
    assert torch.equal(model(x), before)
    assert model.conv1.activation == "relu6"


def test_shared_layers_stay_shared() -> None:
    layer = tnn.FrozenConvBias(3, 3, 3, padding=1, activation="relu")
    plain = to_torch(nn.Sequential(layer, layer))
    assert plain[0] is plain[1]


def test_only_modules_go_back() -> None:
    with pytest.raises(TypeError, match=r"model: expected a torch.nn.Module, got dict"):
        to_torch({})


def exportable(method: str) -> nn.Module:
    """A model with dynamic padding, branches and a functional forward inside."""
    from tinytl_kernels.models import import_timm

    import_timm()
    from timm.layers import Conv2dSame

    stem = nn.Sequential(Conv2dSame(3, 3, 3, stride=2, bias=False), nn.BatchNorm2d(3), nn.ReLU6())
    body = SmallNet()
    body.stem = nn.Sequential(stem, conv_norm(3, 8, nn.Hardswish()))
    return woken(convert(with_statistics(body), method, example_input=torch.randn(1, 3, 33, 30))).eval()


def test_torch_export_with_a_dynamic_batch() -> None:
    model = exportable("lite_residual+bias")
    batch = torch.export.Dim("batch", min=2, max=64)
    program = torch.export.export(to_torch(model), (torch.randn(2, 3, 33, 30),), dynamic_shapes=({0: batch},))
    x = torch.randn(5, 3, 33, 30)
    torch.testing.assert_close(program.module()(x), model(x))


def test_plain_models_pickle_and_copy() -> None:
    model = exportable("lite_residual+bias")
    plain = to_torch(model)
    x = torch.randn(2, 3, 41, 30)
    for other in (copy.deepcopy(plain), pickle.loads(pickle.dumps(plain))):
        assert_plain(other)
        assert torch.equal(other(x), plain(x))


@pytest.mark.parametrize("size", [(50, 47), (33, 64)])
def test_torch_export_with_a_dynamic_size(size: tuple[int, int]) -> None:
    model = exportable("lite_residual+bias")
    auto = torch.export.Dim.AUTO
    example = torch.randn(2, 3, 33, 30)
    program = torch.export.export(to_torch(model), (example,), dynamic_shapes=({2: auto, 3: auto},))
    x = torch.randn(2, 3, *size)
    torch.testing.assert_close(program.module()(x), model(x))


def test_onnx_with_a_dynamic_batch() -> None:
    model = exportable("lite_residual+bias")
    batch = torch.export.Dim("batch", min=2, max=64)
    program = torch.onnx.export(
        to_torch(model), (torch.randn(2, 3, 33, 30),), dynamo=True, dynamic_shapes=({0: batch},), verbose=False
    )
    file = io.BytesIO(program.model_proto.SerializeToString())
    session = onnx.reference.ReferenceEvaluator(onnx.load(file))
    x = torch.randn(3, 3, 33, 30)
    (output,) = session.run(None, {session.input_names[0]: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(output), model(x).detach(), rtol=1e-4, atol=1e-4)
