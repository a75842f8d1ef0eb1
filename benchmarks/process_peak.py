"""``python -m benchmarks.process_peak CASE KEY...``: peak of resident memory over one step, as the kernel counts it.

It sees what no operator-level count can: scratch space of libraries, compiled code, fragmentation. Every block above
64 KiB is mapped on its own, so that what is freed leaves the process and a peak is a peak of living bytes. Prints one
line of JSON: key -> bytes above what was resident before the step.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import json

import torch

from benchmarks.contestants import Contestant, Entry
from benchmarks.lineup import lineup
from benchmarks.networks import BY_NAME
from tinytl_kernels.memory.process import high_water_mark, settle

_M_MMAP_THRESHOLD = -3  # malloc.h
_MAPPED_FROM = 64 * 1024


def peak_of(contestant: Contestant, case, stock: torch.nn.Module) -> int | None:
    """Bytes above resident at the worst moment of the second step; the first one warms up caches and scratch."""
    entry = Entry(contestant, case, stock)
    entry.run()
    entry.clear()
    before = settle()
    output = entry.run()
    most = high_water_mark()
    del output
    return None if before is None or most is None else most - before


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("case", choices=sorted(BY_NAME))
    parser.add_argument("keys", nargs="+", metavar="KEY", help="contestants")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    with contextlib.suppress(AttributeError):  # a C library without mallopt
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, _MAPPED_FROM)
    case = BY_NAME[arguments.case]
    case = case.quick() if arguments.quick else case
    stock = case.stock()
    contestants = {contestant.key: contestant for contestant in lineup(case.level)}
    print(json.dumps({key: peak_of(contestants[key], case, stock) for key in arguments.keys}))


if __name__ == "__main__":
    main()
