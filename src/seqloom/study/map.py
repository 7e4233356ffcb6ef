"""The map: every causal mixer on four kinds of task at one small budget. What is run, one fit of it, and its records.

A record is one JSON file a kind of task: scores by seed, the rate and how it was chosen, parameters, state bytes, training
time, machine and commit. Pictures and pages are made from records alone (`study/chart.py`, `study/atlas.py`).
"""

from __future__ import annotations

import json
import math
import statistics
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from seqloom.core import BadInput, Budget, near
from seqloom.models.backbone import Stack
from seqloom.study.arms import arm, causal_mixers, equal_stacks, parameters_of
from seqloom.study.digest import commit, machine
from seqloom.study.fit import fit
from seqloom.tasks import Copy, MultiQueryRecall, TopicBytes, WordProblem

DIM, LAYERS, HEADS = 32, 2, 2
RATES = (2e-3, 6e-3, 1.8e-2)
CALIBRATION = 1000            # the seed on which rates are picked
SEEDS = (0, 17, 34)
SPANS = (512, 8192)           # tokens at which a state is counted, besides the task's own

FIRST = ("softmax", "linear", "retention", "gated_linear", "delta", "gated_delta", "delta_product", "mamba", "mamba2", "hgrn",
         "gated_slot", "gru", "gated_delta+softmax")


@dataclass(frozen=True, kw_only=True)
class Kind:
    """A kind of task: the task, its budget, and what it says about a mixer.

    bits:     the score is the share of 8 bits that is saved (text), else a share of right answers
    settings: for the mixers that have them, alike
    """

    task: Any
    steps: int
    asks: str
    bits: bool = False
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def budget(self) -> Budget:
        return Budget(steps=self.steps, lrs=RATES)

    @property
    def length(self) -> int:
        """Tokens of a row."""
        return self.task.sample(1, torch.Generator().manual_seed(0)).inputs.shape[1]


KINDS: dict[str, Kind] = {
    "recall": Kind(task=MultiQueryRecall(pairs=8, keys=32, values=32), steps=700,
                   asks="8 pairs of a key and a value, then each key is asked for once, in any order"),
    "copy": Kind(task=Copy(length=16, symbols=16), steps=700, asks="a string of 16 characters out of 16, said again"),
    # A short convolution that mixes neighbours makes products of two elements at hand, and the state is then not learnt.
    "state-tracking": Kind(task=WordProblem(group="S3", length=16, test_lengths=(48,)), steps=700, settings={"conv": 1},
                           asks="the running product of 16 permutations of three points (short convolutions one token wide)"),
    "lm": Kind(task=TopicBytes(length=64), steps=300, bits=True,
               asks="the next byte of Python's documentation, 64 bytes at a time"),
}


def kind_of(name: str) -> Kind:
    if name not in KINDS:
        raise BadInput(f"the map has no kind of task {name!r}; {near(name, KINDS)}")
    return KINDS[name]


def mixers_of_map() -> list[str]:
    """All causal mixers and one hybrid, the twelve that were asked for first at the front."""
    rest = [name for name in causal_mixers() if name not in FIRST]
    return [*FIRST, *rest]


def arms_of(kind: str, names: Iterable[str]) -> dict[str, Stack]:
    """Stacks by name, each widened to the parameters of the largest on the whole map, whichever are asked for."""
    what, names = kind_of(kind), list(names)

    def stack(name: str) -> Stack:
        return arm(name, dim=DIM, layers=LAYERS, heads=HEADS, settings=what.settings)

    among = [stack(name) for name in mixers_of_map()]
    return equal_stacks({name: stack(name) for name in names}, vocab=max(what.task.vocab, what.task.classes), among=among)


@dataclass(frozen=True)
class Job:
    """One fit: a kind of task, an arm, a rate, a seed."""

    kind: str
    mixer: str
    lr: float
    seed: int
    steps: int | None = None      # instead of the kind's own: a trial of a few

    @property
    def calibrates(self) -> bool:
        return self.seed == CALIBRATION


def run_job(job: Job) -> dict[str, Any]:
    """What one fit found, as plain data: scores by name, seconds of training, or "error"."""
    what = kind_of(job.kind)
    row: dict[str, Any] = {"kind": job.kind, "mixer": job.mixer, "lr": job.lr, "seed": job.seed}
    budget = Budget(steps=job.steps or what.steps)
    try:
        result = fit(arms_of(job.kind, [job.mixer])[job.mixer], what.task, budget, lr=job.lr, seed=job.seed)
    except (RuntimeError, ValueError, ArithmeticError) as error:  # one arm that fails must not end the others
        return {**row, "error": f"{type(error).__name__}: {error}"[:300]}
    return {**row, "scores": result.scores, "seconds": result.seconds, "parameters": result.parameters}


def best_rate(rows: Iterable[Mapping[str, Any]]) -> float | None:
    """The rate of the highest calibrating score; the smaller one of two alike. None where all failed."""
    found = [(-row["scores"]["score"], row["lr"]) for row in rows if _scored(row)]
    return min(found)[1] if found else None


def _scored(row: Mapping[str, Any]) -> bool:
    return "scores" in row and math.isfinite(row["scores"]["score"])


def record(kind: str, rows: Iterable[Mapping[str, Any]], *, about: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The record of a kind of task from the rows of its fits, whichever are there yet."""
    what, rows = kind_of(kind), [row for row in rows if row["kind"] == kind]
    names = list(dict.fromkeys(row["mixer"] for row in rows))
    order = mixers_of_map()
    names.sort(key=lambda name: order.index(name) if name in order else len(order))
    stacks = arms_of(kind, names)
    return {
        "kind": kind,
        "asks": what.asks,
        "task": f"{what.task}",
        "metric": "bits per byte" if what.bits else "share of answers that are right",
        "chance": what.task.chance,
        "length": what.length,
        "dim": DIM, "layers": LAYERS, "heads": HEADS, "settings": dict(what.settings),
        "steps": what.steps, "batch": what.budget.batch, "rates": list(RATES), "calibration_seed": CALIBRATION,
        "machine": machine(),
        "commit": commit(),
        "date": time.strftime("%Y-%m-%d"),
        **(about or {}),
        "arms": {name: _arm(stacks[name], what, [row for row in rows if row["mixer"] == name]) for name in names},
    }


def _arm(stack: Stack, what: Kind, rows: list[Mapping[str, Any]]) -> dict[str, Any]:
    spec, spans = what.task.wrap(stack), (what.length, *SPANS)
    with torch.device("meta"):
        layer = spec.build()
        bytes_at = {str(tokens): layer.state_bytes(tokens) for tokens in spans}
    calibration = [row for row in rows if row["seed"] == CALIBRATION]
    runs = sorted((row for row in rows if row["seed"] != CALIBRATION and _scored(row)), key=lambda row: row["seed"])
    return {
        "parameters": parameters_of(spec),
        "state_bytes": bytes_at,
        "constant_state": all(block.mixer.constant_state for block in stack.blocks),
        "lr": best_rate(calibration),
        "calibration": [{"lr": row["lr"], **_facts(row)} for row in sorted(calibration, key=lambda row: row["lr"])],
        "runs": [{"seed": row["seed"], **_facts(row)} for row in runs],
        "score": statistics.fmean(row["scores"]["score"] for row in runs) if runs else None,
        "seconds": statistics.median(row["seconds"] for row in rows if "seconds" in row)
        if any("seconds" in row for row in rows) else None,
    }


def _facts(row: Mapping[str, Any]) -> dict[str, Any]:
    if "error" in row:
        return {"error": row["error"]}
    if not _scored(row):
        return {"error": "the loss is not finite", "seconds": row["seconds"]}
    return {"scores": dict(row["scores"]), "seconds": row["seconds"]}


def store(found: Mapping[str, Any], folder: Path) -> Path:
    """<kind>.json in `folder`; written whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{found['kind']}.json"
    part = path.with_suffix(".part")
    part.write_text(json.dumps(found, indent=1) + "\n")
    part.replace(path)
    return path
