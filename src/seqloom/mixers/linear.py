"""Linear attention: softmax attention with the exponential replaced by a product of positive features.

    S_t = S_{t-1} + phi(k_t) v_t'      z_t = z_{t-1} + phi(k_t)      y_t = S_t' phi(q_t) / (z_t' phi(q_t) + eps)

Bidirectional: the sums run over the whole segment ([lion] section 3, LION-LIT).

Cosine attention ([cottention] Method 1 to 5) is feature="cosine", phi(x) = x / |x| without a scale, and normaliser="count":

    S_t = S_{t-1} + k_t v_t' / |k_t|      y_t = S_t' q_t / (|q_t| n_t^e)      e = sigmoid(m), m trained a head, 0.5 at first

n_t counts the tokens of the segment that t sees, itself included; norm_side="key" divides every value by its own count
instead, v_j / n_j^e, as the authors' causal code does. Scores may be negative: there are no weights that sum to 1.
Source: [s4-survey], [lion] (feature map ELU + 1), [cottention].  State: S, with the normaliser of normaliser="sum" as a
last value column, [B, H, K, V + 1], constant in T.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal, NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from seqloom.core import BuildContext, Info, Memory, Mixed, Mixer, Placement, Segments, Spec, gpu_only, scan
from seqloom.core.marks import mark
from seqloom.core.mixer import accumulator
from seqloom.kernels import decay_scan
from seqloom.parts import RMSNorm, ShortConv, l2_normalise, linear
from seqloom.parts.heads import head_widths
from seqloom.parts.positions import Rope, rotate

CAUSAL = {"recurrent": partial(scan, decay_scan.step), "chunked": decay_scan.chunked, "parallel": decay_scan.parallel,
          "fused": decay_scan.fused}


@gpu_only(torch.bfloat16, torch.float16)
def _fused(*streams: Tensor, **options: Any) -> Mixed:
    """Both directions by the fused scan; a function, since a compiler does not see what is marked on a partial one."""
    return decay_scan.bidirectional(*streams, form=decay_scan.fused, **options)


BIDIRECTIONAL = {
    "matrix": partial(decay_scan.parallel, bidirectional=True),
    "chunked": decay_scan.bidirectional,
    "fused": _fused,
}
EPS = 1e-6


@dataclass(frozen=True, kw_only=True)
class LinearAttention(Spec):
    heads: int
    key_dim: int | None = None    # per head; None: dim / heads
    value_dim: int | None = None  # per head; None: dim / heads
    feature: Literal["elu", "relu", "cosine", "none"] = "elu"
    # what sums are divided by: the same sum of keys alone, the count of tokens to a trained power or to the first, nothing
    normaliser: Literal["sum", "count", "mean", "none"] = "sum"
    norm_side: Literal["query", "key"] = "query"  # whose count divides: the reading token's, or that of each value read
    norm: Literal["none", "rms"] = "none"  # of what each head has read, with one weight for all heads
    norm_eps: float = 1e-6
    conv: int = 0                 # width of the short convolution on q, k, v; 0 is none
    position: Literal["none", "rope"] = "none"
    theta: float = 10000.0        # channel pair i of a head turns by theta^(-2i/K) a token
    direction: Literal["causal", "bidirectional"] = "causal"

    key: ClassVar[str] = "linear"
    equation: ClassVar[str] = "S_t = S_{t-1} + phi(k_t) v_t';  y_t = S_t' phi(q_t) / z_t' phi(q_t)"
    source: ClassVar[str] = "s4-survey"
    examples: ClassVar[dict] = {
        "": dict(heads=2),
        "conv": dict(heads=2, key_dim=8, conv=4, feature="none", normaliser="none"),
        "bidirectional": dict(heads=2, direction="bidirectional"),
        "cosine": dict(heads=2, feature="cosine", normaliser="count"),
        "cosine-key": dict(heads=2, feature="cosine", normaliser="count", norm_side="key", position="rope"),
        "cosine-bidirectional": dict(heads=2, feature="cosine", normaliser="count", direction="bidirectional"),
        "mean-rope": dict(heads=2, key_dim=8, value_dim=12, feature="none", normaliser="mean", position="rope"),
        "rope": dict(heads=2, position="rope", direction="bidirectional"),
        "norm": dict(heads=2, value_dim=12, norm="rms"),
    }

    @property
    def forms(self) -> dict:
        return CAUSAL if self.causal else BIDIRECTIONAL

    def __post_init__(self) -> None:
        if self.direction == "bidirectional" and self.conv:
            raise ValueError("LinearAttention: the short convolution is causal; use conv=0 with direction='bidirectional'")
        if self.norm_side == "key" and (self.direction == "bidirectional" or self.normaliser not in ("count", "mean")):
            raise ValueError("LinearAttention: norm_side='key' divides values by the count at their place, which takes "
                             "normaliser='count' or 'mean' and direction='causal'; use norm_side='query'")

    @property
    def counts(self) -> bool:
        return self.normaliser in ("count", "mean")

    def build(self, ctx: BuildContext) -> LinearAttentionLayer:
        return LinearAttentionLayer(self, ctx)


class Cells(NamedTuple):
    memory: Tensor       # [B, H, K, V] or [B, H, K, V + 1] with the normaliser as a last value column
    tail: Tensor | None  # [B, conv - 1, 2 H K + H V]


FEATURES = {
    "elu": lambda x: F.elu(x) + 1,
    "relu": F.relu,
    "cosine": partial(l2_normalise, eps=1e-24),  # the scale of x shall not show; pads are 0 and stay 0
    "none": lambda x: x,
}


class LinearAttentionLayer(Mixer):
    def __init__(self, spec: LinearAttention, ctx: BuildContext):
        super().__init__(spec)
        self.key, self.value = head_widths(ctx.dim, spec)
        widths = (spec.heads * self.key, spec.heads * self.key, spec.heads * self.value)
        self.widths = widths
        self.qkv = linear(ctx.dim, sum(widths))
        self.conv = ShortConv(sum(widths), spec.conv) if spec.conv else None
        self.o_norm = RMSNorm(self.value, spec.norm_eps) if spec.norm == "rms" else None
        self.out = linear(spec.heads * self.value, ctx.dim, depth=ctx.depth)
        self.scale = 1.0 if spec.feature == "cosine" else self.key**-0.5
        self.m = None
        if spec.normaliser == "count":
            self.m = mark(nn.Parameter(torch.full((spec.heads,), 0.5)), no_decay=True, keep_float32=True)
        self.rope = Rope(self.key, theta=spec.theta) if spec.position == "rope" else None
        if self.rope is not None and not spec.counts:  # a count is of tokens seen, whatever positions are given
            self.uses = self.uses | {"positions"}

    def mix(self, x: Tensor, cells: Cells | None, place: Placement, info: Info, donate: bool) -> tuple[Tensor, Any, dict]:
        q, k, v, tail = self._streams(x, cells, place)
        if self.rope is not None:
            angles = self.rope.angles(place.positions, x.dtype)
            q, k = rotate(q, *angles), rotate(k, *angles)
        share = self._share(self._visible(x, place), x) if self.spec.counts else None
        if self.spec.norm_side == "key":
            v = (v * share).to(x.dtype)
        y, memory, _ = self.run(q, k, v, state=self._start(x) if cells is None else cells.memory, segments=place.segments)
        if share is not None and self.spec.norm_side == "query":
            y = (y * share).to(x.dtype)
        return self.out(self._normalise(y)), Cells(memory, tail), {}

    def _visible(self, x: Tensor, place: Placement) -> Tensor:
        """Tokens of its segment that each one sees, [B, T]: those up to it, or all."""
        if self.spec.causal:
            return place.positions + 1
        if place.segments is None:
            return torch.full_like(place.positions, x.shape[1])
        real, run = place.segments
        return torch.zeros_like(run).scatter_add(1, run, real.to(run.dtype)).gather(1, run)

    def _share(self, count: Tensor, x: Tensor) -> Tensor:
        """count^-e [..., H, 1] for counts [...], in float32 or wider; a count below 1 (a row of pads) is 1."""
        logs = count.to(accumulator(x.dtype)).clamp(min=1).log()[..., None, None]
        return (-logs if self.m is None else -logs * self.m.to(logs.dtype).sigmoid()[:, None]).exp()

    def _streams(self, x: Tensor, cells: Cells | None, place: Placement) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        qkv, tail = self.qkv(x), None
        if self.conv is not None:
            qkv, tail, _ = self.conv(qkv, None if cells is None else cells.tail, place.segments)
        q, k, v = (rearrange(part, "b t (h d) -> b t h d", h=self.spec.heads) for part in qkv.split(self.widths, -1))
        phi = FEATURES[self.spec.feature]
        q, k = phi(q) * self.scale, phi(k)
        if self.spec.normaliser == "sum":
            v = torch.cat([v, torch.ones_like(v[..., :1])], -1)
        return q, k, v, tail

    def _normalise(self, y: Tensor) -> Tensor:
        if self.spec.normaliser == "sum":
            y = y[..., :-1] / (y[..., -1:] + EPS)
        if self.o_norm is not None:
            y = self.o_norm(y)
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
        if self.spec.counts:  # of the whole source, whichever side: it is read as one
            real = torch.ones_like(source[..., 0], dtype=torch.int64) if segments is None else segments.real
            v = v * self._share(real.sum(1)[:, None], source)
        wide = accumulator(source.dtype)
        return Memory(torch.einsum("bshk,bshv->bhkv", k.to(wide), v.to(wide)))

    def read_out(self, x: Tensor, memory: Memory, place: Placement) -> Tensor:
        q, *_ = self._streams(x, None, place)
        y = torch.einsum("bthk,bhkv->bthv", q.to(memory.cells.dtype), memory.cells).to(x.dtype)
        return self.out(self._normalise(y))
