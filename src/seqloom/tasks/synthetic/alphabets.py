"""What the ids of a task stand for: symbols to be named again, or keys and their values."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from seqloom.tasks.base import TokenTask


@dataclass(frozen=True, kw_only=True)
class SymbolTask(TokenTask):
    """Answers are symbols, all equally likely. Ids: symbols 0..symbols-1, then `others` of the task's own."""

    symbols: int = 16

    @property
    def others(self) -> int:
        return 0

    @property
    def vocab(self) -> int:
        return self.symbols + self.others

    @property
    def classes(self) -> int:
        return self.symbols


@dataclass(frozen=True, kw_only=True)
class KeyValueTask(TokenTask):
    """Keys are given values and asked for them, values being equally likely: chance is 1 / values.

    Ids: keys 0..keys-1, then values, then `others` of the task's own. A pair takes a token for its key and one for its value,
    a question is a key; a subclass that lays them out otherwise writes `written`, `asked` and `wrap` anew.
    """

    keys: int
    values: int = 16

    @property
    def others(self) -> int:
        return 0

    @property
    def vocab(self) -> int:
        return self.keys + self.values + self.others

    @property
    def classes(self) -> int:
        return self.values

    def written(self, key: Tensor, value: Tensor) -> Tensor:
        """Tokens [..., 2 N] of the pairs of keys and values [..., N]: k v k v."""
        return torch.stack([key, self.keys + value], -1).flatten(-2)

    def asked(self, key: Tensor) -> Tensor:
        """Tokens [..., N] that ask for the keys' values."""
        return key
