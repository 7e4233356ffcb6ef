"""Initial values. A layer initialises what it makes; nothing re-initialises a layer from outside."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from seqloom.core.marks import mark

STD = 0.02


def linear(inputs: int, outputs: int, *, bias: bool = False, std: float = STD, depth: int | None = None) -> nn.Linear:
    """A linear map with weights N(0, std^2) and zero bias; `depth` divides std by sqrt(2 depth) (residual outputs)."""
    layer = nn.Linear(inputs, outputs, bias=bias)
    with torch.no_grad():
        layer.weight.normal_(0.0, std / math.sqrt(2 * depth) if depth else std)
        if bias:
            layer.bias.zero_()
    return layer


def step_bias(count: int, least: float = 1e-3, most: float = 1e-1, floor: float = 0.0) -> Tensor:
    """[count] numbers whose softplus is a step: log-uniform from `least` to `most`, and not below `floor`."""
    dt = torch.empty(count).uniform_(math.log(least), math.log(most)).exp().clamp(min=floor)
    return dt + (-(-dt).expm1()).log()


def rate_and_step(heads: int) -> tuple[nn.Parameter, nn.Parameter]:
    """A_log and dt_bias [heads] of a log decay -exp(A_log) softplus(x + dt_bias): rates in (0, 16), steps as `step_bias`."""
    # the lowest rate is kept off 0, whose logarithm would never move
    rate = torch.empty(heads).uniform_(1e-2, 16)
    own = dict(no_decay=True, keep_float32=True)
    return mark(nn.Parameter(rate.log()), **own), mark(nn.Parameter(step_bias(heads)), **own)
