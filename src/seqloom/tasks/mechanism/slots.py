"""How a memory of slots is read: the slots are set by hand."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch

from seqloom.kernels import softmax
from seqloom.kernels.merge import merge
from seqloom.mixers import gated_slot
from seqloom.mixers.gated_slot import Slots
from seqloom.tasks.mechanism.codebook import by_size, share_right, units


@dataclass(frozen=True, kw_only=True)
class SlotRead:
    """How slots are read: by a softmax of the logits, or linearly in them."""

    read: Literal["softmax", "linear"] = "softmax"
    scale: float = 8.0


@dataclass(frozen=True, kw_only=True)
class SlotRecall:
    """Slots that hold one random unit key and one of 64 codewords each; each key is asked, the nearest codeword is the answer.

        slot 1: k1 v7   slot 2: k2 v3   ...   read k2 -> v3

    Score: the share read back right, over `repeats` memories, one score per number of slots ("at_32_slots"), "score" their
    mean. Chance: 1 / 64. Optimum: 1. The fewer dimensions, the more do keys overlap.
    Source: [gated-slot-attention] Works when 7.
    """

    slots: tuple[int, ...] = (16, 32, 64)
    dim: int = 16
    values: int = 64
    repeats: int = 20

    def measure(self, rule: SlotRead, seed: int) -> Mapping[str, float]:
        return by_size(lambda count: self._share(rule, count, seed), self.slots, "at_{}_slots")

    def _share(self, rule: SlotRead, count: int, seed: int) -> float:
        make = torch.Generator().manual_seed(seed)
        keys, book = units(self.repeats, count, self.dim, generator=make), units(self.values, self.dim, generator=make)
        wanted = torch.randint(self.values, (self.repeats, count), generator=make)
        slots = Slots(keys.mT[:, None], book[wanted][:, None])
        # one head a question; a log decay of 0 writes nothing
        nothing = keys.new_zeros(self.repeats, 1, self.dim)
        _, read = gated_slot.step(slots, keys, nothing, nothing, keys.new_zeros(self.repeats, 1, count), scale=rule.scale,
                                  read=rule.read)
        return share_right(read, book, wanted)


@dataclass(frozen=True, kw_only=True)
class MemoryJoin:
    """How two memories are read as one: a joint softmax, or a softmax each whose outputs are added or averaged."""

    join: Literal["joint", "sum", "mean"] = "joint"


@dataclass(frozen=True, kw_only=True)
class TwoMemoryRecall:
    """Random unit keys with unit values, some in slots (one each) and some in a window; each key is asked.

        slots: k1 v1 ... k16 v16   window: k17 v17 ... k24 v24   read k3 -> v3, whichever memory holds it

    Score: 1 - the mean distance of what is read from the stored value. Optimum: 1; a softmax over the wrong memory alone
    returns a mean of strangers, at distance about 1. Source: [native-hybrid-attention] Works when 7.
    """

    slots: int = 16
    window: int = 8
    dim: int = 32
    scale: float = 8.0
    repeats: int = 20

    def measure(self, rule: MemoryJoin, seed: int) -> Mapping[str, float]:
        make = torch.Generator().manual_seed(seed)
        keys, values = (units(self.repeats, self.slots + self.window, 1, self.dim, generator=make) for _ in range(2))
        cut = (slice(self.slots), slice(self.slots, None))
        parts = [softmax.matrix(keys, keys[:, part], values[:, part], pattern=softmax.Pattern(order="dense"), scale=self.scale)
                 for part in cut]
        if rule.join == "joint":
            read = merge(parts).y
        else:
            read = torch.stack([part.y for part in parts]).sum(0) / (2 if rule.join == "mean" else 1)
        return {"score": 1 - float((read - values).norm(dim=-1).mean())}
