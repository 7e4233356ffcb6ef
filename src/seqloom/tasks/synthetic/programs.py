"""Dynamic programs written out: a question, then the answer, alone or after the table that leads to it (chain of thought).

With `cot` every entry of the table is a token that the model writes and reads again. Scores are of the last token, the
answer, after the model's own entries: one wrong entry may ruin the rest, which teacher forcing would hide. A fit reports
both, as "score" and "forced". Sources: [can-mamba-copy] section 5 and 6.2; [chain-of-thought-serial] Traps.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from seqloom.core import BadInput
from seqloom.models.sequence import SequenceModelLayer
from seqloom.tasks.base import IGNORE, Batch, Task, TokenTask


@dataclass(frozen=True, kw_only=True)
class _Program(TokenTask):
    """A subclass gives `question` (ids), `table` (entries, the answer last) and `offset`, the id of entry 0."""

    length: int = 8
    symbols: int = 8
    cot: bool = True                       # whether the table is written before the answer
    fed: Literal["own", "true"] = "own"    # entries that the model reads in a test: its own, or the right ones

    def __post_init__(self) -> None:
        if self.length < 1 or self.symbols < 2:
            raise BadInput(f"{type(self).__name__}: needs length >= 1 and symbols >= 2, found length={self.length}, "
                           f"symbols={self.symbols}")

    @property
    def offset(self) -> int:
        raise NotImplementedError

    def question(self, batch: int, generator: torch.Generator) -> tuple[Tensor, Any]:
        raise NotImplementedError

    def table(self, given: Any) -> Tensor:
        raise NotImplementedError

    @property
    def vocab(self) -> int:
        return self.offset + self.classes

    @property
    def chance(self) -> float:
        return _commonest(replace(self, cot=False))

    def sample(self, batch: int, generator: torch.Generator) -> Batch:
        ids, given = self.question(batch, generator)
        entries = self.table(given)
        if not self.cot:
            entries = entries[:, -1:]
        hidden = torch.full_like(ids[:, 1:], IGNORE)
        return Batch(torch.cat([ids, self.offset + entries[:, :-1]], 1), torch.cat([hidden, entries], 1))

    def tests(self) -> Mapping[str, Task]:
        return {"score": self, "forced": replace(self, fed="true")} if self.cot and self.fed == "own" else {"score": self}

    @torch.no_grad()
    def score(self, model: SequenceModelLayer, seed: int) -> float:
        """Share of `examples` fresh rows whose answer is right. Raises: BadInput for a model that does not stream."""
        if not model.spec.stack.causal:
            raise BadInput(f"{type(self).__name__} is answered token by token, which takes a causal stack")
        model.eval()
        inputs, targets = self.sample(self.examples, torch.Generator().manual_seed(seed)).to(next(model.parameters()).device)
        asked = int((targets[0] == IGNORE).sum())  # where the first entry is asked for
        if self.fed == "true":
            guess = model(inputs, keep=1).logits[:, -1].argmax(-1)
        else:
            output = model(inputs[:, : asked + 1], keep=1)
            guess = output.logits[:, -1].argmax(-1)
            for _ in range(inputs.shape[1] - asked - 1):
                output = model(self.offset + guess[:, None], state=output.state)
                guess = output.logits[:, -1].argmax(-1)
        return float((guess == targets[:, -1]).double().mean())


@functools.lru_cache(maxsize=64)
def _commonest(task: _Program) -> float:
    """The share of the commonest answer among 8,192 questions."""
    _, targets = task.sample(8192, torch.Generator().manual_seed(0))
    return float(targets[:, -1].bincount().max()) / 8192


@dataclass(frozen=True, kw_only=True)
class LongestIncreasingSubsequence(_Program):
    """How long is the longest strictly increasing subsequence?

        3 1 2 5 4 = 1 1 2 3 3 -> 3        without the table: 3 1 2 5 4 = -> 3

    Entry i is the longest one that ends at number i, 1 + max of the entries j < i with a smaller number; the answer is the
    largest entry. Ids: numbers 0..symbols-1, "=", then entries 1..length (class = entry - 1). Reading an entry takes all of
    the past: not a local program. Chance: the share of the commonest answer (0.52 at the defaults). Optimum: 1.
    Source: [can-mamba-copy] section 6.2.
    """

    @property
    def classes(self) -> int:
        return self.length

    @property
    def offset(self) -> int:
        return self.symbols + 1

    def question(self, batch: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        numbers = torch.randint(self.symbols, (batch, self.length), generator=generator)
        return F.pad(numbers, (0, 1), value=self.symbols), numbers

    def table(self, numbers: Tensor) -> Tensor:
        longest = torch.zeros_like(numbers)
        for i in range(1, self.length):
            before = torch.where(numbers[:, :i] < numbers[:, i : i + 1], longest[:, :i] + 1, 0)
            longest[:, i] = before.amax(1)
        return torch.cat([longest, longest.amax(1, keepdim=True)], 1)


@dataclass(frozen=True, kw_only=True)
class EditDistance(_Program):
    """How many insertions, deletions and substitutions turn the first string into the second?

        a b | b b = 1 1  1 -> 1        the table row by row; without it: a b | b b = -> 1

    Entry (i, j) is the distance of the first i characters to the first j, the smallest of its three neighbours' plus what
    the step costs; the answer is the last entry. Half of the second strings are the first one with half of its characters
    drawn anew, so that small distances occur. Ids: characters 0..symbols-1, "|", "=", then entries 0..length. An entry needs
    the last length + 1 entries and two characters: a local program but for the question. Chance: the share of the commonest
    answer (0.25 at the defaults). Optimum: 1. Source: [can-mamba-copy] section 5 (dynamic programming).
    """

    length: int = 6
    symbols: int = 4

    @property
    def classes(self) -> int:
        return self.length + 1

    @property
    def offset(self) -> int:
        return self.symbols + 2

    def question(self, batch: int, generator: torch.Generator) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        first, second = torch.randint(self.symbols, (2, batch, self.length), generator=generator)
        near = torch.rand(batch, 1, generator=generator) < 0.5
        kept = near & (torch.rand(batch, self.length, generator=generator) < 0.5)
        second = torch.where(kept, first, second)
        return torch.cat([F.pad(first, (0, 1), value=self.symbols), F.pad(second, (0, 1), value=self.symbols + 1)], 1), (
            first, second)

    def table(self, strings: tuple[Tensor, Tensor]) -> Tensor:
        first, second = strings
        place = torch.arange(self.length + 1)
        row, rows = place.expand(len(first), -1), []
        for i in range(self.length):
            step = torch.minimum(row[:, 1:] + 1, row[:, :-1] + (first[:, i : i + 1] != second))
            # along a row every insertion costs 1: a running minimum, once the place is taken off
            row = torch.cat([torch.full_like(step[:, :1], i + 1), step], 1).sub(place).cummin(1).values + place
            rows.append(row[:, 1:])
        return torch.cat(rows, 1)
