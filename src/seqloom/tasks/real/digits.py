"""Handwritten digits: an image as a few patches, whose order has to come from the mixer, or one pixel at a time."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

import torch
from einops import rearrange
from torch import Tensor

from seqloom.core import require_extra
from seqloom.models.sequence import SequenceModelLayer
from seqloom.tasks.base import Batch, LabelTask, Task

TRAINED = 1400  # of 1,797 digits; the others are the test


@functools.lru_cache(maxsize=1)
def digits() -> tuple[Tensor, Tensor]:
    """scikit-learn's 8 x 8 digits: grey values [1797, 8, 8] of mean 0 and variance 1, and labels [1797], shuffled once and
    for all.

    Raises: MissingExtra without scikit-learn.
    """
    data = require_extra("sklearn.datasets", "sklearn", "reading scikit-learn's digits").load_digits()
    order = torch.randperm(len(data.target), generator=torch.Generator().manual_seed(0))
    images = torch.tensor(data.images, dtype=torch.float32)[order]
    return (images - images.mean()) / images.std(), torch.tensor(data.target, dtype=torch.int64)[order]


@dataclass(frozen=True, kw_only=True)
class DigitPatches(LabelTask):
    """A handwritten digit as patches of `size` x `size` pixels, row by row; which digit is it?

        patch 1 (top left) .. patch 16 (bottom right), 4 grey values each  ->  7

    1,400 digits are drawn from in training, with replacement; the score is that of the other 397, each once. The same
    patches in another order are another digit, or none: a model that does not know the order sees a bag of patches.
    Chance: 0.1. Optimum: 1. Source: [lion] Works when 7. Raises: MissingExtra without scikit-learn.
    """

    size: int = 2
    part: Literal["train", "test"] = "train"

    classes = 10

    def __post_init__(self) -> None:
        if self.size not in (1, 2, 4):
            raise ValueError(f"DigitPatches: an image of 8 x 8 is not made of patches of {self.size} x {self.size}; "
                             "use size 1, 2 or 4")

    @property
    def channels(self) -> int:
        return self.size**2

    def _patches(self, images: Tensor) -> Tensor:
        return rearrange(images, "b (r p) (c q) -> b (r c) (p q)", p=self.size, q=self.size)

    def sample(self, batch: int, generator: torch.Generator) -> Batch:
        images, labels = digits()
        first, last = (0, TRAINED) if self.part == "train" else (TRAINED, len(labels))
        chosen = torch.randint(first, last, (batch,), generator=generator)
        return Batch(self._patches(images[chosen]), labels[chosen])

    @torch.no_grad()
    def score(self, model: SequenceModelLayer, seed: int) -> float:
        """Share of the test digits that are named right, each once, whatever the seed."""
        images, labels = (part[TRAINED:].to(next(model.parameters()).device) for part in digits())
        model.eval()
        return float((model(self._patches(images)).logits.argmax(-1) == labels).double().mean())

    def tests(self) -> Mapping[str, Task]:
        return {"score": replace(self, part="test")}


@dataclass(frozen=True, kw_only=True)
class DigitPixels(DigitPatches):
    """A handwritten digit, one pixel at a time; which digit is it?

        0 0 5 13 9 1 0 0 ... (256 grey values)  ->  0

    As `DigitPatches`, with every pixel repeated 2 x 2 first: 256 tokens of one value, row by row. Chance: 0.1. Optimum: 1.
    Source: [s4d] Works when 7 (b). Raises: MissingExtra without scikit-learn.
    """

    size: int = 1

    def _patches(self, images: Tensor) -> Tensor:
        return super()._patches(images.repeat_interleave(2, 1).repeat_interleave(2, 2))
