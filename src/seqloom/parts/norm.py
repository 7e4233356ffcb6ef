"""Norms over the last axis, computed in float32 or wider and returned in the input's dtype."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from seqloom.core.forms import run_part
from seqloom.core.marks import mark
from seqloom.kernels import row_norm


class RMSNorm(nn.Module):
    """y = weight * x / sqrt(mean(x^2) + eps)."""

    def __init__(self, dim: int, eps: float = 1e-6):
        super().__init__()
        self.eps = eps
        self.weight = mark(nn.Parameter(torch.ones(dim)), no_decay=True)

    def forward(self, x: Tensor) -> Tensor:
        return run_part(row_norm.RMS_FORMS, x, self.weight, name="rms_norm", eps=self.eps)


class GatedRMSNorm(RMSNorm):
    """y = RMSNorm(x) * SiLU(gate), or RMSNorm(x * SiLU(gate)) with `gate_first` (Mamba-2)."""

    def __init__(self, dim: int, eps: float = 1e-6, gate_first: bool = False):
        super().__init__(dim, eps)
        self.gate_first = gate_first

    def forward(self, x: Tensor, gate: Tensor) -> Tensor:
        return run_part(row_norm.RMS_FORMS, x, self.weight, gate, name="rms_norm", eps=self.eps, gate_first=self.gate_first)


def l2_normalise(x: Tensor, eps: float = 1e-6) -> Tensor:
    """x / sqrt(sum(x^2) + eps): a zero vector stays zero, with a finite gradient."""
    return run_part(row_norm.L2_FORMS, x, name="l2_norm", eps=eps)
