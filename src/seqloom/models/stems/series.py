"""Real vectors [B, T, C] (samples of sensors, patches of an image) to vectors [B, T, D] by a linear map."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn


@dataclass(frozen=True, kw_only=True)
class SeriesStem:
    channels: int

    def build(self, dim: int) -> SeriesStemLayer:
        return SeriesStemLayer(self, dim)


class SeriesStemLayer(nn.Module):
    def __init__(self, spec: SeriesStem, dim: int):
        super().__init__()
        self.map = nn.Linear(spec.channels, dim)

    def forward(self, values: Tensor) -> Tensor:
        return self.map(values.to(self.map.weight.dtype))
