"""What measure_memory says of an optimizer that steps in backward, and of one with low-bit state."""

from __future__ import annotations

import torch
from torch import nn

from tinytl_kernels.finetune import Adam8bit, step_in_backward
from tinytl_kernels.memory import measure_memory

WIDTH = 512
LAYER = 4 * WIDTH * WIDTH  # bytes of one weight


def network(layers: int = 8) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*[nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(layers)])


def test_gradients_are_those_alive_at_once() -> None:
    model, x = network(), torch.randn(1, WIDTH)
    optimizer = torch.optim.SGD(model.parameters())
    kept = measure_memory(model, x, optimizer=optimizer)
    with step_in_backward(optimizer):
        consumed = measure_memory(model, x, optimizer=optimizer)
    assert (kept.gradients, consumed.gradients) == (8 * LAYER, LAYER)
    assert kept.at_peak["gradients"] == 8 * LAYER
    assert consumed.at_peak["gradients"] == LAYER
    assert consumed.peak < 3 * LAYER < 8 * LAYER <= kept.peak
    assert consumed.peak_phase == "backward"


def test_the_step_is_taken_back() -> None:
    model, x = network(2), torch.randn(1, WIDTH)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    optimizer = Adam8bit(model.parameters())
    with step_in_backward(optimizer):
        measure_memory(model, x, optimizer=optimizer)
    assert all(torch.equal(one, other) for one, other in zip(model.parameters(), before, strict=True))
    assert not optimizer.state
    assert not optimizer._optimizer_step_pre_hooks


def test_a_state_in_8_bits_counts_as_such() -> None:
    model, x = network(2), torch.randn(1, WIDTH)
    stock = measure_memory(model, x, optimizer=torch.optim.Adam(model.parameters()))
    ours = measure_memory(model, x, optimizer=Adam8bit(model.parameters()))
    assert stock.optimizer == 2 * (2 * LAYER + 4)
    assert ours.optimizer == 2 * (LAYER // 2 + 8 * WIDTH + 4)
    assert ours.at_peak["optimizer"] == ours.optimizer
    # gradients, state, and the chunks in which Adam8bit works
    assert ours.peak < ours.gradients + ours.optimizer + 1_100_000


def test_an_optimizer_that_has_state_is_measured_like_a_fresh_one() -> None:
    model, x = network(2), torch.randn(1, WIDTH)
    optimizer = Adam8bit(model.parameters())
    fresh = measure_memory(model, x, optimizer=optimizer)
    model(x).sum().backward()
    optimizer.step()
    assert optimizer.state
    assert measure_memory(model, x, optimizer=optimizer).peak == fresh.peak
