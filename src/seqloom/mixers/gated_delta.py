"""Gated DeltaNet: DeltaNet whose state also decays, by a factor per head and token.

    S_t = a_t (I - b_t k_t k_t') S_{t-1} + b_t k_t v_t'      log a_t = -exp(A_log) softplus(W_a x_t + dt_bias)
    y_t = W_o (RMSNorm(S_t' q_t) * SiLU(W_g x_t))

The decay clears the whole state at once, the delta rule one key at a time. Everything else is DeltaNet's.
Source: [deltaproduct] Method 2 and 3 at one step a token, [deltanet] for the rest.  State: as DeltaNet's, constant in T.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch.nn.functional as F
from torch import Tensor

from seqloom.core import BuildContext
from seqloom.core.mixer import accumulator
from seqloom.mixers.delta import DeltaNet, DeltaNetLayer
from seqloom.parts import linear
from seqloom.parts.init import rate_and_step


@dataclass(frozen=True, kw_only=True)
class GatedDeltaNet(DeltaNet):
    gate: Literal["none", "silu"] = "silu"

    key: ClassVar[str] = "gated_delta"
    equation: ClassVar[str] = "S_t = a_t (I - b_t k_t k_t') S_{t-1} + b_t k_t v_t';  y_t = S_t' q_t"
    source: ClassVar[str] = "deltaproduct"
    examples: ClassVar[dict] = {
        "": dict(heads=2),
        "neg_eigval": dict(heads=2, key_dim=8, value_dim=12, neg_eigval=True, gate="none", conv=0),
        "adding": dict(heads=2, erase=False),
    }

    def build(self, ctx: BuildContext) -> GatedDeltaNetLayer:
        return GatedDeltaNetLayer(self, ctx)


class GatedDeltaNetLayer(DeltaNetLayer):
    def __init__(self, spec: GatedDeltaNet, ctx: BuildContext, steps: int = 1):
        super().__init__(spec, ctx, steps)
        self.a_proj = linear(ctx.dim, spec.heads)
        self.A_log, self.dt_bias = rate_and_step(spec.heads)

    def _log_decay(self, x: Tensor) -> tuple[Tensor, ...]:
        """log a_t <= 0, [B, T, H] in float32 or wider."""
        wide = accumulator(x.dtype)
        return (-self.A_log.to(wide).exp() * F.softplus(self.a_proj(x).to(wide) + self.dt_bias.to(wide)),)
