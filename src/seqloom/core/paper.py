"""Papers and what is claimed of them. A claim is data: study/ runs it, evidence/ keeps what came out."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Verdict = Literal["reproduced", "exact", "not reproduced", "not run"]


@dataclass(frozen=True, kw_only=True)
class Paper:
    """The bibliography entry, once per recipe. `slug` in brackets is how docstrings cite it."""

    slug: str
    number: int
    title: str
    authors: str = ""
    year: int | None = None
    arxiv: str = ""


@dataclass(frozen=True, kw_only=True)
class Budget:
    """What one arm may spend: optimiser steps, batch, the learning rates tried alike for all arms."""

    steps: int
    lrs: tuple[float, ...] = (1e-3, 3e-3, 1e-2)
    batch: int = 32
    warmup: float = 0.1
    betas: tuple[float, float] = (0.9, 0.98)
    weight_decay: float = 0.0
    clip: float = 1.0


@dataclass(frozen=True)
class Beats:
    """A requirement on mean scores (higher is better, in [0, 1] unless the task says otherwise).

    arm against other: mean(arm) >= mean(other) + by. With `other` None: mean(arm) >= by, or <= by if `most`.
    `on` names the score when a task gives several (for example "at_32_writes").
    """

    arm: str
    other: str | None
    by: float
    most: bool = False
    on: str = "score"

    def holds(self, means: Mapping[str, Mapping[str, float]]) -> bool:
        value = means[self.arm][self.on]
        if self.other is not None:
            return value >= means[self.other][self.on] + self.by
        return value <= self.by if self.most else value >= self.by

    def __str__(self) -> str:
        if self.other is not None:
            return f"{self.arm} >= {self.other} + {self.by:g} on {self.on}"
        return f"{self.arm} {'<=' if self.most else '>='} {self.by:g} on {self.on}"


def beats(arm: str, other: str, *, by: float, on: str = "score") -> Beats:
    """The mean of `arm` exceeds that of `other` by at least `by`."""
    return Beats(arm, other, by, on=on)


def above(arm: str, by: float, *, on: str = "score") -> Beats:
    """The mean of `arm` is at least `by`."""
    return Beats(arm, None, by, on=on)


def below(arm: str, by: float, *, on: str = "score") -> Beats:
    """The mean of `arm` is at most `by`."""
    return Beats(arm, None, by, most=True, on=on)


@dataclass(frozen=True, kw_only=True)
class Check:
    """An exactness check: `measure()` returns a number that must not exceed `limit` (or must reach it, if `at_least`)."""

    text: str
    where: str
    measure: Callable[[], float]
    limit: float
    at_least: bool = False

    def holds(self, value: float) -> bool:
        return value >= self.limit if self.at_least else value <= self.limit


@dataclass(frozen=True, kw_only=True)
class Claim:
    """A measured claim that can fail.

    arms:    "method", "baseline" and "knockout" (and more): what differs is the key step only, parameters within 2 %
    task:    data with a score (tasks/); `None` arms are never trained
    control: a task on which the knockout or baseline must reach 90 % of the method's score, to show it is not broken;
             each at the best of the rates
    control_arms: which arms that holds for
    require: what the means over `seeds` fresh seeds must satisfy, at each arm's best calibrated learning rate
    first_seed: where the fresh seeds begin: moved on when a claim is changed after its seeds were seen
    """

    text: str
    where: str
    task: Any
    arms: Mapping[str, Any]
    budget: Budget
    require: tuple[Beats, ...]
    seeds: int = 3
    first_seed: int = 0
    control: Any = None
    control_arms: tuple[str, ...] = ("knockout",)
    control_share: float = 0.9
    device: Literal["cpu", "gpu"] = "cpu"
    notes: str = ""
    tags: frozenset[str] = field(default_factory=frozenset)
