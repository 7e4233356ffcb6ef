"""Recall of pairs of a key and a value that stand in the row itself, a token each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch

from seqloom.core import BadInput
from seqloom.tasks.base import IGNORE, Batch, Task, at_each
from seqloom.tasks.synthetic.alphabets import KeyValueTask


@dataclass(frozen=True, kw_only=True)
class LatestValueRecall(KeyValueTask):
    """Key-value writes with repeated keys, then every key is asked once: the latest value is wanted.

        k2 v7 k1 v3 k2 v5 | k1 -> v3   k2 -> v5

    Ids: keys 0..keys-1, then values. Length 2 writes + keys. The first `keys` writes visit every key once, so each
    has a value; the others repeat keys at random. Chance: 1 / values. Source: [deltanet] section 4.1 (a variant).
    """

    keys: int = 6
    writes: int = 16
    test_writes: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.writes < self.keys:
            raise ValueError(f"{type(self).__name__}: {self.writes} writes cannot visit {self.keys} keys; use at least as many")

    def sample(self, batch: int, generator: torch.Generator) -> Batch:
        first = torch.rand(batch, self.keys, generator=generator).argsort(1)
        rest = torch.randint(self.keys, (batch, self.writes - self.keys), generator=generator)
        key = torch.cat([first, rest], 1)
        value = torch.randint(self.values, key.shape, generator=generator)
        asked = torch.rand(batch, self.keys, generator=generator).argsort(1)
        when = torch.where(key[:, None, :] == asked[:, :, None], torch.arange(self.writes), -1).amax(-1)
        written = self.written(key, value)
        targets = torch.cat([torch.full(written.shape[:2], IGNORE), value.gather(1, when)], 1)
        return Batch(torch.cat([written, self.asked(asked)], 1), targets)

    def tests(self) -> Mapping[str, Task]:
        return at_each(self, "test_writes", "writes", "at_{}_writes")


def SingleWriteRecall(*, keys: int = 6, values: int = 16) -> LatestValueRecall:
    """Every key written once, then asked once: recall without overwriting."""
    return LatestValueRecall(keys=keys, values=values, writes=keys)


@dataclass(frozen=True, kw_only=True)
class MultiQueryRecall(KeyValueTask):
    """Pairs of a key and a value, no key twice; then each key is asked once, in any order, among fillers.

        k7 v3 k2 v9 k5 v1 | k2 -> v9   .   k5 -> v1   .   .   k7 -> v3

    Ids: keys 0..keys-1, of which `pairs` occur, then values, then a blank. Fillers are blanks, or values and keys that were
    not given ("random"). `length` None leaves no room for them: 3 pairs. With `power` a the places of the questions are drawn
    with weight (i + 1)^(a - 1) by their distance i from the pairs, so that a small a asks early; None draws them evenly.
    Chance: 1 / values. Source: multi-query associative recall (Zoology), as in [mom] Works when 9.
    """

    pairs: int = 8
    keys: int = 32
    values: int = 32
    length: int | None = None
    fillers: Literal["blank", "random"] = "blank"
    power: float | None = None

    others = 1  # the blank

    def __post_init__(self) -> None:
        if not 1 <= self.pairs <= self.keys or (self.length is not None and self.length < 3 * self.pairs):
            raise BadInput(f"MultiQueryRecall: {self.pairs} pairs need as many keys and a length of {3 * self.pairs}, and "
                           f"there are {self.keys} keys and a length of {self.length}")

    def sample(self, batch: int, generator: torch.Generator) -> Batch:
        key = torch.rand(batch, self.keys, generator=generator).argsort(1)
        key, unused = key[:, : self.pairs], key[:, self.pairs :]
        value = torch.randint(self.values, key.shape, generator=generator)
        told = self.written(key, value)
        room = (3 * self.pairs if self.length is None else self.length) - 2 * self.pairs
        weight = torch.arange(1, room + 1, dtype=torch.float64) ** (0.0 if self.power is None else self.power - 1)
        place = torch.multinomial(weight.expand(batch, -1), self.pairs, generator=generator)
        if self.fillers == "blank":
            rest = torch.full((batch, room), self.keys + self.values)
        else:  # unused keys and values alike
            other = torch.cat([unused, torch.arange(self.keys, self.keys + self.values).expand(batch, -1)], 1)
            rest = other.gather(1, torch.randint(other.shape[1], (batch, room), generator=generator))
        ids = torch.cat([told, rest.scatter(1, place, key)], 1)
        targets = torch.full((batch, room), IGNORE).scatter(1, place, value)
        return Batch(ids, torch.cat([torch.full_like(told, IGNORE), targets], 1))


@dataclass(frozen=True, kw_only=True)
class JointRecall(KeyValueTask):
    """Contexts, each with a value for every key; then a context and a key are asked together.

        A k1 v4 k2 v7   B k2 v0 k1 v2 | B k1 -> v2   A k2 -> v7

    Ids: contexts, then keys, then values. A key means another value in each context, so that neither alone gives the answer.
    Questions are drawn without return. Length contexts (1 + 2 keys) + 2 questions. Chance: 1 / values.
    """

    contexts: int = 4
    keys: int = 4
    values: int = 16
    questions: int = 8

    def __post_init__(self) -> None:
        if not 1 <= self.questions <= self.contexts * self.keys:
            raise BadInput(f"JointRecall: {self.contexts} contexts of {self.keys} keys hold {self.contexts * self.keys} "
                           f"answers, not {self.questions}")

    @property
    def others(self) -> int:
        return self.contexts

    def sample(self, batch: int, generator: torch.Generator) -> Batch:
        shape = (batch, self.contexts, self.keys)
        context = torch.rand(batch, self.contexts, generator=generator).argsort(1)
        key = torch.rand(shape, generator=generator).argsort(2)
        value = torch.randint(self.values, shape, generator=generator)
        told = torch.cat([context[..., None], self.contexts + self.written(key, value)], 2).flatten(1)
        asked = torch.rand(batch, self.contexts * self.keys, generator=generator).argsort(1)[:, : self.questions]
        where = context.gather(1, asked // self.keys)
        question = torch.stack([where, self.contexts + key.flatten(1).gather(1, asked)], -1).flatten(1)
        answer = torch.stack([torch.full_like(asked, IGNORE), value.flatten(1).gather(1, asked)], -1).flatten(1)
        return Batch(torch.cat([told, question], 1), torch.cat([torch.full_like(told, IGNORE), answer], 1))
