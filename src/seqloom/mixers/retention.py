"""Retention: linear attention with a fixed decay per head, from short to long memories, and rotated queries and keys.

    S_t = g_h S_{t-1} + k_t v_t'      g_h = 1 - 2^(-5-h), h = 0 .. H-1
    y_t = W_o (RMSNorm(S_t' q_t) * SiLU(W_g x_t))      q, k turned by rotary positions

Bidirectional: y_i sums g_h^|i-j| (q_i' k_j) v_j over the whole segment ([lion] Method 2, LION-D).
Source: [mamba-360] Method 10. xPos turns queries and keys and decays their product by g_h^(i-j): the turning is here,
the decay is in the scan. The norm is over each head's values, with one weight for all heads, in place of a GroupNorm.
State: S, [B, H, K, V], constant in T.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from einops import rearrange
from torch import Tensor

from seqloom.core import BuildContext, Info, Mixer, Placement, Spec
from seqloom.core.mixer import accumulator
from seqloom.mixers.linear import BIDIRECTIONAL, CAUSAL
from seqloom.parts import GatedRMSNorm, RMSNorm, linear
from seqloom.parts.heads import head_widths
from seqloom.parts.positions import Rope, rotate


@dataclass(frozen=True, kw_only=True)
class Retention(Spec):
    heads: int
    key_dim: int | None = None    # per head; None: dim / heads
    value_dim: int | None = None  # per head; None: dim / heads
    decay: Literal["per_head", "none"] = "per_head"
    position: Literal["rope", "none"] = "rope"
    theta: float = 10000.0        # channel pair i of a head turns by theta^(-2i/K) a token
    gate: Literal["silu", "none"] = "silu"
    norm_eps: float = 1e-6        # of the output norm
    direction: Literal["causal", "bidirectional"] = "causal"

    key: ClassVar[str] = "retention"
    equation: ClassVar[str] = "S_t = (1 - 2^(-5-h)) S_{t-1} + k_t v_t';  y_t = S_t' q_t"
    source: ClassVar[str] = "mamba-360"
    examples: ClassVar[dict] = {
        "": dict(heads=2),
        "plain": dict(heads=2, key_dim=6, value_dim=12, position="none", gate="none"),
        "still": dict(heads=2, decay="none"),
        "bidirectional": dict(heads=2, direction="bidirectional"),
    }

    @property
    def forms(self) -> dict:
        return CAUSAL if self.causal else BIDIRECTIONAL

    def build(self, ctx: BuildContext) -> RetentionLayer:
        return RetentionLayer(self, ctx)


class Cells(NamedTuple):
    memory: Tensor  # [B, H, K, V]


class RetentionLayer(Mixer):
    def __init__(self, spec: Retention, ctx: BuildContext):
        super().__init__(spec)
        heads = spec.heads
        self.key, self.value = head_widths(ctx.dim, spec)
        self.widths = (2 * heads * self.key, heads * self.value)
        self.rope = None
        if spec.position == "rope":
            self.rope, self.uses = Rope(self.key, theta=spec.theta), self.uses | {"positions"}
        self.qkv = linear(ctx.dim, sum(self.widths))
        self.g_proj = linear(ctx.dim, heads * self.value) if spec.gate == "silu" else None
        self.o_norm = (RMSNorm if self.g_proj is None else GatedRMSNorm)(self.value, spec.norm_eps)
        self.o_proj = linear(heads * self.value, ctx.dim, depth=ctx.depth)

    def mix(self, x: Tensor, cells: Cells | None, place: Placement, info: Info, donate: bool) -> tuple[Tensor, Any, dict]:
        heads = self.spec.heads
        qk, v = self.qkv(x).split(self.widths, -1)
        qk, v = (rearrange(part, "b t (h d) -> b t h d", d=d) for part, d in ((qk, self.key), (v, self.value)))
        if self.rope is not None:
            qk = rotate(qk, *self.rope.angles(place.positions, x.dtype))
        q, k = qk.split(heads, 2)
        memory = None
        if self.spec.causal:
            memory = self.empty(x.shape[0], None, x.dtype, x.device).memory if cells is None else cells.memory
        y, memory, _ = self.run(q * self.key**-0.5, k, v, *self._log_decay(x), state=memory, segments=place.segments)
        if self.g_proj is None:
            y = self.o_norm(y)
        else:
            y = self.o_norm(y, rearrange(self.g_proj(x), "b t (h v) -> b t h v", h=heads))
        return self.o_proj(rearrange(y, "b t h v -> b t (h v)")), Cells(memory), {}

    def _log_decay(self, x: Tensor) -> tuple[Tensor, ...]:
        """log g_h for every token, [B, T, H] in float32 or wider."""
        if self.spec.decay == "none":
            return ()
        # log1p: 1 - 2^(-5-h) has few digits of the decay left in many heads, and its logarithm fewer
        # made on the device: a copy from the host would wait, and cannot be part of a CUDA graph
        heads = torch.arange(self.spec.heads, dtype=accumulator(x.dtype), device=x.device)
        return (torch.log1p(-torch.exp2(-5 - heads)).expand(*x.shape[:2], -1),)

    def empty(self, batch: int, capacity: int | None, dtype: torch.dtype, device: Any) -> Cells:
        return Cells(torch.zeros(batch, self.spec.heads, self.key, self.value, dtype=accumulator(dtype), device=device))
