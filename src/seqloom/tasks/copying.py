"""Copying: a string said again, and the same operation on its own, where what can fail is the memory alone."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from seqloom.core import BadInput
from seqloom.kernels import selective_scan, softmax
from seqloom.models.sequence import SequenceModelLayer
from seqloom.tasks.base import IGNORE, Batch, Task, TokenTask


@dataclass(frozen=True, kw_only=True)
class Copy(TokenTask):
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

    def __post_init__(self) -> None:
        if self.length < 1 or self.symbols < 2:
            raise BadInput(f"Copy: a string has at least 1 character out of at least 2, and length={self.length}, "
                           f"symbols={self.symbols} were asked for")

    @property
    def vocab(self) -> int:
        return self.symbols + 1

    @property
    def classes(self) -> int:
        return self.symbols

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
class CopyRule:
    """What weighs the past by a score of key and query: softmax attention, or a recurrence that decays by `decay` a token."""

    weighs: Literal["softmax", "recurrence"]
    decay: float = 1.0


@dataclass(frozen=True, kw_only=True)
class DistantCopy:
    """One value is wanted from `distance` tokens back; its key scores `score`, every later key scores U(0, 1).

        v7 v2 v9 v2 ... v4 ?  -> v7

    Both kinds of weighing get the same keys, queries and values; what they return is read by the nearest of `values`
    codewords, after the mean over the weights. Score: the share read right, over `repeats` sequences, one score per distance
    ("at_64_tokens"), "score" their mean. Chance: 1 / values. Optimum: 1.
    Softmax weighs by e^score, so that a score of order log(distance) is enough; a recurrence with decay a by score a^distance,
    which has to be exponential in the distance ([can-mamba-copy] Theorems 1 and 2).
    """

    distances: tuple[int, ...] = (16, 64, 256)
    score: float = 10.0
    values: int = 26
    dim: int = 32
    repeats: int = 200

    def measure(self, rule: CopyRule, seed: int) -> Mapping[str, float]:
        scores = {f"at_{distance}_tokens": self._share(rule, distance, seed) for distance in self.distances}
        return {"score": sum(scores.values()) / len(scores), **scores}

    def _share(self, rule: CopyRule, distance: int, seed: int) -> float:
        make = torch.Generator().manual_seed(seed)
        book = F.normalize(torch.randn(self.values, self.dim, generator=make, dtype=torch.float64), dim=-1)
        wanted = torch.randint(self.values, (self.repeats, distance + 1), generator=make)
        noise = torch.rand(self.repeats, distance + 1, generator=make, dtype=torch.float64)
        # key (1, 0) at the source and (0, noise) after it, against the query (score, 1)
        first = torch.zeros_like(noise)
        first[:, 0], noise[:, 0] = 1.0, 0.0
        keys = torch.stack([first, noise], -1)
        query = torch.tensor([self.score, 1.0], dtype=torch.float64).expand_as(keys)
        read = self._weighed(rule, query, keys, book[wanted])
        return float(((read @ book.T).argmax(-1) == wanted[:, 0]).double().mean())

    def _weighed(self, rule: CopyRule, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """What the last token reads [B, dim]."""
        if rule.weighs == "softmax":
            pattern = softmax.Pattern(order="causal")
            return softmax.matrix(q[:, -1:, None], k[:, :, None], v[:, :, None], pattern=pattern, scale=1.0).y[:, 0, 0]
        A = torch.full((self.dim, 2), math.log(rule.decay), dtype=q.dtype)
        return selective_scan.chunked(v, torch.ones_like(v), k, q, A=A).y[:, -1]
