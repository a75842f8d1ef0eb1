"""Train and evaluate one model."""

from __future__ import annotations

import contextlib
import math
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from ..errors import TinyTLError
from ..models import InputConfig
from .checkpoint import load_checkpoint, random_state, remove_leftovers, save_checkpoint, set_random_state
from .data import Data, PictureDataset, TestBatches, TrainingBatches, batches_of, make_loader
from .distributed import Process
from .in_backward import step_in_backward
from .logs import Log
from .recipe import OPTIMIZERS, Recipe
from .signals import Interrupted, StopRequest


@dataclass(frozen=True)
class Options:
    """How a run is carried out; nothing here changes its result.

    Args:
        folder: Logs and checkpoints go here; None writes nothing.
        checkpoints: Write ``last.pt`` after every epoch and ``best.pt`` when the test accuracy rises.
        checkpoint_steps: Also write ``last.pt`` every so many steps; 0 does not.
        resume: A checkpoint of this run to go on from.
        workers: Processes that decode pictures; 0 decodes in this one.
        progress: Print a bar and a line an epoch.
        tensorboard: Write event files; None does so where tensorboard is installed.
        title: Stands before the bar and the lines.
        step_in_backward: Consume each gradient as it arrives, so that they are never all in memory; see
            :func:`step_in_backward`. A run may be resumed with another choice.
    """

    folder: Path | None = None
    checkpoints: bool = True
    checkpoint_steps: int = 0
    resume: Path | None = None
    workers: int = 0
    progress: bool = True
    tensorboard: bool | None = None
    title: str = ""
    step_in_backward: bool = False


@dataclass(frozen=True)
class Result:
    """What a run came to.

    Args:
        accuracy: Test accuracy after the last epoch, 0 to 1.
        best_accuracy: The highest after any epoch. Chosen on the test pictures, hence optimistic.
        seconds_per_image: Wall-clock time of training, data loading included, over the pictures trained on.
        history: One row an epoch; see ``logs.COLUMNS``.
    """

    accuracy: float
    best_accuracy: float
    seconds_per_image: float
    history: list[dict]


@dataclass
class Progress:
    """How far a run is; all of it goes into the checkpoint."""

    epoch: int = 0
    batches: int = 0  # done in this epoch
    steps: int = 0  # optimizer steps since the start
    loss: float = 0.0  # sums over the epoch so far
    correct: float = 0.0
    images: float = 0.0
    seconds: float = 0.0
    best: float = -1.0
    history: list[dict] = field(default_factory=list)


def check_step_in_backward(recipe: Recipe, process: Process) -> None:
    """Refuse what needs all gradients at once, or more than one backward a step.

    Raises:
        TinyTLError: Says which of them, and what to do.
    """
    if recipe.accumulate > 1:
        raise TinyTLError(
            f"step_in_backward: a gradient is used and freed in its own backward, so the gradients of "
            f"{recipe.accumulate} forward passes cannot be added up; use --accumulate 1, or do without "
            "--step-in-backward and keep the gradients (as many bytes as trained parameters)"
        )
    if recipe.amp == "float16":
        raise TinyTLError(
            "step_in_backward: float16's gradient scaler looks for infinities in all gradients before any is used; "
            "use --amp bfloat16"
        )
    if process.world_size > 1:
        raise TinyTLError(
            f"step_in_backward: the gradients of {process.world_size} processes are averaged after backward; "
            "train in one process, or do without --step-in-backward"
        )


class Training:
    """One model on its way through one recipe.

    Args:
        model: What :func:`tinytl_kernels.convert` returned; its ``requires_grad`` flags say what is trained.
        data: The pictures.
        recipe: The hyper-parameters.
        config: The model's normalisation.
        process: This process among those that train together.
        identity: Names the run for its checkpoints (model, method, ...).
        options: Files and output.

    Raises:
        TinyTLError: ``options.step_in_backward`` with several processes, float16 or accumulated gradients.

    Example:
        >>> import tinytl_kernels as tk
        >>> from tinytl_kernels.finetune import Recipe, Training, load_data
        >>> from tinytl_kernels.models import InputConfig, build_model
        >>> model = tk.convert(build_model("timm:mobilenetv2_100"), "bias", num_classes=10)  # doctest: +SKIP
        >>> data, recipe = load_data("digits"), Recipe.for_data("digits")  # doctest: +SKIP
        >>> Training(model, data, recipe, InputConfig()).run().accuracy  # doctest: +SKIP
    """

    def __init__(
        self,
        model: nn.Module,
        data: Data,
        recipe: Recipe,
        config: InputConfig,
        *,
        process: Process | None = None,
        identity: dict | None = None,
        options: Options | None = None,
    ) -> None:
        self.process = process or Process(torch.device("cpu"))
        self.recipe, self.options = recipe, options or Options()
        if self.options.step_in_backward:
            check_step_in_backward(recipe, self.process)
        self.format = torch.channels_last if recipe.channels_last else torch.contiguous_format
        self.model = model.to(self.process.device, memory_format=self.format)
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        optimizer = OPTIMIZERS[recipe.optimizer]
        self.optimizer = optimizer(trained, lr=recipe.learning_rate, weight_decay=recipe.weight_decay)
        self.scaler = torch.amp.GradScaler(self.process.device.type, enabled=recipe.amp == "float16")
        rank, world_size = self.process.rank, self.process.world_size
        self.batches = TrainingBatches(len(data.train.labels), recipe.batch_size, recipe.seed, rank, world_size)
        self.train_loader = self._loader(PictureDataset(data.train, recipe, config, training=True), self.batches)
        test_batches = TestBatches(len(data.test.labels), recipe.batch_size * 4, rank, world_size)
        self.test_loader = self._loader(PictureDataset(data.test, recipe, config, training=False), test_batches)
        self.steps_per_epoch = -(-len(self.batches.sizes) // recipe.accumulate)
        self.progress = Progress()
        self.class_names = data.classes
        self.identity = {
            **(identity or {}),
            "classes": len(data.classes),
            "data": f"{data.name} ({len(data.train.labels)} + {len(data.test.labels)} pictures)",
            "processes": world_size,
            **asdict(recipe),
        }

    def _loader(self, dataset: PictureDataset, batches: TrainingBatches | TestBatches) -> DataLoader:
        cuda = self.process.device.type == "cuda"
        return make_loader(dataset, batches, workers=self.options.workers, pin_memory=cuda)

    def run(self) -> Result:
        """Train to the end of the recipe, from the start or from ``options.resume``.

        Raises:
            TinyTLError: A picture, the checkpoint or the disk fails, or the loss is not finite.
            Interrupted: SIGINT or SIGTERM came; the state is in ``last.pt`` where checkpoints are on.
        """
        options, progress = self.options, self.progress
        if self.process.is_first and options.folder is not None:
            options.folder.mkdir(parents=True, exist_ok=True)
            remove_leftovers(options.folder)
        torch.manual_seed(self.recipe.seed + self.process.rank)
        if options.resume is not None:
            self._restore(load_checkpoint(options.resume, self.identity))
        runner = self.model
        if self.process.world_size > 1:
            runner = DistributedDataParallel(self.model, gradient_as_bucket_view=True)
        log = Log(
            options.folder,
            enabled=self.process.is_first,
            progress=options.progress,
            tensorboard=options.tensorboard,
            title=options.title,
            first_step=progress.steps,
        )
        with StopRequest() as stop, contextlib.closing(log), self.stepping():
            while progress.epoch < self.recipe.epochs:
                self._train_epoch(runner, log, stop)
                self._end_epoch(log, stop)
        return Result(
            progress.history[-1]["test_accuracy"],
            progress.best,
            progress.history[-1]["seconds"] / progress.history[-1]["images"],
            progress.history,
        )

    def _train_epoch(self, runner: nn.Module, log: Log, stop: StopRequest) -> None:
        progress, recipe, device = self.progress, self.recipe, self.process.device
        self.model.train()
        self.batches.epoch, self.batches.start = progress.epoch, progress.batches
        log.start_epoch(progress.epoch, recipe.epochs, len(self.batches.sizes), progress.batches)
        sums = torch.tensor([progress.loss, progress.correct, progress.images], dtype=torch.float64, device=device)
        seconds_before, started = progress.seconds, time.perf_counter()
        loader = batches_of(self.train_loader)
        while progress.batches < len(self.batches.sizes):
            sizes = self.batches.sizes[progress.batches : progress.batches + recipe.accumulate]
            self._set_learning_rate()
            for position, _ in enumerate(sizes):
                sums += self._forward_backward(runner, next(loader), sum(sizes), last=position == len(sizes) - 1)
                progress.batches += 1
                # Reading the loss waits for the device: rarely on an accelerator, where that would leave it idle.
                if device.type == "cpu" or progress.batches % 20 == 0:
                    self._read(sums)
                progress.seconds = seconds_before + time.perf_counter() - started
                speed = progress.images * self.process.world_size / max(progress.seconds, 1e-9)
                log.batch(progress.loss / max(progress.images, 1), progress.correct / max(progress.images, 1), speed)
            self.scaler.step(self.optimizer)
            self.scaler.update()
            self.optimizer.zero_grad(set_to_none=True)
            progress.steps += 1
            stopped = self.process.any(stop.signal is not None)
            every = self.options.checkpoint_steps
            if stopped or (every and progress.steps % every == 0):
                self._read(sums)
                self._save("last.pt")
            if stopped:
                raise self._interrupted(stop)
        for _ in loader:  # exhausts the iterator, so that its workers are ready for the next epoch
            raise AssertionError("more batches than the sampler announced")
        self._read(sums)
        progress.seconds = seconds_before + time.perf_counter() - started

    def _read(self, sums: torch.Tensor) -> None:
        """Copy the sums from the device; a loss that is not a number ends the run here, before it is saved."""
        progress = self.progress
        progress.loss, progress.correct, progress.images = sums.tolist()
        self._check_loss(progress.loss)

    def _check_loss(self, loss: float) -> None:
        if not math.isfinite(loss):
            raise TinyTLError(
                f"the loss became {loss} in epoch {self.progress.epoch + 1}; try a lower learning rate (--lr)"
            )

    def _forward_backward(
        self, runner: nn.Module, batch: tuple[torch.Tensor, torch.Tensor], step_images: int, *, last: bool
    ) -> torch.Tensor:
        """Add this batch's share of the gradient; returns the sums of loss and correct answers, and the count.

        The loss is summed and divided by the pictures of the whole step, so that a short last batch weighs by its
        pictures. DistributedDataParallel averages over processes, hence the factor ``world_size``.
        """
        images, labels = self.to_device(batch)
        waits = contextlib.nullcontext() if last or runner is self.model else runner.no_sync()
        with waits:
            with self.autocast():
                logits = runner(images)
                loss = F.cross_entropy(logits, labels, reduction="sum", label_smoothing=self.recipe.label_smoothing)
            if self.options.step_in_backward:
                self._check_loss(loss.item())  # after backward the parameters would have it
            self.scaler.scale(loss * (self.process.world_size / step_images)).backward()
        with torch.no_grad():
            correct = (logits.argmax(1) == labels).sum()
            return torch.stack([loss.double(), correct.double(), correct.new_tensor(len(labels)).double()])

    def stepping(self) -> contextlib.AbstractContextManager:
        """Inside, backward steps the optimizer where the options ask for that."""
        return step_in_backward(self.optimizer) if self.options.step_in_backward else contextlib.nullcontext()

    def _set_learning_rate(self) -> None:
        rate = self.recipe.learning_rate_at(self.progress.steps, self.recipe.epochs * self.steps_per_epoch)
        for group in self.optimizer.param_groups:
            group["lr"] = rate

    def _end_epoch(self, log: Log, stop: StopRequest) -> None:
        """Evaluate, write the epoch's row and the checkpoints, go to the next epoch."""
        progress = self.progress
        loss, correct, images = self._total_sums()
        test_loss, test_accuracy = self.evaluate(stop)
        rate = self.optimizer.param_groups[0]["lr"]
        row = {
            "epoch": progress.epoch + 1,
            "step": progress.steps,
            "learning_rate": rate,
            "train_loss": loss / images,
            "train_accuracy": correct / images,
            "test_loss": test_loss,
            "test_accuracy": test_accuracy,
            "images_per_second": images / max(progress.seconds, 1e-9),
            "seconds": progress.seconds,
            "images": images,
        }
        progress.history.append(row)
        is_best = test_accuracy > progress.best
        progress.best = max(progress.best, test_accuracy)
        progress.epoch += 1
        progress.batches, progress.loss, progress.correct, progress.images, progress.seconds = 0, 0.0, 0.0, 0.0, 0.0
        log.end_epoch(progress.history, self.recipe.epochs)
        if self.options.checkpoints:
            # best before last: a run killed between the two repeats the epoch and writes the same best again.
            if is_best:
                self._save("best.pt")
            self._save("last.pt")

    def _total_sums(self) -> list[float]:
        """Loss, correct answers and pictures of the epoch so far, over all processes."""
        progress, device = self.progress, self.process.device
        if self.process.world_size == 1:
            return [progress.loss, progress.correct, progress.images]
        sums = torch.tensor([progress.loss, progress.correct, progress.images], dtype=torch.float64, device=device)
        return self.process.sum(sums).tolist()

    @torch.no_grad()
    def evaluate(self, stop: StopRequest | None = None) -> tuple[float, float]:
        """Loss (without label smoothing) and accuracy over every test picture, each counted once."""
        self.model.eval()
        sums = torch.zeros(3, dtype=torch.float64, device=self.process.device)
        for batch in batches_of(self.test_loader):
            images, labels = self.to_device(batch)
            with self.autocast():
                logits = self.model(images)
                loss = F.cross_entropy(logits, labels, reduction="sum")
            sums += torch.stack(
                [loss.double(), (logits.argmax(1) == labels).sum().double(), sums.new_tensor(len(labels))]
            )
            if stop is not None and stop.signal is not None and self.process.world_size == 1:
                self._save("last.pt")
                raise self._interrupted(stop)
        loss, correct, images = self.process.sum(sums).tolist()
        return loss / images, correct / images

    def to_device(self, batch: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """A batch of pictures (N, 3, H, W) and labels (N,), where the model is and in its memory layout."""
        images, labels = batch
        device = self.process.device
        images = images.to(device, non_blocking=True).contiguous(memory_format=self.format)
        return images, labels.to(device, non_blocking=True)

    def autocast(self) -> contextlib.AbstractContextManager:
        """The recipe's autocast context; does nothing without ``amp``."""
        if self.recipe.amp is None:
            return contextlib.nullcontext()
        return torch.autocast(self.process.device.type, dtype=getattr(torch, self.recipe.amp))

    def _save(self, name: str) -> None:
        """Write a checkpoint; every process has to call it, because the random states are gathered."""
        if not self.options.checkpoints or self.options.folder is None:
            return
        rng, (loss, correct, images) = random_state(self.process), self._total_sums()
        if self.process.is_first:
            state = {
                "identity": self.identity,
                "class_names": self.class_names,
                "model": self.model.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "scaler": self.scaler.state_dict(),
                "progress": {**asdict(self.progress), "loss": loss, "correct": correct, "images": images},
                "rng": rng,
            }
            save_checkpoint(self.options.folder / name, state)
        self.process.wait()  # none goes on, or ends, before the file is there

    def _restore(self, state: dict) -> None:
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        for name, value in state["progress"].items():
            setattr(self.progress, name, value)
        if not self.process.is_first:  # the saved sums are over all processes: one of them carries them on
            self.progress.loss = self.progress.correct = self.progress.images = 0.0
        set_random_state(state["rng"], self.process)

    def _interrupted(self, stop: StopRequest) -> Interrupted:
        number = stop.signal or 15  # another process got it
        kept = self.options.checkpoints and self.options.folder is not None
        told = (
            f"the run is kept in {self.options.folder / 'last.pt'}; go on with --resume" if kept else "nothing is kept"
        )
        return Interrupted(f"interrupted in epoch {self.progress.epoch + 1}; {told}", number)
