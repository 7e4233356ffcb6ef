"""Longhorn: a state space model that forgets only what its key writes over.

    [x, z] = W_in u      x = SiLU(conv_4(x) + b)      [delta, k, q] = W_x x      beta = sigmoid(W_dt delta + b_dt)
    D_t = beta_t / (1 + beta_t |k_t|^2)
    S_t = (1 - D_t (x) k_t^2) * S_{t-1} + (D_t * x_t) (x) k_t      y_t = S_t q_t + D x_t
    out = W_out (y * SiLU(z))

Row i of the state S [E, N] is asked to return x_i for the key k. What is above is the diagonal of the exact answer

    S_t = argmin |S - S_{t-1}|^2 + sum_i beta_{t,i} (S_i k_t - x_{t,i})^2
    S_{t,i} = (I - D_{t,i} k_t k_t') S_{t-1,i} + D_{t,i} x_{t,i} k_t

an implicit gradient step: stable whatever the length of the key, and without a decay of its own. The paper's theory is of
the exact update, its experiments of the diagonal one.

The exact update is a delta rule. With one beta per channel it has no common transition: each channel solves its own
triangular systems, in chunks of C = 16 tokens with O(T E (C + N)) memory, for the keys stand E times in it, [B, T, E, N], and
O(T E (C + N)^2) time. With `heads`, groups of channels share a beta, and each group is one delta rule at DeltaNet's cost.

Source: [longhorn] Method 1 to 5. State: S, [B, E, N] (exact: [B, H, N, E / H]), and the convolution's tail, constant in T.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial, wraps
from typing import Any, ClassVar, Literal, NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from jaxtyping import Float
from torch import Tensor, nn

from seqloom.core import BuildContext, Info, Mixed, Mixer, Placement, Segments, Spec, scan
from seqloom.core.context import split
from seqloom.core.marks import mark
from seqloom.core.mixer import accumulator
from seqloom.kernels import delta_scan, selective_scan
from seqloom.parts import ShortConv

WHOLE, SINGLE = 64, 16  # tokens of a chunk of the exact update: its weights are C x C a head, which may be one channel

DIAGONAL = {"recurrent": selective_scan.recurrent, "chunked": selective_scan.chunked, "parallel": selective_scan.parallel,
            "fused": selective_scan.fused}


def step_size(beta: Float[Tensor, "b t h"], k: Float[Tensor, "b t n"]) -> Float[Tensor, "b t h"]:
    """D = beta / (1 + beta |k|^2), differentiated as a whole; D |k|^2 < 1 whatever the key ([longhorn] Method 2)."""
    return beta / (1 + beta * k.square().sum(-1, keepdim=True))


def _additive(form: Callable[..., Mixed]) -> Callable[..., Mixed]:
    """`form` with a decay of exp(0) = 1: S_t = S_{t-1} + (D_t x_t) k_t'."""

    @wraps(form, assigned=())
    def run(x: Tensor, step: Tensor, k: Tensor, q: Tensor, *, A: None, **options: Any) -> Mixed:
        still = torch.zeros(x.shape[-1], k.shape[-1], dtype=accumulator(x.dtype), device=x.device)
        return form(x, step, k, q, A=still, **options)

    return run


def _exact(form: Callable[..., Mixed]) -> Callable[..., Mixed]:
    """A delta-rule form on groups of channels: the values of a head are its channels, and all heads have the same keys."""

    def run(x: Tensor, step: Tensor, k: Tensor, q: Tensor, *, A: None, D: Tensor, state: Tensor | None = None,
            segments: Segments | None = None) -> Mixed:
        wide, heads = accumulator(x.dtype), step.shape[-1]
        if state is None:
            state = x.new_zeros(x.shape[0], heads, k.shape[-1], x.shape[-1] // heads, dtype=wide)
        k, q = (repeat(value, "b t n -> b t h n", h=heads) for value in (k, q))
        v = rearrange(x.to(wide), "b t (h p) -> b t h p", h=heads)
        y, state, _ = form(q, k, v, step, state=state, segments=segments)
        x = x if segments is None else segments.hold(x)
        return Mixed((rearrange(y, "b t h p -> b t (h p)") + D.to(wide) * x).to(x.dtype), state)

    return run


def _chunked(q: Tensor, k: Tensor, v: Tensor, step: Tensor, *, state: Tensor, segments: Segments | None) -> Mixed:
    """By chunks, after padding to a multiple of 64: lengths of a bucket have equally many chunks, so one compiled graph."""
    tokens = v.shape[1]
    extra = -tokens % WHOLE if tokens > SINGLE else 0
    if segments is not None:  # before the pads are 0: what stands at a hold may not be a number
        q, k, v, step = (segments.hold(value) for value in (q, k, v, step))
        segments = segments.pad(extra)
    q, k, v = (F.pad(value, (0, 0, 0, 0, 0, extra)) for value in (q, k, v))
    step = F.pad(step, (0, 0, 0, extra))
    y, state, _ = delta_scan.chunked(q, k, v, step, state=state, segments=segments, chunk=WHOLE if v.shape[-1] > 1 else SINGLE)
    return Mixed(y[:, :tokens], state)


ADDITIVE = {name: _additive(form) for name, form in DIAGONAL.items()}
if selective_scan.has_native():
    ADDITIVE["native"] = _additive(selective_scan.native)
EXACT = {
    "recurrent": _exact(partial(scan, delta_scan.step)),
    "chunked": _exact(_chunked),
    "parallel": _exact(delta_scan.parallel),
}
FORMS = {"diagonal": DIAGONAL, "exact": EXACT, "additive": ADDITIVE}


@dataclass(frozen=True, kw_only=True)
class Longhorn(Spec):
    state: int = 16               # N per channel: the length of keys and queries
    expand: int = 2               # inner width E / model width
    conv: int = 4                 # width of the short convolution
    dt_rank: int | None = None    # of the map from tokens to beta; None: dim / 16, rounded up
    heads: int | None = None      # groups of channels that share a beta; None: each channel has its own
    # of the state: the exact minimiser, its diagonal (which the paper trains), or nothing forgotten, S + D x k'
    update: Literal["diagonal", "exact", "additive"] = "diagonal"
    conv_bias: bool = True
    bias: bool = False            # of the projections in and out

    key: ClassVar[str] = "longhorn"
    prefer: ClassVar[tuple[str, ...]] = ("fused", "native", "chunked", "parallel")
    equation: ClassVar[str] = "S_t = (1 - D_t k_t^2) * S_{t-1} + D_t x_t k_t';  D_t = b_t / (1 + b_t |k_t|^2);  y_t = S_t q_t"
    source: ClassVar[str] = "longhorn"
    examples: ClassVar[dict] = {
        "": dict(state=4),
        "heads": dict(state=5, expand=1, conv=2, dt_rank=3, heads=4, conv_bias=False, bias=True),
        "exact": dict(state=4, expand=1, update="exact"),
        "exact_heads": dict(state=5, heads=4, update="exact"),
        "additive": dict(state=4, expand=1, update="additive"),
    }

    def __post_init__(self) -> None:
        if min(self.state, self.expand, self.conv, self.dt_rank or 1, self.heads or 1) < 1:
            raise ValueError("Longhorn: state, expand, conv, dt_rank and heads are sizes of at least 1")

    @property
    def forms(self) -> dict:
        return FORMS[self.update]

    def build(self, ctx: BuildContext) -> LonghornLayer:
        return LonghornLayer(self, ctx)


class Cells(NamedTuple):
    memory: Tensor  # [B, E, N], or [B, H, N, E / H] of the exact update
    tail: Tensor    # [B, conv - 1, E]


class LonghornLayer(Mixer):
    def __init__(self, spec: Longhorn, ctx: BuildContext):
        super().__init__(spec)
        inner, rank = spec.expand * ctx.dim, spec.dt_rank or -(-ctx.dim // 16)
        self.inner, self.heads = inner, spec.heads or inner
        self.group = split(inner, self.heads, "Longhorn")
        self.widths = (rank, spec.state, spec.state)
        self.in_proj = nn.Linear(ctx.dim, 2 * inner, bias=spec.bias)
        self.conv1d = ShortConv(inner, spec.conv, bias=spec.conv_bias)
        self.x_proj = nn.Linear(inner, sum(self.widths), bias=False)
        self.dt_head = nn.Linear(rank, self.heads)
        self.D = mark(nn.Parameter(torch.ones(inner)), no_decay=True, keep_float32=True)
        self.out_proj = nn.Linear(inner, ctx.dim, bias=spec.bias)
        with torch.no_grad():
            self.dt_head.bias.zero_()  # beta starts about 1/2
            self.out_proj.weight.div_(math.sqrt(ctx.depth))
            for layer in (self.in_proj, self.out_proj) if spec.bias else ():
                layer.bias.zero_()
        mark(self.dt_head.bias, no_decay=True)

    def mix(self, x: Tensor, cells: Cells | None, place: Placement, info: Info, donate: bool) -> tuple[Tensor, Any, dict]:
        x, z = self.in_proj(x).chunk(2, -1)
        x, tail, _ = self.conv1d(x, None if cells is None else cells.tail, place.segments)
        delta, k, q = self.x_proj(x).split(self.widths, -1)
        wide = accumulator(x.dtype)  # in bfloat16 1 - D k^2 would be 1 where keys are small
        step = step_size(self.dt_head(delta).to(wide).sigmoid(), k.to(wide))
        if self.spec.update != "exact" and self.group > 1:
            step = step.repeat_interleave(self.group, -1)
        y, memory, _ = self.run(  # without a matrix A what a token writes is what it erases
            x, step, k, q, A=None, D=self.D, state=None if cells is None else cells.memory, segments=place.segments
        )
        return self.out_proj(y * F.silu(z)), Cells(memory, tail), {}

    def empty(self, batch: int, capacity: int | None, dtype: torch.dtype, device: Any) -> Cells:
        shape = (self.inner, self.spec.state)
        if self.spec.update == "exact":
            shape = (self.heads, self.spec.state, self.group)
        memory = torch.zeros(batch, *shape, dtype=accumulator(dtype), device=device)
        return Cells(memory, self.conv1d.empty(batch, dtype, device))
