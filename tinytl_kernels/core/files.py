"""Files that are replaced whole or not at all."""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO


def replace_file(path: str | os.PathLike, write: Callable[[BinaryIO], object]) -> None:
    """Write a file so that ``path`` holds the old bytes or all of the new ones, whatever happens meanwhile.

    The bytes go to a temporary file in the same folder (``.NAME.*.tmp``), are flushed to the device, and are then
    renamed over ``path``, which the file system does in one step.

    Args:
        path: The file to replace.
        write: Called with the open temporary file.

    Raises:
        OSError: The disk is full, or the folder cannot be written. After this and whatever ``write`` raises, ``path``
            is as it was and the temporary file is gone.
    """
    path = Path(path)
    # Not mkstemp, which makes a private file: this one gets the permissions of any other new file. The token keeps
    # writers of one process apart.
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}.tmp")
    try:
        with open(temporary, "xb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
    _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    """Make the rename itself durable; where folders cannot be opened (Windows) the system does so by itself."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
