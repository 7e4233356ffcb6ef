"""How the outputs of an untrained linear attention grow with the number of tokens it has summed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

from seqloom.core import BuildContext
from seqloom.mixers import LinearAttention


@dataclass(frozen=True, kw_only=True)
class GrowthOfSums:
    """Root mean square of the output against the number t of tokens, on noise and on tokens that share a direction.

        q, k, v ~ N(0, 1)      ->  rms(o_t) ~ t^(1/2 - e)
        q, k, v ~ N(shift, 1)  ->  rms(o_t) ~ t^(1 - e)         for sums divided by t^e

    No training: one head of `dim` channels reads q, k and v as they are drawn, over `series` rows. Slopes are fitted to
    log rms against log t from `first` to `length`. Scores: "slope" on noise and "shared_slope"; "score", 1 less the larger
    deviation of the two from theory, 1 at best, with the e that the arm starts with (0 without normaliser, 1 for "mean");
    "growth", the rms at `length` over that at `first`, on noise. Source: [cottention] Works when 8.
    """

    dim: int = 16
    series: int = 64
    first: int = 16
    length: int = 1024
    shift: float = 2.0

    def measure(self, arm: LinearAttention, seed: int) -> Mapping[str, float]:
        """`arm` is a causal spec; its heads and widths are replaced."""
        width = 3 * self.dim
        layer = replace(arm, heads=1, key_dim=self.dim, value_dim=self.dim).build(BuildContext(dim=width)).double()
        power = {"none": 0.0, "mean": 1.0}.get(arm.normaliser)
        if power is None:
            power = float(layer.m.detach().sigmoid())
        make = torch.Generator().manual_seed(seed)
        x = torch.randn(self.series, self.length, width, generator=make, dtype=torch.float64)
        with torch.no_grad():
            layer.qkv.weight.copy_(torch.eye(width))
            layer.out.weight.copy_(torch.eye(width)[:, : self.dim])
            sizes = [layer(value).y[..., : self.dim].square().mean((0, 2)).sqrt() for value in (x, x + self.shift)]
        slope, shared = (self._slope(size) for size in sizes)
        return {
            "score": 1 - max(abs(slope - 0.5 + power), abs(shared - 1 + power)),
            "slope": slope,
            "shared_slope": shared,
            "growth": float(sizes[0][-1] / sizes[0][self.first - 1]),
        }

    def _slope(self, size: torch.Tensor) -> float:
        at = torch.arange(self.first, self.length + 1, dtype=torch.float64).log()
        logs = size[self.first - 1 :].log()
        return float(((at - at.mean()) * (logs - logs.mean())).sum() / (at - at.mean()).square().sum())
