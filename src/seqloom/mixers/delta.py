"""DeltaNet: linear attention that overwrites. What the state returns for a key is erased before the new value is written.

    S_t = (I - b_t k_t k_t') S_{t-1} + b_t k_t v_t'      y_t = W_o RMSNorm(S_t' q_t)      b_t = sigmoid(W_b x_t)

q and k are normalised per head, after the short convolution and the activation; q is scaled by K^-1/2.
Source: [deltanet] Method.  State: S [B, H, K, V] and the convolution's tail, constant in T.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal, NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from seqloom.core import BuildContext, Info, Mixed, Mixer, Placement, Spec, scan
from seqloom.core.mixer import accumulator
from seqloom.kernels import decay_scan, delta_scan
from seqloom.parts import GatedRMSNorm, RMSNorm, ShortConv, l2_normalise, linear
from seqloom.parts.heads import head_widths


def _adding(form: Callable[..., Mixed]) -> Callable[..., Mixed]:
    """The same streams without the erasure: S_t = a_t S_{t-1} + b_t k_t v_t'."""

    def run(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, *log_a: Tensor, **options: Any) -> Mixed:
        wide = accumulator(v.dtype)
        y, state, _ = form(q, k, beta.to(wide)[..., None] * v.to(wide), *log_a, **options)
        return Mixed(y.to(v.dtype), state)

    return run


ERASE = {"recurrent": partial(scan, delta_scan.step), "chunked": delta_scan.chunked, "parallel": delta_scan.parallel,
         "fused": delta_scan.fused}
ADD = {"recurrent": _adding(partial(scan, decay_scan.step)), "chunked": _adding(decay_scan.chunked),
       "parallel": _adding(decay_scan.parallel)}
ACTIVATIONS = {"silu": F.silu, "elu": lambda x: F.elu(x) + 1, "relu": F.relu, "none": lambda x: x}
EPS = 1e-5  # of the output norm


@dataclass(frozen=True, kw_only=True)
class DeltaNet(Spec):
    heads: int
    key_dim: int | None = None    # per head; None: dim / heads
    value_dim: int | None = None  # per head; None: dim / heads
    conv: int = 4                 # width of the short convolution on q, k, v; 0 is none
    activation: Literal["silu", "elu", "relu", "none"] = "silu"  # of q and k; v takes SiLU
    key_norm: Literal["l2", "sum"] = "l2"
    beta: Literal["learned", "one"] = "learned"
    neg_eigval: bool = False      # beta in (0, 2): the transition may have an eigenvalue in (-1, 1)
    gate: Literal["none", "silu"] = "none"
    erase: bool = True            # False: plain additive linear attention with the same parameters and keys
    key_heads: int | None = None  # heads of queries and keys, each for heads / key_heads heads of values; None: heads
    norm_eps: float = EPS         # of the output norm

    key: ClassVar[str] = "delta"
    equation: ClassVar[str] = "S_t = (I - b_t k_t k_t') S_{t-1} + b_t k_t v_t';  y_t = S_t' q_t"
    source: ClassVar[str] = "deltanet"
    examples: ClassVar[dict] = {
        "": dict(heads=2),
        "neg_eigval": dict(heads=2, key_dim=8, value_dim=12, neg_eigval=True, gate="silu"),
        "sum": dict(heads=2, conv=0, activation="elu", key_norm="sum"),
        "relu": dict(heads=2, activation="relu", beta="one"),
        "none": dict(heads=2, activation="none"),
        "adding": dict(heads=2, erase=False),
        "grouped": dict(heads=4, key_heads=2, key_dim=6, value_dim=10, gate="silu"),
    }

    @property
    def forms(self) -> dict:
        return ERASE if self.erase else ADD

    def __post_init__(self) -> None:
        if self.key_norm == "sum" and self.activation not in ("elu", "relu"):
            raise ValueError(f"{type(self).__name__}: key_norm='sum' needs keys >= 0, and activation={self.activation!r} gives "
                             "both signs; use activation='elu' or 'relu'")
        keys = self.key_heads or self.heads
        if keys < 1 or self.heads % keys:
            near = max(n for n in range(1, self.heads + 1) if self.heads % n == 0 and n <= max(keys, 1))
            raise ValueError(f"{type(self).__name__}: {self.heads} heads of values do not share {keys} heads of keys; "
                             f"nearest is {near}")

    def build(self, ctx: BuildContext) -> DeltaNetLayer:
        return DeltaNetLayer(self, ctx)


class Cells(NamedTuple):
    memory: Tensor       # [B, H, K, V]
    tail: Tensor | None  # [B, conv - 1, 2 H K + H V]; with n steps a token, (1 + n) H K + n H V


class DeltaNetLayer(Mixer):
    """`steps`: keys, values and betas a token (mixers/delta_product.py); rows of the projections are laid out "(n h d)"."""

    def __init__(self, spec: DeltaNet, ctx: BuildContext, steps: int = 1):
        super().__init__(spec)
        heads, self.steps = spec.heads, steps
        self.key, self.value = head_widths(ctx.dim, spec)
        self.key_heads = spec.key_heads or heads
        self.widths = ((1 + steps) * self.key_heads * self.key, steps * heads * self.value)
        self.qkv = linear(ctx.dim, sum(self.widths))
        self.conv = None
        if spec.conv:
            self.conv = ShortConv(sum(self.widths), spec.conv, activation="silu" if spec.activation == "silu" else None)
        self.b_proj = linear(ctx.dim, steps * heads) if spec.beta == "learned" else None
        self.g_proj = linear(ctx.dim, heads * self.value) if spec.gate == "silu" else None
        self.o_norm = (RMSNorm if self.g_proj is None else GatedRMSNorm)(self.value, spec.norm_eps)
        self.o_proj = linear(heads * self.value, ctx.dim, depth=ctx.depth)

    def mix(self, x: Tensor, cells: Cells | None, place: Placement, info: Info, donate: bool) -> tuple[Tensor, Any, dict]:
        q, k, v, tail = self._streams(x, cells, place)
        decay = self._log_decay(x)
        memory = self._memory(x.shape[0], x.dtype, x.device) if cells is None else cells.memory
        y, memory, _ = self.run(q, k, v, self._beta(x), *decay, state=memory, segments=place.segments)
        if self.g_proj is None:
            y = self.o_norm(y)
        else:
            y = self.o_norm(y, rearrange(self.g_proj(x), "b t (h v) -> b t h v", h=self.spec.heads))
        return self.o_proj(rearrange(y, "b t h v -> b t (h v)")), Cells(memory, tail), {}

    def _streams(self, x: Tensor, cells: Cells | None, place: Placement) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        spec, tail = self.spec, None
        qkv = self.qkv(x)
        if self.conv is not None:
            qkv, tail, _ = self.conv(qkv, None if cells is None else cells.tail, place.segments)
        qk, v = qkv.split(self.widths, -1)
        if self.conv is None or spec.activation != "silu":  # else the convolution has applied it to all three
            qk, v = ACTIVATIONS[spec.activation](qk), F.silu(v)
        q_and_k = rearrange(qk, "b t (m h k) -> b t m h k", h=self.key_heads, k=self.key)
        if spec.key_norm == "l2":
            q_and_k = l2_normalise(q_and_k)
        else:
            q_and_k = q_and_k / (q_and_k.sum(-1, keepdim=True) + 1e-6)
        if self.key_heads != spec.heads:  # values side by side share a key
            q_and_k = q_and_k.repeat_interleave(spec.heads // self.key_heads, 3)
        q, k = q_and_k.split((1, self.steps), 2)
        v = rearrange(v, "b t (n h v) -> b t n h v", n=self.steps, h=spec.heads)
        return q.squeeze(2) * self.key**-0.5, self._one(k), self._one(v), tail

    def _one(self, x: Tensor) -> Tensor:
        """What a token has of each step [b t n h ..]; without the axis where n is 1."""
        return x.squeeze(2) if self.steps == 1 else x

    def _beta(self, x: Tensor) -> Tensor:
        """The strength of each write, [B, T, (n,) H] in float32 or wider: near 2 a reflection is lost to rounding."""
        wide = accumulator(x.dtype)
        if self.b_proj is None:
            beta = torch.ones(*x.shape[:2], self.steps * self.spec.heads, dtype=wide, device=x.device)
        else:
            beta = self.b_proj(x).to(wide).sigmoid()
        beta = self._one(rearrange(beta, "b t (n h) -> b t n h", n=self.steps))
        return 2 * beta if self.spec.neg_eigval else beta

    def _log_decay(self, x: Tensor) -> tuple[Tensor, ...]:
        """No stream of decays here; gated DeltaNet has one."""
        return ()

    def _memory(self, batch: int, dtype: torch.dtype, device: Any) -> Tensor:
        return torch.zeros(batch, self.spec.heads, self.key, self.value, dtype=accumulator(dtype), device=device)

    def empty(self, batch: int, capacity: int | None, dtype: torch.dtype, device: Any) -> Cells:
        tail = None if self.conv is None else self.conv.empty(batch, dtype, device)
        return Cells(self._memory(batch, dtype, device), tail)
