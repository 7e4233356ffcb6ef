"""A task is data with a score: examples made on demand from a seed, the model around a stack, a loss, a chance level."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor

from seqloom.models.backbone import Stack
from seqloom.models.heads import PooledHead, TokenHead
from seqloom.models.sequence import Output, SequenceModel, SequenceModelLayer
from seqloom.models.stems import SeriesStem, TokenStem

IGNORE = -100


class Batch(NamedTuple):
    """inputs [B, T] ids or [B, T, C] values; targets [B, T] or [B] classes (IGNORE: not asked), or [B, T, O] values."""

    inputs: Tensor
    targets: Tensor

    def to(self, device: torch.device | str) -> Batch:
        return Batch(self.inputs.to(device), self.targets.to(device))


@runtime_checkable
class Task(Protocol):
    """What a fit needs. `TokenTask`, `LabelTask` and `SeriesTask` are the three usual kinds."""

    def wrap(self, stack: Stack) -> SequenceModel:
        """`stack` between the stem and the head that this task calls for."""
        ...

    def sample(self, batch: int, generator: torch.Generator) -> Batch:
        """Vectorised and seeded: the same generator state gives the same batch."""
        ...

    def loss(self, output: Output, targets: Tensor) -> Tensor: ...

    def score(self, model: SequenceModelLayer, seed: int) -> float:
        """Higher is better. The rows are drawn from `seed`, the same for every model."""
        ...

    def tests(self) -> Mapping[str, Task]:
        """The tasks to be scored after training on this one, by the score's name; "score" is this task itself."""
        ...


def at_each(task: Task, sizes: str, field: str, name: str) -> dict[str, Task]:
    """The tests of a dataclass that lists more sizes: "score", itself, and `name` for each size in its field `sizes`.

    at_each(task, "test_lengths", "length", "at_{}_tokens") -> {"score": .., "at_64_tokens": .. of length 64, ..}
    """
    bare: Any = replace(task, **{sizes: ()})  # type: ignore[type-var]
    return {"score": bare, **{name.format(size): replace(bare, **{field: size}) for size in getattr(task, sizes)}}


class _Classes:
    """A task whose answers are classes: cross entropy, and the share of asked positions answered right."""

    examples = 512  # rows of a test

    @property
    def classes(self) -> int:
        raise NotImplementedError

    @property
    def chance(self) -> float:
        """The score of a guess. Here all classes are equally likely; a task where they are not says its own."""
        return 1 / self.classes

    def tests(self) -> Mapping[str, Task]:
        return {"score": self}  # type: ignore[dict-item]

    def loss(self, output: Output, targets: Tensor) -> Tensor:
        return F.cross_entropy(output.logits.flatten(0, -2).float(), targets.flatten(), ignore_index=IGNORE)

    @torch.no_grad()
    def score(self, model: SequenceModelLayer, seed: int) -> float:
        """Share of asked positions whose highest score is the target, over `examples` fresh rows."""
        generator, device = torch.Generator().manual_seed(seed), next(model.parameters()).device
        right = asked = 0
        model.eval()
        for start in range(0, self.examples, 128):
            inputs, targets = self.sample(min(128, self.examples - start), generator).to(device)  # type: ignore[attr-defined]
            guess = model(inputs).logits.argmax(-1)
            mask = targets != IGNORE
            right += int((guess[mask] == targets[mask]).sum())
            asked += int(mask.sum())
        return right / asked


class TokenTask(_Classes):
    """Ids in, a class per token out. A subclass (a frozen dataclass) gives `vocab`, `classes` and `sample`."""

    @property
    def vocab(self) -> int:
        raise NotImplementedError

    def wrap(self, stack: Stack) -> SequenceModel:
        # Claims train at rates up to 2e-2, and Adam's first steps would redraw a table of entries near 0.02 whole.
        stem = TokenStem(vocab=self.vocab, std=1.0)
        return SequenceModel(stem=stem, stack=stack, head=TokenHead(classes=self.classes, tie=False))


class LabelTask(_Classes):
    """One class per row, from values [B, T, C] (`channels`) or, where that is 0, ids below `vocab`."""

    pool: str = "mean"

    @property
    def channels(self) -> int:
        return 0

    @property
    def vocab(self) -> int:
        return 0

    def wrap(self, stack: Stack) -> SequenceModel:
        stem = SeriesStem(channels=self.channels) if self.channels else TokenStem(vocab=self.vocab, std=1.0)
        return SequenceModel(stem=stem, stack=stack, head=PooledHead(classes=self.classes, pool=self.pool))  # type: ignore[arg-type]


class SeriesTask:
    """Values [B, T, C] in, values [B, T', O] out: mean squared error. A subclass gives `channels`, `outputs`, `sample`.

    The score is the share of the targets' variance that is explained, 1 - MSE / variance: 0 for the best constant, 1 at best.
    """

    examples = 128

    @property
    def channels(self) -> int:
        raise NotImplementedError

    @property
    def outputs(self) -> int:
        raise NotImplementedError

    def wrap(self, stack: Stack) -> SequenceModel:
        return SequenceModel(stem=SeriesStem(channels=self.channels), stack=stack,
                             head=TokenHead(classes=self.outputs, tie=False))

    def tests(self) -> Mapping[str, Task]:
        return {"score": self}  # type: ignore[dict-item]

    def loss(self, output: Output, targets: Tensor) -> Tensor:
        return F.mse_loss(output.logits.float(), targets)

    @torch.no_grad()
    def score(self, model: SequenceModelLayer, seed: int) -> float:
        model.eval()
        inputs, targets = self.sample(self.examples, torch.Generator().manual_seed(seed)).to(  # type: ignore[attr-defined]
            next(model.parameters()).device)
        error = model(inputs).logits.float() - targets
        return float(1 - error.square().mean() / (targets - targets.mean((0, 1))).square().mean())
