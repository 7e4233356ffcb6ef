"""Mamba-2: a state space layer with one decay per head and token, whose B and C are shared by the heads of a group.

    [z, x, B, C, dt] = W_in u      x, B, C = SiLU(conv_4(x, B, C))      dt_t = softplus(dt + dt_bias)
    S_t = exp(dt_t A) S_{t-1} + B_t (dt_t x_t)'      y_t = S_t' C_t + D x_t      A = -exp(A_log)
    out = W_out RMSNorm(y * SiLU(z))

Source: [s4-survey] Method 10 and 12, [mamba] Method 6 (the start of dt_bias). The decay scan with k = B, v = dt x, q = C.
The norm is over each group's channels, gate first, as in transformers' Mamba-2, whose names the parameters have.
State: S, [B, H, N, P], and the convolution's tail, constant in T.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial, wraps
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from seqloom.core import BuildContext, Info, Mixed, Mixer, Placement, Segments, Spec, run_part, scan
from seqloom.core.marks import mark
from seqloom.core.mixer import accumulator
from seqloom.kernels import decay_scan, row_norm
from seqloom.parts import RMSNorm, ShortConv, linear
from seqloom.parts.heads import grouped_heads
from seqloom.parts.init import step_bias


def _stepped(form: Callable[..., Mixed], rounded: bool = False) -> Callable[..., Mixed]:
    """The scan of values dt x, multiplied in the accumulator's dtype and rounded once, at the end; with `rounded` before the
    scan too, for a form whose products are in the dtype of its streams."""

    @wraps(form, assigned=())
    def run(C: Tensor, B: Tensor, x: Tensor, dt: Tensor, log_a: Tensor, *, segments: Segments | None = None,
            **options: Any) -> Mixed:
        if segments is not None:
            x, dt = segments.hold(x), segments.hold(dt)
        values = dt[..., None] * x.to(dt.dtype)
        y, state, _ = form(C, B, values.to(x.dtype) if rounded else values, log_a, segments=segments, **options)
        return Mixed(y.to(x.dtype), state)

    return run


FORMS = {
    "recurrent": _stepped(partial(scan, decay_scan.step)),
    "chunked": _stepped(decay_scan.chunked),
    "parallel": _stepped(decay_scan.parallel),
    "fused": _stepped(decay_scan.fused, rounded=True),
}


@dataclass(frozen=True, kw_only=True)
class Mamba2(Spec):
    state: int = 128              # N: channels of B and C, rows of a head's state
    head_dim: int = 64            # P
    expand: int = 2               # inner width / model width; heads = expand dim / head_dim
    groups: int = 1               # of heads that share B and C
    conv: int = 4                 # width of the short convolution on x, B, C
    conv_bias: bool = True
    bias: bool = False            # of the projections in and out
    dt_min: float = 1e-3          # dt starts log-uniform between these, and not below dt_floor
    dt_max: float = 1e-1
    dt_floor: float = 1e-4
    dt_limit: tuple[float, float | None] = (0.0, None)  # dt is clamped to this range; None: no upper end
    norm_eps: float = 1e-5

    forms: ClassVar[dict] = FORMS
    key: ClassVar[str] = "mamba2"
    equation: ClassVar[str] = "S_t = exp(dt_t A) S_{t-1} + B_t (dt_t x_t)';  y_t = S_t' C_t + D x_t"
    source: ClassVar[str] = "s4-survey"
    examples: ClassVar[dict] = {
        "": dict(state=8, head_dim=16),
        "groups": dict(state=6, head_dim=8, groups=2, conv=2, conv_bias=False, bias=True),
        "limits": dict(state=8, head_dim=16, expand=1, groups=2, dt_limit=(0.01, 0.5)),
    }

    def __post_init__(self) -> None:
        if min(self.state, self.head_dim, self.expand, self.groups, self.conv) < 1:
            raise ValueError("Mamba2: state, head_dim, expand, groups and conv are sizes of at least 1")
        low, high = self.dt_limit
        if low < 0 or (high is not None and high <= low):
            raise ValueError(f"Mamba2: dt_limit {self.dt_limit} is no range of steps; use 0 <= low < high, or None for high")

    def build(self, ctx: BuildContext) -> Mamba2Layer:
        return Mamba2Layer(self, ctx)


class Cells(NamedTuple):
    memory: Tensor  # [B, H, N, P]
    tail: Tensor    # [B, conv - 1, H P + 2 G N]


class Mamba2Layer(Mixer):
    def __init__(self, spec: Mamba2, ctx: BuildContext):
        super().__init__(spec)
        inner, shared = spec.expand * ctx.dim, spec.groups * spec.state
        self.heads = grouped_heads(inner, spec)
        self.widths = (inner, inner + 2 * shared, self.heads)
        self.in_proj = linear(ctx.dim, sum(self.widths), bias=spec.bias)
        self.conv1d = ShortConv(inner + 2 * shared, spec.conv, bias=spec.conv_bias)
        own = partial(mark, no_decay=True, keep_float32=True)
        self.dt_bias = own(nn.Parameter(step_bias(self.heads, spec.dt_min, spec.dt_max, spec.dt_floor)))
        self.A_log = own(nn.Parameter(torch.empty(self.heads).uniform_(1, 16).log()))
        self.D = own(nn.Parameter(torch.ones(self.heads)))
        self.norm = GroupedNorm(inner, spec.groups, spec.norm_eps)
        self.out_proj = linear(inner, ctx.dim, bias=spec.bias, depth=ctx.depth)

    def mix(self, x: Tensor, cells: Cells | None, place: Placement, info: Info, donate: bool) -> tuple[Tensor, Any, dict]:
        streams, z, tail = self.open(x, None if cells is None else cells.tail, place.segments)
        memory = self._memory(x.shape[0], x.dtype, x.device) if cells is None else cells.memory
        y, memory, _ = self.run(*streams, state=memory, segments=place.segments)
        return self.close(y, streams[2], z), Cells(memory, tail), {}

    def open(self, x: Tensor, tail: Tensor | None, segments: Segments | None) -> tuple[tuple[Tensor, ...], Tensor, Tensor]:
        """The scan's streams (C, B [B, T, G, N], x [B, T, H, P], dt, log a [B, T, H]), the gate z [B, T, E], the new tail."""
        spec, wide = self.spec, accumulator(x.dtype)
        z, xBC, dt = self.in_proj(x).split(self.widths, -1)
        xBC, tail, _ = self.conv1d(xBC, tail, segments)
        shared = spec.groups * spec.state
        x, B, C = xBC.split((xBC.shape[-1] - 2 * shared, shared, shared), -1)
        x = rearrange(x, "b t (h p) -> b t h p", h=self.heads)
        B, C = (rearrange(part, "b t (g n) -> b t g n", g=spec.groups) for part in (B, C))
        dt = F.softplus(dt.to(wide) + self.dt_bias.to(wide)).clamp(*spec.dt_limit)
        return (C, B, x, dt, -self.A_log.to(wide).exp() * dt), z, tail

    def close(self, y: Tensor, x: Tensor, z: Tensor) -> Tensor:
        """The layer's output from the scan's, y [B, T, H, P], and the x and z of `open`."""
        wide = accumulator(z.dtype)
        y = torch.addcmul(y.to(wide), self.D.to(wide)[:, None], x.to(wide))
        return self.out_proj(self.norm(rearrange(y, "b t h p -> b t (h p)"), z))

    def _memory(self, batch: int, dtype: torch.dtype, device: Any) -> Tensor:
        return torch.zeros(batch, self.heads, self.spec.state, self.spec.head_dim, dtype=accumulator(dtype), device=device)

    def empty(self, batch: int, capacity: int | None, dtype: torch.dtype, device: Any) -> Cells:
        return Cells(self._memory(batch, dtype, device), self.conv1d.empty(batch, dtype, device))


class GroupedNorm(RMSNorm):
    """weight * RMSNorm(y * SiLU(z)) with one mean square per group of channels, in float32 or wider; z's dtype comes out."""

    def __init__(self, dim: int, groups: int, eps: float):
        super().__init__(dim, eps)
        self.groups = groups

    def forward(self, y: Tensor, z: Tensor) -> Tensor:
        if self.groups == 1:
            return run_part(row_norm.RMS_FORMS, y, self.weight, z, name="rms_norm", eps=self.eps, gate_first=True).to(z.dtype)
        wide = accumulator(z.dtype)
        gated = (y.to(wide) * F.silu(z.to(wide))).unflatten(-1, (self.groups, -1))
        # rounded before the weight, as transformers does
        return self.weight * F.rms_norm(gated, gated.shape[-1:], eps=self.eps).flatten(-2).to(z.dtype)
