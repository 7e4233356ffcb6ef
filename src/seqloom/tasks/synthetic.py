"""Generated tasks on discrete tokens. Each class draws an example, and states its chance level; the optimum is 1."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

from seqloom.tasks.base import IGNORE, Batch, Task, TokenTask


@dataclass(frozen=True, kw_only=True)
class LatestValueRecall(TokenTask):
    """Key-value writes with repeated keys, then every key is asked once: the latest value is wanted.

        k2 v7 k1 v3 k2 v5 | k1 -> v3   k2 -> v5

    Ids: keys 0..keys-1, then values. Length 2 writes + keys. The first `keys` writes visit every key once, so each
    has a value; the others repeat keys at random. Chance: 1 / values. Source: [deltanet] section 4.1 (a variant).
    """

    keys: int = 6
    values: int = 16
    writes: int = 16
    test_writes: tuple[int, ...] = ()

    @property
    def vocab(self) -> int:
        return self.keys + self.values

    @property
    def classes(self) -> int:
        return self.values

    @property
    def chance(self) -> float:
        return 1 / self.values

    def __post_init__(self) -> None:
        if self.writes < self.keys:
            raise ValueError(f"LatestValueRecall: {self.writes} writes cannot visit {self.keys} keys; use at least as many")

    def sample(self, batch: int, generator: torch.Generator) -> Batch:
        first = torch.rand(batch, self.keys, generator=generator).argsort(1)
        rest = torch.randint(self.keys, (batch, self.writes - self.keys), generator=generator)
        key = torch.cat([first, rest], 1)
        value = torch.randint(self.values, key.shape, generator=generator)
        asked = torch.rand(batch, self.keys, generator=generator).argsort(1)
        when = torch.where(key[:, None, :] == asked[:, :, None], torch.arange(self.writes), -1).amax(-1)
        answer = value.gather(1, when)
        written = torch.stack([key, self.keys + value], -1).flatten(1)
        ids = torch.cat([written, asked], 1)
        return Batch(ids, torch.cat([torch.full_like(written, IGNORE), answer], 1))

    def tests(self) -> Mapping[str, Task]:
        more = {f"at_{n}_writes": replace(self, writes=n, test_writes=()) for n in self.test_writes}
        return {"score": replace(self, test_writes=()), **more}


def SingleWriteRecall(*, keys: int = 6, values: int = 16) -> LatestValueRecall:
    """Every key written once, then asked once: recall without overwriting."""
    return LatestValueRecall(keys=keys, values=values, writes=keys)


@dataclass(frozen=True, kw_only=True)
class _SymbolTask(TokenTask):
    """A task whose answers are `symbols` equally likely symbols, scored as it is trained."""

    symbols: int = 16

    @property
    def classes(self) -> int:
        return self.symbols

    @property
    def chance(self) -> float:
        return 1 / self.symbols


@dataclass(frozen=True, kw_only=True)
class SelectiveCopy(_SymbolTask):
    """Data tokens among blanks, then as many identical query tokens: the i-th must return the i-th data token.

        . b . . a d . c ? ? ? ? -> b a d c

    Ids: data 0..symbols-1, blank, query. `places="random"` asks the model to select by content; with "fixed" the data
    stand at the same positions in every example and a time-invariant filter suffices. Chance: 1 / symbols.
    Source: [mamba] section 4.1.1.
    """

    length: int = 32
    data: int = 8
    places: str = "random"

    @property
    def vocab(self) -> int:
        return self.symbols + 2

    def __post_init__(self) -> None:
        if self.places not in ("random", "fixed") or self.data > self.length:
            raise ValueError(f"SelectiveCopy: places is 'random' or 'fixed' and data <= length, found {self}")

    def sample(self, batch: int, generator: torch.Generator) -> Batch:
        answer = torch.randint(self.symbols, (batch, self.data), generator=generator)
        if self.places == "random":
            place = torch.rand(batch, self.length, generator=generator).argsort(1)[:, : self.data].sort(1).values
        else:
            place = (torch.arange(self.data) * self.length // self.data).expand(batch, -1)
        body = torch.full((batch, self.length), self.symbols).scatter_(1, place, answer)
        query = torch.full((batch, self.data), self.symbols + 1)
        return Batch(torch.cat([body, query], 1), torch.cat([torch.full_like(body, IGNORE), answer], 1))


@dataclass(frozen=True, kw_only=True)
class InductionHeads(_SymbolTask):
    """A trigger token appears once inside noise and once at the end: name the token that followed it.

        x f # c d a e b # -> c

    Ids: noise 0..symbols-1, then the trigger. Chance: 1 / symbols. Source: [mamba] section 4.1.2.
    """

    length: int = 64
    symbols: int = 15

    @property
    def vocab(self) -> int:
        return self.symbols + 1

    def sample(self, batch: int, generator: torch.Generator) -> Batch:
        ids = torch.randint(self.symbols, (batch, self.length), generator=generator)
        place = torch.randint(self.length - 3, (batch, 1), generator=generator)
        answer = ids.gather(1, place + 1)
        ids = ids.scatter(1, place, self.symbols)
        ids[:, -1] = self.symbols
        targets = torch.full_like(ids, IGNORE)
        targets[:, -1:] = answer
        return Batch(ids, targets)
