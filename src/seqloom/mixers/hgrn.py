"""HGRN: an elementwise linear recurrence whose forget gate has a learned lower bound that rises with depth.

    f_t = g + (1 - g) sigmoid(W_f x_t)      h_t = f_t e^{i theta} h_{t-1} + (1 - f_t) c_t
    y_t = W_o norm(SiLU(W_g x_t) * h_t)

h and c are complex, one pair of channels each (Re c, Im c = SiLU(W_i x)), and theta is a trained angle per channel: the
state turns by it every step. recurrence="real" leaves the turning and the imaginary half out.
Lower bounds g: one matrix for all layers, softmax over the layers, and layer k has the sum over the layers before it, so
that g = 0 in the first layer and rises with depth. Low layers stay local, high ones remember for long. "shifted" sums the
layers from the second to the k-th, as flash-linear-attention does: also 0 in the first layer, and another number elsewhere.
Both directions: a second scan from the end with the same gates, added to the first.
Source: [hgrn] Method 1 to 4, 6 and 7.  State: h, [B, 2 D] (real parts, then imaginary ones) or [B, D], constant in T.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial, wraps
from typing import Any, ClassVar, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from seqloom.core import BuildContext, Info, Mixed, Mixer, Placement, Segments, Spec, scan
from seqloom.core.marks import mark
from seqloom.core.mixer import accumulator
from seqloom.kernels import diagonal_scan
from seqloom.parts import GatedRMSNorm, ShortConv, linear


def _recurrent(a: Tensor, b: Tensor, *, state: Tensor | None, segments: Segments | None) -> Mixed:
    start = torch.zeros_like(b[:, 0], dtype=accumulator(b.dtype)) if state is None else state
    return scan(diagonal_scan.step, a, b, state=start, segments=segments)


def _turned(form: Callable[..., Mixed]) -> Callable[..., Mixed]:
    """`form` on decays [B, T, D] times e^{i theta}, and on pairs [B, T, 2 D] as complex numbers; without theta as they are."""

    @wraps(form, assigned=())
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


def rotated(form: Callable[..., Mixed]) -> Callable[..., Mixed]:
    """The same by a scan over real decays: h_t = e^{i theta n_t} g_t with g_t = f_t g_{t-1} + e^{-i theta n_t} b_t.

    n_t counts the real tokens of the call up to t: what turns is the frame in which the state is written, the way that rotary
    positions absorb a turning key. Angles are taken in float64, since theta n_t grows with T. Source: [hgrn] Forms.
    """

    @wraps(form, assigned=())
    def run(decay: Tensor, write: Tensor, *, theta: Tensor | None = None, state: Tensor | None = None,
            segments: Segments | None = None) -> Mixed:
        if theta is None:
            return form(decay, write, state=state, segments=segments)
        if segments is None:
            count = torch.arange(1, decay.shape[1] + 1, device=decay.device)[None]
        else:
            count = segments.real.cumsum(1)
        angle = theta.double() * count[..., None]
        turn = torch.complex(angle.cos().to(write.dtype), angle.sin().to(write.dtype))
        write = write if segments is None else segments.hold(write)
        y, last, _ = form(torch.cat([decay, decay], -1), _part(_join(write) * turn.conj()), state=state, segments=segments)
        return Mixed(_part(_join(y) * turn), None if last is None else _part(_join(last) * turn[:, -1].to(_join(last).dtype)))

    return run


def _join(pairs: Tensor) -> Tensor:
    return torch.complex(*pairs.chunk(2, -1))


def _part(numbers: Tensor) -> Tensor:
    return torch.cat([numbers.real, numbers.imag], -1)


SCANS = {"recurrent": _recurrent, "chunked": diagonal_scan.chunked, "parallel": diagonal_scan.parallel}
CAUSAL = {**{name: _turned(form) for name, form in SCANS.items()}, "fused": rotated(diagonal_scan.fused)}  # fused is real
BIDIRECTIONAL = {name: diagonal_scan.both_ways(form) for name, form in CAUSAL.items()}


@dataclass(frozen=True, kw_only=True)
class HGRN(Spec):
    recurrence: Literal["complex", "real"] = "complex"
    lower_bounds: Literal["rising", "shifted", "none", "falling"] = "rising"  # with depth
    expand: int = 1               # inner width / model width
    conv: int = 0                 # width of the short convolution on what candidate and forget gate read; 0 is none
    norm: Literal["layer", "rms"] = "layer"  # LayerNorm(gate * h), or RMSNorm(h) * gate as flash-linear-attention has it
    norm_eps: float | None = None  # None: 1e-5 for layer, 1e-6 for rms
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
        "shifted": dict(lower_bounds="shifted", recurrence="real", norm="rms", expand=2, conv=3),
        "none": dict(lower_bounds="none", norm="rms", conv=2),
        "bidirectional": dict(direction="bidirectional"),
        "bidirectional_real": dict(recurrence="real", direction="bidirectional"),
    }

    def __post_init__(self) -> None:
        if self.direction == "bidirectional" and self.conv:
            raise ValueError("HGRN: the short convolution is causal; use conv=0 with direction='bidirectional'")
        if self.expand < 1 or self.conv < 0:
            raise ValueError(f"HGRN: expand is at least 1 and conv at least 0, found {self.expand} and {self.conv}")

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
    """One row of logits a layer, their softmax over layers P: layer k has the sum of P_i over i < k, or over 2 <= i <= k."""

    def __init__(self, depth: int, dim: int):
        super().__init__()
        self.logits = mark(nn.Parameter(torch.zeros(depth, dim)), no_decay=True)

    def forward(self, layer: int, dtype: torch.dtype, shift: int = 0) -> Tensor:
        """[D] in [0, 1) for `layer` (from 0), 0 for the first; `shift` 1 leaves out the first share, not the layer's own."""
        return self.logits.to(dtype).softmax(0)[shift : layer + shift].sum(0)


class Cells(NamedTuple):
    hidden: Tensor              # [B, 2 D], or [B, D] in the real recurrence
    tail: Tensor | None = None  # [B, conv - 1, 3 D or 2 D]


class HGRNLayer(Mixer):
    def __init__(self, spec: HGRN, ctx: BuildContext):
        super().__init__(spec)
        dim, inner = ctx.dim, spec.expand * ctx.dim
        width = inner * (2 if spec.recurrence == "complex" else 1)
        # a fan-in scale: at 0.02 a narrow layer's product of gate and state is below the norm's epsilon
        std = (3 * dim) ** -0.5
        self.i_proj = linear(dim, width, bias=spec.bias, std=std)
        self.f_proj = linear(dim, inner, bias=spec.bias, std=std)
        self.conv = ShortConv(width + inner, spec.conv, activation=None) if spec.conv else None
        self.g_proj = linear(dim, width, bias=spec.bias, std=std)
        self.theta = None
        if spec.recurrence == "complex":
            self.theta = mark(nn.Parameter(spec.theta ** (-2 / inner * torch.arange(inner))), no_decay=True)
        if spec.norm == "layer":
            self.g_norm = nn.LayerNorm(width, 1e-5 if spec.norm_eps is None else spec.norm_eps)
            mark(self.g_norm.weight, no_decay=True)
            mark(self.g_norm.bias, no_decay=True)
        else:
            self.g_norm = GatedRMSNorm(width, 1e-6 if spec.norm_eps is None else spec.norm_eps)
        self.o_proj = linear(width, dim, bias=spec.bias, std=(3 * width) ** -0.5, depth=ctx.depth)
        self.layer = ctx.depth - 1 - ctx.layer if spec.lower_bounds == "falling" else ctx.layer
        self._bounds = ()
        if spec.lower_bounds != "none":
            # owned by the stack: in a tuple it is not registered here a second time
            name = "hgrn_lower_bounds" + (f"_{spec.expand}" if spec.expand > 1 else "")  # one matrix per width in a stack
            self._bounds = (ctx.shared(name, partial(LowerBounds, ctx.depth, inner), self),)

    def mix(self, x: Tensor, cells: Cells | None, place: Placement, info: Info, donate: bool) -> tuple[Tensor, Any, dict]:
        wide = accumulator(x.dtype)
        decay, write, tail = self.gates(x, wide, None if cells is None else cells.tail, place.segments)
        options = {} if self.theta is None else {"theta": self.theta.to(wide)}
        y, hidden, _ = self.run(decay, write, state=None if cells is None else cells.hidden, segments=place.segments, **options)
        gate = self.g_proj(x)
        if self.spec.norm == "layer":
            y = F.layer_norm(y * F.silu(gate.to(wide)), y.shape[-1:], self.g_norm.weight.to(wide), self.g_norm.bias.to(wide),
                             self.g_norm.eps).to(x.dtype)
        else:
            y = self.g_norm(y.to(x.dtype), gate)
        return self.o_proj(y), Cells(hidden, tail), {}

    def gates(self, x: Tensor, wide: torch.dtype, tail: Tensor | None = None,
              segments: Segments | None = None) -> tuple[Tensor, Tensor, Tensor | None]:
        """f [B, T, D] and (1 - f) c [B, T, 2 D or D] in `wide`, which is float32 or wider, and the convolution's new tail."""
        candidate, forget = self.i_proj(x), self.f_proj(x)
        if self.conv is not None:
            both, tail, _ = self.conv(torch.cat([candidate, forget], -1), tail, segments)
            candidate, forget = both.split([candidate.shape[-1], forget.shape[-1]], -1)
        candidate, forget = F.silu(candidate.to(wide)), forget.to(wide)
        # 1 - f as a product: the difference loses all digits where the layer remembers for long
        decay, write = forget.sigmoid(), (-forget).sigmoid()
        for bounds in self._bounds:
            lowest = bounds(self.layer, wide, 1 if self.spec.lower_bounds == "shifted" else 0)
            decay, write = lowest + (1 - lowest) * decay, (1 - lowest) * write
        return decay, (write if self.theta is None else torch.cat([write, write], -1)) * candidate, tail

    def empty(self, batch: int, capacity: int | None, dtype: torch.dtype, device: Any) -> Cells:
        hidden = torch.zeros(batch, self.o_proj.in_features, dtype=accumulator(dtype), device=device)
        return Cells(hidden, None if self.conv is None else self.conv.empty(batch, dtype, device))
