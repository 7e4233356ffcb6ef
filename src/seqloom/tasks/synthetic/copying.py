"""Copying: a string said again, whole or as it was strewn among blanks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

import torch

from seqloom.core import BadInput
from seqloom.models.sequence import SequenceModelLayer
from seqloom.tasks.base import IGNORE, Batch, Task, at_each
from seqloom.tasks.synthetic.alphabets import SymbolTask


@dataclass(frozen=True, kw_only=True)
class Copy(SymbolTask):
    """A random string, a separator, and the string again, each character fed back as it should be (teacher forcing).

        q c a # q c -> . . . q c a

    Ids: characters 0..symbols-1, then the separator. Length 2 `length`. `unit` is what has to be right for a point: a
    character, or the whole string, whose share may be 0 where that of the characters is high; a fit reports both, as "score"
    and "strings". Chance: 1 / symbols (of a string: symbols^-length). Optimum: 1.
    Source: [can-mamba-copy] section 5.1.
    """

    length: int = 16
    symbols: int = 26
    unit: Literal["character", "string"] = "character"

    others = 1  # the separator

    def __post_init__(self) -> None:
        if self.length < 1 or self.symbols < 2:
            raise BadInput(f"Copy: a string has at least 1 character out of at least 2, and length={self.length}, "
                           f"symbols={self.symbols} were asked for")

    @property
    def chance(self) -> float:
        return self.symbols ** -(1.0 if self.unit == "character" else self.length)

    def sample(self, batch: int, generator: torch.Generator) -> Batch:
        text = torch.randint(self.symbols, (batch, self.length), generator=generator)
        ids = torch.cat([text, torch.full((batch, 1), self.symbols), text[:, :-1]], 1)
        return Batch(ids, torch.cat([torch.full_like(text, IGNORE), text], 1))

    def tests(self) -> Mapping[str, Task]:
        return {"score": self, "strings": replace(self, unit="string")} if self.unit == "character" else {"score": self}

    @torch.no_grad()
    def score(self, model: SequenceModelLayer, seed: int) -> float:
        if self.unit == "character":
            return super().score(model, seed)
        model.eval()
        inputs, targets = self.sample(self.examples, torch.Generator().manual_seed(seed)).to(next(model.parameters()).device)
        right = (model(inputs).logits.argmax(-1) == targets) | (targets == IGNORE)
        return float(right.all(1).double().mean())


@dataclass(frozen=True, kw_only=True)
class LongerCopy(Copy):
    """`Copy`, scored on strings of `test_lengths` characters too, each as "at_<length>".

        trained: q c a # q c -> . . . q c a      at_5: q c a d b # q c a d -> . . . . . q c a d b

    Chance: 1 / symbols at every length. Optimum: 1. Source: [mimetic-init] Works when 6.
    """

    test_lengths: tuple[int, ...] = ()

    def tests(self) -> Mapping[str, Task]:
        return {**super().tests(), **at_each(self, "test_lengths", "length", "at_{}")}


@dataclass(frozen=True, kw_only=True)
class SelectiveCopy(SymbolTask):
    """Data tokens among blanks, then as many identical query tokens: the i-th must return the i-th data token.

        . b . . a d . c ? ? ? ? -> b a d c

    Ids: data 0..symbols-1, blank, query. `places="random"` asks the model to select by content; with "fixed" the data
    stand at the same positions in every example and a time-invariant filter suffices. Chance: 1 / symbols.
    Source: [mamba] section 4.1.1.
    """

    length: int = 32
    data: int = 8
    places: str = "random"

    others = 2  # the blank and the query

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
