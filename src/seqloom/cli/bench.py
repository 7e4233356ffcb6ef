"""`seqloom bench`: speed beside what you would use instead. A mixer whose forms disagree is not timed."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from seqloom.cli.options import parse, stderr
from seqloom.core import BadInput, near


@dataclass
class BenchOptions:
    """Time mixers: training beside transformers and x-transformers, Mamba beside transformers' own, growth with length,
    the cost of packing, decoding after short and long contexts. Or, on a GPU, kernels beside PyTorch's attention."""

    suite: Annotated[
        Literal["training", "state-space", "lengths", "segments", "decoding", "kernels", "all"], tyro.conf.Positional
    ] = "training"
    """What to time. `all` leaves out `kernels`, which needs a GPU."""
    mixers: str = ""
    """Comma-separated names; all by default."""
    rounds: int = 5
    """Interleaved rounds; the median is reported."""
    threads: int | None = None
    """CPU threads; PyTorch's choice by default."""
    out: Path | None = None
    """Folder for <suite>_<device>.json."""


def main(argv: list[str]) -> int:
    import torch

    from seqloom import laws
    from seqloom.bench import report, suites
    from seqloom.core import require_extra
    from seqloom.mixers import MIXERS

    options = parse(BenchOptions, argv, verb="bench")
    if options.suite == "kernels":
        from seqloom.bench.kernels import kernels

        rows = kernels()
        print(report.table(rows))
        if options.out is not None:
            stderr(f"wrote {report.write('kernels', rows, options.out, gpu=True)}")
        return int(any("red" in row for row in rows))
    mixers = [name.strip() for name in options.mixers.split(",") if name.strip()] or list(MIXERS)
    for name in mixers:
        if name not in MIXERS:
            raise BadInput(f"no mixer {name!r}; {near(name, MIXERS)}")
    if options.threads:
        torch.set_num_threads(options.threads)
    names = list(suites.SUITES) if options.suite == "all" else [options.suite]
    if "training" in names:
        require_extra("x_transformers", "bench", "the training suite")
    red = [name for name in mixers if any(result.failed for result in laws.run_laws([name], laws=("forms_agree",)))]
    for name in red:
        stderr(f"{name} is not timed: its forms disagree (`seqloom check {name}`)")
    for suite in names:
        rows = suites.run(suite, [name for name in mixers if name not in red], rounds=options.rounds)
        print(f"\n{suite}\n{report.table(rows)}")
        if options.out is not None:
            stderr(f"wrote {report.write(suite, rows, options.out)}")
    return 1 if red else 0
