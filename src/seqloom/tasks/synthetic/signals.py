"""Continuous signals: noise of a band, and the same noise later."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from seqloom.tasks.base import Batch, SeriesTask


def band_limited(*shape: int, cycles: float, generator: torch.Generator, least: float = 0.0) -> Tensor:
    """Noise [..., T] of unit variance in frequencies above `least` and up to `cycles` per T, periodic over T.

    Raises: ValueError if no frequency lies in the band.
    """
    tokens = shape[-1]
    index = torch.arange(tokens // 2 + 1)
    band = (index > least) & (index <= cycles)
    if not band.any():
        raise ValueError(f"no frequency of a signal of {tokens} samples lies above {least:g} and up to {cycles:g} cycles; "
                         "use a wider band")
    parts = torch.randn(*shape[:-1], tokens // 2 + 1, 2, generator=generator)
    spectrum = torch.where(band, torch.view_as_complex(parts), 0.0)
    return torch.fft.irfft(spectrum, n=tokens) * (tokens / math.sqrt(4 * int(band.sum())))


@dataclass(frozen=True, kw_only=True)
class Delay(SeriesTask):
    """Noise in, the same noise `delay` samples later out; before that, zeros.

        u0 u1 u2 u3 u4 u5 ...  ->  0 0 0 u0 u1 u2 ...       (delay 3)

    `cycles` per 512 samples. Score: explained share of the variance, which is (T - delay) / T. Chance: 0. Optimum: 1.
    Source: [s4d] Works when 7 (a).
    """

    length: int = 256
    delay: int = 64
    cycles: float = 24.0

    channels = 1
    outputs = 1

    def sample(self, batch: int, generator: torch.Generator) -> Batch:
        # drawn twice as long, so that the end does not tell the beginning
        u = band_limited(batch, 2 * self.length, cycles=self.cycles * self.length / 256, generator=generator)[:, : self.length]
        late = torch.nn.functional.pad(u, (self.delay, 0))[:, : self.length]
        return Batch(u[..., None], late[..., None])
