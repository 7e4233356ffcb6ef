"""What the states of an untrained state space model hold of the past."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from seqloom.core import BuildContext
from seqloom.kernels import diagonal_scan
from seqloom.mixers import S4D
from seqloom.tasks.synthetic.signals import band_limited


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
