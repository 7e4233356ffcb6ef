"""`seqloom advise`: which mixer, for this length, task and memory."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from seqloom.cli.options import at_least, parse, stderr
from seqloom.core import BadInput

if TYPE_CHECKING:
    from seqloom.study.advise import Advice


@dataclass
class AdviseOptions:
    """Pick a mixer from measured costs and the map's scores: its reasons, the runner-up, and what would change it."""

    length: int | None = None
    """Tokens of a row."""
    task: str = ""
    """What matters: recall, copy, state-tracking or lm."""
    memory: str = ""
    """What there is of it, such as 8GB or 512MiB."""
    device: str = "cpu"
    """Where it runs: cpu, h200, or h100."""
    to: Literal["train", "generate"] = "train"
    """What has to fit and be fast: a training step, or generating a token."""
    dim: int = 256
    """Model width."""
    layers: int = 4
    batch: int = 1
    all: bool = False
    """Print every mixer's numbers too."""
    refresh: Path | None = None
    """A checkout's benchmarks folder: make the data that is shipped from it, and answer nothing."""


def main(argv: list[str]) -> None:
    options = parse(AdviseOptions, argv, verb="advise")
    from seqloom.study import advise as study

    if options.refresh is not None:
        for path in study.refresh(options.refresh):
            stderr(f"wrote {path}")
        return
    missing = [f"--{name}" for name in ("length", "task", "memory") if getattr(options, name) in (None, "")]
    if missing or options.length is None:
        raise BadInput(f"missing: {', '.join(missing)}; for example seqloom advise --length 8192 --task recall --memory 8GB")
    at_least(1, length=options.length, dim=options.dim, layers=options.layers, batch=options.batch)
    question = study.Question(
        length=options.length, task=options.task, memory=study.memory_of(options.memory), device=options.device, to=options.to,
        dim=options.dim, layers=options.layers, batch=options.batch)
    print(text(study.advise(question), every=options.all))


def text(advice: Advice, *, every: bool = False) -> str:
    from seqloom.study.advise import PLAIN, size

    named = lambda mixer: "plain softmax attention" if mixer == PLAIN else mixer  # noqa: E731
    lines = [f"take {named(advice.pick)}"]
    lines += [f"  because    {line}" for line in advice.reasons]
    if advice.runner_up:
        lines.append(f"  runner-up  {named(advice.runner_up)}")
    lines += [f"  unless     {line}" for line in advice.otherwise]
    lines += [f"  note       {line}" for line in advice.cautions]
    if every:
        unit = "step" if advice.question.to == "train" else "token"
        lines.append(f"\n{'mixer':<22}{'score':>7}{f'ms a {unit}':>12}{'needs':>12}{'state':>12}  ")
        for one in advice.candidates:
            remark = "" if one.fits(advice.question) else "does not fit"
            if not remark and not one.holds(advice.question):
                remark = f"trusted to {one.trusted_to:,} tokens"
            lines.append(f"{one.mixer:<22}{one.shown:>7}{1e3 * one.seconds:>12.3g}{size(one.bytes):>12}"
                         f"{size(one.state_bytes):>12}  {remark}".rstrip())
    return "\n".join(lines)
