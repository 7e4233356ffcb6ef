"""Tasks that need both sides of a token."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from seqloom.tasks.base import Batch, Task, TokenTask, at_each


@dataclass(frozen=True, kw_only=True)
class TwoSidedNeighbours(TokenTask):
    """At every position: the value of the last marker strictly before, and of the next one strictly after.

        . b . a . .  ->  (-,b) (-,a) (b,a) (b,-) (a,-) (a,-)

    Ids: values 0..values-1, then the blank. A position carries a marker with probability `rate`; where there is no marker
    on a side its answer is one more value. Classes: pairs, before (values + 1) + after. `sides="before"` asks only for the
    first of the pair, so that a causal model can answer. Chance: 1 / classes; the best constant answer is right more often
    (both sides have no marker seldom, all pairs of values are alike). Source: [hydra] Works when 7.
    """

    length: int = 32
    values: int = 4
    rate: float = 0.3
    sides: Literal["both", "before"] = "both"
    test_lengths: tuple[int, ...] = ()

    @property
    def vocab(self) -> int:
        return self.values + 1

    @property
    def classes(self) -> int:
        return (self.values + 1) ** (2 if self.sides == "both" else 1)

    def sample(self, batch: int, generator: torch.Generator) -> Batch:
        marked = torch.rand(batch, self.length, generator=generator) < self.rate
        value = torch.randint(self.values, (batch, self.length), generator=generator)
        ids = torch.where(marked, value, self.values)
        before = self._last(ids)
        if self.sides == "before":
            return Batch(ids, before)
        return Batch(ids, before * (self.values + 1) + self._last(ids.flip(1)).flip(1))

    def _last(self, ids: Tensor) -> Tensor:
        """Value of the last marker before each position [B, T], or the blank's id where there is none."""
        place = torch.where(ids < self.values, torch.arange(ids.shape[1]), -1).cummax(1).values
        place = torch.nn.functional.pad(place, (1, 0), value=-1)[:, :-1]
        return torch.where(place < 0, self.values, ids.gather(1, place.clamp(min=0)))

    def tests(self) -> Mapping[str, Task]:
        return at_each(self, "test_lengths", "length", "at_length_{}")
