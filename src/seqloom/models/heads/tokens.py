"""Scores per token (language modelling, tagging) and one answer per sequence (classification, regression)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from seqloom.parts import linear


@dataclass(frozen=True, kw_only=True)
class TokenHead:
    """Scores [B, T, classes] for every token. `tie` uses the stem's embedding table and needs classes = vocabulary."""

    classes: int
    tie: bool = True

    def build(self, dim: int, stem: nn.Module) -> nn.Module:
        if self.tie and (not hasattr(stem, "weight") or stem.weight.shape[0] != self.classes):
            found = stem.weight.shape[0] if hasattr(stem, "weight") else "no table"
            raise ValueError(
                f"TokenHead(tie=True) needs an embedding table of {self.classes} rows, found {found}; use tie=False"
            )
        return TokenHeadLayer(self, dim, stem)


class TokenHeadLayer(nn.Module):
    def __init__(self, spec: TokenHead, dim: int, stem: nn.Module):
        super().__init__()
        self.weight = stem.weight if spec.tie else linear(dim, spec.classes).weight

    def forward(self, x: Tensor, real: Tensor | None = None) -> Tensor:
        return nn.functional.linear(x, self.weight)


@dataclass(frozen=True, kw_only=True)
class PooledHead:
    """One answer [B, classes] per row: the mean over real tokens, or the last real token, then a linear map."""

    classes: int
    pool: Literal["mean", "last"] = "mean"

    def build(self, dim: int, stem: nn.Module) -> nn.Module:
        return PooledHeadLayer(self, dim)


class PooledHeadLayer(nn.Module):
    def __init__(self, spec: PooledHead, dim: int):
        super().__init__()
        self.pool = spec.pool
        self.out = linear(dim, spec.classes, bias=True)

    def forward(self, x: Tensor, real: Tensor | None = None) -> Tensor:
        if real is None:
            real = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)
        if self.pool == "mean":
            count = real.sum(1, keepdim=True).clamp(min=1)
            return self.out(torch.where(real[..., None], x, 0.0).sum(1) / count)
        index = torch.arange(x.shape[1], device=x.device)
        last = torch.where(real, index, 0).amax(1)
        return self.out(x.gather(1, last[:, None, None].expand(-1, 1, x.shape[2]))[:, 0])
