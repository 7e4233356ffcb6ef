"""Routing of tokens to a few of many: computed in float32 or wider, and returned as data."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from seqloom.core.marks import mark
from seqloom.core.mixer import accumulator
from seqloom.core.segments import Segments
from seqloom.parts.init import STD


class Routing(NamedTuple):
    """For each token and choice, [B, T, M]: the share it gets (0 where not chosen; shares sum to 1), whether it is chosen, and
    the probability it was given."""

    weight: Float[Tensor, "b t m"]
    chosen: Bool[Tensor, "b t m"]
    probability: Float[Tensor, "b t m"]


class TopKRouter(nn.Module):
    """p = softmax(W x) over `choices`; the `active` most probable are chosen, and share p among themselves.

    The selection is hard: gradients reach W through the shares alone (none where active is 1, whose share is always 1), and
    through the balance loss. W stays float32 in any cast, since rounding would choose otherwise in training than in use.
    Source: [mom] Method 1.
    """

    def __init__(self, dim: int, choices: int, active: int):
        super().__init__()
        self.active = active
        self.weight = mark(nn.Parameter(torch.randn(choices, dim) * STD), keep_float32=True)

    def forward(self, x: Float[Tensor, "b t d"]) -> Routing:
        wide = accumulator(x.dtype)
        with torch.autocast(x.device.type, enabled=False):
            p = F.linear(x.to(wide), self.weight.to(wide)).softmax(-1)
        if self.active == p.shape[-1]:
            return Routing(p, torch.ones_like(p, dtype=torch.bool), p)
        chosen = torch.zeros_like(p, dtype=torch.bool).scatter(-1, p.topk(self.active, -1).indices, True)
        if self.active == 1:
            return Routing(chosen.to(p.dtype), chosen, p)
        share = torch.where(chosen, p, 0.0)
        return Routing(share / share.sum(-1, keepdim=True), chosen, p)


def balance(routing: Routing, segments: Segments | None = None) -> tuple[Tensor, Tensor]:
    """(loss, load), both [M]: M^2 f_m P_m, whose mean is the loss M sum_m f_m P_m, and f, the share of real tokens that chose
    each; P_m is the mean probability.

    With k choices a token the f_m sum to k, and the loss is k where tokens are spread evenly, up to M where all choose alike.
    Source: [mom] Method 7.
    """
    chosen, p = routing.chosen.to(routing.probability.dtype), routing.probability
    count = chosen.new_full((), p.shape[0] * p.shape[1])
    if segments is not None:
        chosen, p = segments.hold(chosen), segments.hold(p)
        count = segments.real.sum().clamp(min=1)
    load = chosen.sum((0, 1)) / count
    return p.shape[-1] ** 2 * load * (p.sum((0, 1)) / count), load
