"""Additive memories: what several hold that one does not, and what is left when the common part of all reads is taken off."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F

from seqloom.tasks.mechanism.codebook import by_size, share_right, units


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
        return by_size(lambda count: self._share(arm, count, seed), self.keys, "at_{}_keys")

    def _share(self, arm: Memories, count: int, seed: int) -> float:
        make = torch.Generator().manual_seed(seed)
        unit = partial(units, generator=make)
        keys, book = unit(self.repeats, count, arm.key_dim), unit(self.values, self.dim)
        wanted = torch.randint(self.values, (self.repeats, count), generator=make)
        place = lambda: (keys @ unit(arm.key_dim, arm.count)).argmax(-1)  # noqa: E731
        stored = place()
        write, read = (F.one_hot(where, arm.count).double() for where in (stored, place() if arm.lost else stored))
        memory = torch.einsum("bcm,bck,bcv->bmkv", write, keys, book[wanted])
        found = torch.einsum("bcm,bck,bmkv->bcv", read, keys, memory)
        return share_right(found, book, wanted)


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
        return by_size(lambda count: self._share(rule, count, seed), self.writes, "at_{}_writes")

    def _share(self, rule: DifferenceRead, count: int, seed: int) -> float:
        make = torch.Generator().manual_seed(seed)
        unit = partial(units, generator=make)
        shared, own, book = unit(self.repeats, 1, self.dim), unit(self.repeats, count, self.dim), unit(self.values, self.dim)
        own = F.normalize(own - (own * shared).sum(-1, keepdim=True) * shared, dim=-1)
        keys = (shared + own) / math.sqrt(2)
        wanted = torch.randint(self.values, (self.repeats, count), generator=make)
        memory = keys.mT @ book[wanted]
        y = keys @ memory - rule.weight * (shared / math.sqrt(2)) @ memory
        y = F.rms_norm(y, (self.dim,), eps=1e-5)
        return share_right(y, book, wanted)
