"""HGRN: an elementwise gated recurrence whose forget gate has a floor that rises with depth.

    h_t = lambda_t e^{i theta} h_{t-1} + (1 - lambda_t) c_t       lambda_t = gamma_k + (1 - gamma_k) sigmoid(W_f x_t + b)
    y_t = W_o LayerNorm(sigmoid(W_g x_t + b) [Re h_t, Im h_t])     gamma_k = sum_{i < k} softmax_over_layers(Gamma)_i

Low layers stay local and high layers remember. One matrix Gamma [depth, D] serves all layers. Both directions: the scan and
the scan of the flipped sequence, added. Source: [hgrn] Method 1 to 4 and 7.  State: h [B, D, 2], or [B, D, 1] when real.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from seqloom.core import BuildContext, Info, Mixed, Mixer, Placement, Segments, Spec, scan
from seqloom.core.marks import mark
from seqloom.core.mixer import accumulator
from seqloom.kernels import diagonal_scan
from seqloom.kernels.decay_scan import flip
from seqloom.parts import linear


def recurrent(a: Tensor, b: Tensor, *, theta: Tensor | None, state: Tensor, segments: Segments | None = None) -> Mixed:
    return scan(partial(diagonal_scan.step, theta=theta), a, b, state=state, segments=segments)


def both(form: Any) -> Any:
    """The form over the sequence and over the flipped sequence, added."""

    def run(a: Tensor, b: Tensor, *, theta: Tensor | None, state: Tensor, segments: Segments | None = None) -> Mixed:
        ahead = form(a, b, theta=theta, state=state, segments=segments).y
        behind = form(a.flip(1), b.flip(1), theta=theta, state=state, segments=None if segments is None else flip(segments)).y
        return Mixed(ahead + behind.flip(1))

    return run


CAUSAL = {"recurrent": recurrent, "chunked": diagonal_scan.chunked, "parallel": diagonal_scan.parallel}
BIDIRECTIONAL = {name: both(form) for name, form in CAUSAL.items()}


@dataclass(frozen=True, kw_only=True)
class HGRN(Spec):
    recurrence: Literal["complex", "real"] = "complex"
    bounds: Literal["rising", "none", "falling"] = "rising"  # of the forget gate, over depth
    direction: Literal["causal", "bidirectional"] = "causal"

    key: ClassVar[str] = "hgrn"
    equation: ClassVar[str] = "h_t = lambda_t e^{i theta} h_{t-1} + (1 - lambda_t) c_t"
    source: ClassVar[str] = "hgrn"
    examples: ClassVar[dict] = {
        "": dict(), "real": dict(recurrence="real", bounds="falling"), "none": dict(bounds="none"),
        "bidirectional": dict(direction="bidirectional"),
    }

    @property
    def forms(self) -> dict:
        return CAUSAL if self.causal else BIDIRECTIONAL

    def build(self, ctx: BuildContext) -> HGRNLayer:
        return HGRNLayer(self, ctx)


class LowerBounds(nn.Module):
    """Gamma [depth, D], shared by all layers."""

    def __init__(self, depth: int, dim: int):
        super().__init__()
        self.weight = mark(nn.Parameter(torch.zeros(depth, dim)), no_decay=True)

    def forward(self, layer: int, order: str) -> Tensor:
        """gamma [D] of a layer (from 0) in [0, 1): the exclusive running sum over layers; "falling" counts from the top."""
        share = self.weight.softmax(0)
        return share[:layer].sum(0) if order == "rising" else share[layer + 1 :].sum(0)


class Cells(NamedTuple):
    hidden: Tensor  # [B, D, R]


class HGRNLayer(Mixer):
    def __init__(self, spec: HGRN, ctx: BuildContext):
        super().__init__(spec)
        self.dim, self.layer = ctx.dim, ctx.layer
        self.parts = 2 if spec.recurrence == "complex" else 1
        self.candidate = linear(ctx.dim, self.parts * ctx.dim, bias=True)
        self.forget = linear(ctx.dim, ctx.dim, bias=True)
        self.gate = linear(ctx.dim, self.parts * ctx.dim, bias=True)
        self.norm = nn.LayerNorm(self.parts * ctx.dim)
        self.out = linear(self.parts * ctx.dim, ctx.dim, bias=True, depth=ctx.depth)
        self.theta = None
        if spec.recurrence == "complex":
            frequency = 10000.0 ** (-torch.arange(ctx.dim) / ctx.dim)
            self.theta = mark(nn.Parameter(frequency), no_decay=True, keep_float32=True)
        # a layer alone is the only layer: its bound is 0
        self.bounds = None
        if spec.bounds != "none":
            self.bounds = (ctx.shared("hgrn_lower_bounds", lambda: LowerBounds(ctx.depth, ctx.dim)),)  # owned by the stack

    def lower_bound(self) -> Tensor | float:
        """gamma of this layer."""
        return 0.0 if self.bounds is None else self.bounds[0](self.layer, self.spec.bounds)

    def mix(self, x: Tensor, cells: Cells | None, place: Placement, info: Info, donate: bool) -> tuple[Tensor, Any, dict]:
        wide = accumulator(x.dtype)
        gamma = self.lower_bound()
        gamma = gamma.to(wide) if isinstance(gamma, Tensor) else gamma
        free = (1 - gamma) * torch.sigmoid(-self.forget(x).to(wide))  # 1 - lambda, exact where lambda is near 1
        c = F.silu(self.candidate(x)).to(wide).unflatten(-1, (self.parts, self.dim)).transpose(-1, -2)
        state = self.empty(x.shape[0], None, x.dtype, x.device) if cells is None else cells
        h, hidden, _ = self.run(1 - free, free[..., None] * c, theta=self.theta, state=state.hidden, segments=place.segments)
        h = h.transpose(-1, -2).flatten(-2).to(x.dtype)
        return self.out(self.norm(torch.sigmoid(self.gate(x)) * h)), Cells(hidden), {}

    def empty(self, batch: int, capacity: int | None, dtype: torch.dtype, device: Any) -> Cells:
        return Cells(torch.zeros(batch, self.dim, self.parts, dtype=accumulator(dtype), device=device))
