"""Continuous signals: what a state space keeps of the past, and images read pixel by pixel."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from seqloom.core import BuildContext
from seqloom.kernels import diagonal_scan
from seqloom.mixers import S4D
from seqloom.tasks.base import Batch, SeriesTask
from seqloom.tasks.digits import DigitPatches


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
class DelayReadout:
    """How much of the past the states of an untrained S4D hold: noise is read back `delay` samples later, by ridge regression.

        u_0 u_1 ... u_t  ->  states h_t at four fixed steps  ->  u_{t-500}

    One channel, `cycles` per 1,024 samples, the arm's poles and discretisation at every step of `steps`; real and imaginary
    parts of all states, after position 900, fitted on 4 series and tested on 2. Score: explained share of the variance,
    1 - MSE / variance. Chance: 0. Optimum: 1. Source: [s4d] Works when 6.
    """

    tokens: int = 2048
    delay: int = 500
    cycles: float = 48.0
    steps: tuple[float, ...] = (1e-3, 2e-3, 4e-3, 1e-2)
    start: int = 900
    fitted: int = 4
    tested: int = 2
    ridge: float = 1e-6  # relative to the mean square of a state

    def measure(self, arm: S4D, seed: int) -> Mapping[str, float]:
        """`arm` is a spec: its poles, discretisation and state size are used, its output map is not."""
        make = torch.Generator().manual_seed(seed)
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(seed)
            layer = arm.build(BuildContext(dim=len(self.steps))).double()
            layer.log_dt.copy_(torch.tensor(self.steps, dtype=torch.float64).log())
            system = layer.system(torch.float64)
        shape = (self.fitted + self.tested, self.tokens)
        u = band_limited(*shape, cycles=self.cycles * self.tokens / 1024, generator=make).double()
        writes = system["b"].flatten() * u[..., None]
        h = diagonal_scan.chunked(system["log_a"].exp().flatten().expand_as(writes), writes).y[:, self.start :]
        h = torch.cat([h.real, h.imag, torch.ones_like(h.real[..., :1])], -1)
        target = u[:, self.start - self.delay : self.tokens - self.delay]
        # columns of one size, so that one ridge suits all; a column of zeros stays
        h = h / h[: self.fitted].square().mean((0, 1)).sqrt().clamp(min=1e-30)
        x, y = h[: self.fitted].flatten(0, 1), target[: self.fitted].flatten()
        gram = x.T @ x + self.ridge * len(x) * torch.eye(x.shape[1], dtype=x.dtype)
        guess = h[self.fitted :] @ torch.linalg.solve(gram, x.T @ y)
        wanted = target[self.fitted :]
        return {"score": float(1 - (guess - wanted).square().mean() / wanted.square().mean())}


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


__all__ = ["Delay", "DelayReadout", "DigitPixels", "band_limited"]
