"""The C++ lite branch: computed here alone, memory fully written, the same bits with any number of threads."""

from __future__ import annotations

import pytest
import torch

from tests.backends.cpu.exact import operator, poisoned_memory
from tests.backends.cpu.test_who_computes import recorded
from tests.threads import num_threads

pytestmark = pytest.mark.usefixtures("cpu_kernels")


def arguments(norm_groups: int, size=(3, 24, 13, 9), kernel: int = 5, stride: int = 2) -> list:
    """Of the operator ``lite_branch``."""
    generator = torch.Generator().manual_seed(1)

    def random(*shape) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    pooled = random(*size).contiguous(memory_format=torch.channels_last)
    norms = [[random(channels), random(channels), None, None] for channels in (24, 20)]
    return [
        pooled, random(24, 12, kernel, kernel), *norms[0], random(20, 24, 1, 1), *norms[1],
        stride, 2, "relu", norm_groups, norm_groups, 1e-5, 1e-5, True,
    ]  # fmt: skip


def backward_arguments(forward: list, outputs: tuple, needed=(True,) * 7) -> list:
    pooled, weight1, scale1, shift1, _, _, weight2, scale2, *_ = forward
    output, conv, *statistics = outputs
    numbers = forward[11:18]
    return [
        output.sin(), pooled, conv, *statistics, weight1, scale1, shift1, weight2, scale2, *numbers, True, True,
        list(needed),
    ]  # fmt: skip


@pytest.mark.parametrize("norm_groups", [0, 4])
def test_computed_here_alone(norm_groups):
    forward = arguments(norm_groups)
    outputs, names = recorded("lite_branch", *forward)
    assert names == {"cpu.lite_branch_forward"}
    assert recorded("lite_branch_backward", *backward_arguments(forward, outputs))[1] == {"cpu.lite_branch_backward"}


@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("norm_groups", [0, 4])
def test_every_element_is_written(norm_groups, stride):
    forward = arguments(norm_groups, stride=stride)
    with poisoned_memory():
        outputs = operator("cpu", "lite_branch")(*forward)
        grads = operator("cpu", "lite_branch_backward")(*backward_arguments(forward, outputs))
    assert not any(t.isnan().any() for t in (*outputs, *grads))


@pytest.mark.parametrize("images", [1, 3])
@pytest.mark.parametrize("norm_groups", [0, 4])
def test_the_same_bits_with_any_number_of_threads(norm_groups, images):
    forward = arguments(norm_groups, size=(images, 24, 15, 14), stride=1)
    results = []
    for threads in (1, 2, 5):
        with num_threads(threads):
            outputs = operator("cpu", "lite_branch")(*forward)
            results.append([*outputs, *operator("cpu", "lite_branch_backward")(*backward_arguments(forward, outputs))])
    for others in results[1:]:
        for a, b in zip(results[0], others, strict=True):
            assert torch.equal(a, b)


def test_memory_beyond_the_kept_workspace():
    # 8 MiB are kept from call to call; a call that needs more allocates.
    forward = arguments(0, size=(2, 24, 224, 224), stride=1)
    outputs = operator("cpu", "lite_branch")(*forward)
    theirs = operator("reference", "lite_branch")(*forward)
    torch.testing.assert_close(outputs[0], theirs[0], rtol=1e-4, atol=1e-4)
