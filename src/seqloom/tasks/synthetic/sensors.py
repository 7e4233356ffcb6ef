"""A simulated sensor array: a slow quantity has to be read from fast, noisy, drifting channels."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.nn.functional as F
from einops import reduce
from torch import Tensor

from seqloom.data.series import Scale, with_deltas
from seqloom.tasks.base import Batch, SeriesTask, Task
from seqloom.tasks.synthetic.signals import band_limited


@dataclass(frozen=True, kw_only=True)
class TextureSensor(SeriesTask):
    """A finger slides over a texture at a planar velocity v; 12 sensors vibrate, and the velocity of 3 s ago is asked for.

        samples (50 a second)   s1 .. s10 | s11 .. s20 | ...   ->   chunk means of v (5 a second), `delay` chunks late

    A channel is softplus(2 w v) times a carrier of its own, noise of 12 to 20 Hz drawn anew for every sequence, plus a random
    walk (drift) and white noise; its first differences stand beside it, and all are standardised on the training set. v is
    noise up to 1 Hz of unit variance. So the fast scale tells how strong the vibration is, and the slow one remembers.
    coupling="additive" adds the carrier to w v instead: there a chunk's mean says as much as its samples.

    `sequences` fixed sequences are drawn from in training; the score is over fresh ones. Targets before the delay are 0. Score:
    explained share of the variance. Chance: 0. Optimum: below 1, as carriers and noise limit it. Source: [hiss] Works when 6.
    """

    length: int = 400
    chunk: int = 10
    delay: int = 15
    sensors: int = 12
    sequences: int = 64
    coupling: Literal["modulated", "additive"] = "modulated"
    hertz: float = 50.0
    drift: float = 0.1
    noise: float = 0.3
    part: Literal["train", "test"] = "train"

    outputs = 2

    def __post_init__(self) -> None:
        if self.length % self.chunk or not 0 <= self.delay < self.length // self.chunk:
            raise ValueError(f"TextureSensor: {self.length} samples must fill chunks of {self.chunk}, more of them than the "
                             f"delay of {self.delay}; use for example length=400, chunk=10, delay=15")

    @property
    def channels(self) -> int:
        return 2 * self.sensors

    def sample(self, batch: int, generator: torch.Generator) -> Batch:
        inputs, targets, scale = _training_set(replace(self, part="train"))
        if self.part == "test":
            x, y = self.draw(batch, generator)
            return Batch(scale.apply(x), y)
        chosen = torch.randint(self.sequences, (batch,), generator=generator)
        return Batch(inputs[chosen], targets[chosen])

    def tests(self) -> Mapping[str, Task]:
        return {"score": replace(self, part="test")}  # type: ignore[dict-item]

    def draw(self, batch: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Fresh sequences: channels and their differences [B, T, 2 sensors], targets [B, T / chunk, 2]."""
        seconds = 2 * self.length / self.hertz  # drawn twice as long and cut, so that the end does not tell the beginning
        cut = lambda *shape, **band: band_limited(*shape, 2 * self.length, generator=generator, **band)[..., : self.length]  # noqa: E731
        v = cut(batch, 2, cycles=seconds).mT
        carrier = cut(batch, self.sensors, cycles=20 * seconds, least=12 * seconds).mT
        normal = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
        felt = v @ torch.randn(2, self.sensors, generator=torch.Generator().manual_seed(1))  # one array for all sequences
        signal = F.softplus(2 * felt) * carrier if self.coupling == "modulated" else felt + carrier
        walk = self.drift * normal(batch, self.length, self.sensors).cumsum(1)
        x = signal + walk + self.noise * normal(batch, self.length, self.sensors)
        late = F.pad(reduce(v, "b (n k) o -> b n o", "mean", k=self.chunk), (0, 0, self.delay, 0))
        return with_deltas(x), late[:, : self.length // self.chunk]


@functools.lru_cache(maxsize=8)
def _training_set(task: TextureSensor) -> tuple[Tensor, Tensor, Scale]:
    x, y = task.draw(task.sequences, torch.Generator().manual_seed(0))
    scale = Scale.fit(x)
    return scale.apply(x), y, scale
