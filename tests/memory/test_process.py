"""The operator-level count against the operating system's, in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from tinytl_kernels.memory.process import reset_high_water_mark

# 32 MB an activation. Element-wise layers and pooling only, where ATen and its libraries need no scratch memory, so
# that both counts mean the same thing.
SCRIPT = """
import ctypes, json, sys
# Every large block from mmap, so that freeing one returns it to the system.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
libc = ctypes.CDLL(None)
libc.mallopt(M_MMAP_THRESHOLD, 1 << 16)
libc.mallopt(M_TRIM_THRESHOLD, 1 << 16)
import torch
from torch import nn
from tinytl_kernels.memory import measure_memory
torch.set_num_threads(1)

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


@pytest.mark.skipif(reset_high_water_mark() is None, reason="this system cannot reset the resident high-water mark")
def test_count_agrees_with_the_process_within_three_percent() -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout)
    assert figures["peak"] > 150e6
    assert figures["process"] == pytest.approx(figures["peak"], rel=0.03)
