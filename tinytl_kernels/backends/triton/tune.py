"""``tinytl tune``: for the operators that a training step calls, the fastest right configuration of each kernel.

Three steps. :func:`record` runs the step once and notes each distinct call of an operator: shapes, strides and dtypes,
no data. :func:`search` repeats each call on data of its own, under every candidate of every choice that its launchers
make, checks the answer and takes the time. :func:`tinytl_kernels.backends.triton.configurations.write` keeps what won.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tinytl_kernels.backends.triton.configurations import Choice, Configuration, trying, watch
from tinytl_kernels.backends.triton.launch import compiled, last_offset, observe

# A candidate has to beat the rule by this much: below lies the noise, and a table that follows it helps nobody.
LEAST_GAIN = 0.02
# Of whole numbers most sums are exact, but smooth activations and bilinear weights round in the order of summation.
_ROUNDINGS = 8
_FLIPPED = 1e-3

Timer = Callable[[Callable[[], object]], float]


@dataclass(frozen=True)
class Blank:
    """A tensor without its data."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype

    def filled(self, device: torch.device) -> Tensor:
        """Random small whole numbers in place of the data; masks and codes are random bytes."""
        room = last_offset(torch.empty_strided(self.shape, self.stride, device="meta")) + 1
        if self.dtype == torch.uint8:
            flat = torch.randint(0, 256, (room,), device=device, dtype=torch.uint8)
        else:
            flat = torch.randint(-3, 4, (room,), device=device).to(self.dtype)
        return flat.as_strided(self.shape, self.stride)


@dataclass(frozen=True)
class Call:
    """A call of an operator of this backend, by its shapes.

    Args:
        operator: The backend's function.
        arguments: In order; a :class:`Blank` for every tensor.
    """

    operator: Callable
    arguments: tuple[Any, ...]

    def on(self, device: torch.device) -> Callable[[], tuple[Tensor, ...]]:
        """The call on data of its own, ready to be repeated."""
        filled = [a.filled(device) if isinstance(a, Blank) else a for a in self.arguments]

        def run() -> tuple[Tensor, ...]:
            outputs = self.operator(*filled)
            return outputs if isinstance(outputs, tuple) else (outputs,)

        return run


def record(step: Callable[[], object]) -> Counter[Call]:
    """Run ``step`` and count its distinct calls of operators of this backend."""
    calls: Counter[Call] = Counter()

    def note(operator: Callable, args: tuple, kwargs: dict[str, Any]) -> None:
        if not kwargs:  # the dispatcher passes none; a launcher that calls another's operator may
            calls[Call(operator, tuple(map(_hashable, args)))] += 1

    with observe(note):
        step()
    return calls


def _hashable(value: Any) -> Any:
    if isinstance(value, Tensor):
        return Blank(tuple(value.shape), value.stride(), value.dtype)
    return tuple(map(_hashable, value)) if isinstance(value, list | tuple) else value


@dataclass
class Trial:
    """What a choice cost under its candidates, in all the calls that make it.

    Args:
        rule: What is launched without a table.
        seconds: Candidate -> seconds of a step, of the calls that it was right in.
        failed: Candidate -> why it is out.
    """

    rule: Configuration
    seconds: dict[Configuration, float] = field(default_factory=lambda: defaultdict(float))
    failed: dict[Configuration, str] = field(default_factory=dict)

    @property
    def best(self) -> Configuration:
        """The fastest that was right everywhere; the rule's unless it is beaten by ``LEAST_GAIN``."""
        right = {c: s for c, s in self.seconds.items() if c not in self.failed}
        best = min(right, key=lambda c: right[c], default=self.rule)
        if self.rule in right and right[best] > (1 - LEAST_GAIN) * right[self.rule]:
            return self.rule
        return best

    @property
    def gain(self) -> float:
        """Seconds of a step that the best saves against the rule."""
        return self.seconds[self.rule] - self.seconds[self.best]


def search(
    calls: Mapping[Call, int],
    timer: Timer,
    device: torch.device,
    progress: Callable[[str], None] = lambda line: None,
) -> dict[Choice, Trial]:
    """Time every candidate of every choice that the calls make.

    One choice is varied at a time while the others follow their rules: the kernels of a call do not share registers.

    Args:
        calls: From :func:`record`: how often a step makes each.
        timer: Seconds of a call.
        device: Where the calls run.
        progress: Told of every call, in a line.

    Returns:
        The trials. A candidate that failed, gave another answer than the rule's or spilled more registers is in
        ``failed``: what spills may win a quiet measurement, and loses where other kernels need the cache.

    Raises:
        RuntimeError: A call fails under the rules themselves.
    """
    trials: dict[Choice, Trial] = {}
    for number, (call, count) in enumerate(calls.items(), 1):
        run = call.on(device)
        with trying({}), watch() as choices, compiled() as kernels:
            expected = _answer(run, device)
        usual_spills = _spills(kernels)
        with trying({}):
            usual = timer(run)
        tried = 0
        for choice, candidates in choices.items():
            trial = trials.setdefault(choice, Trial(candidates[0]))
            trial.seconds[trial.rule] += count * usual
            for candidate in candidates[1:]:
                if candidate in trial.failed:
                    continue
                tried += 1
                with trying({choice: candidate}):
                    try:
                        with compiled() as kernels:
                            _check(expected, _answer(run, device))
                        if (spills := _spills(kernels)) > usual_spills:
                            raise ValueError(f"spills {spills} registers, the rule's kernels {usual_spills}")
                        seconds = timer(run)
                    except Exception as error:  # out of shared memory, refused by a compiler, wrong
                        trial.failed[candidate] = f"{type(error).__name__}: {error}".splitlines()[0]
                    else:
                        trial.seconds[candidate] += count * seconds
        if choices:
            progress(
                f"{number}/{len(calls)} {call.operator.__name__} {_sizes(call)}: {usual * 1e6:.1f} us, {tried} tried"
            )
    return trials


def winners(trials: Mapping[Choice, Trial]) -> dict[Choice, Configuration]:
    """The choices in which another configuration than the rule's won."""
    return {choice: trial.best for choice, trial in trials.items() if trial.best != trial.rule}


def _answer(run: Callable[[], tuple[Tensor, ...]], device: torch.device) -> tuple[Tensor, ...]:
    """What ``run`` gives on ``device``, the same each time where it draws random numbers."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(0)
        return run()


def _spills(kernels: Sequence[Any]) -> int:
    """Registers that a thread keeps in memory, as the driver says, in all kernels together."""
    return sum(kernel.n_spills or 0 for kernel in kernels)


def _sizes(call: Call) -> str:
    return ", ".join("x".join(map(str, a.shape)) for a in call.arguments if isinstance(a, Blank))


def _check(expected: tuple[Tensor, ...], got: tuple[Tensor, ...]) -> None:
    """Raise ``ValueError`` unless the answers agree; then spoil ``got``.

    The allocator hands the same memory to the next candidate, in which a kernel that writes nothing would find the
    right answer.
    """
    try:
        for index, (a, b) in enumerate(zip(expected, got, strict=True)):
            if a.numel() == 0:
                continue
            if not a.dtype.is_floating_point:  # masks, positions, codes
                error, allowed = (a != b).double().mean().item(), _FLIPPED
            else:
                error = ((a.double() - b.double()).norm() / a.double().norm().clamp_min(1e-30)).item()
                allowed = _ROUNDINGS * torch.finfo(a.dtype).eps
            if not error <= allowed:  # a NaN must fail
                raise ValueError(f"output {index}: another answer, error {error:.1e}, allowed {allowed:.1e}")
    finally:
        for tensor in got:
            tensor.fill_(float("nan") if tensor.dtype.is_floating_point else torch.iinfo(tensor.dtype).max)
