"""`seqloom compare`: mixers at equal parameters, data and steps."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from seqloom.cli.options import at_least, making, parse, stderr
from seqloom.core import BadInput

if TYPE_CHECKING:
    from seqloom.study.compare import Comparison


@dataclass
class CompareOptions:
    """Train one model per mixer at equal parameters, data and steps, over several seeds; print a table and save a figure.
    Or make the page of the map from its stored runs."""

    mixers: str = ""
    """Comma-separated mixers of `seqloom list`; a+b is a hybrid that alternates."""
    data: str | None = None
    """A file, a folder, 'stdlib' or 'hf:NAME': bits per byte on held-out documents."""
    task: str | None = None
    """Instead: recall, copy, state-tracking or lm as the map has them, or a task of `seqloom list tasks`. The rate is the best
    of three on a calibration seed, alike for every mixer; the scores are of fresh seeds."""
    map: Path | None = None
    """Instead: a folder for map.md and its figures, made from the records in --records; nothing is trained."""
    records: Path = Path("benchmarks/map")
    """Where --map reads <kind>.json."""
    column: str | None = None
    """Text column of a table."""
    out: Path = Path("runs/compare")
    """Folder of comparison.json and comparison.svg."""
    seeds: int = 2
    steps: int = 200
    """Optimiser steps of each run."""
    dim: int = 128
    """Model width."""
    layers: int = 3
    context: int = 256
    """Tokens of a window; the table shows the state at this length."""
    batch: int = 8
    """Windows of a step."""
    lr: float = 2e-3
    """Peak learning rate on text."""
    jobs: int = 1
    """Runs side by side on a generated task; the speed in the table is then that of a shared machine. 0: in this process,
    where peak memory is that of all runs so far."""


def main(argv: list[str]) -> None:
    options = parse(CompareOptions, argv, verb="compare")
    if options.map is not None:
        return draw_map(options.map, options)
    names = [name.strip() for name in options.mixers.split(",") if name.strip()]
    if not names:
        raise BadInput("missing: --mixers, two or more names with commas between (or --map, to draw what is stored)")
    if len(names) < 2 or len(set(names)) < len(names):
        raise BadInput(f"--mixers takes two or more different names with commas between, not {options.mixers!r}")
    if (options.data is None) == (options.task is None):
        raise BadInput("give either --data (files) or --task (generated)")
    at_least(1, seeds=options.seeds, steps=options.steps, dim=options.dim, layers=options.layers, context=options.context,
             batch=options.batch)
    at_least(0, jobs=options.jobs)
    if options.out.exists() and not options.out.is_dir():
        raise BadInput(f"--out {options.out} is a file")
    with making(options.out):
        run(names, options)


def draw_map(folder: Path, options: CompareOptions) -> None:
    from seqloom.study import atlas

    if options.mixers or options.data or options.task:
        raise BadInput("--map draws what is stored and trains nothing: leave out --mixers, --data and --task")
    if folder.exists() and not folder.is_dir():
        raise BadInput(f"--map {folder} is a file; it takes a folder such as docs")
    for path in atlas.write(atlas.read(options.records), folder):
        stderr(f"wrote {path}")


def run(names: list[str], options: CompareOptions) -> None:
    from seqloom.core import Budget
    from seqloom.study import compare as study

    options.out.mkdir(parents=True, exist_ok=True)
    if options.data is not None:
        found = study.compare_on_text(
            names, options.data, out=options.out, dim=options.dim, layers=options.layers, context=options.context,
            batch=options.batch, steps=options.steps, lr=options.lr, seeds=options.seeds, column=options.column, say=stderr)
    elif options.task is not None:
        budget = Budget(steps=options.steps, batch=options.batch)
        found = study.compare_on_task(names, options.task, dim=options.dim, layers=options.layers, budget=budget,
                                      seeds=options.seeds, jobs=options.jobs, say=stderr)
    print(table(found))
    for path in study.save(found, options.out, about={"data": options.data, "task": options.task, "steps": options.steps}):
        stderr(f"wrote {path}")


def table(found: Comparison) -> str:
    lines = [f"{'mixer':<24}{'parameters':>12}{found.metric:>16}{'spread':>9}{'tokens/s':>10}"
             f"{f'state at {found.length}':>16}{'peak MB':>9}"]
    for row in found.ranked():
        peak = "" if row.peak_bytes is None else f"{row.peak_bytes / 2**20:,.0f}"
        lines.append(f"{row.mixer:<24}{row.parameters:>12,}{row.score:>16.4f}{row.spread:>9.4f}"
                     f"{row.tokens_per_second:>10,.0f}{row.state_bytes:>16,}{peak:>9}")
    return "\n".join(lines)
