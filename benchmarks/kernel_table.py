"""The kernels' table: what each reaches, beside the machine's own rates, and why where it is far from its limit."""

from __future__ import annotations

from typing import Any

from benchmarks.machine import arithmetic_gflops
from benchmarks.notes import NOTES, REASONS

# Below this share of its limit a kernel owes an explanation.
EXPLAIN_BELOW = 0.6
NO_NOTE = "**NO NOTE**"

Info = dict[str, Any]

HEADER = (
    "kernel, batch {batch}",
    "pass",
    "computed by",
    "ms",
    "GFLOP/s (of sgemm)",
    "GB/s",
    "its copy, GB/s",
    "limit",
    "of the limit",
    f"why below {EXPLAIN_BELOW:.0%}",
)


def rates(machine: Info) -> str:
    """What the percentages are of, in a sentence."""
    return (
        f"Limits: arithmetic, {arithmetic_gflops(machine):.0f} GFLOP/s, the best float32 rate that PyTorch has here "
        f"(oneDNN's dense convolution {machine['conv_gflops']:.0f}, sgemm {machine['sgemm_gflops']:.0f}); and a copy "
        "that moves as many bytes as the kernel has to, each tensor once, timed between its rounds, from cache where "
        f"they fit one ({machine['copy_gb_s']:.0f} GB/s where they do not). The longer of the two times is the limit. "
        "The time is that of a call as users make it, Python, autograd and the allocation of the results included."
    )


def rows(infos: list[Info]) -> list[tuple[str, ...]]:
    """One row a kernel and direction."""
    return [
        (
            info["case"].replace("_", " "),
            info["direction"],
            ", ".join(info["computed_by"]),
            f"{info['median_s'] * 1e3:.2f}",
            _arithmetic(info),
            f"{info['gb_per_s']:.1f}",
            f"{info['copy_gb_per_s']:.1f}",
            info["limit"],
            f"{info['of_limit']:.0%}",
            note(info),
        )
        for info in infos
    ]


def note(info: Info) -> str:
    """The names of the reasons, loudly none if there is none, nothing where none is owed."""
    if info["of_limit"] >= EXPLAIN_BELOW:
        return ""
    return ", ".join(NOTES.get((info["case"], info["direction"]), ())) or NO_NOTE


def legend(infos: list[Info]) -> str:
    """The reasons that the rows name, as a list."""
    named = {
        reason
        for info in infos
        if info["of_limit"] < EXPLAIN_BELOW
        for reason in NOTES.get((info["case"], info["direction"]), ())
    }
    return "\n".join(f"- {name}: {text}" for name, text in REASONS.items() if name in named)


def _arithmetic(info: Info) -> str:
    if info["gflops_per_s"] is None:
        return "–"
    return f"{info['gflops_per_s']:.0f} ({info['gflops_per_s'] / info['machine']['sgemm_gflops']:.0%})"
