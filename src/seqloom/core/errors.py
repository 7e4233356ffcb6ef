"""Errors a user can act on: what was asked, what was found, what would work."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Iterable
from types import ModuleType


class BadInput(ValueError):
    """What the user gave cannot be used. The command line prints it as one sentence and exits with status 2."""


class FailedRun(RuntimeError):
    """The input was fine and the run failed (a non-finite loss, a full disk). The command line exits with status 1."""


class MissingExtra(BadInput, ImportError):
    """An optional dependency is absent. The message names the extra that brings it."""


def near(name: str, known: Iterable[str]) -> str:
    """A hint for a misspelt name: the nearest known one, or the list of all.

    >>> near("sofmax", ["softmax", "mamba"])
    "did you mean 'softmax'?"
    """
    known = list(known)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    return f"did you mean {close[0]!r}?" if close else f"known: {', '.join(sorted(known))}"


def require_extra(module: str, extra: str, why: str) -> ModuleType:
    """Import an optional module, or say in one sentence which extra brings it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise MissingExtra(
            f"{why} needs the package {module.split('.')[0]!r}, which is not installed; "
            f"pip install 'seqloom[{extra}]' brings it"
        ) from error
