"""FrozenConvBias against nn.Conv2d: every argument, the same state_dict, folding, and life in a training loop."""

from __future__ import annotations

import copy
import io
import pickle
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, parametrize

import tinytl_kernels.nn as tnn
from tests.checks import compare_with_torch, saved_bytes
from tests.process_group import run_in_process_group
from tinytl_kernels import FrozenConvBias
from tinytl_kernels.errors import TinyTLError
from tinytl_kernels.models.zoo import import_timm

# Arguments of nn.Conv2d after (in_channels 8, out_channels 12).
ARGUMENTS = {
    "pointwise": dict(kernel_size=1),
    "padded, strided": dict(kernel_size=3, stride=2, padding=1),
    "pairs": dict(kernel_size=(3, 5), stride=(2, 1), padding=(1, 2), dilation=(1, 2)),
    "depthwise multiplier free": dict(kernel_size=3, padding=1, groups=4),
    "valid": dict(kernel_size=3, padding="valid"),
    "same": dict(kernel_size=3, padding="same"),
    "same, even kernel": dict(kernel_size=4, padding="same"),
    "same, even and dilated": dict(kernel_size=(4, 2), padding="same", dilation=(1, 3)),
    "no bias": dict(kernel_size=3, bias=False),
    "reflect": dict(kernel_size=3, padding=(2, 1), padding_mode="reflect"),
    "replicate": dict(kernel_size=3, padding=2, padding_mode="replicate"),
    "circular": dict(kernel_size=3, padding=1, padding_mode="circular"),
    "circular, same, even kernel": dict(kernel_size=4, padding="same", padding_mode="circular"),
    "bfloat16": dict(kernel_size=3, dtype=torch.bfloat16),
    "float64": dict(kernel_size=3, dtype=torch.float64, device="cpu"),
}


def twins(arguments) -> tuple[FrozenConvBias, nn.Conv2d]:
    frozen, conv = FrozenConvBias(8, 12, **arguments), nn.Conv2d(8, 12, **arguments)
    frozen.load_state_dict(conv.state_dict())
    return frozen, conv


def apply(conv):
    """The convolution as a function of input and bias, in the dtype of the input."""

    def function(x, bias=None):
        values = {"weight": conv.weight.detach().to(x.dtype)}
        if bias is not None:
            values["bias"] = bias
        return torch.func.functional_call(conv, values, (x,))

    return function


@pytest.mark.parametrize("name", ARGUMENTS)
def test_every_argument_of_conv2d(name):
    frozen, conv = twins(ARGUMENTS[name])
    x = torch.randn(2, 8, 11, 10).to(conv.weight.dtype)
    inputs = [x] if conv.bias is None else [x, conv.bias.detach()]
    compare_with_torch(apply(frozen), apply(conv), inputs)
    assert frozen.weight.dtype == conv.weight.dtype


def test_unbatched_input():
    frozen, conv = twins(dict(kernel_size=3))
    x = torch.randn(8, 6, 5)
    torch.testing.assert_close(frozen(x), conv(x))


def test_four_paddings_are_top_bottom_left_right():
    conv = nn.Conv2d(8, 12, 3)
    frozen = FrozenConvBias(8, 12, 3, padding=(0, 1, 2, 3))
    frozen.load_state_dict(conv.state_dict())
    x = torch.randn(1, 8, 6, 6)
    torch.testing.assert_close(frozen(x), conv(F.pad(x, (2, 3, 0, 1))))


@pytest.mark.parametrize("size", [(8, 8), (9, 10), (1, 1)])
@pytest.mark.parametrize("stride", [1, 2, 3])
def test_tensorflow_same_is_timms(size, stride):
    conv = timm_layers().Conv2dSame(8, 12, 3, stride=stride)
    frozen = FrozenConvBias(8, 12, 3, stride=stride, padding="tf_same")
    frozen.load_state_dict(conv.state_dict())
    x = torch.randn(1, 8, *size)
    torch.testing.assert_close(frozen(x), conv(x))


def timm_layers():
    try:
        return import_timm().layers
    except TinyTLError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("bias", [True, False])
def test_state_dict_goes_both_ways(bias):
    frozen, conv = twins(dict(kernel_size=3, bias=bias))
    assert frozen.state_dict().keys() == conv.state_dict().keys()
    with torch.no_grad():
        frozen.weight.add_(1)
    conv.load_state_dict(frozen.state_dict(), strict=True)
    assert torch.equal(conv.weight, frozen.weight)
    assert not frozen.weight.requires_grad


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_from_conv_folds_batch_norm(bias, affine):
    conv, norm = nn.Conv2d(8, 12, 3, bias=bias), nn.BatchNorm2d(12, eps=1e-3, affine=affine)
    randomize(norm)
    frozen = FrozenConvBias.from_conv(conv, norm, nn.ReLU6())
    x = torch.randn(2, 8, 6, 6)
    torch.testing.assert_close(frozen(x), F.relu6(norm.eval()(conv(x))), rtol=1e-5, atol=1e-5)


def randomize(norm):
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.5, 2)
    if norm.weight is not None:
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.bias)


def test_from_conv_folds_sync_batch_norm():
    conv, norm = nn.Conv2d(8, 12, 1), nn.SyncBatchNorm(12)
    randomize(norm)
    frozen = FrozenConvBias.from_conv(conv, norm)
    x = torch.randn(2, 8, 6, 6)
    torch.testing.assert_close(frozen(x), norm.eval()(conv(x)), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["Conv2dSame", "StdConv2d", "StdConv2dSame", "ScaledStdConv2d"])
def test_from_conv_takes_subclasses_of_timm(name):
    conv = getattr(timm_layers(), name)(8, 12, kernel_size=3, stride=2).eval()
    frozen = FrozenConvBias.from_conv(conv)
    for size in (8, 9):
        x = torch.randn(1, 8, size, size + 3)
        torch.testing.assert_close(frozen(x), conv(x), rtol=1e-5, atol=1e-5)


class DoubledWeight(nn.Module):
    def forward(self, weight):
        return 2 * weight


def test_from_conv_takes_parametrized_weights():
    conv = parametrizations.weight_norm(nn.Conv2d(8, 12, 3))
    parametrize.register_parametrization(conv, "weight", DoubledWeight())
    x = torch.randn(1, 8, 6, 6)
    torch.testing.assert_close(FrozenConvBias.from_conv(conv)(x), conv(x))


def test_from_conv_takes_the_weight_that_a_hook_computes():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        conv = nn.utils.weight_norm(nn.Conv2d(8, 12, 3))
    with torch.no_grad():
        conv.weight_g.mul_(3)  # conv.weight is stale until the next forward
    frozen = FrozenConvBias.from_conv(conv)
    x = torch.randn(1, 8, 6, 6)
    torch.testing.assert_close(frozen(x), conv(x))


class Standardised(nn.Conv2d):
    def forward(self, x):
        return self._conv_forward(x, self.weight - self.weight.mean((1, 2, 3), keepdim=True), self.bias)


def test_from_conv_takes_a_users_standardisation_with_any_padding_mode():
    conv = Standardised(8, 12, 3, padding=1, padding_mode="reflect")
    x = torch.randn(1, 8, 6, 6)
    torch.testing.assert_close(FrozenConvBias.from_conv(conv)(x), conv(x))


class WithActivation(nn.Conv2d):
    def forward(self, x):
        return super().forward(x).relu()


class Scaled(nn.Conv2d):
    def forward(self, x):
        return super().forward(x) * 1.003  # close to a plain convolution, but not one


class NoConvolution(nn.Conv2d):
    def forward(self, x):
        raise RuntimeError("not today")


@pytest.mark.parametrize("kind", [WithActivation, Scaled, NoConvolution])
def test_from_conv_refuses_what_it_cannot_represent(kind):
    with pytest.raises(ValueError, match=f"{kind.__name__}: its forward"):
        FrozenConvBias.from_conv(kind(8, 12, 3))


class NormAndActivation(nn.BatchNorm2d):
    def forward(self, x):
        return super().forward(x).relu()


@pytest.mark.parametrize(
    ("norm", "message"),
    [
        (nn.GroupNorm(2, 12), "norm: expected a BatchNorm, got GroupNorm"),
        (nn.BatchNorm2d(12, track_running_stats=False), "norm: without running statistics"),
        (nn.BatchNorm2d(8), "norm: expected 12 channels .* got 8"),
        (NormAndActivation(12), "norm: the forward of NormAndActivation is its own"),
    ],
)
def test_from_conv_refuses_a_norm_that_cannot_fold(norm, message):
    with pytest.raises(ValueError, match=message):
        FrozenConvBias.from_conv(nn.Conv2d(8, 12, 3), norm)


def test_from_conv_refuses_other_modules():
    with pytest.raises(TypeError, match=r"conv: expected an nn.Conv2d, got Linear"):
        FrozenConvBias.from_conv(nn.Linear(3, 3))
    with pytest.raises(ValueError, match=r"activation: PReLU.* cannot be fused"):
        FrozenConvBias.from_conv(nn.Conv2d(8, 12, 3), activation=nn.PReLU())


def test_from_conv_of_a_frozen_one():
    frozen = FrozenConvBias(8, 12, 3, padding="tf_same")
    norm = nn.BatchNorm2d(12)
    randomize(norm)
    x = torch.randn(1, 8, 6, 5)
    folded = FrozenConvBias.from_conv(frozen, norm, "relu")
    torch.testing.assert_close(folded(x), norm.eval()(frozen(x)).relu(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(FrozenConvBias.from_conv(folded)(x), folded(x))
    with pytest.raises(ValueError, match="its activation 'relu' comes first"):
        FrozenConvBias.from_conv(folded, norm)


@pytest.mark.parametrize("training", [True, False])
def test_from_conv_keeps_mode_layout_dtype_and_owns_its_weight(training):
    conv = nn.Conv2d(8, 12, 3, dtype=torch.bfloat16).to(memory_format=torch.channels_last).train(training)
    frozen = FrozenConvBias.from_conv(conv)
    assert frozen.training is training
    assert frozen.weight.dtype == torch.bfloat16
    assert frozen.weight.is_contiguous(memory_format=torch.channels_last)
    assert frozen.weight.data_ptr() != conv.weight.data_ptr()
    assert frozen.bias.data_ptr() != conv.bias.data_ptr()


def test_a_weight_set_to_train_is_a_clear_error():
    layer = FrozenConvBias(8, 12, 3)
    layer.requires_grad_(True)
    with pytest.raises(RuntimeError, match=r"requires_grad=True.*requires_grad_\(False\).*to_torch"):
        layer(torch.randn(1, 8, 6, 6))


def test_only_the_bias_trains_and_no_input_is_kept():
    layer = FrozenConvBias(8, 16, 3, activation="relu6")
    x = torch.randn(2, 8, 6, 6, requires_grad=True)
    assert [name for name, p in layer.named_parameters() if p.requires_grad] == ["bias"]
    assert saved_bytes(lambda: layer(x), exclude=[layer.weight]) == 2 * 4 * 4 * 16 // 8
    layer(x).sum().backward()
    assert layer.weight.grad is None
    assert layer.bias.grad is not None


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
@pytest.mark.parametrize("padding", [1, "same", "tf_same", (0, 1, 2, 1)])
def test_copies_compute_the_same(clone, padding):
    layer = FrozenConvBias(8, 12, 3, padding=padding, activation="relu")
    x = torch.randn(1, 8, 6, 6)
    assert torch.equal(clone(layer)(x), layer(x))
    assert clone(layer).weight.requires_grad is False


def test_torch_save_and_load():
    layer = FrozenConvBias(8, 12, 3)
    buffer = io.BytesIO()
    torch.save(layer.state_dict(), buffer)
    buffer.seek(0)
    FrozenConvBias(8, 12, 3).load_state_dict(torch.load(buffer, weights_only=True))


@pytest.mark.parametrize(
    ("layer", "text"),
    [
        (lambda: FrozenConvBias(8, 12, 3, activation="relu6"),
         "FrozenConvBias(8, 12, kernel_size=(3, 3), stride=(1, 1), activation=relu6)"),
        (lambda: FrozenConvBias(8, 12, 3, padding="tf_same"),
         "FrozenConvBias(8, 12, kernel_size=(3, 3), stride=(1, 1), padding=tf_same)"),
        (lambda: FrozenConvBias(8, 12, 3, padding=(0, 1, 0, 1), bias=False),
         "FrozenConvBias(8, 12, kernel_size=(3, 3), stride=(1, 1), padding=(0, 1, 0, 1), bias=False)"),
    ],
)  # fmt: skip
def test_repr(layer, text):
    assert repr(layer()) == text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(activation="relu7"), "activation: expected None or one of"),
        (dict(padding="full"), "Invalid padding string"),
        (dict(padding=(0, 0, 0, -1)), "padding: expected four numbers of at least 0"),
        (dict(padding="same", stride=2), "padding='same' is not supported for strided"),
        (dict(groups=3), "divisible by groups"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        FrozenConvBias(8, 12, 3, **arguments)


@pytest.mark.parametrize("padding", [0, "tf_same"])
@pytest.mark.parametrize("size", [(8, 6), (1, 1, 8, 6, 6)])
def test_input_of_other_dimensions_is_named(size, padding):
    with pytest.raises(ValueError, match=r"input: expected \(N, C, H, W\) or \(C, H, W\), got shape"):
        FrozenConvBias(8, 12, 3, padding=padding)(torch.zeros(size))


@pytest.mark.parametrize("padding", [1, "tf_same"])
def test_compiles_without_a_graph_break(padding):
    layer = nn.Sequential(FrozenConvBias(8, 12, 3, stride=2, padding=padding, activation="relu"), nn.Flatten())
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=True)
    for size in (6, 9):
        x = torch.randn(2, 8, size, size)
        expected = torch.autograd.grad(layer(x).square().sum(), layer[0].bias)
        torch.testing.assert_close(torch.autograd.grad(compiled(x).square().sum(), layer[0].bias), expected)


def test_compiles_under_autocast():
    layer = FrozenConvBias(8, 12, 3, activation="relu")
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 8, 6, 6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, expected = compiled(x), layer(x)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, expected)
    y.sum().backward()
    assert layer.bias.grad.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_model_to_dtype(dtype):
    layer = FrozenConvBias(8, 12, 3, activation="relu").to(dtype)
    y = layer(torch.randn(1, 8, 6, 6, dtype=dtype))
    y.sum().backward()
    assert y.dtype == layer.bias.grad.dtype == dtype
    assert not layer.weight.requires_grad


def in_distributed_data_parallel() -> None:
    layer = FrozenConvBias(8, 12, 3, activation="relu")
    model = nn.parallel.DistributedDataParallel(nn.Sequential(layer, tnn.MaxPool2d(2)))
    x = torch.randn(2, 8, 6, 6)
    model(x).sum().backward()
    ddp_grad, layer.bias.grad = layer.bias.grad, None
    tnn.MaxPool2d(2)(layer(x)).sum().backward()
    torch.testing.assert_close(ddp_grad, layer.bias.grad)


def test_distributed_data_parallel():
    run_in_process_group(in_distributed_data_parallel)


def test_a_second_derivative_through_a_smooth_activation_is_refused():
    # The loss is linear, so grad_output carries no history: its share would be lost without a word.
    layer = FrozenConvBias(8, 12, 3, activation="silu")
    x = torch.randn(1, 8, 6, 6, requires_grad=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(layer(x).sum(), x, create_graph=True)


def test_codes_of_a_smooth_activation_are_a_byte_an_element():
    layer = FrozenConvBias(3, 8, 3, padding=1, activation="silu", code_bits=8)
    x = torch.randn(2, 3, 6, 5, requires_grad=True)
    assert repr(layer).endswith("activation=silu, code_bits=8)")
    assert saved_bytes(lambda: layer(x), exclude=list(layer.parameters())) == 2 * 8 * 6 * 5
    coded = torch.autograd.grad(layer(x).sum(), [x, layer.bias])
    layer.code_bits = None
    assert saved_bytes(lambda: layer(x), exclude=list(layer.parameters())) == 2 * 8 * 6 * 5 * 4
    for name, a, b in zip(("input", "bias"), coded, torch.autograd.grad(layer(x).sum(), [x, layer.bias]), strict=True):
        assert 0 < ((a - b).norm() / b.norm()).item() < 0.01, name


def test_codes_do_not_change_what_an_activation_of_bits_keeps():
    layer = FrozenConvBias(3, 8, 3, activation="relu", code_bits=8)
    x = torch.randn(2, 3, 6, 5, requires_grad=True)
    assert saved_bytes(lambda: layer(x), exclude=list(layer.parameters())) == 2 * 4 * 3
    assert FrozenConvBias.from_conv(layer).code_bits == 8


def test_other_numbers_of_bits_are_refused():
    with pytest.raises(ValueError, match="code_bits: expected None"):
        FrozenConvBias(3, 8, 3, activation="silu", code_bits=4)
