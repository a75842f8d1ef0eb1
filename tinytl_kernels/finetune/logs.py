"""What a run leaves to read: a progress bar, a line an epoch, a CSV file, TensorBoard curves."""

from __future__ import annotations

import csv
import io
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors import TinyTLError, missing_extra
from .checkpoint import atomic_write

COLUMNS = (
    "epoch",
    "step",
    "learning_rate",
    "train_loss",
    "train_accuracy",
    "test_loss",
    "test_accuracy",
    "images_per_second",
)


class Log:
    """The log of one run.

    Args:
        folder: ``log.csv`` and ``tensorboard/`` go here; None writes nothing.
        enabled: False in all processes but the first: no files, no output.
        progress: Show a bar while standard error is a terminal, and a line an epoch.
        tensorboard: Write event files; None does so where tensorboard is installed.
        title: Stands before the bar and the lines.
        first_step: A resumed run's first step: TensorBoard drops later points of the run that was cut off.
    """

    def __init__(
        self,
        folder: Path | None,
        *,
        enabled: bool = True,
        progress: bool = True,
        tensorboard: bool | None = None,
        title: str = "",
        first_step: int = 0,
    ) -> None:
        self.folder = folder if enabled else None
        self.progress, self.title = progress and enabled, title
        self.bar = None
        self.writer = _summary_writer(folder, tensorboard, first_step) if self.folder is not None else None

    def start_epoch(self, epoch: int, epochs: int, batches: int, done: int) -> None:
        """Open the bar of epoch ``epoch`` (from 0)."""
        if self.progress:
            try:
                from tqdm import tqdm
            except ModuleNotFoundError:
                raise missing_extra("tqdm", "demo", "the progress bar (off with --no-progress)") from None
            label = f"{self.title} {epoch + 1}/{epochs}".strip()
            # disable=None: no bar where standard error is a file, only the line an epoch below.
            self.bar = tqdm(total=batches, initial=done, desc=label, unit="batch", leave=False, disable=None)

    def batch(self, loss: float, accuracy: float, images_per_second: float) -> None:
        """Move the bar by one batch; the numbers are those of the epoch so far."""
        if self.bar is not None:
            self.bar.set_postfix_str(
                f"loss {loss:.3f}, accuracy {accuracy:.1%}, {images_per_second:.0f} images/s", refresh=False
            )
            self.bar.update()

    def end_epoch(self, history: list[dict], epochs: int) -> None:
        """Print the last row of ``history``, rewrite the CSV file, add to the curves."""
        row = history[-1]
        self.close_bar()
        if self.progress:
            print(
                f"{self.title} epoch {row['epoch']}/{epochs}: loss {row['train_loss']:.3f}, "
                f"accuracy {row['train_accuracy']:.1%}, test {row['test_accuracy']:.2%}, "
                f"{row['images_per_second']:.0f} images/s".strip(),
                file=sys.stderr,
                flush=True,
            )
        if self.folder is not None:
            write_csv(self.folder / "log.csv", COLUMNS, history)
        if self.writer is not None:
            with _one_line_errors(self.folder):
                for column in COLUMNS[2:]:
                    self.writer.add_scalar(column, row[column], row["step"])
                self.writer.flush()

    def close_bar(self) -> None:
        """Take the bar off the screen."""
        if self.bar is not None:
            self.bar.close()
            self.bar = None

    def close(self) -> None:
        """Finish the bar and the event file."""
        self.close_bar()
        if self.writer is not None:
            with _one_line_errors(self.folder):
                self.writer.close()


def write_csv(path: Path, columns: tuple[str, ...], rows: list[dict]) -> None:
    """Write ``rows`` atomically, with ``columns`` in the first line."""
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n", extrasaction="ignore")
    writer.writeheader()
    writer.writerows(rows)
    atomic_write(path, lambda file: file.write(text.getvalue().encode()))


def _summary_writer(folder: Path, wanted: bool | None, first_step: int):
    if wanted is False:
        return None
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ModuleNotFoundError:
        if wanted:
            raise missing_extra("tensorboard", "demo", "--tensorboard") from None
        return None
    with _one_line_errors(folder):
        return SummaryWriter(str(folder / "tensorboard"), purge_step=first_step or None)


@contextmanager
def _one_line_errors(folder: Path) -> Iterator[None]:
    """TensorBoard writes in a thread, which prints a traceback when the disk is full and then fails here as well."""

    def hook(failed: threading.ExceptHookArgs) -> None:
        if not isinstance(failed.exc_value, OSError):
            before(failed)

    before, threading.excepthook = threading.excepthook, hook
    try:
        yield
    except OSError as error:
        raise TinyTLError(f"cannot write TensorBoard's events in {folder}: {error.strerror}") from error
    finally:
        threading.excepthook = before
