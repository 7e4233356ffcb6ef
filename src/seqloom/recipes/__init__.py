"""One file per paper, loaded by name: PAPER, composition functions, CHECKS and CLAIMS."""

from __future__ import annotations

import importlib
import pkgutil
from importlib.resources import files
from types import ModuleType

from seqloom.core import BadInput, near


def slugs() -> list[str]:
    """Slugs of the papers that have a recipe."""
    return sorted(module.name.replace("_", "-") for module in pkgutil.iter_modules(__path__))


def recipe(slug: str) -> ModuleType:
    """The recipe of a paper, by its slug."""
    known = slugs()
    if slug not in known:
        raise BadInput(f"no recipe {slug!r}; {near(slug, known)}")
    return importlib.import_module(f"{__name__}.{slug.replace('-', '_')}")


def index() -> list[tuple[int, str, str]]:
    """Number, slug and title of every paper the project is about, whether or not it has a recipe yet."""
    lines = files(__name__).joinpath("index.tsv").read_text(encoding="utf-8").splitlines()[1:]
    return [(int(number), slug, title) for number, slug, title in (line.split("\t") for line in lines)]
