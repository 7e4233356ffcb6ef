"""Norms over the last axis, computed in float32 or wider and returned in the input's dtype."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from seqloom.core.marks import mark


class RMSNorm(nn.Module):
    """y = weight * x / sqrt(mean(x^2) + eps)."""

    def __init__(self, dim: int, eps: float = 1e-6):
        super().__init__()
        self.eps = eps
        self.weight = mark(nn.Parameter(torch.ones(dim)), no_decay=True)

    def forward(self, x: Tensor) -> Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        return F.rms_norm(x.to(wide), self.weight.shape, self.weight.to(wide), self.eps).to(x.dtype)


class GatedRMSNorm(RMSNorm):
    """y = RMSNorm(x) * SiLU(gate), or RMSNorm(x * SiLU(gate)) with `gate_first` (Mamba-2)."""

    def __init__(self, dim: int, eps: float = 1e-6, gate_first: bool = False):
        super().__init__(dim, eps)
        self.gate_first = gate_first

    def forward(self, x: Tensor, gate: Tensor) -> Tensor:
        if self.gate_first:
            return super().forward(x * F.silu(gate))
        return super().forward(x) * F.silu(gate)


def l2_normalise(x: Tensor, eps: float = 1e-6) -> Tensor:
    """x / sqrt(sum(x^2) + eps): a zero vector stays zero, with a finite gradient."""
    wide = torch.promote_types(x.dtype, torch.float32)
    x_wide = x.to(wide)
    return (x_wide * torch.rsqrt(x_wide.square().sum(-1, keepdim=True) + eps)).to(x.dtype)
