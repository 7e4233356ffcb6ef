"""Mamba: a diagonal state space whose step, input map and readout depend on the token, in one gated block.

    [x, z] = W_in u      x = SiLU(conv_4(x))      [delta, B_t, C_t] = W_x x      dt_t = softplus(W_dt delta + b_dt)
    h_t = exp(dt_t A) h_{t-1} + (dt_t x_t) B_t'      y_t = h_t C_t + D x_t      out = W_out (y * SiLU(z))      A = -exp(A_log)

Source: [mamba] Method 1 to 6; parameters are named as in its released checkpoints.  State: h [B, E, N] and the convolution's
tail, constant in T.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from seqloom.core import BuildContext, Info, Mixed, Mixer, Placement, Segments, Spec, scan
from seqloom.core.marks import mark
from seqloom.core.mixer import accumulator
from seqloom.kernels import selective_scan
from seqloom.parts import ShortConv, linear


def _recurrent(*streams: Tensor, A: Tensor, state: Tensor, segments: Segments | None = None, zoh: bool = False) -> Mixed:
    return scan(partial(selective_scan.step, A=A, zoh=zoh), *streams, state=state, segments=segments)


EULER = {"recurrent": _recurrent, "chunked": selective_scan.chunked, "parallel": selective_scan.parallel}
ZOH = {"recurrent": partial(_recurrent, zoh=True), "parallel": partial(selective_scan.parallel, zoh=True)}


@dataclass(frozen=True, kw_only=True)
class Mamba(Spec):
    state: int = 16                 # N per channel
    conv: int = 4                   # width of the short convolution
    expand: int = 2                 # inner width E / model width
    dt_rank: int | None = None      # None: ceil(dim / 16)
    dt_min: float = 1e-3            # dt starts log-uniform between these, and not below dt_floor
    dt_max: float = 1e-1
    dt_floor: float = 1e-4
    conv_bias: bool = True
    bias: bool = False              # of the projections in and out
    selective: Literal["all", "dt", "none"] = "all"  # which maps depend on the token: dt, B and C; dt alone; none
    discretise: Literal["euler", "zoh"] = "euler"    # of the input map; zoh is exact and has no chunked form

    key: ClassVar[str] = "mamba"
    equation: ClassVar[str] = "h_t = exp(dt_t A) h_{t-1} + (dt_t x_t) B_t';  y_t = h_t C_t + D x_t"
    source: ClassVar[str] = "mamba"
    examples: ClassVar[dict] = {
        "": dict(state=4), "dt": dict(state=4, selective="dt", conv_bias=False, bias=True, expand=1),
        "none": dict(state=4, selective="none", conv=2), "zoh": dict(state=4, discretise="zoh"),
    }

    @property
    def forms(self) -> dict:
        return EULER if self.discretise == "euler" else ZOH

    def build(self, ctx: BuildContext) -> MambaLayer:
        return MambaLayer(self, ctx)


class Cells(NamedTuple):
    hidden: Tensor  # [B, E, N]
    tail: Tensor    # [B, conv - 1, E]


class MambaLayer(Mixer):
    def __init__(self, spec: Mamba, ctx: BuildContext):
        super().__init__(spec)
        inner, rank = spec.expand * ctx.dim, spec.dt_rank or -(-ctx.dim // 16)
        self.sizes = (rank, spec.state, spec.state)
        self.in_proj = linear(ctx.dim, 2 * inner, bias=spec.bias)
        self.conv1d = ShortConv(inner, spec.conv, bias=spec.conv_bias)
        self.x_proj = linear(inner, sum(self.sizes), std=inner**-0.5)
        self.dt_proj = nn.Linear(rank, inner)
        dt = torch.exp(torch.empty(inner).uniform_(math.log(spec.dt_min), math.log(spec.dt_max))).clamp(min=spec.dt_floor)
        with torch.no_grad():
            self.dt_proj.weight.uniform_(-(rank**-0.5), rank**-0.5)
            self.dt_proj.bias.copy_(dt + torch.log(-torch.expm1(-dt)))  # the inverse of softplus
        mark(self.dt_proj.bias, no_decay=True)
        own = dict(no_decay=True, keep_float32=True)
        self.A_log = mark(nn.Parameter(torch.arange(1, spec.state + 1).float().log().repeat(inner, 1)), **own)
        self.D = mark(nn.Parameter(torch.ones(inner)), **own)
        self.out_proj = linear(inner, ctx.dim, bias=spec.bias, depth=ctx.depth)
        if spec.selective != "all":
            # what does not depend on the token is read off one learnt vector instead, by the same maps
            self.fixed = nn.Parameter(torch.randn(inner))

    def mix(self, x: Tensor, cells: Cells | None, place: Placement, info: Info, donate: bool) -> tuple[Tensor, Any, dict]:
        cells = self.empty(x.shape[0], None, x.dtype, x.device) if cells is None else cells
        inner, z = self.in_proj(x).chunk(2, -1)
        inner, tail, _ = self.conv1d(inner, cells.tail, place.segments)
        wide = accumulator(x.dtype)
        dt, B, C = self._maps(inner)
        A = -self.A_log.to(wide).exp()
        y, hidden, _ = self.run(inner, dt, B, C, A=A, state=cells.hidden, segments=place.segments)
        y = y + self.D.to(y.dtype) * inner
        return self.out_proj(y * F.silu(z)), Cells(hidden, tail), {}

    def _maps(self, inner: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """dt [B, T, E] in float32 or wider, B and C [B, T, N]."""
        delta, B, C = self.x_proj(inner).split(self.sizes, -1)
        if self.spec.selective != "all":
            fixed = self.x_proj(F.silu(self.fixed).to(inner.dtype)).split(self.sizes, -1)
            B, C = (part.expand_as(B) for part in fixed[1:])
            delta = fixed[0].expand_as(delta) if self.spec.selective == "none" else delta
        # the bias is added in float32: a step of 1e-3 differs from one of 1.1e-3 in its last bits
        wide = accumulator(inner.dtype)
        dt = F.linear(delta, self.dt_proj.weight).to(wide) + self.dt_proj.bias.to(wide)
        return F.softplus(dt), B, C

    def empty(self, batch: int, capacity: int | None, dtype: torch.dtype, device: Any) -> Cells:
        hidden = torch.zeros(batch, *self.A_log.shape, dtype=accumulator(dtype), device=device)
        return Cells(hidden, self.conv1d.empty(batch, dtype, device))
