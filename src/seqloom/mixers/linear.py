"""Linear attention: softmax attention with the exponential replaced by a product of positive features.

    S_t = S_{t-1} + phi(k_t) v_t'      z_t = z_{t-1} + phi(k_t)      y_t = S_t' phi(q_t) / (z_t' phi(q_t) + eps)

Bidirectional: the sums run over the whole segment ([lion] section 3, LION-LIT).
Source: [s4-survey], [lion] (feature map ELU + 1).  State: S with its normaliser, [B, H, K, V + 1], constant in T.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal, NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from seqloom.core import BuildContext, Info, Memory, Mixer, Placement, Segments, Spec, scan
from seqloom.core.context import split
from seqloom.core.mixer import accumulator
from seqloom.kernels import decay_scan
from seqloom.parts import ShortConv, linear

CAUSAL = {"recurrent": partial(scan, decay_scan.step), "chunked": decay_scan.chunked, "parallel": decay_scan.parallel}
BIDIRECTIONAL = {
    "matrix": partial(decay_scan.parallel, bidirectional=True),
    "chunked": decay_scan.bidirectional,
}
EPS = 1e-6


@dataclass(frozen=True, kw_only=True)
class LinearAttention(Spec):
    heads: int
    key_dim: int | None = None    # per head; None: dim / heads
    value_dim: int | None = None  # per head; None: dim / heads
    feature: Literal["elu", "relu", "none"] = "elu"
    normaliser: Literal["sum", "none"] = "sum"
    conv: int = 0                 # width of the short convolution on q, k, v; 0 is none
    direction: Literal["causal", "bidirectional"] = "causal"

    key: ClassVar[str] = "linear"
    equation: ClassVar[str] = "S_t = S_{t-1} + phi(k_t) v_t';  y_t = S_t' phi(q_t) / z_t' phi(q_t)"
    source: ClassVar[str] = "s4-survey"
    examples: ClassVar[dict] = {
        "": dict(heads=2),
        "conv": dict(heads=2, key_dim=8, conv=4, feature="none", normaliser="none"),
        "bidirectional": dict(heads=2, direction="bidirectional"),
    }

    @property
    def forms(self) -> dict:
        return CAUSAL if self.causal else BIDIRECTIONAL

    def __post_init__(self) -> None:
        if self.direction == "bidirectional" and self.conv:
            raise ValueError("LinearAttention: the short convolution is causal; use conv=0 with direction='bidirectional'")

    def build(self, ctx: BuildContext) -> LinearAttentionLayer:
        return LinearAttentionLayer(self, ctx)


class Cells(NamedTuple):
    memory: Tensor       # [B, H, K, V] or [B, H, K, V + 1] with the normaliser as a last value column
    tail: Tensor | None  # [B, conv - 1, 2 H K + H V]


FEATURES = {"elu": lambda x: F.elu(x) + 1, "relu": F.relu, "none": lambda x: x}


class LinearAttentionLayer(Mixer):
    def __init__(self, spec: LinearAttention, ctx: BuildContext):
        super().__init__(spec)
        head = split(ctx.dim, spec.heads, "LinearAttention")
        self.key, self.value = spec.key_dim or head, spec.value_dim or head
        widths = (spec.heads * self.key, spec.heads * self.key, spec.heads * self.value)
        self.widths = widths
        self.qkv = linear(ctx.dim, sum(widths))
        self.conv = ShortConv(sum(widths), spec.conv) if spec.conv else None
        self.out = linear(spec.heads * self.value, ctx.dim, depth=ctx.depth)

    def mix(self, x: Tensor, cells: Cells | None, place: Placement, info: Info, donate: bool) -> tuple[Tensor, Any, dict]:
        q, k, v, tail = self._streams(x, cells, place)
        y, memory, _ = self.run(q, k, v, state=self._start(x) if cells is None else cells.memory, segments=place.segments)
        return self.out(self._normalise(y)), Cells(memory, tail), {}

    def _streams(self, x: Tensor, cells: Cells | None, place: Placement) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        qkv, tail = self.qkv(x), None
        if self.conv is not None:
            qkv, tail, _ = self.conv(qkv, None if cells is None else cells.tail, place.segments)
        q, k, v = (rearrange(part, "b t (h d) -> b t h d", h=self.spec.heads) for part in qkv.split(self.widths, -1))
        phi = FEATURES[self.spec.feature]
        q, k = phi(q) * self.key**-0.5, phi(k)
        if self.spec.normaliser == "sum":
            v = torch.cat([v, torch.ones_like(v[..., :1])], -1)
        return q, k, v, tail

    def _normalise(self, y: Tensor) -> Tensor:
        if self.spec.normaliser == "sum":
            y = y[..., :-1] / (y[..., -1:] + EPS)
        return rearrange(y, "b t h v -> b t (h v)")

    def _start(self, x: Tensor) -> Tensor | None:
        return self.empty(x.shape[0], None, x.dtype, x.device).memory if self.spec.causal else None

    def empty(self, batch: int, capacity: int | None, dtype: torch.dtype, device: Any) -> Cells:
        value = self.value + (self.spec.normaliser == "sum")
        memory = torch.zeros(batch, self.spec.heads, self.key, value, dtype=accumulator(dtype), device=device)
        return Cells(memory, None if self.conv is None else self.conv.empty(batch, dtype, device))

    def read_in(self, source: Tensor, info: Info = Info()) -> Memory:
        """The sum over the whole source: one [K, V] memory per head, whatever the source's length."""
        info.check("LinearAttention", self.uses)
        segments = None
        if info.segments is not None:  # one run: a source is read as a whole, only its pads are left out
            real = info.segments != 0
            segments = Segments(real, torch.zeros_like(real, dtype=torch.int64))
            source = segments.hold(source)
        _, k, v, _ = self._streams(source, None, Placement(segments, None))
        k = k if segments is None else segments.hold(k)
        wide = accumulator(source.dtype)
        return Memory(torch.einsum("bshk,bshv->bhkv", k.to(wide), v.to(wide)))

    def read_out(self, x: Tensor, memory: Memory, place: Placement) -> Tensor:
        q, *_ = self._streams(x, None, place)
        y = torch.einsum("bthk,bhkv->bthv", q.to(memory.cells.dtype), memory.cells).to(x.dtype)
        return self.out(self._normalise(y))
