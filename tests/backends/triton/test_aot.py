"""A handful of the kernels of ``benchmarks.aot`` compiled ahead of time, and its count of bytes against arithmetic."""

from __future__ import annotations

import os

import pytest
import torch

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter does not compile", allow_module_level=True)

from benchmarks.aot import machine_code
from benchmarks.aot.machine_code import SHARED_LIMITS, compile_for
from benchmarks.aot.table import PRODUCTS, collect, configuration
from benchmarks.aot.traffic import traffic
from benchmarks.aot.workload import (
    DTYPES,
    Layer,
    Run,
    block,
    group_norm,
    launches,
    lite_branch,
    max_pool,
    mobilenet_v2,
    resnet50,
)
from tinytl_kernels.backends.triton.choice import IMPLICIT_GEMM, LIBRARY
from tinytl_kernels.backends.triton.launch import Launch, record
from tinytl_kernels.backends.triton.operators import OPERATORS

EXPAND = Layer(24, 144, 1, 1, 1, 56, "relu6")
FILTER = Layer(144, 144, 3, 1, 144, 56, "relu6")
DENSE = Layer(64, 64, 3, 1, 1, 56, "relu")


@pytest.mark.parametrize("layer", [EXPAND, FILTER], ids=["pointwise", "depthwise"])
@pytest.mark.parametrize("architecture", ["sm_80", "sm_90", "sm_100", "gfx942"])
def test_half_precision_does_not_spill_and_loads_16_bytes(architecture, layer):
    forward, backward = launches(layer, torch.bfloat16)
    for launch in (forward, backward):
        compiled = compile_for(launch, architecture)
        assert compiled.spilled_bytes == 0
        assert compiled.widest_load_bits == 128  # 24 channels: a multiple of 8 that Triton must be told of
        assert (compiled.matrix_instructions > 0) == (layer is EXPAND)


@pytest.mark.parametrize("layer", [EXPAND, FILTER], ids=["pointwise", "depthwise"])
def test_beyond_2_to_31_elements_offsets_are_of_64_bits_and_still_do_not_spill(layer):
    for launch in launches(layer, torch.bfloat16, batch=8192):
        assert launch.constants["WIDE"]
        assert compile_for(launch, "sm_90").spilled_bytes == 0


def test_the_edges_of_a_dense_convolution_do_not_spill():
    # 3 x 3 with 64 channels: cuDNN's arithmetic, our epilogue in place and our masked gradient, chunk by chunk.
    forward, *backward = launches(DENSE, torch.bfloat16, by=LIBRARY)
    assert {launch.kernel.__name__ for launch in backward} == {"activation_backward_kernel"}
    for launch in (forward, backward[0]):
        compiled = compile_for(launch, "sm_90")
        assert (compiled.spilled_bytes, compiled.widest_load_bits) == (0, 128)


@pytest.mark.parametrize(
    ("architecture", "int8"), [("sm_80", False), ("sm_80", True), ("sm_100", False), ("gfx942", False)]
)
def test_the_implicit_product_does_not_spill_and_uses_tensor_cores(architecture, int8):
    for launch in launches(DENSE, torch.bfloat16, by=IMPLICIT_GEMM, int8=int8):
        assert launch.kernel.__name__.startswith("dense")
        compiled = compile_for(launch, architecture)
        assert (compiled.spilled_bytes, compiled.widest_load_bits) == (0, 128)
        assert compiled.matrix_instructions > 0
        assert compiled.shared_bytes <= SHARED_LIMITS[architecture]


def test_group_norm_does_not_spill_and_loads_16_bytes():
    with record() as recorded:
        group_norm(144, 56)(torch.bfloat16)
    for launch in recorded[:2]:  # the statistics, and what a group makes of them
        assert compile_for(launch, "sm_80").spilled_bytes == 0
    # The first of several chunks of images.
    backward = next(x for x in recorded if x.kernel.__name__ == "group_norm_backward_kernel")
    compiled = compile_for(backward, "sm_80")
    assert (compiled.spilled_bytes, compiled.widest_load_bits) == (0, 128)


@pytest.mark.parametrize("architecture", ["sm_80", "gfx942"])
def test_derivative_codes_do_not_spill_and_load_16_bytes(architecture):
    with record() as recorded:
        x = torch.empty(8, 96, 56, 56, dtype=torch.bfloat16, device="meta")
        _, codes = OPERATORS["activation"](x, "gelu", 0.01, True, True)
        OPERATORS["activation_backward"](x, codes, "gelu", 0.01)
    assert [launch.kernel.__name__ for launch in recorded] == ["encode_kernel", "decode_kernel"]
    for launch in recorded:
        compiled = compile_for(launch, architecture)
        assert (compiled.spilled_bytes, compiled.widest_load_bits) == (0, 128)


@pytest.mark.parametrize("sizes", [(24, 144, 24, 1, 56), (16, 96, 24, 2, 112)], ids=str)
def test_a_block_in_one_kernel_does_not_spill_and_uses_tensor_cores(sizes):
    with record() as recorded:
        block(*sizes)(torch.bfloat16)
    (launch,) = (x for x in recorded if x.kernel.__name__ == "whole_block_kernel")
    compiled = compile_for(launch, "sm_80")
    assert (compiled.spilled_bytes, compiled.widest_load_bits) == (0, 128)
    assert compiled.matrix_instructions > 0


def launched(what: Layer | Run, dtype: torch.dtype) -> list[Launch]:
    if isinstance(what, Layer):
        return launches(what, dtype)
    with record() as recorded:
        what(dtype)
    return recorded


@pytest.mark.parametrize(
    ("kernel", "what", "dtype", "architecture"),
    [
        # The sums of a wide step of grad_output, in a branch after the product, at the limit of two programs.
        ("pointwise_backward_kernel", block(24, 144, 24, 1, 56), "bfloat16", "sm_80"),
        ("pointwise_backward_kernel", block(32, 192, 64, 2, 28), "bfloat16", "sm_80"),
        ("pointwise_backward_kernel", Layer(64, 384, 1, 1, 1, 14, "relu6"), "bfloat16", "sm_100"),
        ("pointwise_backward_kernel", Layer(64, 64, 1, 1, 1, 56, "relu"), "bfloat16", "sm_100"),
        # Whether a window has a winner yet, beside the winner.
        ("max_pool2d_kernel", max_pool(64, 112), "bfloat16", "sm_90"),
        # 49 taps, unrolled, and all of their loads first.
        ("upsample_add_backward_kernel", block(24, 144, 32, 2, 56), "float32", "gfx942"),
        ("upsample_add_backward_kernel", block(24, 144, 24, 1, 56), "float32", "gfx942"),
        ("upsample_add_backward_kernel", block(96, 576, 160, 2, 14), "float32", "gfx942"),
        ("upsample_add_backward_kernel", block(96, 576, 96, 1, 14), "float32", "gfx942"),
        # 25 taps of a narrow tile, with 4 warps.
        ("dense_kernel", lite_branch(96, 160, 2, 7), "bfloat16", "sm_90"),
        # Stages of the pipeline, by dtype.
        ("whole_block_kernel", block(16, 96, 24, 2, 112), "float16", "sm_100"),
    ],
)
def test_what_once_spilled_does_not(kernel, what, dtype, architecture):
    distinct = {configuration(x): x for x in launched(what, DTYPES[dtype]) if x.kernel.__name__ == kernel}
    assert distinct
    for launch in distinct.values():
        assert compile_for(launch, architecture).spilled_bytes == 0


def test_accumulation_registers_of_gfx942_are_counted_once():
    # One file of 512 a thread; .vgpr_count is all of it.
    metadata = ".agpr_count: 256\n.private_segment_fixed_size: 84\n.vgpr_count: 512\n"
    compiled = machine_code._read_amdgcn(metadata, 0)
    assert (compiled.registers, compiled.spilled_bytes) == (512, 84)


@pytest.mark.parametrize("architecture", ["sm_80", "sm_100"])
def test_the_products_of_a_lite_residual_do_not_spill_and_use_tensor_cores(architecture):
    with record() as recorded:
        lite_branch(32, 64, 2, 14)(torch.bfloat16)
    products = {x.kernel.__name__: x for x in recorded if x.kernel.__name__.startswith(PRODUCTS)}
    assert len([name for name in products if name.startswith("lite_branch")]) == 3
    for launch in products.values():
        compiled = compile_for(launch, architecture)
        assert (compiled.spilled_bytes, compiled.widest_load_bits) == (0, 128), launch.kernel.__name__
        assert compiled.matrix_instructions > 0


def test_bytes_of_an_implicit_product():
    forward, backward = launches(DENSE, torch.bfloat16, by=IMPLICIT_GEMM, batch=2)
    pixels = 2 * 56 * 56
    floor = pixels * 64 * 2 * 2 + pixels * 8 + 64 * 64 * 9 * 2 + 64 * 4
    assert traffic(forward).floor == traffic(backward).floor == floor
    # Every tile asks for the rows above and below it, which L2 has.
    assert traffic(forward).requested > 1.5 * floor
    assert traffic(forward).memory == floor


def test_bytes_of_a_pointwise():
    forward, backward = launches(EXPAND, torch.bfloat16, batch=2)
    pixels = 2 * 56 * 56
    narrow, wide, mask = pixels * 24 * 2, pixels * 144 * 2, pixels * 18
    weight, bias = 144 * 24 * 2, 144 * 4
    assert traffic(forward).floor == narrow + wide + mask + weight + bias
    assert traffic(backward).floor == narrow + wide + mask + weight + bias
    # Two column tiles: the narrow input is asked for twice, the second time from L2.
    assert traffic(forward).requested >= traffic(forward).floor + narrow
    assert traffic(forward).memory == traffic(forward).floor


@pytest.mark.parametrize("network", ["mobilenet_v2", "resnet50"])
def test_no_kernel_moves_more_than_the_floor_and_15_percent(network):
    for row in collect([network], ["bfloat16", "float32"]):
        assert 1.0 <= row.memory <= 1.15, (row.kernel, row.tile)
        assert row.memory <= row.requested


def test_networks_have_the_multiplications_of_their_papers():
    def multiplications(layers):
        return sum(
            (x.size // x.stride) ** 2 * x.out_channels * x.channels // x.groups * x.kernel**2 for x in layers
        )  # fmt: skip

    # 300 M in the first paper's table; 4.1 G where the second's 3.8 has its strides in the 3x3. Without classifiers.
    assert multiplications(mobilenet_v2()) == pytest.approx(300e6, rel=0.02)
    assert multiplications(resnet50()) == pytest.approx(4.1e9, rel=0.02)
