"""Which mixer for this length, task and memory? Answered from measured cost models and from the map's scores.

The answer is a rule over numbers that are all shown with it:
1. A mixer is in question if its step (or its state, to generate) fits the memory. To recall or copy, a constant state is
   trusted up to the length at which it has as many bytes per token as it had on the map; beyond that it would have to hold
   more than it was seen to hold.
2. Of these, the ones that score within CLOSE of the best are good enough, and the fastest of them is picked.
3. Plain softmax attention is picked before any of them while it is good enough and costs at most SIMPLE times the fastest,
   or, to recall or copy, at most PATIENCE times: it holds every token, needs no special kernel and is supported everywhere.
"""

from __future__ import annotations

import functools
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from importlib import resources
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch

from seqloom.core import BadInput, near
from seqloom.core.state import count_bytes
from seqloom.models.backbone import StackLayer
from seqloom.study import atlas, costs
from seqloom.study.arms import arm
from seqloom.study.fit import count_parameters

SIMPLE, PATIENCE = 1.25, 3.0
CLOSE = {"bits per byte": 0.1, "share of answers that are right": 0.05}
HOLDS = ("recall", "copy")    # tasks that ask for what was said, word for word
PLAIN = "softmax"
# a card that was not measured: the one that answers for it, and how they differ
STANDS_IN = {"h100": ("h200", "an H100 has the same arithmetic and a memory 1.4 times slower")}


@dataclass(frozen=True, kw_only=True)
class Question:
    """What is asked. length: tokens of a row. memory: bytes. to: what has to fit, and what is to be fast."""

    length: int
    task: str
    memory: int
    device: str = "cpu"
    to: Literal["train", "generate"] = "train"
    dim: int = 256
    layers: int = 4
    batch: int = 1

    def __post_init__(self) -> None:
        for name in ("length", "memory", "dim", "layers", "batch"):
            if getattr(self, name) < 1:
                raise BadInput(f"{name} must be at least 1, not {getattr(self, name)}")


@dataclass(frozen=True)
class Candidate:
    """One mixer under the question. seconds: of a training step, or of a token a row. bytes: what has to fit.

    trusted_to: the longest length at which its score is taken to hold; None where there is no such bound.
    """

    mixer: str
    score: float
    shown: str
    seconds: float
    bytes: int
    state_bytes: int
    grows: bool
    trusted_to: int | None = None

    def fits(self, question: Question) -> bool:
        return self.bytes <= question.memory

    def holds(self, question: Question) -> bool:
        return self.trusted_to is None or question.length <= self.trusted_to


@dataclass(frozen=True)
class Advice:
    """pick and runner_up are names; the rest are sentences, and the candidates, best first, with those that do not fit."""

    question: Question
    pick: str
    runner_up: str | None
    reasons: tuple[str, ...]
    otherwise: tuple[str, ...] = ()
    cautions: tuple[str, ...] = ()
    candidates: tuple[Candidate, ...] = field(default=(), repr=False)


class Decision(NamedTuple):
    pick: Candidate
    runner_up: Candidate | None
    good: list[Candidate]


# What was measured ------------------------------------------------------------------------------------------------


class Measured(NamedTuple):
    """costs: models by device (`study/costs.py`). map: scores by kind of task (`digest_map`)."""

    costs: Mapping[str, Any]
    map: Mapping[str, Any]


@functools.cache
def shipped() -> Measured:
    """What comes with the package."""
    folder = resources.files("seqloom.study") / "data"
    try:
        return Measured(*(json.loads((folder / name).read_text()) for name in ("costs.json", "map.json")))
    except FileNotFoundError as error:
        raise BadInput(f"this installation has no {error.filename}; in a checkout `seqloom advise --refresh benchmarks` makes "
                       "it") from error


def digest_map(records: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """What advice needs of the map's records: scores, lengths and state bytes, without the single runs."""
    keep = ("metric", "length", "chance", "dim", "layers", "steps", "commit", "date", "asks")
    return {
        kind: {**{key: record[key] for key in keep}, "arms": {
            name: {"score": arm["score"], "state_bytes": arm["state_bytes"][str(record["length"])],
                   "constant_state": arm["constant_state"]}
            for name, arm in atlas.ranked(record)
        }}
        for kind, record in records.items()
    }


def refresh(benchmarks: Path, folder: Path | None = None) -> list[Path]:
    """Make what is shipped from benchmarks/costs, benchmarks/results and benchmarks/map of a checkout."""
    folder = Path(__file__).parent / "data" if folder is None else folder
    found = {"costs.json": costs.collect(benchmarks)}
    if not found["costs.json"]:
        raise BadInput(f"no costs_<device>.json in {benchmarks / 'costs'}; `python -m seqloom.bench.costs` makes them")
    found["map.json"] = digest_map(atlas.read(benchmarks / "map"))
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in found.items():
        (folder / name).write_text(json.dumps(data, indent=1) + "\n")
    return [folder / name for name in found]


def memory_of(text: str) -> int:
    """Bytes of "8GB", "512 MiB", "1.5e9": units of 1000, and with an i of 1024. Raises: BadInput for anything else."""
    match = re.fullmatch(r"\s*([0-9.]+(?:e[+]?[0-9]+)?)\s*(?:([kmgt])(i?))?b?\s*", text.lower())
    try:
        number = float(match[1]) if match else math.nan
    except ValueError:
        number = math.nan
    if not match or not number > 0 or math.isinf(number):
        raise BadInput(f"a memory is a number of bytes or has a unit, such as 8GB, 512MiB or 2e9, not {text!r}")
    return int(number * (1024 if match[3] else 1000) ** (" kmgt".index(match[2]) if match[2] else 0))


# The answer -------------------------------------------------------------------------------------------------------


def advise(question: Question, measured: Measured | None = None) -> Advice:
    """The pick for `question`, why, the runner-up, and what would change it.

    Raises: BadInput for a task or device without measurements, and where nothing fits the memory.
    """
    measured = shipped() if measured is None else measured
    if question.task not in measured.map:
        raise BadInput(f"the map has no runs of task {question.task!r} yet; {near(question.task, measured.map)}. "
                       f"`seqloom compare --task {question.task}` trains the mixers you name on it here")
    note: tuple[str, ...] = ()
    if question.device not in measured.costs and STANDS_IN.get(question.device, ("",))[0] in measured.costs:
        other, how = STANDS_IN[question.device]
        note = (f"costs are those of {measured.costs[other]['machine']}: {how}",)
        question = replace(question, device=other)
    if question.device not in measured.costs:
        raise BadInput(f"no costs were measured on {question.device!r}; {near(question.device, measured.costs)}. `python -m "
                       "seqloom.bench.costs` measures them, and `seqloom advise --refresh` takes them in")
    found = candidates(question, measured)
    decision = decide(question, found)
    if decision is None:
        raise BadInput(_nothing_fits(question, found))
    return Advice(
        question,
        decision.pick.mixer,
        decision.runner_up.mixer if decision.runner_up else None,
        tuple(_reasons(question, decision, found, measured)),
        tuple(_otherwise(question, decision, found, measured)),
        (*note, *_cautions(question, decision, found, measured)),
        tuple(sorted(found, key=lambda one: (not one.fits(question), not one.holds(question), -one.score, one.seconds))),
    )


def candidates(question: Question, measured: Measured) -> list[Candidate]:
    """Every mixer that has both a score and a cost, at the question's sizes."""
    record, models = measured.map[question.task], measured.costs[question.device]["mixers"]
    found = []
    for name, seen in record["arms"].items():
        parts = [models.get(part, {}) for part in name.split("+")]
        if not all({"train", "bytes", "decode"} <= set(part) for part in parts):
            continue
        try:
            layer, parameters = _built(name, question.dim, question.layers)
        except ValueError:  # a width that its heads do not divide
            continue
        row = {"batch": question.batch, "tokens": question.length, "dim": question.dim}

        def block(what: str, parts: list = parts, row: dict = row) -> float:
            return sum(costs.predict(part[what], what, row, part["grows"]) for part in parts) / len(parts)

        state = count_bytes(layer.init_state(question.batch, question.length, device="meta"))
        if question.to == "train":  # weights and two moments; gradients are in the block's peak
            seconds, size = question.layers * block("train"), 12 * parameters + question.layers * block("bytes")
        else:
            seconds, size = question.layers * block("decode", row={**row, "batch": 1}), 4 * parameters + state
        bound = None
        if question.task in HOLDS and seen["constant_state"]:
            bound = int(record["length"] * state / question.batch / seen["state_bytes"])
        shown = f"{atlas.shown(record, seen['score']):.2f}"
        found.append(Candidate(name, seen["score"], shown, seconds, int(size), state, not seen["constant_state"], bound))
    if not found:
        raise BadInput(f"no mixer of the map can be built at width {question.dim}; a multiple of 64 would work")
    return found


@functools.lru_cache(maxsize=256)
def _built(name: str, dim: int, layers: int) -> tuple[StackLayer, int]:
    with torch.device("meta"):
        layer = arm(name, dim=dim, layers=layers).build()
    return layer, count_parameters(layer)


def decide(question: Question, found: list[Candidate]) -> Decision | None:
    """The rule at the head of this module; None where nothing fits."""
    fitting = [one for one in found if one.fits(question)]
    if not fitting:
        return None
    trusted = [one for one in fitting if one.holds(question)] or fitting
    bar = max(one.score for one in trusted) - _close(question)
    good = sorted((one for one in trusted if one.score >= bar), key=lambda one: (one.seconds, -one.score))
    # within a tenth of the fastest time the better score decides
    tied = [one for one in good if one.seconds <= 1.1 * good[0].seconds]
    pick = max(tied, key=lambda one: (round(one.score, 2), -one.seconds))
    plain = next((one for one in good if one.mixer == PLAIN), None)
    if plain is not None and plain.seconds <= (PATIENCE if question.task in HOLDS else SIMPLE) * good[0].seconds:
        pick = plain
    rest = [one for one in good if one is not pick] or sorted(
        (one for one in trusted if one is not pick), key=lambda one: (-one.score, one.seconds))
    return Decision(pick, rest[0] if rest else None, good)


def _close(question: Question) -> float:
    return CLOSE["bits per byte"] / 8 if question.task == "lm" else CLOSE["share of answers that are right"]


# In words ---------------------------------------------------------------------------------------------------------


def _name(mixer: str) -> str:
    return "plain softmax attention" if mixer == PLAIN else mixer


def _rate(question: Question, one: Candidate) -> str:
    if question.to == "train":
        return f"{_seconds(one.seconds)} a step"
    return f"{_seconds(one.seconds)} a token"


def _reasons(question: Question, decision: Decision, found: list[Candidate], measured: Measured) -> list[str]:
    record, pick = measured.map[question.task], decision.pick
    best = max((one for one in found if one.fits(question)), key=lambda one: one.score)
    metric = record["metric"]
    lines = [f"it scores {pick.shown} ({metric}) on the map" + (
        ", the best that fits" if pick.score >= best.score else f", the best that fits {best.shown} ({best.mixer})")]
    what = "training" if question.to == "train" else "weights and state"
    lines.append(f"{what} at {question.length:,} tokens takes about {size(pick.bytes)} of {size(question.memory)}, and "
                 f"{_rate(question, pick)} on {measured.costs[question.device]['machine']}")
    fast = min(decision.good, key=lambda one: one.seconds)
    if pick.mixer == PLAIN and pick is not fast:
        ratio = pick.seconds / fast.seconds
        why = "it keeps every token, and a constant state keeps what it has room for"
        if question.task not in HOLDS or fast.grows:
            why = "it needs no special kernel and runs everywhere"
        lines.append(f"{fast.mixer} would be {ratio:.1f} times as fast; {why}")
    elif len(decision.good) > 1:
        lines.append(f"of {len(decision.good)} that score within {_shown_close(question, metric)} of the best it is "
                     + ("the fastest" if pick is fast else f"the best within a tenth of the fastest ({fast.mixer})"))
    else:
        lines.append(f"no other that fits comes within {_shown_close(question, metric)} of it")
    plain = next((one for one in found if one.mixer == PLAIN), None)
    if plain is not None and pick is not plain:
        if not plain.fits(question):
            lines.append(f"plain softmax attention would take {size(plain.bytes)}")
        elif plain not in decision.good:
            lines.append(f"plain softmax attention scores {plain.shown}")
        else:
            lines.append(f"plain softmax attention would take {_rate(question, plain)}, "
                         f"{plain.seconds / pick.seconds:.1f} times as long")
    return lines


def _shown_close(question: Question, metric: str) -> str:
    return f"{CLOSE[metric]:g}" + (" bits per byte" if metric == "bits per byte" else "")


def _otherwise(question: Question, decision: Decision, found: list[Candidate], measured: Measured) -> list[str]:
    """The nearest doublings of length and memory at which the pick is another."""
    lines = []
    for key, word in (("length", "tokens"), ("memory", "of memory")):
        for factor in (2.0, 0.5):
            for power in range(1, 11):
                value = int(getattr(question, key) * factor**power)
                if value < 1:
                    break
                other = replace(question, length=value) if key == "length" else replace(question, memory=value)
                again = decide(other, candidates(other, measured) if key == "length" else found)
                amount = f"{value:,} {word}" if key == "length" else f"{size(value)} {word}"
                if again is None:
                    lines.append(f"at {amount} nothing fits")
                    break
                if again.pick.mixer != decision.pick.mixer:
                    lines.append(f"at {amount} the pick is {_name(again.pick.mixer)}")
                    break
    if decision.runner_up is not None and decision.runner_up not in decision.good:
        gap = abs(decision.pick.score - decision.runner_up.score) * (8 if question.task == "lm" else 1)
        lines.append(f"{_name(decision.runner_up.mixer)} would have to score {gap:.2f} better")
    return lines or ["no change of length or memory up to a thousandfold"]


def _cautions(question: Question, decision: Decision, found: list[Candidate], measured: Measured) -> list[str]:
    record, device = measured.map[question.task], measured.costs[question.device]
    lines = []
    for key, value in (("tokens", question.length), ("dim", question.dim), ("batch", question.batch)):
        low, high = device["ranges"][key]
        if not low <= value <= high:
            word = {"tokens": "length", "dim": "width", "batch": "batch"}[key]
            lines.append(f"extrapolated: costs on {question.device} were measured at a {word} of {low:,} to {high:,}, and "
                         f"{value:,} is asked for")
    lines.append(f"scores are of {record['layers']} blocks of width {record['dim']}, {record['length']} tokens and "
                 f"{record['steps']} steps" + ("" if question.length == record["length"] else "; the order at "
                                               f"{question.length:,} tokens is extrapolated"))
    if not decision.pick.holds(question):
        lines.append(f"no mixer that fits is known to hold {question.length:,} tokens word for word; "
                     f"{_name(decision.pick.mixer)} is trusted to {decision.pick.trusted_to:,}")
    floor = record["chance"] + 0.5 * (1 - record["chance"])
    if question.task != "lm" and decision.pick.score < floor:
        lines.append(f"nothing that fits has learnt the task on the map's budget: the best score is {decision.pick.shown}")
    left = [one.mixer for one in found if one.fits(question) and not one.holds(question)]
    if left and decision.pick.holds(question):
        lines.append(f"not trusted to hold {question.length:,} tokens in a constant state: {', '.join(sorted(left))}")
    absent = sorted(set(record["arms"]) - {one.mixer for one in found})
    if absent:
        lines.append(f"not in question, without costs on {question.device} at this width: {', '.join(absent)}")
    lines.append("vocabulary tables and logits, the same for all, are not counted")
    return lines


def _nothing_fits(question: Question, found: list[Candidate]) -> str:
    least = min(found, key=lambda one: one.bytes)
    return (f"nothing fits {size(question.memory)} at {question.length:,} tokens, batch {question.batch}, width {question.dim} "
            f"and {question.layers} layers; the smallest is {least.mixer} with {size(least.bytes)}: give that, or a shorter "
            "length, a smaller batch or width" + (", or ask --to generate" if question.to == "train" else ""))


def size(count: float) -> str:
    """Bytes in the unit that suits."""
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if count < 1024 or unit == "TiB":
            return f"{count:.0f} {unit}" if unit == "B" or count >= 100 else f"{count:.1f} {unit}"
        count /= 1024
    return ""


def _seconds(value: float) -> str:
    for unit, scale in (("s", 1.0), ("ms", 1e-3), ("us", 1e-6)):
        if value >= scale:
            return f"{value / scale:.3g} {unit}"
    return f"{value / 1e-6:.3g} us"
