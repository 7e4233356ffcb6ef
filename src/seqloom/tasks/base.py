"""A task is data with a score: examples made on demand from a seed, a chance level and an optimum."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

IGNORE = -100


class Batch(NamedTuple):
    """ids [B, T] in [0, vocab); targets [B, T] in [0, classes), IGNORE where nothing is asked."""

    ids: Tensor
    targets: Tensor


@runtime_checkable
class TokenTask(Protocol):
    """Vectorised and seeded: the same generator state gives the same batch."""

    @property
    def vocab(self) -> int: ...

    @property
    def classes(self) -> int: ...

    @property
    def chance(self) -> float: ...

    def sample(self, batch: int, generator: torch.Generator) -> Batch: ...

    def tests(self) -> Mapping[str, TokenTask]:
        """The tasks to be scored after training on this one, by the score's name; "score" is this task itself."""
        ...


@torch.no_grad()
def accuracy(model: nn.Module, task: TokenTask, *, seed: int, examples: int = 512, batch: int = 128) -> float:
    """Share of asked positions whose highest score is the target, over `examples` fresh rows."""
    generator = torch.Generator().manual_seed(seed)
    right = asked = 0
    model.eval()
    for _ in range(-(-examples // batch)):
        ids, targets = task.sample(batch, generator)
        guess = model(ids).logits.argmax(-1)
        mask = targets != IGNORE
        right += int((guess[mask] == targets[mask]).sum())
        asked += int(mask.sum())
    return right / asked
