"""The one exception class of everything a user can get wrong from outside: names, files, options, data."""

from __future__ import annotations


class TinyTLError(Exception):
    """A mistake the user can mend, told in one line: what was expected, what came, what to do.

    The command line prints it as ``tinytl: error: ...`` without a traceback and exits with status 2. Mistakes in
    arguments of Python functions are ``ValueError`` and ``TypeError``, as everywhere in PyTorch.

    Args:
        message: The line to show; line breaks are folded into spaces.
    """

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(str(message).split()))


def missing_extra(package: str, extra: str, purpose: str) -> TinyTLError:
    """The error for an optional package that is not installed; it names the extra that brings it."""
    return TinyTLError(f"{purpose} needs {package}: pip install 'tinytl_kernels[{extra}]'")
