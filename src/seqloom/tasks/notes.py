"""Recall from among noise: a few tokens are flagged as worth keeping, and a memory that cancels what its reads share."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from seqloom.core import BadInput
from seqloom.models.backbone import Stack
from seqloom.models.sequence import SequenceModel
from seqloom.tasks.base import IGNORE, Batch, Task, TokenTask


@dataclass(frozen=True, kw_only=True)
class SumStem:
    """Ids [B, T, F] to vectors [B, T, D]: a token is the sum of the rows of its F facts, drawn N(0, std^2)."""

    rows: int
    std: float = 1.0

    def build(self, dim: int) -> SumStemLayer:
        return SumStemLayer(self, dim)


class SumStemLayer(nn.Module):
    def __init__(self, spec: SumStem, dim: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(spec.rows, dim).normal_(0.0, spec.std))

    def forward(self, ids: Tensor) -> Tensor:
        return F.embedding(ids, self.weight).sum(-2)


@dataclass(frozen=True, kw_only=True)
class FlaggedNotes(TokenTask):
    """One token is a key, its value and a flag; the flagged ones are asked for, the others have the same keys and values.

        k3v1 k2v7! k3v5 k1v1! k2v2 | k1? k2? -> v1 v7

    A token is three ids [B, T, 3]: the key 0..keys-1, then the value or none, then plain, flagged or question. Each of the
    `flagged` tokens has a key of its own, and is asked for once, in any order; they stand anywhere among `noise` plain ones.
    `more` plain tokens follow before the questions, in a test named "with_<more>_more". Chance: 1 / values; optimum: 1.
    Source: [memmamba] Works when 7, [diff-mamba] Works when 7.
    """

    flagged: int = 12
    noise: int = 52
    keys: int = 16
    values: int = 16
    more: int = 0
    test_more: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if not 1 <= self.flagged <= self.keys:
            raise BadInput(f"FlaggedNotes: {self.flagged} flagged tokens need a key each, and there are {self.keys} keys; "
                           f"use flagged in 1..{self.keys}")

    @property
    def vocab(self) -> int:
        return self.keys + self.values + 4

    @property
    def classes(self) -> int:
        return self.values

    @property
    def chance(self) -> float:
        return 1 / self.values

    def wrap(self, stack: Stack) -> SequenceModel:
        return replace(super().wrap(stack), stem=SumStem(rows=self.vocab))  # type: ignore[arg-type]

    def sample(self, batch: int, generator: torch.Generator) -> Batch:
        draw = lambda high, count: torch.randint(high, (batch, count), generator=generator)  # noqa: E731
        noise = self.noise + self.more
        own = torch.rand(batch, self.keys, generator=generator).argsort(1)[:, : self.flagged]
        key = torch.cat([own, draw(self.keys, noise)], 1)
        value = draw(self.values, self.flagged + noise)
        flag = (torch.arange(self.flagged + noise) < self.flagged).long().expand(batch, -1)
        told = torch.stack([key, self.keys + value, self.keys + self.values + 1 + flag], -1)
        first = self.flagged + self.noise  # the flagged stand among these
        place = torch.rand(batch, first, generator=generator).argsort(1)[..., None].expand(-1, -1, 3)
        told = torch.cat([told[:, :first].gather(1, place), told[:, first:]], 1)
        order = torch.rand(own.shape, generator=generator).argsort(1)
        rest = torch.tensor([self.keys + self.values, self.vocab - 1]).expand(batch, self.flagged, 2)
        asked = torch.cat([own.gather(1, order)[..., None], rest], -1)
        answer = value[:, : self.flagged].gather(1, order)
        return Batch(torch.cat([told, asked], 1), torch.cat([torch.full(told.shape[:2], IGNORE), answer], 1))

    def tests(self) -> Mapping[str, Task]:
        longer = {f"with_{n}_more": replace(self, more=n, test_more=()) for n in self.test_more}
        return {"score": replace(self, test_more=()), **longer}


@dataclass(frozen=True, kw_only=True)
class DifferenceRead:
    """Of two reads of a memory, the second times `weight` is taken from the first, and the rest is normed."""

    weight: float


@dataclass(frozen=True, kw_only=True)
class CommonMode:
    """An additive memory whose keys all share a direction c; each key's value is read back by the nearest of 64 codewords.

        write (c + u1)/2^.5 -> v7, (c + u2)/2^.5 -> v3, ..; read m1 with (c + u2)/2^.5, m2 with c/2^.5; m1 - w m2 -> v3

    What all keys share answers every question with the sum of all values; a second read with that part alone takes it away.
    Score: the share read back right, over `repeats` memories, one score per number of writes ("at_32_writes"), "score" their
    mean. Chance: 1 / values. Optimum: 1. Source: [diff-mamba] Works when 8.
    """

    writes: tuple[int, ...] = (32, 128)
    dim: int = 64
    values: int = 64
    repeats: int = 20

    def measure(self, rule: DifferenceRead, seed: int) -> Mapping[str, float]:
        scores = {f"at_{count}_writes": self._share(rule, count, seed) for count in self.writes}
        return {"score": sum(scores.values()) / len(scores), **scores}

    def _share(self, rule: DifferenceRead, count: int, seed: int) -> float:
        make = torch.Generator().manual_seed(seed)
        unit = lambda *shape: F.normalize(torch.randn(*shape, generator=make, dtype=torch.float64), dim=-1)  # noqa: E731
        shared, own, book = unit(self.repeats, 1, self.dim), unit(self.repeats, count, self.dim), unit(self.values, self.dim)
        own = F.normalize(own - (own * shared).sum(-1, keepdim=True) * shared, dim=-1)
        keys = (shared + own) / math.sqrt(2)
        wanted = torch.randint(self.values, (self.repeats, count), generator=make)
        memory = keys.mT @ book[wanted]
        y = keys @ memory - rule.weight * (shared / math.sqrt(2)) @ memory
        y = F.rms_norm(y, (self.dim,), eps=1e-5)
        return float(((y @ book.mT).argmax(-1) == wanted).double().mean())
