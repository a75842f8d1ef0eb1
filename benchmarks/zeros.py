"""``python -m benchmarks.zeros CASE...``: what the zeros that a ReLU leaves are worth to a step of ours.

The CPU kernels leave out products with zeros, and gradients that no mask lets pass, so that their time depends on the
network's values. Prints, for a network with random weights as the tables time it, and for the same one with norms that
let nearly everything pass: the share of values behind an activation that are not zero, and the time of a ``bias`` step,
interleaved.
"""

from __future__ import annotations

import argparse

import torch
from torch import nn

from benchmarks.contestants import Entry
from benchmarks.interleave import interleave
from benchmarks.lineup import lineup
from benchmarks.networks import BY_NAME

_KEY = "ours_cpu_bias"


def share_passing(model: nn.Module, input: torch.Tensor) -> float:
    """The share of values behind the model's ReLUs and ReLU6s that are not zero."""
    passing = total = 0

    def count(module, _, output) -> None:
        nonlocal passing, total
        passing += output.count_nonzero().item()
        total += output.numel()

    rectifiers = [module for module in model.modules() if isinstance(module, nn.ReLU | nn.ReLU6)]
    handles = [module.register_forward_hook(count) for module in rectifiers]
    with torch.no_grad():
        model.eval()(input)
    for handle in handles:
        handle.remove()
    return passing / total if total else 1.0


def let_everything_pass_(model: nn.Module) -> nn.Module:
    """Moves what every norm makes to the middle of where a ReLU6 passes."""
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm2d):
            nn.init.constant_(norm.weight, 0.1)
            nn.init.constant_(norm.bias, 3.0)
    return model


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("cases", nargs="*", metavar="CASE", default=["mobilenet_v2_b8"], help="networks of the tables")
    for name in parser.parse_args().cases:
        if name not in BY_NAME:
            parser.error(f"CASE: expected one of {', '.join(BY_NAME)}, got {name!r}")
        case = BY_NAME[name]
        ours = next(contestant for contestant in lineup(case.level) if contestant.key == _KEY)
        models = {"random": case.stock(), "everything passes": let_everything_pass_(case.stock())}
        shares = {label: share_passing(model, case.input()) for label, model in models.items()}
        rounds = interleave({label: Entry(ours, case, model).run for label, model in models.items()})
        for label, median in rounds.medians.items():
            ratio = rounds.ratio(label, "random")
            print(f"{name:24s} {label:18s} {shares[label]:4.0%} not zero  {median * 1e3:6.1f} ms  {ratio:.2f}x")


if __name__ == "__main__":
    main()
