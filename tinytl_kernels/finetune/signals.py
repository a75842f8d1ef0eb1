"""Ctrl-C and SIGTERM as a request that the loop meets between two steps."""

from __future__ import annotations

import signal
import threading
from types import FrameType

from ..errors import TinyTLError


class Interrupted(TinyTLError):
    """The run was asked to stop, and did.

    Args:
        message: What was kept.
        number: The signal; the command exits with 128 + number, as a shell expects.
    """

    def __init__(self, message: str, number: int) -> None:
        super().__init__(message)
        self.number = number


class StopRequest:
    """A context in which SIGINT and SIGTERM set ``signal`` instead of ending the process at once.

    A second SIGINT does what Ctrl-C always does. Outside the main thread nothing is installed, because Python hands
    signals to the main thread only.
    """

    def __init__(self) -> None:
        self.signal: int | None = None
        self._before: dict[int, object] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.signal is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = number
