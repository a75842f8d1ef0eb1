"""Blocks: the inverted residuals of MobileNetV2, and ResNet's two, inside a network at batch 8."""

from __future__ import annotations

import pytest

from benchmarks.blocks import BLOCKS
from benchmarks.conftest import REPLAY, pairs

pytestmark = pytest.mark.benchmark(timer=REPLAY)


@pytest.mark.parametrize(("case", "contestant"), pairs(BLOCKS))
def test_block(case, contestant, take_part) -> None:
    take_part(case, contestant)
