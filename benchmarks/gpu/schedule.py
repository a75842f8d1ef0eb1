"""Jobs in processes of their own, within a budget: one that hangs or brings the device down costs its own rows only.

A job writes rows, one JSON object a line, as it gets them. What it wrote before it failed or ran out of time counts.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

_ROOT = Path(__file__).parents[2]
# Where a job finds the file for its rows, and how many seconds it has.
ROWS_VARIABLE, SECONDS_VARIABLE = "TINYTL_GPU_ROWS", "TINYTL_GPU_SECONDS"
# Between a polite end and a hard one.
_GRACE = 5.0
_TICK = 0.1

Row = dict[str, Any]


@dataclass(frozen=True)
class Job:
    """Something to run.

    Args:
        name: Unique.
        command: What to start.
        seconds: At most.
        environment: Added to this process's.
        summary: A regular expression; the last line of the output that it is found in becomes the outcome's note.
    """

    name: str
    command: Sequence[str]
    seconds: float
    environment: Mapping[str, str] = field(default_factory=dict)
    summary: str | None = None


@dataclass
class Outcome:
    """What became of a job.

    Args:
        name: The job's.
        state: ``"running"``, ``"done"``, ``"failed"``, ``"out of time"`` or ``"skipped"``.
        seconds: It took.
        note: Why it failed or was skipped; or the job's summary line.
        rows: It wrote.
    """

    name: str
    state: str
    seconds: float = 0.0
    note: str = ""
    rows: list[Row] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        """Ready for ``json.dump``."""
        return asdict(self)


class Process:
    """A running job."""

    def __init__(self, job: Job, seconds: float, folder: Path) -> None:
        self.job = job
        self.outcome = Outcome(job.name, "running")
        slug = re.sub(r"\W+", "_", job.name)
        self._rows = folder / f"{slug}.jsonl"
        self._output = folder / f"{slug}.log"
        self._seconds = seconds
        self._started = time.monotonic()
        self._asked_to_stop: float | None = None
        environment = {
            **os.environ,
            "PYTHONUNBUFFERED": "1",
            **job.environment,
            ROWS_VARIABLE: str(self._rows),
            SECONDS_VARIABLE: str(seconds),
        }
        with self._output.open("wb") as output:
            # A session of its own, so that compilers that it started end with it.
            self._process = subprocess.Popen(
                list(job.command), cwd=_ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL, start_new_session=True,
            )  # fmt: skip

    def poll(self) -> bool:
        """Read what is new and end what is late; whether the job is over."""
        over = self._is_over()
        self.outcome.seconds = round(time.monotonic() - self._started, 2)
        self.outcome.rows = self._read()
        if not over:
            self._end_if_late()
            return False
        self._signal(signal.SIGKILL)  # what it left running
        status = self._process.wait()
        log = self._output.read_text(encoding="utf-8", errors="replace")
        if self._asked_to_stop is not None:
            self.outcome.state = "out of time"
            self.outcome.note = f"stopped after {self._seconds:.0f} s"
        else:
            self.outcome.state = "done" if status == 0 else "failed"
        found = [line.strip() for line in log.splitlines() if self.job.summary and re.search(self.job.summary, line)]
        if found:
            self.outcome.note = found[-1]
        elif self.outcome.state == "failed":
            self.outcome.note = f"status {status}: {_last_line(log)}"
        if self.outcome.state == "failed":
            self.outcome.rows.append({"log": log[-4000:]})
        return True

    def stop(self) -> None:
        """End it and what it started, at once."""
        if self._process.returncode is None:
            self._signal(signal.SIGKILL)
            self._process.wait()

    def _is_over(self) -> bool:
        # Seen, but not yet waited for: until then no other process can have its number, and so its group's.
        return os.waitid(os.P_PID, self._process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None

    def _end_if_late(self) -> None:
        late = time.monotonic() - self._started - self._seconds
        if self._asked_to_stop is None and late > 0:
            self._asked_to_stop = time.monotonic()
            self._signal(signal.SIGTERM)
        elif self._asked_to_stop is not None and time.monotonic() - self._asked_to_stop > _GRACE:
            self._signal(signal.SIGKILL)

    def _signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, number)

    def _read(self) -> list[Row]:
        rows: list[Row] = []
        try:
            lines = self._rows.read_text(encoding="utf-8").splitlines()
        except OSError:
            return rows
        for line in lines:
            try:
                rows.append(json.loads(line))
            except ValueError:
                break  # half a line: its process was ended, or writes it right now
        return rows


def _last_line(log: str) -> str:
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    return lines[-1][:300] if lines else "it wrote nothing"


class Schedule:
    """Runs jobs and keeps their outcomes.

    Args:
        seconds: For everything.
        changed: Called with all outcomes when one got new rows or ended.
        clock: Seconds, monotonic.
    """

    def __init__(
        self,
        seconds: float,
        changed: Callable[[dict[str, Outcome]], None] = lambda outcomes: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.outcomes: dict[str, Outcome] = {}
        self._clock = clock
        self._deadline = clock() + seconds
        self._changed = changed

    @property
    def left(self) -> float:
        """Seconds until the deadline."""
        return self._deadline - self._clock()

    def skip(self, name: str, why: str) -> None:
        """Note that a job is not run."""
        self.outcomes[name] = Outcome(name, "skipped", note=why)
        self._changed(self.outcomes)

    def run(self, jobs: Sequence[Job], at_a_time: int = 1, seconds: float | None = None) -> None:
        """Run jobs, ``at_a_time`` together, in order; those that no time is left for are skipped.

        Args:
            jobs: What to run.
            at_a_time: Together; one where times are measured.
            seconds: For all of them, at most.
        """
        until = self._deadline if seconds is None else min(self._deadline, self._clock() + seconds)
        waiting, running = list(jobs), []
        with tempfile.TemporaryDirectory() as folder:
            try:
                while waiting or running:
                    while waiting and len(running) < at_a_time:
                        job = waiting.pop(0)
                        left = until - self._clock()
                        # An interpreter that imports PyTorch needs some of it before it does anything.
                        if left < min(15.0, job.seconds):
                            self.skip(job.name, f"{max(0.0, left):.0f} s left")
                            continue
                        process = Process(job, min(job.seconds, left), Path(folder))
                        self.outcomes[job.name] = process.outcome
                        running.append(process)
                    before = [(len(p.outcome.rows), p.outcome.state) for p in running]
                    over = [process for process in running if process.poll()]
                    if over or before != [(len(p.outcome.rows), p.outcome.state) for p in running]:
                        self._changed(self.outcomes)
                    for process in over:
                        running.remove(process)
                    if running and not over:
                        time.sleep(_TICK)
            finally:
                for process in running:
                    process.stop()


def python(module: str, *arguments: str) -> list[str]:
    """The command that runs a module of this repository with this Python."""
    return [sys.executable, "-m", module, *arguments]
