"""A process of ``benchmarks.gpu``: ``python -m benchmarks.gpu.worker SECTION [NAME] [--tiny] [--warm] ...``."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.gpu.schedule import ROWS_VARIABLE, SECONDS_VARIABLE, Row
from tinytl_kernels.backends import ENVIRONMENT_VARIABLE

# Of its seconds, what a job leaves to the interpreter's end.
_RESERVE = 3.0


@dataclass(frozen=True)
class Context:
    """What a section is told.

    Args:
        device: Where to work.
        backend: Ours, under test.
        tiny: Small shapes and few rounds: tries the code, measures nothing.
        warm: Only compile what will be timed later.
        until: When to start nothing new, by ``time.monotonic``.
    """

    device: torch.device
    backend: str
    tiny: bool = False
    warm: bool = False
    until: float = float("inf")

    @property
    def left(self) -> float:
        """Seconds."""
        return self.until - time.monotonic()


def parser() -> argparse.ArgumentParser:
    """What a worker can be told."""
    made = argparse.ArgumentParser(prog="benchmarks.gpu.worker", description=__doc__)
    made.add_argument("section")
    made.add_argument("name", nargs="?", default="")
    made.add_argument("--device", default="cuda")
    made.add_argument("--backend", default="triton")
    made.add_argument("--tiny", action="store_true")
    made.add_argument("--warm", action="store_true")
    return made


def rows(section: str, name: str, context: Context) -> Iterator[Row]:
    """The rows of a section, as it gets them."""
    from benchmarks.gpu.sections import SECTIONS  # imports what it needs to time things

    if section not in SECTIONS:
        raise ValueError(f"section: expected one of {', '.join(SECTIONS)}, got {section!r}")
    return SECTIONS[section](name, context)


def main(arguments: list[str] | None = None) -> int:
    """Run a section and write its rows where the schedule looks for them, or to standard output."""
    options = parser().parse_args(arguments)
    seconds = float(os.environ.get(SECONDS_VARIABLE, "inf"))
    context = Context(
        torch.device(options.device), options.backend, options.tiny, options.warm,
        time.monotonic() + seconds - _RESERVE,
    )  # fmt: skip
    # For what nobody forces, such as converting a model on the CPU: without the minute that the C++ takes to compile.
    os.environ.setdefault(ENVIRONMENT_VARIABLE, "reference")
    path = os.environ.get(ROWS_VARIABLE)
    # Rows have their own file: libraries write what they like to standard output.
    with open(path, "a", encoding="utf-8") if path else os.fdopen(os.dup(1), "w", encoding="utf-8") as file:
        for row in rows(options.section, options.name, context):
            file.write(json.dumps(row, default=_plain) + "\n")
            file.flush()
    return 0


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple | torch.Size) else str(value)


if __name__ == "__main__":
    sys.exit(main())
