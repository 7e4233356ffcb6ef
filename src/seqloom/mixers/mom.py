"""Mixture of memories: several memories of one linear mixer, of which each token writes to and reads from a few.

    S^m <- rule(S^m; k^m_t, v^m_t, ...) for the chosen m, the others neither change nor decay;   k^m = W_k^m x, v^m = W_v^m x
    y_t = W_o (RMSNorm(sum_m w_m S^m' q_t + S^shared' q_t) * SiLU(W_g x_t))      w = softmax(W x) of the chosen, normalised

The rule is any of the scans below. Queries, convolutions and the decay's rate are shared by all memories, so are all
projections with `single_kv`; the shared memory takes every token, with weight 1. Each memory is a sequence of its own: the
convolution's taps are a token's predecessors in that memory.
Every memory runs over all tokens and holds at those that are not its own. So shapes are fixed, at M / k times the work in
scan and projections of a layout that gathers each memory's tokens.
With k = 1 the share is always 1, and the router learns from the balance loss alone.
aux: balance_loss [M] (times `balance`), load [M]: the share of tokens that chose each memory, routing [B, T, M]: probabilities.
Source: [mom] Method.  State: S [B, M (+ 1), H, K, V] and each memory's convolution tail, constant in T.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor

from seqloom.core import BuildContext, Info, Mixer, Placement, Segments, Spec
from seqloom.core.mixer import accumulator
from seqloom.mixers.delta import EPS, ERASE
from seqloom.mixers.linear import CAUSAL
from seqloom.parts import GatedRMSNorm, RMSNorm, ShortConv, l2_normalise, linear
from seqloom.parts.heads import head_widths
from seqloom.parts.init import rate_and_step
from seqloom.parts.router import Routing, TopKRouter, balance

# rule -> forms, whether writes have a strength beta, whether the memory decays
RULES = {"gated_delta": (ERASE, True, True), "delta": (ERASE, True, False), "decay": (CAUSAL, False, True),
         "additive": (CAUSAL, False, False)}


@dataclass(frozen=True, kw_only=True)
class MixtureOfMemories(Spec):
    heads: int
    key_dim: int | None = None    # per head; None: dim / heads
    value_dim: int | None = None  # per head; None: dim / heads
    memories: int = 4             # M, without the shared one
    active: int = 2               # k, memories that each token chooses
    shared: bool = True           # one more memory, which takes every token
    single_kv: bool = False       # one projection to keys, values, beta and decay for all memories
    rule: Literal["gated_delta", "delta", "decay", "additive"] = "gated_delta"
    conv: int = 4                 # width of the short convolution on q, k, v; 0 is none
    gate: Literal["none", "silu"] = "silu"
    balance: float = 0.01         # weight of the routing balance loss
    norm_eps: float = EPS         # of the output norm

    key: ClassVar[str] = "mom"
    equation: ClassVar[str] = "S^m_t = rule(S^m_{t-1}, k^m_t, v^m_t) for chosen m;  y_t = sum_m w_m S^m_t' q_t"
    source: ClassVar[str] = "mom"
    examples: ClassVar[dict] = {
        "": dict(heads=2),
        "additive": dict(heads=2, memories=3, rule="additive", single_kv=True, key_dim=8, value_dim=12),
        "delta": dict(heads=2, memories=3, active=2, shared=False, rule="delta", conv=0, gate="none"),
        "decay": dict(heads=1, memories=2, active=2, rule="decay"),
    }

    @property
    def forms(self) -> dict:
        return RULES[self.rule][0]

    def __post_init__(self) -> None:
        if not 1 <= self.active <= self.memories:
            raise ValueError(f"MixtureOfMemories: a token chooses 1 to {self.memories} of {self.memories} memories, not "
                             f"active={self.active}")

    def build(self, ctx: BuildContext) -> MixtureOfMemoriesLayer:
        return MixtureOfMemoriesLayer(self, ctx)


class Cells(NamedTuple):
    memory: Tensor       # [B, R, H, K, V], R = M and the shared one, which is last
    tail: Tensor | None  # [B, R, conv - 1, 2 H K + H V]


class MixtureOfMemoriesLayer(Mixer):
    """Projections to keys, values, beta and decay are stacked by memory, the shared one last."""

    def __init__(self, spec: MixtureOfMemories, ctx: BuildContext):
        super().__init__(spec)
        heads = spec.heads
        self.key, self.value = head_widths(ctx.dim, spec)
        self.rows = spec.memories + spec.shared
        sets = 1 if spec.single_kv else self.rows
        _, strength, decay = RULES[spec.rule]
        self.router = TopKRouter(ctx.dim, spec.memories, spec.active)
        self.q_proj = linear(ctx.dim, heads * self.key)
        self.k_proj = linear(ctx.dim, sets * heads * self.key)
        self.v_proj = linear(ctx.dim, sets * heads * self.value)
        self.b_proj = linear(ctx.dim, sets * heads) if strength else None
        self.a_proj = linear(ctx.dim, sets * heads) if decay else None
        if decay:  # as in gated DeltaNet
            self.A_log, self.dt_bias = rate_and_step(heads)
        self.conv = ShortConv(heads * (2 * self.key + self.value), spec.conv) if spec.conv else None
        self.g_proj = linear(ctx.dim, heads * self.value) if spec.gate == "silu" else None
        self.o_norm = (RMSNorm if self.g_proj is None else GatedRMSNorm)(self.value, spec.norm_eps)
        self.o_proj = linear(heads * self.value, ctx.dim, depth=ctx.depth)

    def mix(self, x: Tensor, cells: Cells | None, place: Placement, info: Info, donate: bool) -> tuple[Tensor, Any, dict]:
        cells = self.empty(x.shape[0], None, x.dtype, x.device) if cells is None else cells
        routing = self.router(x)
        rows = self._rows(routing, place.segments)
        q, k, v, tail = self._streams(x, cells.tail, rows)
        y, memory, _ = self.run(q, k, v, *self._gates(x), state=cells.memory.flatten(0, 1), segments=rows)
        y = self._read(rearrange(y, "(b r) t h v -> b t r h v", r=self.rows), routing)
        if self.g_proj is None:
            y = self.o_norm(y)
        else:
            y = self.o_norm(y, rearrange(self.g_proj(x), "b t (h v) -> b t h v", v=self.value))
        loss, load = balance(routing, place.segments)
        aux = {"balance_loss": self.spec.balance * loss, "load": load.detach(), "routing": routing.probability.detach()}
        return self.o_proj(y.flatten(-2)), Cells(memory.unflatten(0, (-1, self.rows)), tail), aux

    def _rows(self, routing: Routing, segments: Segments | None) -> Segments | None:
        """Every memory of every sample as a row [B R, T] that holds at tokens of others. A boundary is one for all memories,
        also where its first token goes elsewhere."""
        if segments is None:
            if self.spec.active == self.spec.memories:
                return None
            real = torch.ones_like(routing.chosen[..., 0])
            segments = Segments(real, torch.zeros_like(real, dtype=torch.int64))
        chosen = F.pad(routing.chosen, (0, self.rows - self.spec.memories), value=True)
        real = rearrange(chosen & segments.real[..., None], "b t r -> (b r) t")
        return Segments(real, segments.run.repeat_interleave(self.rows, 0))

    def _streams(self, x: Tensor, tail: Tensor | None, rows: Segments | None) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        q = repeat(self.q_proj(x), "b t d -> (b r) t d", r=self.rows)
        qkv = torch.cat([q, self._by_row(self.k_proj(x)), self._by_row(self.v_proj(x))], -1)
        if self.conv is None:
            qkv = F.silu(qkv)
        else:
            qkv, tail, _ = self.conv(qkv, None if tail is None else tail.flatten(0, 1), rows)
            tail = tail.unflatten(0, (-1, self.rows))
        heads, key = self.spec.heads, self.key
        qk, v = qkv.split((2 * heads * key, heads * self.value), -1)
        q, k = l2_normalise(rearrange(qk, "b t (two h k) -> b t two h k", two=2, h=heads)).unbind(2)
        return q * key**-0.5, k, rearrange(v, "b t (h v) -> b t h v", h=heads), tail

    def _by_row(self, x: Tensor) -> Tensor:
        """A projection [B, T, (R D)] as rows [(B R), T, D]; one that all memories share is repeated."""
        if self.spec.single_kv:
            return repeat(x, "b t d -> (b r) t d", r=self.rows)
        return rearrange(x, "b t (r d) -> (b r) t d", r=self.rows)

    def _gates(self, x: Tensor) -> list[Tensor]:
        """beta in (0, 1) and log decay <= 0, [B R, T, H] in float32 or wider, as far as the rule has them."""
        wide, found = accumulator(x.dtype), []
        if self.b_proj is not None:
            found.append(self._by_row(self.b_proj(x).to(wide).sigmoid()))
        if self.a_proj is not None:
            step = F.softplus(self._by_row(self.a_proj(x)).to(wide) + self.dt_bias.to(wide))
            found.append(-self.A_log.to(wide).exp() * step)
        return found

    def _read(self, y: Tensor, routing: Routing) -> Tensor:
        """Outputs [b t r h v] of the memories by the router's shares; the shared one counts 1."""
        weight = F.pad(routing.weight, (0, self.rows - self.spec.memories), value=1.0)
        return torch.einsum("btrhv,btr->bthv", y.to(weight.dtype), weight).to(y.dtype)

    def empty(self, batch: int, capacity: int | None, dtype: torch.dtype, device: Any) -> Cells:
        shape = (batch, self.rows, self.spec.heads, self.key, self.value)
        memory = torch.zeros(shape, dtype=accumulator(dtype), device=device)
        tail = None if self.conv is None else self.conv.empty(batch * self.rows, dtype, device).unflatten(0, (batch, self.rows))
        return Cells(memory, tail)
