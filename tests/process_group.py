"""Test bodies that need ``torch.distributed`` run in a process of their own, a group of one.

Gloo's threads and the teardown of a group can deadlock with a long test session's other threads (seen once: the whole
session hung, beyond the reach of any Python timeout). A child can be killed, and leaves without a teardown.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parents[1]
_SECONDS = 100

_CHILD = f"""
import faulthandler, os, sys, traceback
faulthandler.dump_traceback_later({_SECONDS}, exit=True)
import torch, torch.distributed
torch.manual_seed(20260101)
torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
try:
    getattr(__import__(sys.argv[1], fromlist=["_"]), sys.argv[2])()
except BaseException:
    traceback.print_exc()
    status = 1
else:
    status = 0
sys.stderr.flush()
os._exit(status)
"""


def run_in_process_group(body: Callable[[], None]) -> None:
    """Call a test module's function in a child process that has an initialised group; what it raises is raised."""
    command = [sys.executable, "-c", _CHILD, body.__module__, body.__name__]
    child = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=_SECONDS + 20)
    assert child.returncode == 0, f"{body.__name__} in a process group:\n{child.stderr}"
