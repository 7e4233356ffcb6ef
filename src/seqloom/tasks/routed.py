"""What several memories hold that one does not: a mechanism test, without a model or training."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F


@dataclass(frozen=True, kw_only=True)
class Memories:
    """`count` additive [K, V] memories. Each key is stored in one of them: where a random projection of the key is largest,
    or at random, which a reader cannot repeat (`lost`)."""

    count: int = 1
    key_dim: int = 64
    lost: bool = False


@dataclass(frozen=True, kw_only=True)
class RoutedRecall:
    """Random unit keys are written once each; every value is read back by the nearest of 64 codewords.

        write k1 v7, k2 v3, ...; read k1 -> v7

    Score: the share read back right, over `repeats` draws, one score per number of keys ("at_128_keys"), "score" their mean.
    Chance: 1 / 64. Optimum: 1. Source: [mom] Works when 8.
    """

    keys: tuple[int, ...] = (32, 128, 256)
    dim: int = 64
    values: int = 64
    repeats: int = 10

    def measure(self, arm: Memories, seed: int) -> Mapping[str, float]:
        scores = {f"at_{count}_keys": self._share(arm, count, seed) for count in self.keys}
        return {"score": sum(scores.values()) / len(scores), **scores}

    def _share(self, arm: Memories, count: int, seed: int) -> float:
        make = torch.Generator().manual_seed(seed)
        unit = lambda *shape: F.normalize(torch.randn(*shape, generator=make, dtype=torch.float64), dim=-1)  # noqa: E731
        keys, book = unit(self.repeats, count, arm.key_dim), unit(self.values, self.dim)
        wanted = torch.randint(self.values, (self.repeats, count), generator=make)
        place = lambda: (keys @ unit(arm.key_dim, arm.count)).argmax(-1)  # noqa: E731
        stored = place()
        write, read = (F.one_hot(where, arm.count).double() for where in (stored, place() if arm.lost else stored))
        memory = torch.einsum("bcm,bck,bcv->bmkv", write, keys, book[wanted])
        found = torch.einsum("bcm,bck,bmkv->bcv", read, keys, memory)
        return float((torch.einsum("bcv,nv->bcn", found, book).argmax(-1) == wanted).double().mean())
