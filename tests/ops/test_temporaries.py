"""No operator makes a full extra copy of an activation: peaks of PyTorch's allocator, ATen's own temporaries included.

The tensors are a few times the size of a slab and a chunk, so that what should be piecewise is seen to be.
"""

from __future__ import annotations

import pytest
import torch

from tests.allocations import allocated, steadily_allocated
from tinytl_kernels.backends.reference import max_pool, slabs
from tinytl_kernels.core.activations import BIT_MASK

SIZE = (8, 32, 56, 48)
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
tinytl = torch.ops.tinytl


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    """Slabs and chunks in the proportion to SIZE that the real ones have to a real activation (8, 96, 112, 112)."""
    monkeypatch.setattr(slabs, "SLAB_ELEMENTS", 1 << 14)
    monkeypatch.setattr(max_pool, "SLAB_ELEMENTS", 1 << 14)
    monkeypatch.setattr(slabs, "CHUNK_BYTES", {"cpu": 32 * 56 * 48 * 4})  # one image


@pytest.fixture(params=LAYOUTS)
def layout(request) -> torch.memory_format:
    return LAYOUTS[request.param]


def image(layout, size=SIZE):
    return torch.randn(size).contiguous(memory_format=layout)


def assert_lean(function, tolerance: float = 0.1, chunks: int = 0) -> None:
    """The peak is what is returned, plus a tenth, plus so many chunks of one image."""
    peak, left = steadily_allocated(function)  # what is made once and kept (threads' buffers) is not counted
    assert left > 0
    allowed = (1 + tolerance) * left + chunks * 32 * 56 * 48 * 4
    assert peak <= allowed, f"peak {peak}, returned {left}, allowed {allowed:.0f}"


def test_the_measure_sees_a_copy():
    x = image(torch.contiguous_format)
    peak, left = allocated(lambda: x.mul(2).add(1))
    assert left == x.nbytes
    assert 2 * x.nbytes <= peak < 2.01 * x.nbytes  # and a scalar or two


@pytest.mark.parametrize("name", BIT_MASK)
def test_activation(layout, name):
    x = image(layout)
    assert_lean(lambda: tinytl.activation(x, name, 0.01, True))
    mask = tinytl.activation(x, name, 0.01, True)[1]
    assert_lean(lambda: tinytl.activation_backward(x, mask, name, 0.01))


def test_derivative_codes(layout):
    x = image(layout)
    assert_lean(lambda: tinytl.activation(x, "gelu", 0.01, True, True))
    codes = tinytl.activation(x, "gelu", 0.01, True, True)[1]
    assert_lean(lambda: tinytl.activation_backward(x, codes, "gelu", 0.01))


@pytest.mark.parametrize("weight_size", [(32, 32, 1, 1), (32, 1, 3, 3), (32, 32, 3, 3)], ids=str)
def test_frozen_conv(layout, weight_size):
    x, weight = image(layout), torch.randn(weight_size)
    geometry = ([1, 1], [weight_size[2] // 2] * 4, [1, 1], 32 // weight_size[1])
    # In NCHW oneDNN reorders one image on its way in and out, and the weight.
    chunks = 0 if layout is torch.channels_last else 3
    assert_lean(lambda: tinytl.frozen_conv(x, weight, None, *geometry, "relu6", True), chunks=chunks)
    mask = tinytl.frozen_conv(x, weight, None, *geometry, "relu6", True)[1]
    # Two chunks: the masked gradient and what the transposed convolution makes of it (NCHW: blocked, once more).
    assert_lean(
        lambda: tinytl.frozen_conv_backward(
            x, weight, mask, list(SIZE), *geometry, "relu6", layout is torch.channels_last, True, True
        ),
        chunks=2 if layout is torch.channels_last else 3,
    )


def test_bias_gradient_alone(layout):
    x, weight = image(layout), torch.randn(32, 32, 1, 1)
    mask = tinytl.frozen_conv(x, weight, None, [1, 1], [0] * 4, [1, 1], 1, "relu6", True)[1]
    peak, _ = steadily_allocated(
        lambda: tinytl.frozen_conv_backward(
            x, weight, mask, list(SIZE), [1, 1], [0] * 4, [1, 1], 1, "relu6", True, False, True
        )
    )
    assert peak < 0.35 * x.nbytes


def test_max_pool(layout):
    x, window = image(layout), ([3, 3], [2, 2], [1, 1], [1, 1])
    assert_lean(lambda: tinytl.max_pool2d(x, *window, False, True), tolerance=0.2)
    y, positions = tinytl.max_pool2d(x, *window, False, True)
    assert_lean(lambda: tinytl.max_pool2d_backward(y, positions, list(SIZE), *window, layout is torch.channels_last))


def test_avg_pool(layout):
    x, window = image(layout), ([2, 2], [2, 2], [0, 0], False, True, None)
    assert_lean(lambda: tinytl.avg_pool2d(x, *window))
    y = tinytl.avg_pool2d(x, *window)
    assert_lean(lambda: tinytl.avg_pool2d_backward(y, list(SIZE), *window, layout is torch.channels_last))
    assert_lean(lambda: tinytl.adaptive_avg_pool2d_backward(y, list(SIZE), layout is torch.channels_last), chunks=2)


def test_dropout(layout):
    x = image(layout)
    assert_lean(lambda: tinytl.dropout(x, 0.3))
    mask = tinytl.dropout(x, 0.3)[1]
    assert_lean(lambda: tinytl.dropout_backward(x, mask, 0.3))


def test_upsample_add(layout):
    main, branch = image(layout), image(layout, (8, 32, 28, 24))
    # In NCHW ATen interpolates one image channels last.
    assert_lean(lambda: tinytl.upsample_add(main, branch), chunks=0 if layout is torch.channels_last else 2)
    assert_lean(lambda: tinytl.upsample_add_backward(main, [28, 24], layout is torch.channels_last), chunks=1)


@pytest.mark.parametrize("mode", ["reflect", "replicate", "circular"])
def test_pad(layout, mode):
    x = image(layout)
    assert_lean(lambda: tinytl.pad2d(x, [1, 2, 1, 0], mode), chunks=2)
    y = tinytl.pad2d(x, [1, 2, 1, 0], mode)
    assert_lean(lambda: tinytl.pad2d_backward(y, [1, 2, 1, 0], mode, layout is torch.channels_last), chunks=3)
