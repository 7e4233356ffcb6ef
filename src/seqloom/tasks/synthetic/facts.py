"""Recall with one token per fact: a token has several ids, and its vector is the sum of theirs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from seqloom.core import BadInput
from seqloom.models.backbone import Stack
from seqloom.models.sequence import SequenceModel
from seqloom.models.stems import TokenStem
from seqloom.models.stems.tokens import TokenStemLayer
from seqloom.tasks.base import IGNORE, Batch, Task, at_each
from seqloom.tasks.synthetic.alphabets import KeyValueTask
from seqloom.tasks.synthetic.recall import LatestValueRecall


@dataclass(frozen=True, kw_only=True)
class SumStem(TokenStem):
    """Several ids a token, [B, T, N]: the sum of their rows of one table."""

    def build(self, dim: int) -> SumStemLayer:
        return SumStemLayer(self, dim)


class SumStemLayer(TokenStemLayer):
    def forward(self, ids: Tensor, positions: Tensor | None = None) -> Tensor:
        return self.dropout(F.embedding(ids, self.weight).sum(-2))


@dataclass(frozen=True, kw_only=True)
class _FactTask(KeyValueTask):
    """Tokens of several ids."""

    def wrap(self, stack: Stack) -> SequenceModel:
        return replace(super().wrap(stack), stem=SumStem(vocab=self.vocab, std=1.0))


@dataclass(frozen=True, kw_only=True)
class _PairTask(_FactTask):
    """Ids of a token: its key, 0..keys-1, and keys + its value, or keys + values where the key's value is asked for."""

    others = 1  # stands for the value in a question

    def written(self, key: Tensor, value: Tensor) -> Tensor:
        return torch.stack([key, self.keys + value], -1)

    def asked(self, key: Tensor) -> Tensor:
        return torch.stack([key, torch.full_like(key, self.keys + self.values)], -1)


@dataclass(frozen=True, kw_only=True)
class LatestPairRecall(_PairTask, LatestValueRecall):
    """Writes with repeated keys, one token each, then every key is asked once: the latest value is wanted.

        k2+v7 k1+v3 k2+v5 | k1+? -> v3   k2+? -> v5

    `LatestValueRecall` in length writes + keys. Chance: 1 / values. Optimum: 1.
    Source: [gated-slot-attention] Works when 6.
    """

    keys: int = 12
    writes: int = 32


@dataclass(frozen=True, kw_only=True)
class LongLocalRecall(_PairTask):
    """Pairs to keep for long, then pairs of which a recent one is asked after each, then the first ones are asked.

        a1+v4 a2+v9 | b1+v3 b1+? -> v3   b2+v8 b1+? -> v3   b3+v1 b3+? -> v1 | a2+? -> v9   a1+? -> v4

    The first pairs have the keys 0..long-1, in any order, so that what is to be kept can be told from what is not; `local`
    of the other keys follow, none twice, and a question there is about one of the last `recent` pairs. Length
    2 long + 2 local (60). "score": all questions; "long" and "local": those of one kind. Chance: 1 / values. Optimum: 1.
    Source: [native-hybrid-attention] Works when 6.
    """

    keys: int = 70
    long: int = 6
    local: int = 24
    recent: int = 3
    kind: Literal["both", "long", "local"] = "both"

    def __post_init__(self) -> None:
        if self.long + self.local > self.keys:
            raise ValueError(f"LongLocalRecall: {self.long} + {self.local} pairs need as many keys, found {self.keys}")

    def sample(self, batch: int, generator: torch.Generator) -> Batch:
        draw = lambda n: torch.rand(batch, n, generator=generator).argsort(1)  # noqa: E731
        key = torch.cat([draw(self.long), self.long + draw(self.keys - self.long)[:, : self.local]], 1)
        value = torch.randint(self.values, key.shape, generator=generator)
        step = torch.arange(self.local)
        back = (torch.rand(batch, self.local, generator=generator) * (step + 1).clamp(max=self.recent)).long()
        near, far = self.long + step - back, draw(self.long)
        written, asked = self.written(key, value), self.asked(key.gather(1, torch.cat([near, far], 1)))
        middle = torch.stack([written[:, self.long :], asked[:, : self.local]], 2).flatten(1, 2)
        ids = torch.cat([written[:, : self.long], middle, asked[:, self.local :]], 1)
        none = torch.full((batch, self.long), IGNORE)
        late, soon = value.gather(1, far), value.gather(1, near)
        soon = torch.stack([torch.full_like(soon, IGNORE), soon if self.kind != "long" else torch.full_like(soon, IGNORE)], 2)
        return Batch(ids, torch.cat([none, soon.flatten(1), late if self.kind != "local" else none], 1))

    def tests(self) -> Mapping[str, Task]:
        return {"score": self, "long": replace(self, kind="long"), "local": replace(self, kind="local")}


@dataclass(frozen=True, kw_only=True)
class FlaggedNotes(_FactTask):
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
    more: int = 0
    test_more: tuple[int, ...] = ()

    others = 4  # no value, then plain, flagged, question

    def __post_init__(self) -> None:
        if not 1 <= self.flagged <= self.keys:
            raise BadInput(f"FlaggedNotes: {self.flagged} flagged tokens need a key each, and there are {self.keys} keys; "
                           f"use flagged in 1..{self.keys}")

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
        return at_each(self, "test_more", "more", "with_{}_more")
