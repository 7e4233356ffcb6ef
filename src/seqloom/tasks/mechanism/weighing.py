"""How far back one value can be picked out: by weights of softmax, or of a recurrence that decays."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from seqloom.kernels import selective_scan, softmax
from seqloom.tasks.mechanism.codebook import by_size, share_right, units


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
        return by_size(lambda distance: self._share(rule, distance, seed), self.distances, "at_{}_tokens")

    def _share(self, rule: CopyRule, distance: int, seed: int) -> float:
        make = torch.Generator().manual_seed(seed)
        book = units(self.values, self.dim, generator=make)
        wanted = torch.randint(self.values, (self.repeats, distance + 1), generator=make)
        noise = torch.rand(self.repeats, distance + 1, generator=make, dtype=torch.float64)
        # key (1, 0) at the source and (0, noise) after it, against the query (score, 1)
        first = torch.zeros_like(noise)
        first[:, 0], noise[:, 0] = 1.0, 0.0
        keys = torch.stack([first, noise], -1)
        query = torch.tensor([self.score, 1.0], dtype=torch.float64).expand_as(keys)
        read = self._weighed(rule, query, keys, book[wanted])
        return share_right(read, book, wanted[:, 0])

    def _weighed(self, rule: CopyRule, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """What the last token reads [B, dim]."""
        if rule.weighs == "softmax":
            pattern = softmax.Pattern(order="causal")
            return softmax.matrix(q[:, -1:, None], k[:, :, None], v[:, :, None], pattern=pattern, scale=1.0).y[:, 0, 0]
        A = torch.full((self.dim, 2), math.log(rule.decay), dtype=q.dtype)
        return selective_scan.chunked(v, torch.ones_like(v), k, q, A=A).y[:, -1]
