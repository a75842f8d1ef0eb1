"""The command ``tinytl``: finetune, compare, profile, tune, paper-memory, doctor."""

from __future__ import annotations

import argparse
import contextlib
import errno
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch

import tinytl_kernels

from . import finetune as package
from .errors import TinyTLError
from .finetune import Data, Options, Recipe, Training, load_data, prepare, process_group
from .finetune.arguments import USAGE_STATUS, parse
from .models import input_config


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        arguments: Instead of ``sys.argv[1:]``.

    Returns:
        The exit status: 0; 2 for a mistake, told in one line on standard error; 128 + N after signal N.
    """
    debug = "--debug" in (sys.argv[1:] if arguments is None else arguments)
    try:
        options = parse(arguments)
        with contextlib.ExitStack() as stack:
            if getattr(options, "backend", None):
                _force_backend(options.backend, stack)
            if getattr(options, "threads", None) is not None:
                _set_threads(options.threads)
            COMMANDS[options.command](options)
        return 0
    except TinyTLError as error:
        if debug:
            raise
        return _fail(str(error), getattr(error, "number", None))
    except KeyboardInterrupt:
        if debug:
            raise
        return _fail("interrupted", 2)
    except OSError as error:
        if debug or error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EROFS):
            raise
        return _fail(f"cannot write {error.filename or 'a file'}: {error.strerror}")


def _fail(message: str, signal_number: int | None = None) -> int:
    rank = os.environ.get("RANK", "0")
    if rank == "0" or signal_number is None:
        print(f"tinytl: error: {message}", file=sys.stderr)
    return USAGE_STATUS if signal_number is None else 128 + signal_number


def _set_threads(count: int) -> None:
    if count < 1:
        raise TinyTLError(f"--threads: expected at least 1, got {count}")
    torch.set_num_threads(count)


def _force_backend(name: str, stack: contextlib.ExitStack) -> None:
    try:
        stack.enter_context(tinytl_kernels.use_backend(name))
    except (ValueError, RuntimeError) as error:
        raise TinyTLError(f"--backend {name}: {error}") from error


def _recipe(options: argparse.Namespace, data: str, world_size: int = 1, seed: int = 0) -> Recipe:
    names = ("learning_rate", "epochs", "batch_size", "accumulate", "label_smoothing", "weight_decay", "dropout")
    names += ("resolution", "crop_scale", "flip", "amp", "weight_bits", "weight_code", "channels_last", "optimizer")
    given = {name: getattr(options, name, None) for name in names}
    return Recipe.for_data(data, world_size=world_size, seed=seed, **given)


def _data(options: argparse.Namespace) -> Data:
    data = load_data(options.data, root=options.data_root, download=options.download, test_share=options.test_share)
    return data.limited(options.limit_train, options.limit_test)


def _options(options: argparse.Namespace, **more: object) -> Options:
    if options.workers < 0:
        raise TinyTLError(f"--workers: expected 0 or more, got {options.workers}")
    return Options(
        workers=options.workers,
        progress=options.progress,
        tensorboard=options.tensorboard,
        step_in_backward=options.step_in_backward,
        **more,
    )


def _weights(options: argparse.Namespace) -> str:
    return options.weights or ("pretrained" if options.pretrained else "random")


def finetune(options: argparse.Namespace) -> None:
    """Train one model; print where the results are."""
    folder = Path(options.out)
    resume = None
    if options.resume is not None:
        resume = Path(options.resume or folder / "last.pt")
        if not resume.exists():
            raise TinyTLError(f"--resume: no such file: {resume}")
    elif (folder / "last.pt").exists() and not options.overwrite:
        raise TinyTLError(f"{folder} holds a run: go on with --resume, or start anew with --overwrite or another --out")
    with process_group(options.device) as process:
        data = _data(options)
        recipe = _recipe(options, options.data, process.world_size, options.seed)
        model = prepare(
            options.model,
            options.method,
            len(data.classes),
            recipe,
            pretrained=options.pretrained,
            weights=options.weights,
        )
        training = Training(
            model,
            data,
            recipe,
            input_config(options.model),
            process=process,
            identity={"model": options.model, "method": options.method, "weights": _weights(options)},
            options=_options(options, folder=folder, resume=resume, checkpoint_steps=options.checkpoint_steps),
        )
        result = training.run()
        if process.is_first:
            tinytl_kernels.save_adapter(training.model, folder / "adapter.safetensors")
            print(
                f"{options.method}: test accuracy {result.accuracy:.2%} after {recipe.epochs} epochs "
                f"(best {result.best_accuracy:.2%}), {result.seconds_per_image * 1e3:.2f} ms an image"
            )
            print(f"{folder}: log.csv, last.pt, best.pt, adapter.safetensors (only what was trained)")


def compare(options: argparse.Namespace) -> None:
    """Train several methods; print the table and draw the figures."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise TinyTLError("compare runs in one process, where its times mean something; finetune takes torchrun")
    data = _data(options)
    process = package.Process(package.choose_device(options.device))
    folder = Path(options.out)
    comparison = package.compare(
        options.model,
        data,
        options.methods,
        options.seeds,
        _recipe(options, options.data),
        folder,
        process=process,
        options=_options(options),
        pretrained=options.pretrained,
        weights=options.weights,
        resume=options.resume,
    )
    about = comparison.about
    print(
        f"{about['model']} on {about['data']} ({about['pictures'][0]} pictures, {about['pictures'][1]} to test), "
        f"{about['recipe']['epochs']} epochs, batch {about['recipe']['batch_size']}, "
        f"{about['recipe']['resolution']}x{about['recipe']['resolution']}, {about['device']}"
    )
    print(comparison.table())
    figures = package.draw(comparison, folder)
    print(f"figures: {', '.join(map(str, figures))}; numbers: {folder / 'results.json'}, {folder / 'results.csv'}")


def profile(options: argparse.Namespace) -> None:
    """Print memory and time by layer."""
    for name in ("rounds", "num_classes"):
        if getattr(options, name) < 1:
            raise TinyTLError(f"--{name.replace('_', '-')}: expected at least 1, got {getattr(options, name)}")
    pair = package.profile(
        options.model,
        options.method,
        _recipe(options, "profile"),
        package.choose_device(options.device),
        num_classes=options.num_classes,
        pretrained=options.pretrained,
        weights=options.weights,
        rounds=options.rounds,
    )
    print(pair.text(options.rows or None))


def tune(options: argparse.Namespace) -> None:
    """Measure launch configurations; print what they save and where they are kept."""
    if options.num_classes < 1:
        raise TinyTLError(f"--num-classes: expected at least 1, got {options.num_classes}")
    device = package.choose_device(options.device)
    print(
        package.tune(options.model, options.method, _recipe(options, "tune"), device, num_classes=options.num_classes)
    )


def paper_memory(options: argparse.Namespace) -> None:
    """Measure and draw the memory column of the paper's Table 2."""
    from .memory.paper import paper_memory

    @contextlib.contextmanager
    def stepping(parameters: list[torch.nn.Parameter]) -> Iterator[torch.optim.Optimizer]:
        optimizer = package.OPTIMIZERS[options.optimizer](parameters)
        with package.step_in_backward(optimizer) if options.step_in_backward else contextlib.nullcontext():
            yield optimizer

    try:
        result = paper_memory(
            options.methods,
            options.resolutions,
            options.norms.split(","),
            options.kinds.split(","),
            batch=options.batch_size,
            num_classes=options.num_classes,
            stepping=stepping,
            progress=lambda row: print(
                f"{row.method}, {row.norm}, {row.kind}, {row.resolution}x{row.resolution}", file=sys.stderr
            ),
        )
    except ValueError as error:
        raise TinyTLError(str(error)) from error
    folder = Path(options.out)
    folder.mkdir(parents=True, exist_ok=True)
    picture = folder / "paper-memory.png"
    result.plot(picture)
    print(json.dumps(result.as_dict(), indent=2) if options.json else result.table())
    print(f"figure: {picture}", file=sys.stderr)


def doctor(options: argparse.Namespace) -> None:
    """Print the environment report."""
    print(tinytl_kernels.env_report())


COMMANDS: dict[str, Callable[[argparse.Namespace], None]] = {
    "finetune": finetune,
    "compare": compare,
    "profile": profile,
    "tune": tune,
    "paper-memory": paper_memory,
    "doctor": doctor,
}


if __name__ == "__main__":
    sys.exit(main())
