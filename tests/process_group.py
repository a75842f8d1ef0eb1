"""Test bodies that need ``torch.distributed`` run in processes of their own: a group of one, or of several.

Gloo's threads and the teardown of a group can deadlock with a long test session's other threads (seen once: the whole
session hung, beyond the reach of any Python timeout). A child can be killed, and leaves without a teardown.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parents[1]
_SECONDS = 100

_CHILD = f"""
import faulthandler, os, sys, traceback
faulthandler.dump_traceback_later({_SECONDS}, exit=True)
import torch, torch.distributed
torch.manual_seed(20260101)
module, body, file, rank, size = sys.argv[1:]
size = int(size)
store = torch.distributed.HashStore() if size == 1 else torch.distributed.FileStore(file, size)
torch.distributed.init_process_group("gloo", store=store, rank=int(rank), world_size=size)
try:
    getattr(__import__(module, fromlist=["_"]), body)()
    if size > 1:
        torch.distributed.barrier()  # who leaves first takes its connections along
except BaseException:
    traceback.print_exc()
    status = 1
else:
    status = 0
sys.stderr.flush()
os._exit(status)
"""


def run_in_process_group(body: Callable[[], None], processes: int = 1) -> None:
    """Call a test module's function in child processes that have an initialised group; what it raises is raised.

    Args:
        body: found in the children by the name of its module and its own.
        processes: size of the group. All are given the same seed.
    """
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-c", _CHILD, body.__module__, body.__name__, f"{folder}/store"]
        children = [
            subprocess.Popen([*command, str(rank), str(processes)], cwd=ROOT, stderr=subprocess.PIPE, text=True)
            for rank in range(processes)
        ]
        try:
            errors = [child.communicate(timeout=_SECONDS + 20)[1] for child in children]
        finally:
            for child in children:
                child.kill()
    for rank, (child, text) in enumerate(zip(children, errors, strict=True)):
        assert child.returncode == 0, f"{body.__name__} in process {rank} of {processes}:\n{text}"
