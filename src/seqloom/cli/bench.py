"""`seqloom bench`: speed beside what you would use instead. A mixer whose forms disagree is not timed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from seqloom.cli.options import at_least, device_of, parse, stderr
from seqloom.core import BadInput, near

# what each part of a suite takes of the options
TAKES = {
    "layers": ("dim", "tokens", "batch"), "segments": ("dim", "tokens", "batch"),
    "training": (), "state-space": (), "lengths": (),
    "decoding": ("dim", "depth", "batch", "contexts", "vocab"),
    "hybrid": ("batch", "tokens"), "million": ("dim",),
}
# suites by their former names
FORMER = {"training": "models", "state-space": "models", "lengths": "models", "segments": "layers", "decoding": "decode"}


@dataclass
class BenchOptions:
    """Time kernels beside PyTorch's attention (on a GPU), layers beside SDPA softmax, training steps of models beside
    transformers and x-transformers, decoding after a context, or training and rows at a GPU's scale; every table says where
    another is faster."""

    suite: Annotated[Literal["kernels", "layers", "models", "decode", "scale", "all"], tyro.conf.Positional] = "models"
    """What to time. `all` leaves out `kernels` and `scale`, which need a GPU."""
    part: str = ""
    """Comma-separated tables of a suite (layers: layers, segments; models: training, state-space, lengths;
    scale: hybrid, million); all by default."""
    mixers: str = ""
    """Comma-separated names; all by default. For `kernels`, names of kernels; for --tune, of kernel files."""
    rounds: int = 5
    """Interleaved rounds; the median is reported."""
    dim: int | None = None
    """Width of the layers, or of the models that decode; for `kernels`, channels of a head."""
    depth: int | None = None
    """Layers of the models that decode."""
    vocab: int | None = None
    """Vocabulary of the models that decode."""
    tokens: int | None = None
    """Tokens of a row, for layers."""
    batch: int | None = None
    """Rows, for layers and decoding."""
    contexts: tuple[int, ...] | None = None
    """Tokens read before decoding is timed."""
    device: str = "cpu"
    """Where layers, models and decoding run."""
    threads: int | None = None
    """CPU threads; PyTorch's choice by default."""
    tune: bool = False
    """Search the tiles of the Triton kernels on this GPU, and write them to a file of yours that the kernels then read."""
    seconds: float = 600.0
    """How long --tune searches at most."""
    out: Path | None = None
    """Folder for <part>_<device>.json."""


def main(argv: list[str]) -> int:
    import torch

    from seqloom.bench import report

    if argv and argv[0] in FORMER:
        raise BadInput(f"bench: {argv[0]} is a part of a suite now: seqloom bench {FORMER[argv[0]]} --part {argv[0]}")
    options = parse(BenchOptions, argv, verb="bench")
    given = {name: getattr(options, name) for name in ("rounds", "dim", "depth", "vocab", "tokens", "batch", "threads")}
    at_least(1, **given)
    if options.contexts is not None:
        at_least(1, contexts=min(options.contexts, default=0))
    names = [name.strip() for name in options.mixers.split(",") if name.strip()]
    gpu = torch.device(device_of(options.device)).type == "cuda"

    def show(part: str, rows: list[dict[str, Any]], gpu: bool) -> bool:
        print(f"\n{part}\n{report.table(rows)}")
        if options.out is not None:
            stderr(f"wrote {report.write(part, rows, options.out, gpu=gpu)}")
        return any("red" in row for row in rows)

    if options.tune:
        from seqloom.bench.tune import tune

        return int(show("tiles", tune(names or None, seconds=options.seconds, told=stderr), True))
    if options.suite == "kernels":
        from seqloom.bench.kernels import kernels

        part = "kernels" if options.dim is None else f"kernels-{options.dim}"
        return int(show(part, kernels(names or None, dim=options.dim), True))
    if options.suite == "scale":
        from seqloom.bench.scale import needs_gpu

        needs_gpu(options.device, options.part or "scale")
    if options.threads:
        torch.set_num_threads(options.threads)
    return _mixers(options, names, lambda part, rows: show(part, rows, gpu))


def _mixers(options: BenchOptions, names: list[str], show: Callable[[str, list], bool]) -> int:
    """The suites over mixers; returns the status."""
    from seqloom import laws
    from seqloom.bench import suites
    from seqloom.core import require_extra
    from seqloom.mixers import MIXERS

    for name in names:
        if name not in MIXERS:
            raise BadInput(f"no mixer {name!r}; {near(name, MIXERS)}")
    chosen = [suite for suite in suites.SUITES if suite not in suites.GPU] if options.suite == "all" else [options.suite]
    parts = [part for suite in chosen for part in suites.SUITES[suite]]
    asked = [part.strip() for part in options.part.split(",") if part.strip()]
    for part in asked:
        if part not in parts:
            raise BadInput(f"{options.suite} has no part {part!r}; {near(part, parts)}")
    parts = asked or parts
    if "training" in parts:
        require_extra("x_transformers", "bench", "the training part")
    wanted = {part: names or suites.mixers_of(part) for part in parts}
    names = [name for name in MIXERS if any(name in each for each in wanted.values())]
    results = [result for name in names for result in laws.run_laws([name], device=options.device, laws=("forms_agree",))]
    red = [name for name in names if any(result.mixer == name and result.failed for result in results)]
    for name in red:
        stderr(f"{name} is not timed: its forms disagree (`seqloom check {name}`)")
    for part in parts:
        values = {name: getattr(options, name) for name in TAKES[part]}
        taken = {name: value for name, value in values.items() if value is not None}
        green = [name for name in wanted[part] if name not in red]
        rows = suites.run(part, green, rounds=options.rounds, device=options.device, **taken)
        show(part, rows)
    return 1 if red else 0
