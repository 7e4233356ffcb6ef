"""Tasks that are also scored at lengths beyond the one trained on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from seqloom.tasks.base import Task
from seqloom.tasks.copying import Copy


@dataclass(frozen=True, kw_only=True)
class LongerCopy(Copy):
    """`Copy`, scored on strings of `test_lengths` characters too, each as "at_<length>".

        trained: q c a # q c -> . . . q c a      at_5: q c a d b # q c a d -> . . . . . q c a d b

    Chance: 1 / symbols at every length. Optimum: 1. Source: [mimetic-init] Works when 6.
    """

    test_lengths: tuple[int, ...] = ()

    def tests(self) -> Mapping[str, Task]:
        longer = {f"at_{n}": replace(self, length=n, test_lengths=()) for n in self.test_lengths}
        return {**super().tests(), **longer}
