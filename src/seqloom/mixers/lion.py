"""LION: a linear attention with decay, turned bidirectional by one mask over one set of queries, keys and values.

    A = phi(Q) phi(K)' * M      y_i = sum_j A_ij v_j / (sum_j A_ij + eps)
    mask="none" (LION-LIT)       M_ij = 1
    mask="fixed" (LION-D)        M_ij = l^|i-j|, l = sigmoid(a), a ~ N(0, 1) a head
    mask="selective" (LION-S)    M_ij = product of l_s between i and j, l_s = 1 - sigmoid(w x_s + b) a head and token

Which l_s lie "between" has two conventions, each other's transpose: side="key" takes s = j .. i-1 (and i+1 .. j for later
j), so that a step is decayed by the token it leaves, as in the authors' code; side="query" takes s = j+1 .. i (and
i .. j-1), the token it comes to. Two recurrences, one from either end, compute the same without the T x T matrix, the
diagonal counted once: by halves in the recurrent form ([lion] Method 3), in the first direction alone in the chunked one.

order="serpentine" is the variant for images: tokens are the patches of an image row by row, `columns` in a row, and the
weights are the mean of two masks with own decays, along the rows and along the columns, every other one backwards.
normaliser="layer" is the variant for masked language models: no division, a LayerNorm over all heads.
Source: [lion] Method 1 to 7. Not causal: no state.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from seqloom.core import BuildContext, Info, Mixed, Mixer, Placement, Segments, Spec, scan
from seqloom.core.context import split
from seqloom.core.marks import mark
from seqloom.core.mixer import accumulator
from seqloom.kernels import decay_scan
from seqloom.parts import linear
from seqloom.parts.bidirectional import apart, both, both_segments, previous

Side = Literal["key", "query"]
EPS = 1e-6


def mask(log_a: Tensor, *, side: Side = "key", segments: Segments | None = None) -> Tensor:
    """M [B, H, T, T] from log decays [B, T, H]: 1 on the diagonal, 0 between segments."""
    one = torch.ones_like(log_a[..., None])
    m = decay_scan.matrix(one, one, log_a, segments=segments, bidirectional=True)  # the query's side
    return m.mT if side == "key" else m


def _matrix(q: Tensor, k: Tensor, v: Tensor, log_a: Tensor | None, side: Side, segments: Segments | None) -> Tensor:
    """The sums [B, T, H, V] by T x T weights: the definition."""
    m = mask(torch.zeros_like(q[..., 0]) if log_a is None else log_a, side=side, segments=segments)
    return torch.einsum("bhij,bjhv->bihv", torch.einsum("bihk,bjhk->bhij", q, k) * m, v)


def _recurrent(q: Tensor, k: Tensor, v: Tensor, log_a: Tensor | None, side: Side, segments: Segments | None) -> Tensor:
    """Two recurrences that both write a token before they read it, less half of its own weight each."""
    own = (q * k).sum(-1, keepdim=True) * v
    q, k, v, *decays, segments = _both_ways(q, k, v, log_a, side, segments)
    start = v.new_zeros(len(v), *v.shape[2:3], k.shape[-1], v.shape[-1])
    ahead, behind = apart(scan(decay_scan.step, q, k, v, *decays, state=start, segments=segments).y)
    return (ahead - own / 2) + (behind - own / 2)


def _passes(scan: Callable[..., Mixed]) -> Callable[..., Tensor]:
    """Two passes of `scan`, side by side in the batch, without the diagonal, which is added."""

    @wraps(scan, assigned=())
    def run(q: Tensor, k: Tensor, v: Tensor, log_a: Tensor | None, side: Side, segments: Segments | None) -> Tensor:
        own = (q * k).sum(-1, keepdim=True) * v
        q, k, v, *decays, segments = _both_ways(q, k, v, log_a, side, segments)
        ahead, behind = apart(scan(q, k, v, *decays, segments=segments, diagonal=False).y)
        return ahead + behind + own

    return run


def _both_ways(q: Tensor, k: Tensor, v: Tensor, log_a: Tensor | None, side: Side, segments: Segments | None) -> tuple:
    """Both directions in the batch; on the key's side each step is decayed by the token that its direction visited before."""
    segments = both_segments(segments)
    streams = [both(x, x) for x in (q, k, v)]
    if log_a is None:
        return *streams, segments
    log_a = both(log_a, log_a)
    return *streams, previous(log_a, segments) if side == "key" else log_a, segments


def _normalised(form: Callable[..., Tensor]) -> Callable[..., Mixed]:
    """`form` along each of the orders, back in the tokens' order, averaged and divided by the row sums; rounded once.

    log_a holds H decays for each order [B, T, O H], None without mask; `orders` [O, B, T] says which token stands where,
    None for one order as given.
    """

    @wraps(form, assigned=())
    def run(q: Tensor, k: Tensor, v: Tensor, log_a: Tensor | None = None, *, side: Side, normalise: bool,
            orders: Tensor | None = None, segments: Segments | None = None) -> Mixed:
        wide = accumulator(v.dtype)
        if segments is not None:
            q, k, v = segments.hold(q), segments.hold(k), segments.hold(v)
            log_a = None if log_a is None else segments.hold(log_a)
        streams = q.to(wide), k.to(wide), torch.cat([v, torch.ones_like(v[..., :1])], -1).to(wide)
        with torch.autocast(v.device.type, enabled=False):
            if orders is None or log_a is None:
                y = form(*streams, log_a, side, segments)
            else:
                sums = []
                for order, decays in zip(orders.unbind(), log_a.chunk(len(orders), -1), strict=True):
                    along = None if segments is None else Segments(*(x.gather(1, order) for x in segments))
                    found = form(*(_take(x, order) for x in (*streams, decays)), side, along)
                    sums.append(_take(found, order.argsort(1)))
                y = torch.stack(sums).mean(0)
            y = (y[..., :-1] / (y[..., -1:] + EPS) if normalise else y[..., :-1]).to(v.dtype)
        return Mixed(y if segments is None else segments.hold(y))

    return run


def _take(x: Tensor, order: Tensor) -> Tensor:
    """x[b, order[b, t]] for x [B, T, ...]."""
    return x.gather(1, order.reshape(*order.shape, *(1,) * (x.ndim - 2)).expand_as(x))


def serpentine(positions: Tensor, columns: int, segments: Segments | None = None) -> Tensor:
    """Orders [2, B, T] of patches that stand row by row: along the rows, and along the columns, every other one backwards.

    positions [B, T] in the segment, `columns` patches in a row. A segment stays where it is, pads anywhere inside it; a
    last row need not be whole.
    """
    row, column = positions // columns, positions % columns
    tokens = positions.shape[1]
    turned = lambda line, along, size: line * size + torch.where(line % 2 == 0, along, size - 1 - along)  # noqa: E731
    ranks = torch.stack([turned(row, column, columns), turned(column, row, tokens)])
    if segments is not None:  # ranks are below 2 columns T
        ranks = ranks + segments.run * (2 * columns * (tokens + 1))
    return ranks.argsort(dim=-1, stable=True)


FORMS = {
    "matrix": _normalised(_matrix),
    "chunked": _normalised(_passes(decay_scan.chunked)),
    "recurrent": _normalised(_recurrent),
    "fused": _normalised(_passes(decay_scan.fused)),
}
FEATURES = {
    "elu": lambda x: F.elu(x) + 1,
    # positive: SiLU is nowhere below -0.279
    "silu": lambda x: F.normalize(F.silu(x) + 0.5, dim=-1),
}


@dataclass(frozen=True, kw_only=True)
class Lion(Spec):
    heads: int
    mask: Literal["none", "fixed", "selective"] = "selective"
    side: Side = "key"            # whose decays lie between two tokens; the same for the other masks
    feature: Literal["paper", "elu", "silu"] = "paper"  # paper: elu without mask, else the unit vector of SiLU + 0.5
    normaliser: Literal["sum", "layer"] = "sum"
    order: Literal["sequence", "serpentine"] = "sequence"
    columns: int = 0              # patches in a row of the image, for the serpentine order
    bias: bool = False            # of the projections

    forms: ClassVar[dict] = FORMS
    key: ClassVar[str] = "lion"
    equation: ClassVar[str] = "y_i = sum_j A_ij v_j / sum_j A_ij;  A_ij = phi(q_i)' phi(k_j) prod of l_s between i and j"
    source: ClassVar[str] = "lion"
    examples: ClassVar[dict] = {
        "": dict(heads=2),
        "query": dict(heads=2, side="query", normaliser="layer", bias=True),
        "fixed": dict(heads=4, mask="fixed"),
        "none": dict(heads=2, mask="none"),
        "serpentine": dict(heads=2, order="serpentine", columns=6),
        "serpentine-fixed": dict(heads=2, mask="fixed", feature="elu", order="serpentine", columns=5),
    }

    def __post_init__(self) -> None:
        if (self.order == "serpentine") != (self.columns > 0):
            raise ValueError(f"Lion: order={self.order!r} with columns={self.columns}; give the patches in a row, columns > 0, "
                             "to the serpentine order and only to it")
        if self.order == "serpentine" and self.mask == "none":
            raise ValueError("Lion: without a mask the order of tokens does not matter; use mask='fixed' or 'selective', "
                             "or order='sequence'")

    @property
    def causal(self) -> bool:
        return False

    def build(self, ctx: BuildContext) -> LionLayer:
        return LionLayer(self, ctx)


class LionLayer(Mixer):
    def __init__(self, spec: Lion, ctx: BuildContext):
        super().__init__(spec)
        self.head = split(ctx.dim, spec.heads, "Lion")
        decays = spec.heads * (2 if spec.order == "serpentine" else 1)
        self.qkv = linear(ctx.dim, 3 * ctx.dim, bias=spec.bias)
        self.a_proj = linear(ctx.dim, decays, bias=True) if spec.mask == "selective" else None
        self.a = mark(nn.Parameter(torch.randn(decays)), no_decay=True, keep_float32=True) if spec.mask == "fixed" else None
        self.norm = nn.LayerNorm(ctx.dim) if spec.normaliser == "layer" else None
        self.out = linear(ctx.dim, ctx.dim, bias=spec.bias, depth=ctx.depth)
        self.feature = spec.feature if spec.feature != "paper" else "elu" if spec.mask == "none" else "silu"

    def mix(self, x: Tensor, cells: None, place: Placement, info: Info, donate: bool) -> tuple[Tensor, None, dict]:
        spec = self.spec
        q, k, v = rearrange(self.qkv(x), "b t (three h d) -> three b t h d", three=3, h=spec.heads)
        phi = FEATURES[self.feature]
        orders = serpentine(place.positions, spec.columns, place.segments) if spec.order == "serpentine" else None
        y = self.run(phi(q) * self.head**-0.5, phi(k), v, *self._log_decay(x), side=spec.side,
                     normalise=spec.normaliser == "sum", orders=orders, segments=place.segments).y
        y = rearrange(y, "b t h d -> b t (h d)")
        return self.out(y if self.norm is None else self.norm(y)), None, {}

    def _log_decay(self, x: Tensor) -> tuple[Tensor, ...]:
        """log l [B, T, H] (of each order, one after the other) in float32 or wider; nothing without a mask."""
        wide = accumulator(x.dtype)
        if self.a_proj is not None:
            return (F.logsigmoid(-self.a_proj(x).to(wide)),)
        if self.a is not None:
            return (F.logsigmoid(self.a.to(wide)).expand(*x.shape[:2], -1),)
        return ()
