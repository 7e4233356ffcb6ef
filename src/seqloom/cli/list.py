"""`seqloom list`: what there is, by name."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import tyro

from seqloom.cli.options import parse


@dataclass
class ListOptions:
    """List mixers, models, papers with a recipe, tasks, or kinds of checkpoints that can be read."""

    what: Annotated[Literal["mixers", "models", "papers", "tasks", "checkpoints"], tyro.conf.Positional] = "mixers"
    """Which table to print."""


def main(argv: list[str]) -> None:
    options = parse(ListOptions, argv, verb="list")
    tables = {"mixers": _mixers, "models": _models, "papers": _papers, "tasks": _tasks, "checkpoints": _checkpoints}
    tables[options.what]()


def _mixers() -> None:
    from seqloom.mixers import MIXERS
    from seqloom.models.presets import mixer_for

    width = max(map(len, MIXERS))
    for key, cls in MIXERS.items():
        spec = mixer_for(key, 256)
        state = "constant state" if spec.constant_state else "state grows"
        print(f"{key:<{width}}  {cls.__name__:<22} {state:<15} {', '.join(spec.forms)}")


def _models() -> None:
    from seqloom.models.presets import SIZES

    for name, (pattern, dim, layers) in SIZES.items():
        print(f"{name:<18} {' + '.join(pattern)}, width {dim}, {layers} layers")
    print("<mixer>-tiny|small|base works for every mixer of `seqloom list`")


def _papers() -> None:
    from seqloom.recipes import recipe, slugs

    for slug in slugs():
        paper = recipe(slug).PAPER
        print(f"{slug:<20} {paper.number:>3}  {paper.title}")


def _tasks() -> None:
    from seqloom.tasks import TASKS

    for name, task in TASKS.items():
        print(f"{name:<12} {(task.__doc__ or '').strip().splitlines()[0]}")


def _checkpoints() -> None:
    from seqloom.hub.foreign import table

    for row in table():
        told = f"{row.writes}: {row.note}" if row.note else row.writes
        print(f"{row.kind:<24} {row.mixers or 'refused':<20} {told if row.read else row.note}")
