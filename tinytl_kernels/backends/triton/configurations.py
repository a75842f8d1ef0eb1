"""Which configuration a kernel is launched with: a rule's, or one that ``tinytl tune`` measured to be faster here.

A rule is a function from shapes to a tuple of whole numbers (tile sizes, warps, stages), sensible everywhere.
:func:`tunable` lets a table overrule it, shape by shape. The table is a JSON file a GPU, read at the first launch; it
counts only for the GPU, the Triton and the kernel sources that it was measured with.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import inspect
import json
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import triton

from tinytl_kernels.backends.triton import launch
from tinytl_kernels.core.files import replace_file

Configuration = tuple[int, ...]

# Moves the folder of the tables.
CACHE_VARIABLE = "TINYTL_TUNE_CACHE"

# Of the file's layout.
_FORMAT = 1


@dataclass(frozen=True)
class Target:
    """What a table was measured on and with; a table of any other is not used.

    Args:
        device: Name of the GPU.
        capability: ``"9.0"``, or AMD's ``"gfx942"``.
        triton: Its version, the compiler's.
        kernels: Digest of the sources of this folder.
    """

    device: str
    capability: str
    triton: str
    kernels: str


@dataclass(frozen=True)
class Choice:
    """One question that launchers ask: which configuration for this shape?

    Args:
        tunable: Name of the rule.
        shape: Its arguments in one line, ``"pixels=100352, columns=144, ..."``.
    """

    tunable: str
    shape: str


class Tunable:
    """A rule that a table may overrule; called as the rule is. See :func:`tunable`."""

    def __init__(self, rule: Callable[..., Configuration], candidates: Callable[..., Iterable[Configuration]]) -> None:
        functools.update_wrapper(self, rule)
        self.name = f"{rule.__module__.rpartition('.')[2]}.{rule.__name__}"
        self._rule = rule
        self._candidates = candidates
        self._signature = inspect.signature(rule)
        self._chosen = functools.lru_cache(maxsize=4096)(self._choose)

    def __call__(self, *args, **kwargs) -> Configuration:
        # What is inspected and not run (ahead-of-time compilation) is what ships, whatever this machine has measured.
        if launch.recording():
            return self._rule(*args, **kwargs)
        if _watchers:
            choice = self.choice(*args, **kwargs)
            for watcher in _watchers:
                watcher[choice] = self.candidates(*args, **kwargs)
        return self._chosen(*args, **kwargs)

    def choice(self, *args, **kwargs) -> Choice:
        """The question that these arguments ask."""
        bound = self._signature.bind(*args, **kwargs)
        bound.apply_defaults()
        return Choice(self.name, ", ".join(f"{name}={_text(value)}" for name, value in bound.arguments.items()))

    def candidates(self, *args, **kwargs) -> tuple[Configuration, ...]:
        """What may be tried for these arguments: the rule's answer first, then the others, each once."""
        return tuple(dict.fromkeys([self._rule(*args, **kwargs), *self._candidates(*args, **kwargs)]))

    def forget(self) -> None:
        """Ask the table anew from now on."""
        self._chosen.cache_clear()

    def _choose(self, *args, **kwargs) -> Configuration:
        choice = self.choice(*args, **kwargs)
        if choice in _tried:
            return _tried[choice]
        measured = _table.get(choice) if _table is not None else load().get(choice)
        # A file is no reason to launch what no launcher would.
        if measured is not None and measured in self.candidates(*args, **kwargs):
            return measured
        return self._rule(*args, **kwargs)


TUNABLES: dict[str, Tunable] = {}

# None until the first launch asks.
_table: dict[Choice, Configuration] | None = None
_tried: dict[Choice, Configuration] = {}
_watchers: list[dict[Choice, tuple[Configuration, ...]]] = []


def tunable(candidates: Callable[..., Iterable[Configuration]]) -> Callable[[Callable[..., Configuration]], Tunable]:
    """Let ``tinytl tune`` choose in place of the decorated rule.

    Args:
        candidates: Called with the rule's arguments; all that is worth trying. A table may hold nothing else.

    Returns:
        The decorator. The rule's arguments must be hashable, and what it returns a tuple of whole numbers.
    """

    def decorate(rule: Callable[..., Configuration]) -> Tunable:
        made = Tunable(rule, candidates)
        TUNABLES[made.name] = made
        return made

    return decorate


def _text(value: object) -> str:
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    return "x".join(map(str, value)) if isinstance(value, tuple) else str(value)


@contextlib.contextmanager
def trying(tried: Mapping[Choice, Configuration]) -> Iterator[None]:
    """Answer these choices as given, and all others by their rules, inside the ``with`` block. Process-wide."""
    global _table
    before = _table, dict(_tried)
    _table = {}
    _tried.update(tried)
    _forget()
    try:
        yield
    finally:
        _table = before[0]
        _tried.clear()
        _tried.update(before[1])
        _forget()


@contextlib.contextmanager
def watch() -> Iterator[dict[Choice, tuple[Configuration, ...]]]:
    """Collect the choices made inside the ``with`` block, each with its candidates, the rule's first."""
    seen: dict[Choice, tuple[Configuration, ...]] = {}
    _watchers.append(seen)
    try:
        yield seen
    finally:
        # Not remove(): two watchers that saw the same are equal.
        del _watchers[next(i for i, watcher in enumerate(_watchers) if watcher is seen)]


def _forget() -> None:
    for made in TUNABLES.values():
        made.forget()


def target(device: torch.device | None = None) -> Target | None:
    """What a table would be measured on and with, for ``device`` or the current GPU; None if there is none."""
    if not torch.cuda.is_available():
        return None
    properties = torch.cuda.get_device_properties(device)
    capability = f"{properties.major}.{properties.minor}"
    if torch.version.hip is not None:
        capability = properties.gcnArchName.partition(":")[0]
    return Target(properties.name, capability, triton.__version__, kernels_digest())


@functools.cache
def kernels_digest() -> str:
    """Twelve hexadecimal digits that change with any source of this folder."""
    digest = hashlib.sha256()
    for source in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(source.name.encode() + b"\0" + source.read_bytes() + b"\0")
    return digest.hexdigest()[:12]


def table_path(target: Target) -> Path:
    """The file of a GPU's table, below ``TINYTL_TUNE_CACHE`` or the user's cache folder."""
    root = os.environ.get(CACHE_VARIABLE)
    base = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "tinytl_kernels" / "tune"
    name = re.sub(r"[^A-Za-z0-9.]+", "-", f"{target.device}-{target.capability}").strip("-")
    return (Path(root).expanduser() if root else base) / f"{name}.json"


def load() -> dict[Choice, Configuration]:
    """The table of the current GPU, read at the first call; empty where there is none, or none that counts here."""
    global _table
    if _table is None:
        here = target()
        _table = {} if here is None else read(table_path(here), here)
    return _table


def reload() -> None:
    """Read the table again at the next launch."""
    global _table
    _table = None
    _forget()


def read(path: Path, here: Target) -> dict[Choice, Configuration]:
    """The table in ``path``. One that is damaged or was measured elsewhere is left aside, with a line that says so."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["format"] != _FORMAT:
            raise ValueError(f"format {content['format']}, expected {_FORMAT}")
        foreign = [name for name, value in asdict(here).items() if content["target"][name] != value]
        table = {
            Choice(name, shape): tuple(map(int, configuration))
            for name, shapes in content["configurations"].items()
            for shape, configuration in shapes.items()
        }
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        _say(f"{path} is not used: it cannot be read ({type(error).__name__}: {error}); run tinytl tune again")
        return {}
    if foreign:
        _say(f"{path} is not used: it was measured with another {' and '.join(foreign)}; run tinytl tune again")
        return {}
    return table


def write(path: Path, here: Target, found: Mapping[Choice, Configuration]) -> None:
    """Add ``found`` to the table in ``path``, and make the launchers of this process read it. Whole or not at all.

    Raises:
        OSError: The folder cannot be made or written.
    """
    shapes: dict[str, dict[str, list[int]]] = {}
    for choice, configuration in sorted({**read(path, here), **found}.items(), key=lambda item: str(item[0])):
        shapes.setdefault(choice.tunable, {})[choice.shape] = list(configuration)
    content = {"format": _FORMAT, "target": asdict(here), "configurations": shapes}
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(content, indent=1)
    replace_file(path, lambda file: file.write(text.encode()))
    reload()


def _say(message: str) -> None:
    print(f"tinytl_kernels: {' '.join(message.split())}", file=sys.stderr, flush=True)
