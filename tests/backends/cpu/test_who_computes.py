"""Which arithmetic the C++ kernels do themselves and which they hand to ATen: nothing falls back in silence."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.backends.cpu.exact import operator
from tinytl_kernels.backends import cpu, reference
from tinytl_kernels.backends.cpu import frozen_conv
from tinytl_kernels.core.activations import ACTIVATIONS, BIT_MASK, FULL_VALUE

pytestmark = pytest.mark.usefixtures("cpu_kernels")

# Operators that the cpu backend leaves to the reference, which is ATen: no arithmetic (dropout draws random numbers,
# padding copies) or one ATen kernel that is at the speed of memory already.
ATEN_OPERATORS = {
    "adaptive_avg_pool2d", "adaptive_avg_pool2d_backward", "dropout", "dropout_backward", "pad2d", "pad2d_backward",
}  # fmt: skip

# Memory, layouts and shapes, no arithmetic.
PLUMBING = {
    "_to_copy", "clone", "contiguous", "copy_", "detach", "empty", "empty_like", "new_empty", "reshape", "slice", "to",
    "unsqueeze", "view", "zeros", "alias", "as_strided", "expand", "_unsafe_view", "permute", "transpose", "squeeze",
    "empty_strided", "select", "fill_", "zero_", "in_layout",
}  # fmt: skip


class Recorder(TorchDispatchMode):
    """Names of the operators that run inside, without plumbing; the kernels' own with their namespace."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        namespace, name = function._schema.name.split("::")
        if name not in PLUMBING:
            self.names.add(f"cpu.{name}" if namespace == "tinytl_cpu" else name)
        return function(*args, **(kwargs or {}))


def recorded(name: str, *arguments) -> tuple[tuple, set[str]]:
    with Recorder() as recorder:
        result = operator("cpu", name)(*arguments)
    return (result if isinstance(result, tuple) else (result,)), recorder.names


X = torch.randn(2, 16, 8, 8).contiguous(memory_format=torch.channels_last)
WEIGHTS = {
    "pointwise": (torch.randn(24, 16, 1, 1), 1),
    "depthwise": (torch.randn(16, 1, 3, 3), 16),
    "dense": (torch.randn(24, 16, 3, 3), 1),
    "narrow groups": (torch.randn(24, 4, 3, 3), 4),
}
OWN = {
    "pointwise": ({"cpu.pointwise_forward"}, {"cpu.pointwise_backward"}),
    "depthwise": ({"cpu.depthwise_forward"}, {"cpu.depthwise_backward"}),
    "dense": ({"cpu.dense_forward"}, {"cpu.dense_backward"}),
}
# oneDNN and one pass of our own; the input gradient of a convolution is a transposed convolution.
MIXED = ({"convolution", "cpu.bias_activation_"}, {"cpu.activation_backward", "convolution"})


def run_convolution(kind: str, activation: str | None) -> tuple[set[str], set[str]]:
    weight, groups = WEIGHTS[kind]
    numbers = ([1, 1], [0, 0, 0, 0], [1, 1], groups)
    (output, saved), forward = recorded(
        "frozen_conv", X, weight, torch.zeros(weight.size(0)), *numbers, activation, True
    )
    _, backward = recorded(
        "frozen_conv_backward", torch.randn_like(output), weight, saved, list(X.shape), *numbers, activation, True,
        True, True,
    )  # fmt: skip
    return forward, backward


@pytest.mark.parametrize("activation", [None, *ACTIVATIONS])
@pytest.mark.parametrize("kind", OWN)
def test_convolutions_as_wide_as_a_vector_are_computed_here_alone(kind, activation):
    assert run_convolution(kind, activation) == OWN[kind]


@pytest.mark.parametrize("activation", BIT_MASK)
def test_narrow_groups_are_onednn_and_one_pass_of_our_own(activation):
    forward, backward = run_convolution("narrow groups", activation)
    assert forward == MIXED[0]
    assert backward - {"add_"} == MIXED[1]  # add_: bias gradients of the chunks of images


@pytest.mark.parametrize("activation", FULL_VALUE)
def test_narrow_groups_with_smooth_activations_are_the_references(activation):
    forward, backward = run_convolution("narrow groups", activation)
    assert not {name for name in forward | backward if name.startswith("cpu.")}
    assert "convolution" in forward


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_large_weights_are_onednns_where_it_has_the_arithmetic(dtype):
    input, weight = torch.randn(1, 144, 4, 4).to(dtype), torch.randn(144, 144, 3, 3).to(dtype)
    _, forward = recorded("frozen_conv", input, weight, None, [1, 1], [1] * 4, [1, 1], 1, "relu", True)
    without = {
        torch.float16: not frozen_conv._onednn_knows_more(dtype),
        torch.bfloat16: not torch.ops.mkldnn._is_mkldnn_bf16_supported(),
    }
    ours = without.get(dtype, False)
    assert forward == ({"cpu.dense_forward"} if ours else MIXED[0])


@pytest.mark.parametrize("need_input", [True, False])
def test_a_stem_is_computed_here_and_only_its_input_gradient_is_onednns(need_input):
    input = torch.randn(1, 3, 16, 16).contiguous(memory_format=torch.channels_last)
    weight = torch.randn(32, 3, 3, 3)
    numbers = ([2, 2], [0, 1, 0, 1], [1, 1], 1)
    (output, saved), forward = recorded("frozen_conv", input, weight, None, *numbers, "relu6", True)
    assert forward == {"cpu.dense_forward"}
    (grad_input, _), backward = recorded(
        "frozen_conv_backward", output, weight, saved, list(input.shape), *numbers, "relu6", True, need_input, True
    )
    assert grad_input.numel() == (input.numel() if need_input else 0)
    assert backward - {"add_"} == (MIXED[1] if need_input else {"cpu.activation_backward"})


@pytest.mark.parametrize("activation", [None, "relu", "relu6"])
@pytest.mark.parametrize("expand", [True, False])
def test_the_block_is_computed_here_alone(expand, activation):
    hidden = 48 if expand else 16
    weights = [torch.randn(s) for s in ((hidden, 16, 1, 1), (hidden, 1, 3, 3), (16, hidden, 1, 1))]
    if not expand:
        weights[0] = None
    numbers = ([1, 1], [1] * 4, activation, True)
    pairs = [t for w in weights for t in (w, None)]
    (output, *masks, pooled), forward = recorded("frozen_inverted_residual", X, *pairs, *numbers, True, True)
    _, backward = recorded(
        "frozen_inverted_residual_backward", output, pooled, *weights, *masks, list(X.shape), *numbers, True,
        [True, expand, True, True],
    )  # fmt: skip
    assert forward == {"cpu.inverted_residual_forward"}
    assert backward == {"cpu.inverted_residual_backward"}


def test_memory_bound_operators_are_computed_here_alone():
    small = X[:, :, ::2, ::2].contiguous(memory_format=torch.channels_last)
    window = ([2, 2], [2, 2], [0, 0])
    (_, positions), max_pool = recorded("max_pool2d", X, *window, [1, 1], False, True)
    (_, mask), relu = recorded("activation", X, "relu", 0.01, True)
    calls = {
        "max_pool2d_forward": max_pool,
        "max_pool2d_backward": recorded("max_pool2d_backward", small, positions, list(X.shape), *window, [1, 1], True)[
            1
        ],
        "avg_pool2d_forward": recorded("avg_pool2d", X, *window, False, True, None)[1],
        "avg_pool2d_backward": recorded("avg_pool2d_backward", small, list(X.shape), *window, False, True, None, True)[
            1
        ],
        "activation_forward": relu,
        "activation_backward": recorded("activation_backward", X, mask, "relu", 0.01)[1],
        "upsample_add_forward": recorded("upsample_add", X, small)[1],
        "upsample_add_backward": recorded("upsample_add_backward", X, list(small.shape[2:]), True)[1],
    }
    assert calls == {name: {f"cpu.{name}"} for name in calls}


def test_the_operators_left_to_the_reference_are_these():
    assert set(reference.OPERATORS) - set(cpu.OPERATORS) == ATEN_OPERATORS
    assert set(cpu.OPERATORS) <= set(reference.OPERATORS)
