"""A stem and the block behind it in one call: the bits of its two operators, and left to them where it has to be."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import tinytl_kernels as tk
from tests.backends.cpu.fused import counted, image, kept
from tests.threads import num_threads
from tinytl_kernels import FrozenConvBias, FrozenInvertedResidual
from tinytl_kernels.backends.cpu import frozen_conv
from tinytl_kernels.nn import FusedSequential

pytestmark = pytest.mark.usefixtures("cpu_kernels")

NAME = "block_chain"


@pytest.fixture(autouse=True, scope="module")
def stem_by_our_kernel():
    """The stem alone is computed by ``dense_conv.cpp``, also where oneDNN would be: it adds as the block does."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(frozen_conv, "_dense_is_faster", lambda *_: True)
        yield


@pytest.fixture
def taken(monkeypatch) -> list[bool]:
    """For every time that the one call was asked for: whether it took the layers."""
    return counted(NAME, monkeypatch)


def make(
    channels=3, hidden=16, out=8, k=3, stem_stride=2, stem_padding=1, activation="relu6", **block
) -> FusedSequential:
    stem = FrozenConvBias(channels, hidden, k, stem_stride, stem_padding, activation=activation)
    block = FrozenInvertedResidual(hidden, out, expand_ratio=1, activation=activation, residual=False, **block)
    for conv in (stem, block.depthwise, block.project):
        nn.init.normal_(conv.bias, std=0.5)
    return FusedSequential(stem, block).to(memory_format=torch.channels_last)


def step(model: nn.Module, x: torch.Tensor) -> dict[str, torch.Tensor | None]:
    model.zero_grad()
    output = model(x)
    generator = torch.Generator().manual_seed(3)
    if output.requires_grad:
        (output * torch.randn(output.shape, generator=generator).to(output.dtype)).sum().backward()
    biases = {name: p for name, p in model.named_parameters() if name.endswith("bias")}
    return {"output": output.detach()} | {name: p.grad for name, p in biases.items()}


def both(model: FusedSequential, x: torch.Tensor) -> tuple[dict, dict]:
    """One step in one call and one, of a copy, layer by layer."""
    layers = copy.deepcopy(model)
    layers.fused = False
    return step(model, x), step(layers, x)


def assert_same(ours: dict, theirs: dict) -> None:
    assert torch.equal(ours["output"], theirs["output"])
    for name, expected in theirs.items():
        assert (ours[name] is None) == (expected is None), name
        if name == "0.bias" and expected is not None:  # summed in another order, of terms that may cancel
            atol = 1e-6 + 1e-5 * expected.abs().max().item()
            torch.testing.assert_close(ours[name], expected, rtol=1e-5, atol=atol)
        elif expected is not None:
            assert torch.equal(ours[name], expected), name


@pytest.mark.parametrize(
    "options",
    [
        dict(),
        dict(activation="relu"),
        dict(activation=None),
        dict(stem_stride=1, stem_padding=(2, 0, 0, 1)),
        dict(stem_padding="tf_same", k=5),
        dict(stride=2),
        dict(kernel_size=5, stride=2, padding="tf_same"),
        dict(channels=1, hidden=12, out=5),
        dict(channels=4, hidden=40, out=30, k=2, stem_padding=0),
        dict(stem_stride=3, k=2),
    ],
    ids=str,
)
@pytest.mark.parametrize("size", [(2, 17, 22), (1, 9, 40)], ids=str)
def test_the_bits_of_two_operators(options, size, taken):
    model = make(**options)
    batch, height, width = size
    assert_same(*both(model, image(batch, model[0].in_channels, height, width)))
    assert taken == [True]


@given(
    batch=st.integers(1, 5),
    height=st.integers(3, 24),
    width=st.integers(3, 24),
    channels=st.integers(1, 4),
    hidden=st.integers(1, 50),
    out=st.integers(1, 30),
    k=st.integers(2, 3),
    stem_stride=st.integers(1, 3),
    stride=st.integers(1, 2),
    pads=st.tuples(*[st.integers(0, 2)] * 4),
    activation=st.sampled_from(["relu", "relu6", None]),
)
@settings(max_examples=60, deadline=None)
def test_any_shape(batch, height, width, pads, k, **options):
    assert_same(*both(make(stem_padding=pads, k=k, **options), image(batch, options["channels"], height, width)))


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_bands_of_one_picture(threads, taken):
    with num_threads(threads):
        model, x = make(), image(1, 3, 65, 63)
        ours, theirs = both(model, x)
        assert_same(ours, theirs)
        again = step(model, x)
        assert all(torch.equal(again[name], ours[name]) for name in ours)
    assert taken == [True, True]


@pytest.mark.parametrize("k", [7, 11])
def test_a_window_of_more_terms_than_one_chain_adds_up(k, taken):
    ours, theirs = both(make(k=k, stem_padding=k // 2), image(2, 4, 20, 20)[:, :3])
    for name in theirs:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-5, atol=1e-5 * theirs[name].abs().max().item())
    assert taken == [True]


@pytest.mark.parametrize("code", ["int8", "kmeans"])
def test_weights_in_8_bits(code, taken):
    model = make()
    model[0].quantize_(code)
    model[1].quantize_(code)
    assert_same(*both(model, image(2, 3, 20, 20)))
    assert taken == [True]


@pytest.mark.parametrize("weights", ["half", "float32"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_as_near_to_float64_as_two_operators(dtype, weights, taken):
    model = make().to(dtype)
    exact = copy.deepcopy(model).double()
    if weights == "float32":
        model = model.float()
    x = image(4, 3, 20, 20, dtype=dtype)
    ours, theirs = both(model, x)
    assert taken == [True]
    with tk.use_backend("reference"):
        expected = step(exact, x.double())

    def error(results: dict, name: str) -> float:
        return ((results[name].double() - expected[name]).norm() / expected[name].norm()).item()

    assert ours["output"].dtype is dtype
    # What lies between is rounded once more by two operators; a mask may turn around for either.
    for name in expected:
        assert error(ours, name) <= 1.5 * error(theirs, name) + 2 * torch.finfo(dtype).eps, name


@pytest.mark.parametrize(
    "frozen", [["0"], ["1"], ["0", "1"], ["1.depthwise"], ["1.project", "1.depthwise"]], ids=" ".join
)
def test_only_what_is_asked_for(frozen, taken):
    model = make()
    for name in frozen:
        model.get_submodule(name).requires_grad_(False)
    ours, theirs = both(model, image(2, 3, 16, 16))
    assert_same(ours, theirs)
    for name in ours.keys() - {"output"}:
        assert (ours[name] is not None) == model.get_parameter(name).requires_grad, name
    assert taken == [True]


def test_without_gradients(taken):
    model, x = make(), image(2, 3, 16, 16)
    with torch.no_grad():
        ours = model(x)
    assert taken == [True]
    assert not ours.requires_grad
    model.fused = False
    assert torch.equal(ours, model(x))


def test_a_not_finite_value_stays_where_it_is(taken):
    model, x = make(activation="relu"), image(2, 3, 16, 16)
    x[0, 1, 5, 5] = float("nan")
    x[1, 2, 0, 0] = float("inf")
    ours, theirs = both(model, x)
    assert torch.equal(ours["output"].isnan(), theirs["output"].isnan())
    assert not ours["output"][0, :, 6:].isnan().any()
    assert taken == [True]


def test_an_empty_batch(taken):
    output = make()(image(0, 3, 16, 16))
    assert output.shape == (0, 8, 8, 8)
    output.sum().backward()
    assert taken == [True]


def test_it_keeps_the_masks_and_not_the_image(taken):
    model, x = make(), image(2, 3, 16, 16)

    ours = kept(lambda: model(x))
    assert taken == [True]
    model.fused = False
    assert ours == kept(lambda: model(x))


def test_pictures_in_nchw_are_taken_where_the_weights_are_channels_last(taken):
    model, x = make(), torch.randn(2, 3, 16, 16)
    assert_same(*both(model, x))
    assert model(x).is_contiguous(memory_format=torch.channels_last)
    assert taken == [True, True]
    make().to(memory_format=torch.contiguous_format)(x)
    assert taken == [True, True, False]


def test_autocast_is_half_precision(taken):
    """As with an image and biases in bfloat16 themselves: the weights are rounded to it inside."""
    model, x = make(), image(2, 3, 16, 16)
    with torch.autocast("cpu", torch.bfloat16):
        ours = step(model, x)
    expected = step(model, x.bfloat16())
    assert taken == [True, True]
    assert ours["output"].dtype is torch.bfloat16
    for name in expected:
        assert torch.equal(ours[name], expected[name]), name


def test_what_is_not_asked_for_in_one_call(taken):
    model, x = make(), image(2, 3, 16, 16)
    with tk.use_backend("reference"):
        model(x)
    x.requires_grad_()
    model(x).sum().backward()
    assert x.grad.abs().sum() > 0
    assert not taken
    make(activation="leaky_relu")(image(2, 3, 16, 16))
    assert taken == [False]


def test_a_second_derivative_is_an_error_where_it_is_asked_for(taken):
    model, x = make(), image(2, 3, 16, 16)
    (first,) = torch.autograd.grad(model(x).square().sum(), model[1].project.bias, create_graph=True)
    assert taken == [True]
    with pytest.raises(RuntimeError, match=r"tinytl::.*_backward has no second derivative.*to_torch"):
        first.sum().backward()


@pytest.mark.parametrize("name", ["0", "1.depthwise", "1.project"])
def test_a_trained_weight_is_refused(name):
    model = make()
    model.get_submodule(name).weight.requires_grad_(True)
    with pytest.raises(RuntimeError, match="computes no weight gradient"):
        model(image(2, 3, 16, 16))


def test_bad_input_is_named():
    model = make()
    with pytest.raises(ValueError, match="input: expected 3 channels"):
        model(image(2, 4, 16, 16))
    with pytest.raises(ValueError, match="is smaller than the kernel"):
        make(k=5, stem_padding=0)(image(2, 3, 2, 2))
    with pytest.raises(ValueError, match="weight: expected dtype"):
        model.bfloat16()(image(2, 3, 16, 16))
