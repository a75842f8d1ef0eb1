"""A handful of the kernels of ``benchmarks.aot`` compiled ahead of time, and its count of bytes against arithmetic."""

from __future__ import annotations

import os

import pytest
import torch

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter does not compile", allow_module_level=True)

from benchmarks.aot import Layer, collect, compile_for, launches, mobilenet_v2, resnet50, traffic

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
    forward, *backward = launches(DENSE, torch.bfloat16)
    assert {launch.kernel.__name__ for launch in backward} == {"activation_backward_kernel"}
    for launch in (forward, backward[0]):
        compiled = compile_for(launch, "sm_90")
        assert (compiled.spilled_bytes, compiled.widest_load_bits) == (0, 128)


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

    # 300 M and 3.8 G in the papers' tables; the stems, 11 M and 118 M, and the classifiers are left out.
    assert multiplications(mobilenet_v2()) == pytest.approx(300e6 - 11e6, rel=0.02)
    assert multiplications(resnet50()) == pytest.approx(4.1e9 - 0.12e9, rel=0.02)
