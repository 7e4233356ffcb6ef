"""HGRN: an elementwise linear recurrence whose forget gate has a learned lower bound that rises with depth.

    f_t = g + (1 - g) sigmoid(W_f x_t)      h_t = f_t e^{i theta} h_{t-1} + (1 - f_t) c_t
    y_t = W_o norm(SiLU(W_g x_t) * h_t)

h and c are complex, one pair of channels each (Re c, Im c = SiLU(W_i x)), and theta is a trained angle per channel: the
state turns by it every step. recurrence="real" leaves the turning and the imaginary half out.
Lower bounds g: one matrix for all layers, softmax over the layers, and layer k has the sum over the layers before it, so
that g = 0 in the first layer and rises with depth. Low layers stay local, high ones remember for long.
Both directions: a second scan from the end with the same gates, added to the first.
Source: [hgrn] Method 1 to 4, 6 and 7.  State: h, [B, 2 D] (real parts, then imaginary ones) or [B, D], constant in T.
"""

from __future__ import annotations

from collections.abc import Callable
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
from seqloom.parts import GatedRMSNorm, linear


def _recurrent(a: Tensor, b: Tensor, *, state: Tensor | None, segments: Segments | None) -> Mixed:
    start = torch.zeros_like(b[:, 0], dtype=accumulator(b.dtype)) if state is None else state
    return scan(diagonal_scan.step, a, b, state=start, segments=segments)


def _turned(form: Callable[..., Mixed]) -> Callable[..., Mixed]:
    """`form` on decays [B, T, D] times e^{i theta}, and on pairs [B, T, 2 D] as complex numbers; without theta as they are."""

    def run(decay: Tensor, write: Tensor, *, theta: Tensor | None = None, state: Tensor | None = None,
            segments: Segments | None = None) -> Mixed:
        if theta is None:
            return form(decay, write, state=state, segments=segments)
        if segments is not None:
            decay, write = segments.hold(decay, 1.0), segments.hold(write)
        a = torch.complex(decay * theta.cos(), decay * theta.sin())
        y, state, _ = form(a, _join(write), state=None if state is None else _join(state), segments=segments)
        return Mixed(_part(y), None if state is None else _part(state))

    return run


def _join(pairs: Tensor) -> Tensor:
    return torch.complex(*pairs.chunk(2, -1))


def _part(numbers: Tensor) -> Tensor:
    return torch.cat([numbers.real, numbers.imag], -1)


SCANS = {"recurrent": _recurrent, "chunked": diagonal_scan.chunked, "parallel": diagonal_scan.parallel}
CAUSAL = {name: _turned(form) for name, form in SCANS.items()}
BIDIRECTIONAL = {name: _turned(diagonal_scan.both_ways(form)) for name, form in SCANS.items()}


@dataclass(frozen=True, kw_only=True)
class HGRN(Spec):
    recurrence: Literal["complex", "real"] = "complex"
    lower_bounds: Literal["rising", "none", "falling"] = "rising"  # with depth
    norm: Literal["layer", "rms"] = "layer"  # LayerNorm(gate * h), or RMSNorm(h) * gate as flash-linear-attention has it
    bias: bool = True             # of the projections
    theta: float = 10000.0        # channel j starts to turn by theta^(-2j/D) a token
    direction: Literal["causal", "bidirectional"] = "causal"

    key: ClassVar[str] = "hgrn"
    equation: ClassVar[str] = "h_t = f_t e^{i theta} h_{t-1} + (1 - f_t) c_t;  f_t = g_layer + (1 - g_layer) sigmoid(W x_t)"
    source: ClassVar[str] = "hgrn"
    examples: ClassVar[dict] = {
        "": dict(),
        "real": dict(recurrence="real", norm="rms", bias=False),
        "falling": dict(recurrence="real", lower_bounds="falling"),
        "none": dict(lower_bounds="none", norm="rms"),
        "bidirectional": dict(direction="bidirectional"),
        "bidirectional_real": dict(recurrence="real", direction="bidirectional"),
    }

    @property
    def forms(self) -> dict:
        return CAUSAL if self.causal else BIDIRECTIONAL

    @property
    def lacks(self) -> dict[str, str]:
        if self.lower_bounds == "falling":
            return {"liveness": "falling bounds end at 0, so that the last layer gives their parameter no gradient"}
        return {}

    def build(self, ctx: BuildContext) -> HGRNLayer:
        return HGRNLayer(self, ctx)


class LowerBounds(nn.Module):
    """One row of logits a layer: bounds of layer k = sum over i < k of softmax(logits)_i, the softmax over layers."""

    def __init__(self, depth: int, dim: int):
        super().__init__()
        self.logits = mark(nn.Parameter(torch.zeros(depth, dim)), no_decay=True)

    def forward(self, layer: int, dtype: torch.dtype) -> Tensor:
        """[D] in [0, 1) for `layer`, 0 for the first."""
        return self.logits.to(dtype).softmax(0)[:layer].sum(0)


class Cells(NamedTuple):
    hidden: Tensor  # [B, 2 D], or [B, D] in the real recurrence


class HGRNLayer(Mixer):
    def __init__(self, spec: HGRN, ctx: BuildContext):
        super().__init__(spec)
        dim = ctx.dim
        width = dim * (2 if spec.recurrence == "complex" else 1)
        self.i_proj = linear(dim, width, bias=spec.bias)
        self.f_proj = linear(dim, dim, bias=spec.bias)
        self.g_proj = linear(dim, width, bias=spec.bias)
        self.theta = None
        if spec.recurrence == "complex":
            self.theta = mark(nn.Parameter(spec.theta ** (-2 / dim * torch.arange(dim))), no_decay=True)
        if spec.norm == "layer":
            self.g_norm = nn.LayerNorm(width)
            mark(self.g_norm.weight, no_decay=True)
            mark(self.g_norm.bias, no_decay=True)
        else:
            self.g_norm = GatedRMSNorm(width)
        self.o_proj = linear(width, dim, bias=spec.bias, depth=ctx.depth)
        self.layer = ctx.layer if spec.lower_bounds == "rising" else ctx.depth - 1 - ctx.layer
        self._bounds = ()
        if spec.lower_bounds != "none":
            # owned by the stack: in a tuple it is not registered here a second time
            self._bounds = (ctx.shared("hgrn_lower_bounds", partial(LowerBounds, ctx.depth, dim)),)

    def mix(self, x: Tensor, cells: Cells | None, place: Placement, info: Info, donate: bool) -> tuple[Tensor, Any, dict]:
        wide = accumulator(x.dtype)
        decay, write = self._gates(x, wide)
        options = {} if self.theta is None else {"theta": self.theta.to(wide)}
        y, hidden, _ = self.run(decay, write, state=None if cells is None else cells.hidden, segments=place.segments, **options)
        gate = self.g_proj(x)
        if self.spec.norm == "layer":
            y = F.layer_norm(y * F.silu(gate.to(wide)), y.shape[-1:], self.g_norm.weight.to(wide), self.g_norm.bias.to(wide),
                             self.g_norm.eps).to(x.dtype)
        else:
            y = self.g_norm(y.to(x.dtype), gate)
        return self.o_proj(y), Cells(hidden), {}

    def _gates(self, x: Tensor, wide: torch.dtype) -> tuple[Tensor, Tensor]:
        """f [B, T, D], and (1 - f) c [B, T, 2 D or D], in float32 or wider."""
        forget, candidate = self.f_proj(x).to(wide), F.silu(self.i_proj(x).to(wide))
        # 1 - f as a product: the difference loses all digits where the layer remembers for long
        decay, write = forget.sigmoid(), (-forget).sigmoid()
        for bounds in self._bounds:
            lowest = bounds(self.layer, wide)
            decay, write = lowest + (1 - lowest) * decay, (1 - lowest) * write
        return decay, torch.cat([write, write], -1) * candidate if self.theta is not None else write * candidate

    def empty(self, batch: int, capacity: int | None, dtype: torch.dtype, device: Any) -> Cells:
        return Cells(torch.zeros(batch, self.o_proj.in_features, dtype=accumulator(dtype), device=device))
