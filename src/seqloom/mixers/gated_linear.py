"""Gated linear attention: linear attention that forgets by a factor per key channel and token, read from the input.

    S_t = diag(a_t) S_{t-1} + k_t v_t'      log a_t = logsigmoid(W_2 W_1 x_t + b) / 16
    y_t = W_o (RMSNorm(S_t' q_t) * SiLU(W_g x_t))

With `decay="scalar"` one factor per head: log a_t = logsigmoid(w' x_t + b) / 16.
Bidirectional: M_ij is the product of the decays from token j to i (query side, [lion] Method 2), diagonal counted once.
Source: [lion] Method 8 (GLA among the diagonal decays). The product W_2 W_1 has rank 16, and the division by 16 starts
decays near 1: a half-life of 16 tokens where the gate is at 0.
State: S, [B, H, K, V], and the convolution's tail, constant in T.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from seqloom.core import BuildContext, Info, Mixer, Placement, Spec
from seqloom.core.context import split
from seqloom.core.mixer import accumulator
from seqloom.mixers.linear import BIDIRECTIONAL, CAUSAL
from seqloom.parts import GatedRMSNorm, ShortConv, linear


@dataclass(frozen=True, kw_only=True)
class GatedLinearAttention(Spec):
    heads: int
    key_dim: int | None = None    # per head; None: dim / heads / 2
    value_dim: int | None = None  # per head; None: dim / heads
    decay: Literal["vector", "scalar"] = "vector"
    gate_rank: int = 16           # of the map from inputs to vector decays
    tau: float = 16.0             # divides the log decay
    conv: int = 0                 # width of the short convolution on q, k, v; 0 is none
    norm_eps: float = 1e-6        # of the output norm
    direction: Literal["causal", "bidirectional"] = "causal"

    key: ClassVar[str] = "gated_linear"
    equation: ClassVar[str] = "S_t = diag(a_t) S_{t-1} + k_t v_t';  y_t = S_t' q_t;  a_t = sigmoid(W x_t)^(1/16)"
    source: ClassVar[str] = "lion"
    examples: ClassVar[dict] = {
        "": dict(heads=2),
        "conv": dict(heads=2, key_dim=6, value_dim=12, gate_rank=4, tau=1.0, conv=4),
        "scalar": dict(heads=2, decay="scalar", tau=4.0),
        "bidirectional": dict(heads=2, direction="bidirectional"),
        "bidirectional_scalar": dict(heads=2, decay="scalar", direction="bidirectional"),
    }

    @property
    def forms(self) -> dict:
        return CAUSAL if self.causal else BIDIRECTIONAL

    def __post_init__(self) -> None:
        if self.direction == "bidirectional" and self.conv:
            raise ValueError("GatedLinearAttention: the short convolution is causal; use conv=0 with direction='bidirectional'")

    def build(self, ctx: BuildContext) -> GatedLinearAttentionLayer:
        return GatedLinearAttentionLayer(self, ctx)


class Cells(NamedTuple):
    memory: Tensor       # [B, H, K, V]
    tail: Tensor | None  # [B, conv - 1, 2 H K + H V]


class GatedLinearAttentionLayer(Mixer):
    def __init__(self, spec: GatedLinearAttention, ctx: BuildContext):
        super().__init__(spec)
        heads = spec.heads
        # dim has to split over the heads only where a width per head is left to it
        head = 0 if spec.key_dim and spec.value_dim else split(ctx.dim, heads, "GatedLinearAttention")
        self.key, self.value = spec.key_dim or max(head // 2, 1), spec.value_dim or head
        self.widths = (heads * self.key, heads * self.key, heads * self.value)
        self.qkv = linear(ctx.dim, sum(self.widths))
        self.conv = ShortConv(sum(self.widths), spec.conv) if spec.conv else None
        if spec.decay == "vector":
            self.a_proj = nn.Sequential(linear(ctx.dim, spec.gate_rank), linear(spec.gate_rank, heads * self.key, bias=True))
        else:
            self.a_proj = linear(ctx.dim, heads, bias=True)
        self.g_proj = linear(ctx.dim, heads * self.value)
        self.o_norm = GatedRMSNorm(self.value, spec.norm_eps)
        self.o_proj = linear(heads * self.value, ctx.dim, depth=ctx.depth)

    def mix(self, x: Tensor, cells: Cells | None, place: Placement, info: Info, donate: bool) -> tuple[Tensor, Any, dict]:
        heads, tail = self.spec.heads, None
        qkv = self.qkv(x)
        if self.conv is not None:
            qkv, tail, _ = self.conv(qkv, None if cells is None else cells.tail, place.segments)
        q, k, v = (rearrange(part, "b t (h d) -> b t h d", h=heads) for part in qkv.split(self.widths, -1))
        memory = None
        if self.spec.causal:
            memory = self._memory(x.shape[0], x.dtype, x.device) if cells is None else cells.memory
        y, memory, _ = self.run(q * self.key**-0.5, k, v, self._log_decay(x), state=memory, segments=place.segments)
        y = self.o_norm(y, rearrange(self.g_proj(x), "b t (h v) -> b t h v", h=heads))
        return self.o_proj(rearrange(y, "b t h v -> b t (h v)")), Cells(memory, tail), {}

    def _log_decay(self, x: Tensor) -> Tensor:
        """log a_t <= 0, [B, T, H, K] or [B, T, H] in float32 or wider."""
        gate = self.a_proj(x).to(accumulator(x.dtype))
        log_a = F.logsigmoid(gate) / self.spec.tau
        return rearrange(log_a, "b t (h k) -> b t h k", h=self.spec.heads) if self.spec.decay == "vector" else log_a

    def _memory(self, batch: int, dtype: torch.dtype, device: Any) -> Tensor:
        return torch.zeros(batch, self.spec.heads, self.key, self.value, dtype=accumulator(dtype), device=device)

    def empty(self, batch: int, capacity: int | None, dtype: torch.dtype, device: Any) -> Cells:
        tail = None if self.conv is None else self.conv.empty(batch, dtype, device)
        return Cells(self._memory(batch, dtype, device), tail)
