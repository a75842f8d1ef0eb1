"""FrozenConvBias and FrozenInvertedResidual with weights in 8 bits: state_dict both ways, dtypes, copies, repr."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch import nn

from tinytl_kernels import FrozenConvBias, FrozenInvertedResidual
from tinytl_kernels.core.quantization import CODES, dequantize, quantize

KEYS = ["weight", "bias", "weight_scale"]


def twins(code: str, **arguments) -> tuple[FrozenConvBias, FrozenConvBias]:
    """A layer in 8 bits, and one in floating point with the weight that the 8 bits stand for."""
    layer = FrozenConvBias(8, 12, **{"kernel_size": 3, "activation": "relu", **arguments}).quantize_(code)
    exact = copy.deepcopy(layer).dequantize_()
    assert exact.weight_code is None
    return layer, exact


@pytest.mark.parametrize("code", CODES)
@pytest.mark.parametrize(
    "arguments",
    [
        dict(padding=1),
        dict(kernel_size=1),
        dict(padding="same", groups=4),
        dict(stride=2, padding="tf_same"),
        dict(padding=2, padding_mode="reflect"),
        dict(padding=1, padding_mode="circular"),
        dict(bias=False),
    ],
    ids=str,
)
def test_computes_with_the_weight_that_the_8_bits_stand_for(arguments, code):
    layer, exact = twins(code, **arguments)
    x = torch.randn(2, 8, 9, 10, requires_grad=True)
    y = layer(x)
    grad = torch.randn_like(y)
    torch.testing.assert_close(y, exact(x))
    torch.testing.assert_close(torch.autograd.grad(y, x, grad), torch.autograd.grad(exact(x), x, grad))


@pytest.mark.parametrize("code", CODES)
def test_the_weight_is_a_byte_a_number_and_the_scale_a_buffer(code):
    layer, _ = twins(code)
    assert list(layer.state_dict()) == KEYS
    assert [name for name, _ in layer.named_parameters()] == ["weight", "bias"]
    assert layer.weight.element_size() == 1
    assert not layer.weight.requires_grad
    assert [name for name, p in layer.named_parameters() if p.requires_grad] == ["bias"]
    assert list(FrozenConvBias(8, 12, 3).state_dict()) == ["weight", "bias"]


@pytest.mark.parametrize("assign", [False, True])
def test_a_float_state_dict_is_quantised_on_the_way_in(assign):
    layer, _ = twins("int8")
    conv = nn.Conv2d(8, 12, 3)
    layer.load_state_dict(conv.state_dict(), assign=assign)
    codes, scale = quantize(conv.weight)
    assert torch.equal(layer.weight, codes)
    assert torch.equal(layer.weight_scale, scale)
    assert torch.equal(layer.bias, conv.bias)
    assert conv.weight.dtype == torch.float32  # the caller's dictionary is left alone


@pytest.mark.parametrize("code", CODES)
def test_a_quantised_state_dict_is_dequantised_on_the_way_into_floats(code):
    layer, exact = twins(code)
    state = layer.state_dict()
    for target in (FrozenConvBias(8, 12, 3), FrozenConvBias(8, 12, 3, dtype=torch.bfloat16)):
        target.load_state_dict(state)
        assert torch.equal(target.weight, exact.weight.to(target.weight.dtype))
        assert list(target.state_dict()) == ["weight", "bias"]
    assert list(state) == KEYS


@pytest.mark.parametrize("code", CODES)
def test_round_trip_through_a_file(code):
    layer, _ = twins(code)
    buffer = io.BytesIO()
    torch.save(nn.Sequential(layer).state_dict(), buffer)
    buffer.seek(0)
    other = nn.Sequential(twins(code)[0])
    other.load_state_dict(torch.load(buffer, weights_only=True))
    x = torch.randn(1, 8, 6, 6)
    assert torch.equal(other[0](x), layer(x))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop("weight_scale"), "weight: expected a weight_scale beside one of dtype torch.int8"),
        (lambda state: state.update(weight=torch.randn(12, 8, 3, 3)), "weight: expected no weight_scale beside"),
        (lambda state: state.update(weight=state["weight"][:, :4]), "size mismatch for weight"),
        (lambda state: state.update(twins("kmeans")[0].state_dict()), "the module holds 'int8' and .* 'kmeans'"),
    ],
)
def test_a_state_dict_that_does_not_fit_is_refused(change, message):
    state = twins("int8")[0].state_dict()
    change(state)
    for strict in (True, False):
        with pytest.raises(RuntimeError, match=message):
            twins("int8")[0].load_state_dict(state, strict=strict)


def test_nan_in_a_float_state_dict_is_refused():
    with pytest.raises(RuntimeError, match="weight: NaN or inf cannot be coded"):
        nn.Sequential(twins("int8")[0]).load_state_dict(
            {"0.weight": torch.full((12, 8, 3, 3), float("nan")), "0.bias": torch.zeros(12)}
        )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_to_dtype_leaves_codes_and_scale_alone(dtype):
    layer, exact = twins("int8")
    scale = layer.weight_scale.clone()
    layer.to(dtype)
    assert (layer.weight.dtype, layer.weight_scale.dtype, layer.bias.dtype) == (torch.int8, torch.float32, dtype)
    assert torch.equal(layer.weight_scale, scale)
    assert torch.equal(layer.float_weight(), exact.weight.to(dtype))
    x = torch.randn(1, 8, 6, 6, dtype=dtype)
    y = layer(x)
    y.sum().backward()
    torch.testing.assert_close(y, exact.to(dtype)(x))
    assert layer.bias.grad.dtype == dtype
    assert layer.float().float_weight().dtype == torch.float32
    assert layer.type(dtype).weight.dtype == torch.int8  # Module.type() casts integers too
    torch.testing.assert_close(layer(x), y)


def test_to_memory_format_and_device():
    layer, exact = twins("int8")
    layer.to(memory_format=torch.channels_last)
    assert layer.weight.is_contiguous(memory_format=torch.channels_last)
    assert layer(torch.randn(1, 8, 6, 6)).is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(layer.float_weight(), exact.weight)
    layer.to("meta")
    assert layer.weight.device == layer.weight_scale.device == torch.device("meta")
    assert layer(torch.randn(1, 8, 6, 6, device="meta")).shape == (1, 12, 4, 4)


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
@pytest.mark.parametrize("code", CODES)
def test_copies_compute_the_same(clone, code):
    layer, _ = twins(code)
    x = torch.randn(1, 8, 6, 6)
    assert torch.equal(clone(layer)(x), layer(x))
    assert clone(layer.half()).float_weight().dtype == torch.float16


def test_repr_says_so():
    assert repr(twins("int8")[0]) == (
        "FrozenConvBias(8, 12, kernel_size=(3, 3), stride=(1, 1), activation=relu, weight=int8)"
    )


def test_a_weight_in_8_bits_cannot_be_set_to_train():
    layer, _ = twins("int8")
    with pytest.raises(RuntimeError, match=r"weight in 8 bits, which cannot be trained.*to_torch"):
        layer.requires_grad_(True)
    layer.requires_grad_(False)
    assert not layer.bias.requires_grad


def test_quantising_again():
    layer, _ = twins("int8")
    codes = layer.weight
    assert layer.quantize_("int8").weight is codes
    with pytest.raises(ValueError, match="already; call dequantize_"):
        layer.quantize_("kmeans")
    with pytest.raises(ValueError, match="code: expected one of"):
        layer.quantize_("int4")


def test_from_conv_folds_into_the_weight_that_the_8_bits_stand_for():
    layer, exact = twins("int8", activation=None)
    norm = nn.BatchNorm2d(12)
    norm.running_var.uniform_(0.5, 2)
    x = torch.randn(1, 8, 6, 6)
    folded = FrozenConvBias.from_conv(layer, norm, "relu")
    assert folded.weight_code is None
    torch.testing.assert_close(folded(x), norm.eval()(exact(x)).relu(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("code", CODES)
@pytest.mark.parametrize("expand_ratio", [1, 4])
def test_a_block_computes_with_the_weights_that_the_8_bits_stand_for(expand_ratio, code):
    block = FrozenInvertedResidual(16, 16, expand_ratio=expand_ratio).quantize_(code)
    exact = copy.deepcopy(block).dequantize_()
    assert {t.dtype for n, t in block.state_dict().items() if n.endswith("weight")} == {
        quantize(torch.ones(1, 1), code)[0].dtype
    }
    x = torch.randn(2, 16, 8, 8, requires_grad=True)
    y, pooled = block.forward_with_pooled(x)
    expected, expected_pooled = exact.forward_with_pooled(x)
    torch.testing.assert_close((y, pooled), (expected, expected_pooled))
    grad = torch.randn_like(y)
    torch.testing.assert_close(torch.autograd.grad(y, x, grad), torch.autograd.grad(expected, x, grad))
    block.fused = False
    torch.testing.assert_close(block(x), expected)


def test_compiles_without_a_graph_break():
    block = FrozenInvertedResidual(8, 8).quantize_()
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    x = torch.randn(1, 8, 6, 6)
    expected = torch.autograd.grad(block(x).square().sum(), block.project.bias)
    torch.testing.assert_close(torch.autograd.grad(compiled(x).square().sum(), block.project.bias), expected)


def test_distributed_data_parallel(tmp_path):
    import torch.distributed as dist

    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        layer, exact = twins("int8")
        x = torch.randn(2, 8, 6, 6)
        nn.parallel.DistributedDataParallel(nn.Sequential(layer))(x).sum().backward()
        exact(x).sum().backward()
        torch.testing.assert_close(layer.bias.grad, exact.bias.grad)
    finally:
        dist.destroy_process_group()


def test_the_scale_is_what_dequantises():
    layer, _ = twins("int8")
    assert torch.equal(layer.float_weight(), dequantize(layer.weight, layer.weight_scale))
