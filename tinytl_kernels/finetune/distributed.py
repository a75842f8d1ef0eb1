"""One process or several: what torchrun says, and the few collective operations that the loop needs."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist

from ..errors import TinyTLError


@dataclass(frozen=True)
class Process:
    """Where this process stands among those that train together.

    Args:
        device: It computes here.
        rank: Its number.
        world_size: How many there are.
    """

    device: torch.device
    rank: int = 0
    world_size: int = 1

    @property
    def is_first(self) -> bool:
        """Whether this process writes files and prints."""
        return self.rank == 0

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """The sum of ``values`` over all processes; in place where there are several."""
        if self.world_size > 1:
            dist.all_reduce(values)
        return values

    def any(self, flag: bool) -> bool:
        """Whether ``flag`` is set in any process."""
        if self.world_size == 1:
            return flag
        return bool(self.sum(torch.tensor([float(flag)], device=self.device)).item())

    def wait(self) -> None:
        """Go on when all processes are here."""
        self.sum(torch.zeros(1, device=self.device))

    def gather_bytes(self, values: torch.Tensor) -> list[torch.Tensor]:
        """The uint8 tensor ``values`` of every process, on the CPU; it has the same length everywhere."""
        if self.world_size == 1:
            return [values.cpu()]
        mine = values.to(self.device)
        gathered = [torch.empty_like(mine) for _ in range(self.world_size)]
        dist.all_gather(gathered, mine)
        return [one.cpu() for one in gathered]


def choose_device(name: str) -> torch.device:
    """``auto`` is the first accelerator or the CPU; anything else is a torch device that has to work.

    Raises:
        TinyTLError: No such device here.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise TinyTLError(f"device {name!r} cannot be used here ({reason[:120]})") from error
    return device


@contextmanager
def process_group(device: str) -> Iterator[Process]:
    """Join the group that ``torchrun`` describes in the environment, or stand alone where there is none.

    NCCL between CUDA devices, one a process; Gloo otherwise.
    """
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    if world_size == 1:
        yield Process(choose_device(device))
        return
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    chosen = choose_device(device)
    if chosen.type == "cuda":
        if local_rank >= torch.cuda.device_count():
            raise TinyTLError(f"torchrun started more processes than the {torch.cuda.device_count()} CUDA devices")
        chosen = torch.device("cuda", local_rank)
        torch.cuda.set_device(chosen)
    dist.init_process_group("nccl" if chosen.type == "cuda" else "gloo")
    try:
        yield Process(chosen, dist.get_rank(), world_size)
    finally:
        # A model in a reference cycle holds on to the group, whose threads then outlive the interpreter: one run in
        # twenty was aborted in its exit, with everything written.
        gc.collect()
        dist.destroy_process_group()
