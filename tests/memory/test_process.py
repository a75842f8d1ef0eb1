"""The operator-level count against the operating system's, in a process of its own."""

from __future__ import annotations

import pytest

from tests.memory.child import MEASURABLE, run_in_child

# 32 MB an activation. Element-wise layers and pooling only, where ATen and its libraries need no scratch memory, so
# that both counts mean the same thing.
SCRIPT = """
from torch import nn
from tinytl_kernels.memory import measure_memory

class Scale(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(8, 1, 1))
    def forward(self, x):
        return x * self.weight

def model():
    return nn.Sequential(Scale(), nn.Sigmoid(), nn.SiLU(), Scale(), nn.Tanh(), nn.AdaptiveAvgPool2d(1), nn.Flatten())

measure_memory(model(), torch.randn(1, 8, 8, 8))  # libraries are loaded before the count begins
x = torch.randn(4, 8, 512, 512)
report = measure_memory(model(), x)
print(json.dumps({"peak": report.peak, "process": report.process_peak}))
"""


@pytest.mark.skipif(not MEASURABLE, reason="needs Linux with glibc, and a resident high-water mark that can be reset")
def test_count_agrees_with_the_process_within_three_percent() -> None:
    figures = run_in_child(SCRIPT)
    assert figures["peak"] > 150e6
    assert figures["process"] == pytest.approx(figures["peak"], rel=0.03)
