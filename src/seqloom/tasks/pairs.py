"""Recall with one token per key-value pair: the token's vector is the sum of a key's and a value's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from seqloom.models.backbone import Stack
from seqloom.models.heads import TokenHead
from seqloom.models.sequence import SequenceModel
from seqloom.models.stems import TokenStem
from seqloom.models.stems.tokens import TokenStemLayer
from seqloom.tasks.base import IGNORE, Batch, Task, TokenTask


@dataclass(frozen=True, kw_only=True)
class SumStem(TokenStem):
    """Several ids a token, [B, T, N]: the sum of their rows of one table."""

    def build(self, dim: int) -> SumStemLayer:
        return SumStemLayer(self, dim)


class SumStemLayer(TokenStemLayer):
    def forward(self, ids: Tensor, positions: Tensor | None = None) -> Tensor:
        return self.dropout(F.embedding(ids, self.weight).sum(-2))


@dataclass(frozen=True, kw_only=True)
class _PairTask(TokenTask):
    """Ids of a token: its key, 0..keys-1, and keys + its value, or keys + values where the key's value is asked for."""

    keys: int
    values: int = 16

    @property
    def vocab(self) -> int:
        return self.keys + self.values + 1

    @property
    def classes(self) -> int:
        return self.values

    @property
    def chance(self) -> float:
        return 1 / self.values

    def wrap(self, stack: Stack) -> SequenceModel:
        stem = SumStem(vocab=self.vocab, std=1.0)
        return SequenceModel(stem=stem, stack=stack, head=TokenHead(classes=self.classes, tie=False))

    def written(self, key: Tensor, value: Tensor) -> Tensor:
        return torch.stack([key, self.keys + value], -1)

    def asked(self, key: Tensor) -> Tensor:
        return torch.stack([key, torch.full_like(key, self.keys + self.values)], -1)


@dataclass(frozen=True, kw_only=True)
class LatestPairRecall(_PairTask):
    """Writes with repeated keys, one token each, then every key is asked once: the latest value is wanted.

        k2+v7 k1+v3 k2+v5 | k1+? -> v3   k2+? -> v5

    The first `keys` writes visit every key once, the others repeat keys at random. Length writes + keys. Chance: 1 / values.
    Optimum: 1. Source: [gated-slot-attention] Works when 6.
    """

    keys: int = 12
    writes: int = 32
    test_writes: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.writes < self.keys:
            raise ValueError(f"LatestPairRecall: {self.writes} writes cannot visit {self.keys} keys; use at least as many")

    def sample(self, batch: int, generator: torch.Generator) -> Batch:
        first = torch.rand(batch, self.keys, generator=generator).argsort(1)
        rest = torch.randint(self.keys, (batch, self.writes - self.keys), generator=generator)
        key = torch.cat([first, rest], 1)
        value = torch.randint(self.values, key.shape, generator=generator)
        asked = torch.rand(batch, self.keys, generator=generator).argsort(1)
        when = torch.where(key[:, None, :] == asked[:, :, None], torch.arange(self.writes), -1).amax(-1)
        targets = torch.cat([torch.full_like(key, IGNORE), value.gather(1, when)], 1)
        return Batch(torch.cat([self.written(key, value), self.asked(asked)], 1), targets)

    def tests(self) -> Mapping[str, Task]:
        more = {f"at_{n}_writes": replace(self, writes=n, test_writes=()) for n in self.test_writes}
        return {"score": replace(self, test_writes=()), **more}


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
