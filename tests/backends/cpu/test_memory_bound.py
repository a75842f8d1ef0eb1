"""Activations, pooling and upsampling in C++ equal the reference bit by bit on whole numbers, for any shape."""

from __future__ import annotations

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from tests.backends.cpu.exact import both, whole_numbers
from tests.checks import compare_with_torch
from tests.ops.layouts import DTYPES, LAYOUTS, images
from tests.ops.test_activation import STOCK
from tests.ops.test_upsample_add import stock as stock_upsample_add
from tinytl_kernels import ops
from tinytl_kernels.core.activations import BIT_MASK
from tinytl_kernels.core.geometry import output_length

pytestmark = pytest.mark.usefixtures("cpu_kernels")

SHAPES = st.lists(st.integers(0, 9), min_size=1, max_size=3).flatmap(
    lambda front: st.integers(1, 40).map(lambda last: (*front, last))
)
PAIR = st.tuples(st.integers(1, 4), st.integers(1, 4))
DTYPE = st.sampled_from(DTYPES)


@given(
    size=SHAPES, five=st.booleans(), dtype=DTYPE, name=st.sampled_from(["relu", "relu6", "leaky_relu"]),
    seed=st.integers(0, 2**31),
)  # fmt: skip
@settings(max_examples=200, deadline=None)
def test_activations_equal_the_reference_for_any_shape(size, five, dtype, name, seed):
    size = (1, 2, *size[-3:]) if five else size
    generator = torch.Generator().manual_seed(seed)
    x = whole_numbers(size, 8, generator, dtype)
    _, mask = both("activation", x, name, 0.25, True)
    both("activation_backward", whole_numbers(size, 8, generator, dtype), mask, name, 0.25)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", BIT_MASK)
def test_activations_are_as_exact_as_pytorchs(name, dtype, layout):
    compare_with_torch(lambda x: ops.activation(x, name), STOCK[name], [images((2, 37, 5, 7), dtype, layout)])


@given(
    size=st.tuples(st.integers(1, 3), st.integers(1, 40), st.integers(1, 12), st.integers(1, 12)), kernel=PAIR,
    stride=PAIR, padded=st.tuples(st.booleans(), st.booleans()), dilation=st.integers(1, 2), ceil_mode=st.booleans(),
    dtype=DTYPE, special=st.sampled_from([None, float("nan"), -float("inf")]), seed=st.integers(0, 2**31),
)  # fmt: skip
@settings(max_examples=200, deadline=None)
def test_max_pool_equals_the_reference_for_any_window(
    size, kernel, stride, padded, dilation, ceil_mode, dtype, special, seed
):
    padding = [k // 2 if p else 0 for k, p in zip(kernel, padded, strict=True)]
    assume(all(output_length(size[2 + i], kernel[i], stride[i], padding[i], padding[i], dilation) > 0 for i in (0, 1)))
    # A dilated window can miss a narrow image altogether; which position it then has says nothing.
    assume(all(size[2 + i] > (kernel[i] - 1) * dilation or not padding[i] for i in (0, 1)))
    generator = torch.Generator().manual_seed(seed)
    x = whole_numbers(size, 3, generator, dtype)  # ties in every window
    if special is not None:
        x.view(-1)[::5] = special
    window = [list(kernel), list(stride), padding, [dilation] * 2]
    # Not against PyTorch: its backward in half precision writes out of bounds where a window is -inf all over.
    output, positions = both("max_pool2d", x, *window, ceil_mode, True)
    both("max_pool2d_backward", whole_numbers(output.shape, 3, generator, dtype), positions, list(size), *window, False)


@given(
    size=st.tuples(st.integers(0, 3), st.integers(1, 40), st.integers(1, 12), st.integers(1, 12)), kernel=PAIR,
    stride=PAIR, padded=st.tuples(st.booleans(), st.booleans()), ceil_mode=st.booleans(), counted=st.booleans(),
    divisor=st.sampled_from([None, 1, 3]), seed=st.integers(0, 2**31),
)  # fmt: skip
@settings(max_examples=100, deadline=None)
def test_average_pool_is_as_exact_as_pytorch_for_any_window(
    size, kernel, stride, padded, ceil_mode, counted, divisor, seed
):
    padding = [k // 2 if p else 0 for k, p in zip(kernel, padded, strict=True)]
    assume(all(output_length(size[2 + i], kernel[i], stride[i], padding[i], padding[i], 1) > 0 for i in (0, 1)))
    x = torch.randn(size, generator=torch.Generator().manual_seed(seed))
    window = (kernel, stride, padding, ceil_mode, counted, divisor)
    compare_with_torch(lambda x: ops.avg_pool2d(x, *window), lambda x: torch.nn.functional.avg_pool2d(x, *window), [x])


SIDE = st.integers(1, 11)


@given(
    main=st.tuples(SIDE, SIDE), branch=st.tuples(SIDE, SIDE), channels=st.integers(1, 40), batch=st.integers(0, 2),
    dtype=DTYPE, seed=st.integers(0, 2**31),
)  # fmt: skip
@settings(max_examples=100, deadline=None)
def test_upsample_add_is_as_exact_as_pytorch_for_any_sizes(main, branch, channels, batch, dtype, seed):
    assume(batch > 0 or main == branch)  # F.interpolate refuses an empty batch
    generator = torch.Generator().manual_seed(seed)
    inputs = [torch.randn(batch, channels, *size, generator=generator).to(dtype) for size in (main, branch)]
    if batch == 0:
        both("upsample_add", *inputs)
        both("upsample_add_backward", inputs[0], list(branch), False)
    else:
        compare_with_torch(ops.upsample_add, stock_upsample_add, inputs, terms=main[0] * main[1])
