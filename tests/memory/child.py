"""Measurements of resident memory, each in a process of its own that is set up for them."""

from __future__ import annotations

import json
import platform
import subprocess
import sys
from typing import Any

from tinytl_kernels.memory.process import reset_high_water_mark

# Linux, with the C library that the child is set up through.
MEASURABLE = reset_high_water_mark() is not None and platform.libc_ver()[0] == "glibc"

_PRELUDE = """
import json, sys
from tinytl_kernels.memory.process import high_water_mark, map_blocks_by_themselves, settle
assert map_blocks_by_themselves()
import torch
torch.set_num_threads(1)
"""


def run_in_child(script: str, *arguments: object) -> dict[str, Any]:
    """What ``script`` prints as JSON in its last line, run with one thread and exact resident memory."""
    command = [sys.executable, "-c", _PRELUDE + script, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])
