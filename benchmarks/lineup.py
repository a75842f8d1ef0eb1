"""Which contestants run which level."""

from __future__ import annotations

import tinytl_kernels as tk
from benchmarks import ours, peers
from benchmarks.contestants import Contestant

# Every ratio is taken against one of these two: they always run.
YARDSTICKS = (peers.STOCK_INFERENCE, peers.STOCK_BIAS)


def lineup(level: str) -> tuple[Contestant, ...]:
    """Everybody who runs a layer, a block or a network, the yardsticks first."""
    backends = tuple(tk.available_backends())
    if level == "layer":
        # Compiling and checkpointing a single layer changes nothing; precision is compared on blocks.
        mine = (ours.contestants(backend, "bias", half=False) for backend in backends)
        return (*YARDSTICKS, peers.FOLDED, peers.MEMSAVE, *_flat(mine))
    if level == "block":
        mine = (ours.contestants(backend, "bias", "lite_residual+bias", half=True) for backend in backends)
        return (*YARDSTICKS, peers.FOLDED, peers.CHECKPOINTED, peers.MEMSAVE, peers.STOCK_BIAS_BF16, *_flat(mine))
    mine = (ours.contestants(backend, "bias", "lite_residual+bias", "last", half=True) for backend in backends)
    return (
        *YARDSTICKS,
        peers.FOLDED,
        peers.CHECKPOINTED,
        peers.COMPILED,
        peers.MEMSAVE,
        peers.STOCK_BIAS_BF16,
        peers.STOCK_FULL,
        *_flat(mine),
        ours.kept("cpu"),
    )


def _flat(groups) -> tuple[Contestant, ...]:
    return tuple(contestant for group in groups for contestant in group)
