"""Bytes of real text that every machine has: the documentation topics that ship with the interpreter."""

from __future__ import annotations

import functools
import importlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from seqloom.models.sequence import SequenceModelLayer
from seqloom.tasks.base import Batch, Task, TokenTask, at_each


@functools.lru_cache(maxsize=1)
def topics() -> Tensor:
    """All topics of `pydoc_data.topics`, one after the other, as bytes [N] (about half a million, by Python's version)."""
    texts = importlib.import_module("pydoc_data.topics").topics
    return torch.frombuffer(bytearray("\n".join(texts[name] for name in sorted(texts)).encode()), dtype=torch.uint8).long()


@dataclass(frozen=True, kw_only=True)
class TopicBytes(TokenTask):
    """Python's own documentation, byte by byte: which byte comes next?

        T h e _ " i f " _ s t a t e m e n  ->  h e _ " i f " _ s t a t e m e n t

    Windows of `length` bytes; the last tenth of the text is held out and read whole, in windows, once each. Score: the
    share of a byte's 8 bits that the model saves, 1 - bits per byte / 8: 0 for the uniform guess, about 0.4 for one by the
    bytes' frequencies; the optimum is not known. Source: [cottention] Works when 7.
    """

    length: int = 64
    part: Literal["train", "test"] = "train"
    test_lengths: tuple[int, ...] = ()

    vocab = 256
    classes = 256
    chance = 0.0

    def _text(self) -> Tensor:
        text = topics()
        cut = len(text) * 9 // 10
        return text[:cut] if self.part == "train" else text[cut:]

    def sample(self, batch: int, generator: torch.Generator) -> Batch:
        text = self._text()
        start = torch.randint(len(text) - self.length, (batch, 1), generator=generator)
        rows = text[start + torch.arange(self.length + 1)]
        return Batch(rows[:, :-1], rows[:, 1:])

    @torch.no_grad()
    def score(self, model: SequenceModelLayer, seed: int) -> float:
        """1 - bits per byte / 8 over the windows of this task's part, whatever the seed."""
        text, device = self._text(), next(model.parameters()).device
        count = (len(text) - 1) // self.length
        inputs, targets = (text[i : i + count * self.length].reshape(count, self.length) for i in (0, 1))
        model.eval()
        rows, nats = max(8192 // self.length, 1), 0.0
        for some in torch.arange(count).split(rows):
            one, wanted = Batch(inputs[some], targets[some]).to(device)
            nats += float(self.loss(model(one), wanted)) * one.numel()
        return 1 - nats / (count * self.length * math.log(2) * 8)

    def tests(self) -> Mapping[str, Task]:
        return at_each(replace(self, part="test"), "test_lengths", "length", "at_length_{}")
