"""Layers of real networks, inside a network at batch 8: a convolution comes with its norm and activation."""

from __future__ import annotations

import pytest

from benchmarks.conftest import REPLAY, pairs
from benchmarks.layers import LAYERS

pytestmark = pytest.mark.benchmark(timer=REPLAY)


@pytest.mark.parametrize(("case", "contestant"), pairs(LAYERS))
def test_layer(case, contestant, take_part) -> None:
    take_part(case, contestant)
