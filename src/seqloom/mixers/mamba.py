"""Mamba: a diagonal state space whose step, input map and output map are read from the token.

    [x, z] = W_in u      x = SiLU(conv_4(x) + b)      [delta, B, C] = W_x x      dt = softplus(W_dt delta + b_dt)
    h_t = exp(dt_t A) h_{t-1} + (dt_t x_t) B_t      y_t = h_t C_t + D x_t      A = -exp(A_log)
    out = W_out (y * SiLU(z))

Source: [mamba] Method 1 to 7. Parameters have the names of the authors' code and of transformers' (where conv1d.weight
has one more axis of length 1). One block does the work of a mixer and a channel mixer: two of them, without an MLP,
replace a Transformer layer.
State: h, [B, E, N] with E = expand dim, and the convolution's tail, constant in T.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from seqloom.core import BuildContext, Info, Mixed, Mixer, Placement, Segments, Spec
from seqloom.core.marks import mark
from seqloom.core.mixer import accumulator
from seqloom.kernels import selective_scan
from seqloom.parts import RMSNorm, ShortConv
from seqloom.parts.init import step_bias

FORMS = {"recurrent": selective_scan.recurrent, "chunked": selective_scan.chunked, "parallel": selective_scan.parallel,
         "fused": selective_scan.fused}
# compiled for the CPU where numba is installed (pip install 'seqloom[native]'), for Euler's rule
NATIVE = {**FORMS, "native": selective_scan.native} if selective_scan.has_native() else FORMS
Stream = Literal["dt", "B", "C"]


@dataclass(frozen=True, kw_only=True)
class Mamba(Spec):
    state: int = 16               # N per channel
    expand: int = 2               # inner width E / model width
    conv: int = 4                 # width of the short convolution
    dt_rank: int | None = None    # of the map from tokens to steps; None: dim / 16, rounded up
    dt_min: float = 1e-3          # dt starts log-uniform between these, and not below dt_floor
    dt_max: float = 1e-1
    dt_floor: float = 1e-4
    conv_bias: bool = True
    bias: bool = False            # of the projections in and out
    # which of step and maps are read from the token; the others are the same maps of one trained vector
    selective: tuple[Stream, ...] = ("dt", "B", "C")
    discretise: selective_scan.Discretisation = "euler"  # of the write; "zoh" is exact for a held input
    inner_norm: Literal["none", "rms"] = "none"  # RMSNorm of delta, B and C each, as Jamba has it
    norm_eps: float = 1e-6        # of these norms

    key: ClassVar[str] = "mamba"
    prefer: ClassVar[tuple[str, ...]] = ("fused", "native", "chunked", "parallel")
    equation: ClassVar[str] = "h_t = exp(dt_t A) h_{t-1} + (dt_t x_t) B_t;  y_t = h_t C_t + D x_t"
    source: ClassVar[str] = "mamba"
    examples: ClassVar[dict] = {
        "": dict(state=4),
        "zoh": dict(state=3, expand=1, conv=2, dt_rank=5, conv_bias=False, bias=True, discretise="zoh"),
        "dt_only": dict(state=4, expand=1, selective=("dt",)),
        "still": dict(state=4, expand=1, selective=()),
        "inner_norm": dict(state=4, expand=1, inner_norm="rms"),
    }

    def __post_init__(self) -> None:
        unknown = set(self.selective) - {"dt", "B", "C"}
        if unknown:
            raise ValueError(f"Mamba: selective names some of dt, B and C, not {', '.join(map(repr, sorted(unknown)))}")
        if not 0 < self.dt_min <= self.dt_max:
            raise ValueError(f"Mamba: dt starts in [dt_min, dt_max], and {self.dt_min:g}, {self.dt_max:g} is no range above 0; "
                             "use for example 0.001, 0.1")
        if min(self.state, self.expand, self.conv, self.dt_rank or 1) < 1:
            raise ValueError("Mamba: state, expand, conv and dt_rank are sizes of at least 1")

    @property
    def forms(self) -> dict:
        return NATIVE if self.discretise == "euler" else FORMS

    def build(self, ctx: BuildContext) -> MambaLayer:
        return MambaLayer(self, ctx)


class Cells(NamedTuple):
    hidden: Tensor  # [B, E, N]
    tail: Tensor    # [B, conv - 1, E]


class MambaLayer(Mixer):
    def __init__(self, spec: Mamba, ctx: BuildContext):
        super().__init__(spec)
        inner, rank = spec.expand * ctx.dim, spec.dt_rank or -(-ctx.dim // 16)
        self.widths = (rank, spec.state, spec.state)
        self.in_proj = nn.Linear(ctx.dim, 2 * inner, bias=spec.bias)
        self.conv1d = ShortConv(inner, spec.conv, bias=spec.conv_bias)
        self.x_proj = nn.Linear(inner, sum(self.widths), bias=False)
        self.dt_proj = nn.Linear(rank, inner)
        if spec.inner_norm == "rms":
            norm = lambda width: RMSNorm(width, spec.norm_eps)  # noqa: E731
            self.dt_layernorm, self.b_layernorm, self.c_layernorm = map(norm, self.widths)
        own = dict(no_decay=True, keep_float32=True)
        rates = torch.arange(1.0, spec.state + 1).log()
        self.A_log = mark(nn.Parameter(rates.repeat(inner, 1)), **own)  # S4D-Real
        self.D = mark(nn.Parameter(torch.ones(inner)), **own)
        self.out_proj = nn.Linear(inner, ctx.dim, bias=spec.bias)
        self.still = None if len(set(spec.selective)) == 3 else nn.Parameter(torch.randn(inner))
        with torch.no_grad():
            self.dt_proj.weight.uniform_(-(rank**-0.5), rank**-0.5)
            self.dt_proj.bias.copy_(step_bias(inner, spec.dt_min, spec.dt_max, spec.dt_floor))
            self.out_proj.weight.div_(math.sqrt(ctx.depth))
            for layer in (self.in_proj, self.out_proj) if spec.bias else ():
                layer.bias.zero_()
        mark(self.dt_proj.bias, no_decay=True)

    def mix(self, x: Tensor, cells: Cells | None, place: Placement, info: Info, donate: bool) -> tuple[Tensor, Any, dict]:
        hidden, tail = (None, None) if cells is None else cells
        x, z, tail = self.open(x, tail, place.segments)
        y, hidden = self.scan(self.run, x, hidden, place.segments)
        return self.close(y, z), Cells(hidden, tail), {}

    def open(self, x: Tensor, tail: Tensor | None, segments: Segments | None) -> tuple[Tensor, Tensor, Tensor]:
        """What the scan reads, the gate, both [B, T, E], and the convolution's new tail."""
        x, z = self.in_proj(x).chunk(2, -1)
        x, tail, _ = self.conv1d(x, tail, segments)
        return x, z, tail

    def scan(self, run: Callable[..., Mixed], x: Tensor, hidden: Tensor | None,
             segments: Segments | None) -> tuple[Tensor, Tensor]:
        """y [B, T, E] and the state after x [B, T, E], by `run`: this layer's own, or that of a mixer it is a part of."""
        wide = accumulator(x.dtype)
        dt, B, C = self._maps(x)
        if dt.dtype == wide or type(self.dt_proj) is not nn.Linear:  # adapters replace the module
            dt = self.dt_proj(dt).to(wide)
        else:  # the bias is added after rounding: a step of 1e-3 is a softplus of -7, where bfloat16 has one digit
            dt = F.linear(dt, self.dt_proj.weight).to(wide) + self.dt_proj.bias.to(wide)
        y, hidden, _ = run(
            x, F.softplus(dt).expand(*x.shape), B, C, A=-self.A_log.to(wide).exp(), D=self.D, state=hidden, segments=segments,
            discretise=self.spec.discretise,
        )
        return y, hidden

    def close(self, y: Tensor, z: Tensor) -> Tensor:
        """The layer's output from the scan's and the gate."""
        return self.out_proj(y * F.silu(z))

    def _maps(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What dt is made of [B, T or 1, R], B and C [B, T, N], of the token or of one trained vector."""
        moved = still = (None,) * 3
        if self.spec.selective:
            moved = self.x_proj(x).split(self.widths, -1)
        if self.still is not None:
            still = self.x_proj(self.still).split(self.widths, -1)
        dt, B, C = (a if name in self.spec.selective else b for name, a, b in zip(("dt", "B", "C"), moved, still, strict=True))
        if self.spec.inner_norm == "rms":
            dt, B, C = self.dt_layernorm(dt), self.b_layernorm(B), self.c_layernorm(C)
        return dt, B.expand(*x.shape[:2], -1), C.expand(*x.shape[:2], -1)

    def empty(self, batch: int, capacity: int | None, dtype: torch.dtype, device: Any) -> Cells:
        hidden = torch.zeros(batch, *self.A_log.shape, dtype=accumulator(dtype), device=device)
        return Cells(hidden, self.conv1d.empty(batch, dtype, device))
