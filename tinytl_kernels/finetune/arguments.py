"""What can be typed after ``tinytl``: commands, options, their defaults and help."""

from __future__ import annotations

import argparse
import difflib
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

import tinytl_kernels

from ..core.quantization import CODES
from ..errors import TinyTLError
from ..models.zoo import DEMO_MODEL
from .prepare import METHODS
from .recipe import OPTIMIZERS

USAGE_STATUS = 2

DESCRIPTION = "Fine-tune convolutional networks in the memory of inference: frozen weights, trained biases (TinyTL)."

EXAMPLES = f"""\
examples:
  tinytl finetune --model timm:mobilenetv2_100 --data photos/ --out runs/photos
      fine-tune on photos/CLASS/*.jpg the TinyTL way, with the paper's recipe
  tinytl finetune --model torchvision:resnet50 --data torchvision:CIFAR10 --download --method bias --amp bfloat16
  torchrun --nproc-per-node 2 -m tinytl_kernels finetune --model timm:mobilenetv2_100 --data photos/
  tinytl compare --model demo:{DEMO_MODEL} --data digits --methods all --out demo_out
      all six methods on scikit-learn's digits: table, accuracy.png, memory.png
  tinytl profile --model torchvision:mobilenet_v2 --method bias
      memory and time by layer, beside stock PyTorch
  tinytl tune --model torchvision:mobilenet_v2 --method bias --batch-size 128 --amp bfloat16
      on a GPU: measure and keep the fastest launch configurations for these shapes
  tinytl doctor
      versions, devices, backends, and why one is missing
"""


class Parser(argparse.ArgumentParser):
    """An argument parser whose mistakes are one line, with close matches for what was typed."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}; see {self.prog} --help")


class UsageError(TinyTLError):
    """The command line does not parse."""


def one_of(names: Sequence[str]) -> Callable[[str], str]:
    """An argparse type: one of ``names``, or an error with the closest."""

    def parse(text: str) -> str:
        if text in names:
            return text
        close = difflib.get_close_matches(text, names, n=2, cutoff=0.4)
        hint = f"did you mean {' or '.join(close)}?" if close else f"choose from {', '.join(names)}"
        raise argparse.ArgumentTypeError(f"{text!r} is not known; {hint}")

    return parse


def methods(text: str) -> list[str]:
    """An argparse type: ``all`` or names separated by commas."""
    if text == "all":
        return list(METHODS)
    return list(dict.fromkeys(one_of((*METHODS, "all"))(name) for name in text.split(",")))


def seeds(text: str) -> list[int]:
    """An argparse type: whole numbers separated by commas."""
    try:
        return list(dict.fromkeys(int(number) for number in text.split(",")))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of whole numbers such as 0,1,2") from None


def build_parser() -> tuple[Parser, dict[str, Parser]]:
    """The parser and its subparsers by command."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = Parser("tinytl", description=DESCRIPTION, epilog=EXAMPLES, formatter_class=raw, allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"tinytl_kernels {tinytl_kernels.__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", parser_class=Parser)
    texts = {
        "finetune": "train one model with one method",
        "compare": "train several methods and show accuracy beside measured memory",
        "profile": "memory and time by layer, beside stock PyTorch",
        "tune": "find this GPU's fastest launch configurations for a model, batch size and dtype, and keep them",
        "paper-memory": "the memory column of the paper's Table 2: its figure, the formula, and measured",
        "doctor": "report versions, devices and backends",
    }
    subparsers = {
        name: commands.add_parser(
            name, help=text, description=text.capitalize() + ".", allow_abbrev=False, formatter_class=raw
        )
        for name, text in texts.items()
    }
    for name in ("finetune", "compare", "profile"):
        _add_model_options(subparsers[name])
        _add_recipe_options(subparsers[name], training=name != "profile")
        _add_machine_options(subparsers[name], training=name != "profile")
    _add_recipe_options(subparsers["tune"], training=False)
    _add_machine_options(subparsers["tune"], training=False)
    for name in ("finetune", "compare"):
        _add_data_options(subparsers[name])
    _add_finetune_options(subparsers["finetune"])
    _add_compare_options(subparsers["compare"])
    _add_profile_options(subparsers["profile"])
    _add_tune_options(subparsers["tune"])
    _add_paper_options(subparsers["paper-memory"])
    for subparser in subparsers.values():
        subparser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser, subparsers


def _model_option(group: argparse._ActionsContainer) -> None:
    group.add_argument(
        "--model",
        default=f"demo:{DEMO_MODEL}",
        metavar="NAME",
        help="timm:NAME, torchvision:NAME, tinytl:NAME or demo:efficientnet_lite0 (default: %(default)s)",
    )


def _add_model_options(parser: Parser) -> None:
    group = parser.add_argument_group("model")
    _model_option(group)
    group.add_argument("--weights", metavar="FILE", help="a local state_dict: .safetensors, or torch.save without code")
    group.add_argument(
        "--pretrained",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="load the library's ImageNet weights, downloaded once by timm or torchvision (default: yes)",
    )


def _add_data_options(parser: Parser) -> None:
    group = parser.add_argument_group("data")
    group.add_argument(
        "--data",
        default="digits",
        metavar="NAME|FOLDER",
        help="digits (embedded), torchvision:NAME such as torchvision:CIFAR10, or a folder FOLDER/CLASS/*.jpg, "
        "with or without train/ and val/ above the classes (default: %(default)s)",
    )
    group.add_argument("--data-root", default="data", metavar="FOLDER", help="where torchvision keeps its data sets")
    group.add_argument("--download", action="store_true", help="let torchvision download a data set that is not there")
    group.add_argument(
        "--test-share",
        type=float,
        default=0.2,
        metavar="X",
        help="share of each class to test on where the data come in one part (default: %(default)s)",
    )
    group.add_argument("--limit-train", type=int, metavar="N", help="train on N pictures, evenly spread")
    group.add_argument("--limit-test", type=int, metavar="N", help="test on N pictures, evenly spread")
    group.add_argument("--workers", type=int, default=0, metavar="N", help="processes that read pictures (default: 0)")


def _add_recipe_options(parser: Parser, *, training: bool) -> None:
    group = parser.add_argument_group(
        "recipe", "Defaults are the paper's for its data sets; the embedded digits get 3 epochs of 64x64."
    )
    group.add_argument("--batch-size", type=int, metavar="N", help="pictures a forward pass and process (8)")
    group.add_argument("--resolution", type=int, metavar="N", help="height and width in pixels (224; digits 64)")
    group.add_argument("--dropout", type=float, metavar="P", help="before the classifier, if the model has one (0.2)")
    group.add_argument("--amp", type=one_of(("bfloat16", "float16")), metavar="DTYPE", help="bfloat16 or float16")
    group.add_argument(
        "--channels-last", action=argparse.BooleanOptionalAction, default=None, help="memory layout (default: yes)"
    )
    group.add_argument("--weight-bits", type=int, choices=(8, 32), help="of the frozen weights (32)")
    group.add_argument(
        "--weight-code", type=one_of(CODES), metavar="NAME", help="of 8-bit weights: int8 or kmeans (int8)"
    )
    if not training:
        return
    group.add_argument("--epochs", type=int, metavar="N", help="passes over the training pictures (50; digits 3)")
    group.add_argument(
        "--lr", dest="learning_rate", type=float, metavar="X", help="Adam's (by data set, times sqrt(batch / 8))"
    )
    group.add_argument(
        "--optimizer", type=one_of(tuple(OPTIMIZERS)), metavar="NAME", help="adam, or adam8bit: a quarter of the state"
    )
    group.add_argument("--label-smoothing", type=float, metavar="X", help="(0.1, or the paper's for the data set)")
    group.add_argument("--weight-decay", type=float, metavar="X", help="(0)")
    group.add_argument("--crop-scale", type=float, metavar="X", help="smallest random crop (0.22; 1: no crops)")
    group.add_argument(
        "--flip", action=argparse.BooleanOptionalAction, default=None, help="mirror at random (yes, but not characters)"
    )
    group.add_argument("--accumulate", type=int, metavar="N", help="forward passes a step (1)")


def _add_machine_options(parser: Parser, *, training: bool) -> None:
    group = parser.add_argument_group("machine and output")
    group.add_argument("--device", default="auto", metavar="NAME", help="auto, cpu, cuda, cuda:1, mps (default: auto)")
    group.add_argument("--threads", type=int, metavar="N", help="CPU threads of PyTorch")
    group.add_argument(
        "--backend", type=one_of(("reference", "cpu", "triton")), metavar="NAME", help="force reference, cpu or triton"
    )
    if training:
        group.add_argument(
            "--step-in-backward",
            action="store_true",
            help="use and free each gradient as it arrives: never all of them in memory",
        )
        group.add_argument("--progress", action=argparse.BooleanOptionalAction, default=True, help="bar, epoch lines")
        group.add_argument(
            "--tensorboard",
            action=argparse.BooleanOptionalAction,
            default=None,
            help="write event files (default: where tensorboard is installed)",
        )


def _method_option(parser: argparse._ActionsContainer) -> None:
    parser.add_argument(
        "--method",
        type=one_of(METHODS),
        default="lite_residual+bias",
        metavar="NAME",
        help=f"{', '.join(METHODS)} (default: %(default)s)",
    )


def _add_finetune_options(parser: Parser) -> None:
    group = parser.add_argument_group("run")
    _method_option(group)
    group.add_argument("--out", default="runs/finetune", metavar="FOLDER", help="logs and checkpoints (%(default)s)")
    group.add_argument("--seed", type=int, default=0, metavar="N", help="(default: 0)")
    group.add_argument(
        "--resume",
        nargs="?",
        const="",
        metavar="FILE",
        help="go on from a checkpoint of this run; without FILE from last.pt in --out",
    )
    group.add_argument("--overwrite", action="store_true", help="start anew although --out holds a run")
    group.add_argument(
        "--checkpoint-steps", type=int, default=0, metavar="N", help="write last.pt every N steps, not only every epoch"
    )


def _add_compare_options(parser: Parser) -> None:
    group = parser.add_argument_group("comparison")
    group.add_argument(
        "--methods",
        type=methods,
        default=list(METHODS),
        metavar="A,B,...",
        help=f"all, or some of {', '.join(METHODS)} (default: all)",
    )
    group.add_argument("--seeds", type=seeds, default=[0], metavar="0,1,...", help="one run a method and seed (0)")
    group.add_argument("--out", default="runs/compare", metavar="FOLDER", help="table and figures (%(default)s)")
    group.add_argument("--resume", action="store_true", help="keep the finished runs of this comparison in --out")


def _add_profile_options(parser: Parser) -> None:
    group = parser.add_argument_group("profile")
    _method_option(group)
    group.add_argument("--num-classes", type=int, default=10, metavar="N", help="outputs of the classifier (10)")
    group.add_argument("--rounds", type=int, default=5, metavar="N", help="timed steps; medians are shown (5)")
    group.add_argument("--rows", type=int, default=25, metavar="N", help="layers shown, most saved first; 0: all (25)")


def _add_tune_options(parser: Parser) -> None:
    group = parser.add_argument_group(
        "tune", "Kept in a file below TINYTL_TUNE_CACHE, which the kernels' launchers read."
    )
    _model_option(group)
    _method_option(group)
    group.add_argument("--num-classes", type=int, default=10, metavar="N", help="outputs of the classifier (10)")


def _add_paper_options(parser: Parser) -> None:
    group = parser.add_argument_group(
        "Table 2", "One training step of ProxylessNAS-Mobile a row, on the CPU. Everything: some minutes and 2 GB."
    )
    group.add_argument(
        "--methods", type=methods, default=list(METHODS), metavar="A,B,...", help="all, or some of the six (all)"
    )
    group.add_argument("--resolutions", type=seeds, default=[224, 320], metavar="N,...", help="(default: 224,320)")
    group.add_argument("--norms", default="bn,gn", metavar="A,B", help="bn: BatchNorm, gn: GroupNorm (default: bn,gn)")
    group.add_argument(
        "--kinds",
        default="stock,float32,int8",
        metavar="A,B,...",
        help="stock: plain PyTorch; float32, int8: converted, frozen weights of that dtype (default: %(default)s)",
    )
    group.add_argument("--batch-size", type=int, default=8, metavar="N", help="(default: 8)")
    group.add_argument("--num-classes", type=int, default=102, metavar="N", help="(default: 102, as Flowers has)")
    group.add_argument("--optimizer", type=one_of(tuple(OPTIMIZERS)), default="adam", metavar="NAME", help="(adam)")
    group.add_argument("--step-in-backward", action="store_true", help="use and free each gradient as it arrives")
    group.add_argument("--threads", type=int, metavar="N", help="CPU threads of PyTorch")
    group.add_argument("--backend", type=one_of(("reference", "cpu")), metavar="NAME", help="force reference or cpu")
    group.add_argument("--json", action="store_true", help="print JSON instead of the table")
    group.add_argument("--out", default="paper_out", metavar="FOLDER", help="the figure goes here (%(default)s)")


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line.

    Raises:
        UsageError: With close matches for an option or command that does not exist.
    """
    parser, subparsers = build_parser()
    words = list(sys.argv[1:] if arguments is None else arguments)
    if words and not words[0].startswith("-") and words[0] not in subparsers:
        try:
            one_of(tuple(subparsers))(words[0])
        except argparse.ArgumentTypeError as error:
            raise UsageError(f"command {error}") from None
    options, unknown = parser.parse_known_args(words)
    if unknown:
        known = subparsers[options.command]._option_string_actions if options.command else {}
        close = difflib.get_close_matches(unknown[0].partition("=")[0], known, n=2)
        hint = f"; did you mean {' or '.join(close)}?" if close else f"; see tinytl {options.command or ''} --help"
        raise UsageError(f"unknown argument {unknown[0]}{hint}")
    if options.command is None:
        parser.print_help()
        raise SystemExit(USAGE_STATUS)
    return options
