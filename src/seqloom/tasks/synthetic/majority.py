"""Majority: does a sequence hold more ones than zeros?"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

from seqloom.core import BadInput
from seqloom.tasks.base import Batch, LabelTask, Task


@dataclass(frozen=True, kw_only=True)
class Majority(LabelTask):
    """A row of bits, ones counted; the last token's output gives the answer.

        1 0 0 1 1 -> yes        0 0 1 0 0 -> no

    The number of ones is uniform in 0..length, their places random. A fit draws from `rows` fixed training rows (its seed
    says which), and each of their ones is lost with probability `noise`, so that training and test differ by design; the
    test is clean and fresh. Chance: 1/2. Optimum: 1. Source: [selective-ssm-bounds] section 5, Method 8.
    """

    length: int = 50
    rows: int | None = 1000     # None: fresh rows in every batch
    noise: float = 0.25

    examples = 1000
    vocab = 2
    classes = 2
    pool = "last"

    def __post_init__(self) -> None:
        if self.length < 1 or not 0 <= self.noise < 1 or (self.rows is not None and self.rows < 1):
            raise BadInput(f"Majority: length and rows are at least 1 and noise is in [0, 1), found {self}")

    def sample(self, batch: int, generator: torch.Generator) -> Batch:
        if self.rows is None:
            return self._draw(batch, generator)
        # the training rows: the same for every batch of a fit
        ids, targets = self._draw(self.rows, torch.Generator().manual_seed(generator.initial_seed()))
        chosen = torch.randint(self.rows, (batch,), generator=generator)
        return Batch(ids[chosen], targets[chosen])

    def _draw(self, batch: int, generator: torch.Generator) -> Batch:
        count = torch.randint(self.length + 1, (batch, 1), generator=generator)
        ids = (torch.rand(batch, self.length, generator=generator).argsort(1) < count).long()
        lost = torch.rand(batch, self.length, generator=generator) < self.noise
        return Batch(torch.where(lost, 0, ids), (2 * count[:, 0] > self.length).long())

    def tests(self) -> Mapping[str, Task]:
        return {"score": replace(self, rows=None, noise=0.0)}
