"""Checkpoints: written whole or not at all, read without unpickling, refused where they do not belong.

A checkpoint is a dictionary of tensors, numbers, strings, lists and dictionaries, so that
``torch.load(weights_only=True)`` reads it:

=========== ============================================================================
format      version of this layout
identity    model, method, classes, data, recipe, processes: what a resumed run must share
class_names names of the classes, in the order of the outputs
model       state_dict of the converted model
optimizer   moments and step counts
scaler      state of the float16 gradient scaler; empty without
progress    epoch, batches done in it, the sums of its loss and accuracy, history, best
rng         generator states: torch by process, CUDA by process, numpy, python
=========== ============================================================================
"""

from __future__ import annotations

import contextlib
import errno
import pickle
import random
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch

from ..core.files import replace_file
from ..errors import TinyTLError
from .distributed import Process

FORMAT = 1


def atomic_write(path: str | Path, write: Callable[[BinaryIO], object]) -> None:
    """:func:`~tinytl_kernels.core.files.replace_file`, with what the system refuses in one line.

    Args:
        path: The file to replace.
        write: Called with the open temporary file.

    Raises:
        TinyTLError: The disk is full, or the folder cannot be written; ``path`` is as it was.
    """
    path = Path(path)
    try:
        replace_file(path, write)
    except BaseException as error:
        cause = _os_error(error)
        if cause is None:
            raise
        reason = "the disk is full" if cause.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) else cause.strerror
        kept = "; the file from before is untouched" if path.exists() else ""
        raise TinyTLError(f"cannot write {path}: {reason}{kept}") from error


def _os_error(error: BaseException | None) -> OSError | None:
    """The OSError behind ``error``: torch's zip writer may raise its own RuntimeError over it."""
    while error is not None and not isinstance(error, OSError):
        error = error.__cause__ or error.__context__
    return error


def remove_leftovers(folder: Path) -> None:
    """Delete temporary files that a killed process of an earlier run left behind."""
    for stale in folder.glob(".*.tmp"):
        with contextlib.suppress(OSError):
            stale.unlink()


def save_checkpoint(path: str | Path, state: dict) -> None:
    """Write ``state`` to ``path`` atomically; see :func:`atomic_write`."""
    atomic_write(path, lambda file: torch.save({"format": FORMAT, **state}, file))


def load_checkpoint(path: str | Path, identity: dict) -> dict:
    """Read a checkpoint that belongs to the run described by ``identity``.

    Raises:
        TinyTLError: No such file, not a checkpoint, of another version, or of another run: which entry differs, what
            the file has and what was asked for.
    """
    path = Path(path)
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise TinyTLError(f"checkpoint: no such file: {path}") from None
    except (pickle.UnpicklingError, RuntimeError, ValueError, EOFError, OSError) as error:
        reason = str(error).splitlines()[0][:100] if str(error) else type(error).__name__
        raise TinyTLError(f"checkpoint: cannot read {path} ({reason})") from error
    if not isinstance(state, dict) or "format" not in state or "identity" not in state:
        raise TinyTLError(f"checkpoint: {path} was not written by tinytl")
    if state["format"] != FORMAT:
        raise TinyTLError(f"checkpoint: {path} has format {state['format']}, this version reads format {FORMAT}")
    found = state["identity"]
    for key in [*identity, *(key for key in found if key not in identity)]:
        if found.get(key) != identity.get(key):
            raise TinyTLError(
                f"checkpoint: {path} is of another run: its {key} is {found.get(key)!r}, "
                f"this one's is {identity.get(key)!r}"
            )
    return state


def random_state(process: Process) -> dict:
    """The states of every generator the run may draw from, as tensors and plain numbers."""
    name, keys, position, has_gauss, gauss = np.random.get_state()
    return {
        "torch": process.gather_bytes(torch.get_rng_state()),
        "cuda": process.gather_bytes(torch.cuda.get_rng_state()) if process.device.type == "cuda" else [],
        "numpy": [name, keys.tolist(), int(position), int(has_gauss), float(gauss)],
        "python": random.getstate(),
    }


def set_random_state(state: dict, process: Process) -> None:
    """Put back what :func:`random_state` returned."""
    torch.set_rng_state(state["torch"][process.rank])
    if state["cuda"]:
        torch.cuda.set_rng_state(state["cuda"][process.rank])
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), *rest))
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
