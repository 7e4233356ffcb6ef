"""Initial values. A layer initialises what it makes; nothing re-initialises a layer from outside."""

from __future__ import annotations

import math

import torch
from torch import nn

STD = 0.02


def linear(inputs: int, outputs: int, *, bias: bool = False, std: float = STD, depth: int | None = None) -> nn.Linear:
    """A linear map with weights N(0, std^2) and zero bias; `depth` divides std by sqrt(2 depth) (residual outputs)."""
    layer = nn.Linear(inputs, outputs, bias=bias)
    with torch.no_grad():
        layer.weight.normal_(0.0, std / math.sqrt(2 * depth) if depth else std)
        if bias:
            layer.bias.zero_()
    return layer
