"""The short causal convolution that most linear mixers put before their scan."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from seqloom.core.forms import run_part
from seqloom.core.segments import Segments
from seqloom.core.state import Mixed
from seqloom.kernels import short_conv


class ShortConv(nn.Module):
    """Depthwise causal convolution over `width` tokens, then SiLU (or nothing). State: the tail [B, width - 1, dim]."""

    def __init__(self, dim: int, width: int = 4, *, bias: bool = False, activation: short_conv.Activation | None = "silu"):
        super().__init__()
        bound = 1 / math.sqrt(width)
        self.weight = nn.Parameter(torch.empty(dim, width).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(dim).uniform_(-bound, bound)) if bias else None
        self.activation = activation

    def forward(self, x: Tensor, state: Tensor | None = None, segments: Segments | None = None) -> Mixed:
        return run_part(short_conv.FORMS, x, name="short_conv", weight=self.weight, bias=self.bias, state=state,
                        segments=segments, activation=self.activation)

    def empty(self, batch: int, dtype: torch.dtype, device: torch.device | str | None) -> Tensor:
        dim, width = self.weight.shape
        return torch.zeros(batch, width - 1, dim, dtype=dtype, device=device)
