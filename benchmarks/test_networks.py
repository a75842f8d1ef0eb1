"""Whole networks: pictures in, cross entropy out."""

from __future__ import annotations

import pytest

from benchmarks.conftest import REPLAY, pairs
from benchmarks.networks import NETWORKS

pytestmark = pytest.mark.benchmark(timer=REPLAY)


@pytest.mark.parametrize(("case", "contestant"), pairs(NETWORKS))
def test_network(case, contestant, take_part) -> None:
    take_part(case, contestant)
