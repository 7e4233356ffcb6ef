"""A memory whose values are overwritten, by erasing first or by adding."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from seqloom.core import scan
from seqloom.kernels import decay_scan, delta_scan
from seqloom.tasks.mechanism.codebook import by_size, share_right, units


@dataclass(frozen=True, kw_only=True)
class MemoryRule:
    """How a [K, V] memory takes a write: with erasure (the delta rule) or by addition, after a decay."""

    erase: bool = False
    decay: float = 1.0


@dataclass(frozen=True, kw_only=True)
class OverwriteRecall:
    """A memory of random unit keys; each key's value is read back by the nearest of 64 codewords.

        write k1 v7, k2 v3, ..., then k1 v2, k2 v9, ...; read k1 -> v2

    Every key is written `times` times with different values, the newest is wanted. Score: the share read back right, over
    `repeats` memories, one score per number of keys ("at_16_keys"), "score" their mean. Chance: 1 / 64. Optimum: 1.
    Source: [deltanet] Works when 6.
    """

    keys: tuple[int, ...] = (16, 32)
    times: int = 2
    dim: int = 64
    values: int = 64
    repeats: int = 20

    def measure(self, rule: MemoryRule, seed: int) -> Mapping[str, float]:
        return by_size(lambda count: self._share(rule, count, seed), self.keys, "at_{}_keys")

    def _share(self, rule: MemoryRule, count: int, seed: int) -> float:
        make = torch.Generator().manual_seed(seed)
        keys, book = units(self.repeats, count, self.dim, generator=make), units(self.values, self.dim, generator=make)
        wanted = torch.stack([torch.randperm(self.values, generator=make)[: self.times] for _ in range(self.repeats * count)])
        wanted = wanted.unflatten(0, (self.repeats, count))
        k = keys.repeat(1, self.times, 1)[:, :, None]  # [b t 1 k]
        v = book[wanted.transpose(1, 2).flatten(1)][:, :, None]
        read = torch.einsum("bck,bkv->bcv", keys, self._written(rule, k, v))
        return share_right(read, book, wanted[..., -1])

    def _written(self, rule: MemoryRule, k: Tensor, v: Tensor) -> Tensor:
        """The memory [B, K, V] after the writes k, v [B, T, 1, dim]."""
        state = torch.zeros(len(k), 1, self.dim, self.dim, dtype=k.dtype)
        log_a = torch.full(k.shape[:3], math.log(rule.decay), dtype=k.dtype)
        if rule.erase:
            return scan(delta_scan.step, k, k, v, torch.ones_like(log_a), log_a, state=state).state[:, 0]
        return scan(decay_scan.step, k, k, v, log_a, state=state).state[:, 0]
