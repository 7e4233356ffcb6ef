"""Hydra: two state space scans, one from either end, as one quasiseparable matrix with a free diagonal.

    [z, x, B, C, dt] = W_in u    x, B, C = SiLU(conv_7(x, B, C)), centred    dt = softplus(dt + dt_bias)    A = -exp(A_log)
    S_t = exp(dt_t A) S_{t-1} + B_t (dt_t x_t)'      scan_t = S_t' C_t, and the same from the end with its own B, C, dt
    y_t = scan_{t-1} + (scan from the end)_{t+1} + (W_D x_t + D) x_t      out = W_out (RMSNorm(y) * SiLU(z))

Reading each scan one token late leaves the diagonal to its own map: a token's weight on itself is not tied to C_t' B_t,
and is not counted twice. "late" is inside a segment, and over pads: the first token of a segment reads nothing.
Source: [hydra] Method 2 to 4. Parameters have the names of the authors' code, whose columns of B and C are (B, C) of the
forward scan, then of the backward one. combine="add" is the sum of two plain scans ([hydra] Method 6), with their diagonals.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial, wraps
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from seqloom.core import BuildContext, Info, Mixed, Mixer, Placement, Segments, Spec, scan
from seqloom.core.marks import mark
from seqloom.core.mixer import accumulator
from seqloom.kernels import decay_scan
from seqloom.parts import GatedRMSNorm, linear
from seqloom.parts.bidirectional import CentredConv, apart, both, both_segments, previous
from seqloom.parts.heads import grouped_heads
from seqloom.parts.init import step_bias

Combine = Literal["shift", "add"]


def weights(C: Tensor, B: Tensor, dt: Tensor, log_a: Tensor, skip: Tensor, *, segments: Segments | None = None,
            combine: Combine = "shift") -> Tensor:
    """The T x T mixing matrices [B, H, T, T], y = weights @ x: the definition.

    m_ij = C_{i-1}' (a_{j+1} .. a_{i-1}) B_j dt_j below the diagonal, skip_i on it, and the mirror image above it.
    Shapes: C, B [B, T, 2, G, N], dt, log_a [B, T, 2, H] (axis 2: forward, backward), skip [B, T, H].
    """
    C, B, log_a = (both(x[:, :, 0], x[:, :, 1]) for x in (C, B, log_a))
    both_ways = both_segments(segments)
    rows = decay_scan.matrix(C, B, log_a, segments=both_ways).transpose(1, 2)  # [b i h j]
    if combine == "shift":
        rows = previous(rows, both_ways)
    lower, upper = apart(rows)
    ahead, behind = (x.transpose(1, 2)[:, None] for x in dt.unbind(2))  # [b 1 h j]
    rows = lower * ahead + upper.flip(-1) * behind
    return rows.transpose(1, 2) + torch.diag_embed(skip.transpose(1, 2))


def _matrix(C: Tensor, B: Tensor, x: Tensor, dt: Tensor, log_a: Tensor, skip: Tensor, *, segments: Segments | None = None,
            combine: Combine = "shift") -> Mixed:
    if segments is not None:
        C, B, x, dt, log_a, skip = (segments.hold(stream) for stream in (C, B, x, dt, log_a, skip))
    m = weights(C.to(dt.dtype), B.to(dt.dtype), dt, log_a, skip, segments=segments, combine=combine)
    y = torch.einsum("bhij,bjhp->bihp", m, x.to(dt.dtype)).to(x.dtype)
    return Mixed(y if segments is None else segments.hold(y))


def _scans(form: Callable[..., Mixed], rounded: bool = False) -> Callable[..., Mixed]:
    """Both scans by `form`, side by side in the batch, each read one token late; summed in the accumulator's dtype. With
    `rounded` values are rounded first, for a form whose products are in the dtype of its streams."""

    @wraps(form, assigned=())
    def run(C: Tensor, B: Tensor, x: Tensor, dt: Tensor, log_a: Tensor, skip: Tensor, *, segments: Segments | None = None,
            combine: Combine = "shift") -> Mixed:
        if segments is not None:
            x, dt, skip = (segments.hold(stream) for stream in (x, dt, skip))
        x_wide = x.to(dt.dtype)
        C, B, v, log_a = (both(s[:, :, 0], s[:, :, 1]) for s in (C, B, dt[..., None] * x_wide[:, :, None], log_a))
        v = v.to(x.dtype) if rounded else v
        both_ways = both_segments(segments)
        start = x_wide.new_zeros(len(v), v.shape[2], B.shape[-1], v.shape[-1])
        y = form(C, B, v, log_a, state=start, segments=both_ways).y
        if combine == "shift":
            y = previous(y, both_ways)
        ahead, behind = apart(y.to(dt.dtype))
        y = torch.addcmul(ahead + behind, skip[..., None], x_wide).to(x.dtype)
        return Mixed(y if segments is None else segments.hold(y))

    return run


FORMS = {
    "matrix": _matrix,
    "chunked": _scans(decay_scan.chunked),
    "recurrent": _scans(partial(scan, decay_scan.step)),
    "fused": _scans(decay_scan.fused, rounded=True),
}


@dataclass(frozen=True, kw_only=True)
class Hydra(Spec):
    state: int = 64               # N: channels of B and C, rows of a head's state, per direction
    head_dim: int = 64            # P
    expand: int = 2               # inner width / model width; heads = expand dim / head_dim
    groups: int = 1               # of heads that share B and C
    conv: int = 7                 # width of the centred convolution on x, B, C, odd; 0 leaves only its SiLU
    conv_bias: bool = True
    bias: bool = False            # of the projections in and out
    combine: Combine = "shift"
    dt_min: float = 1e-3          # dt starts log-uniform between these, and not below dt_floor
    dt_max: float = 1e-1
    dt_floor: float = 1e-4
    norm_eps: float = 1e-5

    forms: ClassVar[dict] = FORMS
    key: ClassVar[str] = "hydra"
    equation: ClassVar[str] = "y_t = (S_{t-1}' C_{t-1}, forward) + (S_{t+1}' C_{t+1}, from the end) + (W_D x_t + D) x_t"
    source: ClassVar[str] = "hydra"
    examples: ClassVar[dict] = {
        "": dict(state=8, head_dim=16),
        "groups": dict(state=6, head_dim=8, groups=2, conv=3, conv_bias=False, bias=True),
        "bare": dict(state=8, head_dim=16, expand=1, conv=0),
        "add": dict(state=8, head_dim=16, expand=1, conv=5, combine="add"),
    }

    def __post_init__(self) -> None:
        if self.conv and self.conv % 2 == 0:
            raise ValueError(f"Hydra: a centred convolution has an odd number of taps, and conv={self.conv} would move the "
                             f"signal; use conv={self.conv + 1}, or 0 for none")

    @property
    def causal(self) -> bool:
        return False

    def build(self, ctx: BuildContext) -> HydraLayer:
        return HydraLayer(self, ctx)


class HydraLayer(Mixer):
    def __init__(self, spec: Hydra, ctx: BuildContext):
        super().__init__(spec)
        inner, shared = spec.expand * ctx.dim, 2 * spec.groups * spec.state  # B and C of one direction
        self.heads = grouped_heads(inner, spec)
        self.widths = (inner, inner + 2 * shared, 2 * self.heads)
        self.in_proj = linear(ctx.dim, sum(self.widths), bias=spec.bias)
        self.conv1d = CentredConv(self.widths[1], spec.conv, bias=spec.conv_bias) if spec.conv else None
        own = partial(mark, no_decay=True, keep_float32=True)
        self.dt_bias = own(nn.Parameter(step_bias(self.heads, spec.dt_min, spec.dt_max, spec.dt_floor)))
        self.A_log = own(nn.Parameter(torch.zeros(self.heads)))
        self.D = own(nn.Parameter(torch.ones(self.heads)))
        self.fc_D = linear(inner, self.heads)
        self.norm = GatedRMSNorm(inner, spec.norm_eps)
        self.out_proj = linear(inner, ctx.dim, bias=spec.bias, depth=ctx.depth)

    def mix(self, x: Tensor, cells: None, place: Placement, info: Info, donate: bool) -> tuple[Tensor, None, dict]:
        wide, groups, state = accumulator(x.dtype), self.spec.groups, self.spec.state
        z, xBC, dt = self.in_proj(x).split(self.widths, -1)
        xBC = F.silu(xBC) if self.conv1d is None else self.conv1d(xBC, place.segments)
        x, BC = xBC.split((z.shape[-1], xBC.shape[-1] - z.shape[-1]), -1)
        B, C = rearrange(BC, "b t (way two g n) -> two b t way g n", way=2, two=2, g=groups, n=state)
        dt = F.softplus(rearrange(dt, "b t (way h) -> b t way h", way=2).to(wide) + self.dt_bias.to(wide))
        log_a = -self.A_log.to(wide).exp() * dt
        skip = self.fc_D(x).to(wide) + self.D.to(wide)
        heads = rearrange(x, "b t (h p) -> b t h p", h=self.heads)
        y = self.run(C, B, heads, dt, log_a, skip, segments=place.segments, combine=self.spec.combine).y
        return self.out_proj(self.norm(rearrange(y, "b t h p -> b t (h p)"), z)), None, {}
