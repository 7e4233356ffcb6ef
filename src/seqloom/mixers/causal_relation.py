"""Causal relation network: token i reads the mean over j <= i of a function of the pair (i, j), all weights an MLP's.

    a = W_1 x + b_1      b = W_2 x      y_i = mean_{j <= i} exp(LN(a_i + b_j))      out = W_3 LN(y) + b_3

LN has no parameters and no epsilon. pre_norm="exact" is the line above: dividing by the pair's own deviation, which holds
the inner product of a_i and b_j, makes the weighting depend on content, and every b_j must be kept. "approx" normalises a and
b apart, exp(LN a_i + LN b_j), and "none" not at all: the exponential then factorises, and a running sum of H channels is all
that is kept. The output norm ignores scale, so that the sum is taken as a logarithm and its largest channel set to 1; without
it (post_norm=False) pre_norm="none" overflows where its sum does.
Other activations stand in exp's place in the same three pairs; they do not factorise, and their past is kept.
Source: [causalrn] Method 1 to 7; what its block normalises first is `Block(norm="layer")`'s.  State: log sum [B, H] and a
count, constant in T; or b of the past in the compute dtype, growing with T.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from seqloom.core import BuildContext, Info, Mixer, Placement, Segments, Spec, scan
from seqloom.core.mixer import accumulator
from seqloom.kernels import log_sum, pair_sum, softmax
from seqloom.kernels.pair_sum import standardise
from seqloom.kernels.rows import take
from seqloom.kernels.softmax import Coords, Pattern
from seqloom.parts import linear
from seqloom.parts.init import STD

CAUSAL_SUM = {"recurrent": partial(scan, log_sum.step), "chunked": log_sum.chunked, "parallel": log_sum.parallel}
WHOLE_SUM = {"matrix": log_sum.matrix, "chunked": log_sum.whole}
PAIRS = {"matrix": pair_sum.matrix, "chunked": pair_sum.chunked}


@dataclass(frozen=True, kw_only=True)
class CausalRelation(Spec):
    hidden: int | None = None     # channels of a pair; None: dim
    pre_norm: Literal["exact", "approx", "none"] = "exact"
    post_norm: bool = True
    activation: Literal["exp", "elu", "relu", "gelu"] = "exp"
    std: float = STD              # of W_1 and W_2 at the start; W_3 has 0.02 / sqrt(depth)
    direction: Literal["causal", "bidirectional"] = "causal"

    key: ClassVar[str] = "causal_relation"
    equation: ClassVar[str] = "y_i = mean_{j <= i} exp(LN(a_i + b_j));  out = W LN(y) + c"
    source: ClassVar[str] = "causalrn"
    examples: ClassVar[dict] = {
        "": dict(hidden=24),
        "approx": dict(pre_norm="approx"),
        "none": dict(hidden=24, pre_norm="none"),
        "gelu": dict(activation="gelu"),
        "elu_approx": dict(hidden=24, activation="elu", pre_norm="approx"),
        "relu_none": dict(activation="relu", pre_norm="none", post_norm=False),
        "scaled_approx": dict(pre_norm="approx", post_norm=False),
        "bidirectional": dict(hidden=24, post_norm=False, direction="bidirectional"),
        "bidirectional_approx": dict(pre_norm="approx", direction="bidirectional"),
    }

    @property
    def factorises(self) -> bool:
        """Whether the sum over pairs is a product of two, so that a running sum carries the past."""
        return self.activation == "exp" and self.pre_norm != "exact"

    @property
    def forms(self) -> dict:
        if not self.factorises:
            return PAIRS
        return CAUSAL_SUM if self.causal else WHOLE_SUM

    @property
    def constant_state(self) -> bool:
        return self.streams and self.factorises

    def build(self, ctx: BuildContext) -> CausalRelationLayer:
        return CausalRelationLayer(self, ctx)


# Two kinds of cache, so that which one a state is costs no look at its values. The token of rank r (the number of tokens
# that its row had written before) stands in slot r; `count` [B] tokens were written, the current segment began at `start` [B].

class Growing(NamedTuple):
    read: Tensor   # [B, S, H]: b of the past
    count: Tensor
    start: Tensor


class Slots(NamedTuple):
    """Made with a capacity, which it keeps."""

    read: Tensor
    count: Tensor
    start: Tensor


class CausalRelationLayer(Mixer):
    def __init__(self, spec: CausalRelation, ctx: BuildContext):
        super().__init__(spec)
        self.hidden = spec.hidden or ctx.dim
        self.a_proj = linear(ctx.dim, self.hidden, bias=True, std=spec.std)
        self.b_proj = linear(ctx.dim, self.hidden, std=spec.std)
        self.o_proj = linear(self.hidden, ctx.dim, bias=True, std=STD / ctx.depth**0.5)

    def mix(self, x: Tensor, cells: Any, place: Placement, info: Info, donate: bool) -> tuple[Tensor, Any, dict]:
        spec, wide = self.spec, accumulator(x.dtype)
        a, b = self.a_proj(x), self.b_proj(x)
        stored, a, b = b.to(x.dtype), a.to(wide), b.to(wide)
        if spec.pre_norm == "approx":
            a, b = standardise(a), standardise(b)
        if not spec.factorises:
            y, cells = self._pairs(a, b, stored, cells, place)
        elif spec.causal:
            start = log_sum.empty(b) if cells is None else cells
            y, cells, _ = self.run(b, state=start, segments=place.segments)
            y = a + y
        else:
            y, cells, _ = self.run(b, segments=place.segments)
            y = a + y
        return self.o_proj(self._finish(y, place).to(x.dtype)), cells, {}

    def _finish(self, y: Tensor, place: Placement) -> Tensor:
        """From what the kernel returns, a logarithm for exp, to what W_3 reads; in float32 or wider."""
        spec = self.spec
        if spec.activation == "exp":
            if spec.post_norm:  # any factor of a row may go
                y = y - y.detach().amax(-1, keepdim=True)
            elif spec.factorises:  # the kernel's is a sum
                y = y - self._seen(place).to(y.dtype).log()[..., None]
            y = y.exp()
        return standardise(y) if spec.post_norm else y

    def _seen(self, place: Placement) -> Tensor:
        """How many tokens each one reads, [B, T]."""
        if self.spec.causal:
            return place.positions + 1
        if place.segments is None:
            return torch.full_like(place.positions, place.positions.shape[1])
        real, run = place.segments
        return torch.zeros_like(run).scatter_add_(1, run, real.to(run.dtype)).gather(1, run).clamp(min=1)

    # -- the cache of what is read --------------------------------------------------------------------------------
    def _pairs(self, a: Tensor, b: Tensor, stored: Tensor, cells: Growing | Slots | None,
               place: Placement) -> tuple[Tensor, Growing | Slots | None]:
        spec, segments = self.spec, place.segments
        how = dict(normalise=spec.pre_norm == "exact", activation=spec.activation, segments=segments,
                   pattern=Pattern(order="causal" if spec.causal else "dense"))
        if not spec.streams:
            return self.run(a, b, **how).y, None
        if cells is None or cells.read.shape[1] == 0:
            y = self.run(a, b, **how).y
            return y, self._write(stored, self._nothing(stored) if cells is None else cells, segments)
        new = self._write(stored, cells, segments)  # first of all, since it may find the cache too short
        old = cells.read.to(b.dtype)
        slot = torch.arange(old.shape[1], device=b.device).expand(old.shape[:2])
        real = (slot >= cells.start[:, None]) & (slot < cells.count[:, None])
        # the past goes on into run 0
        past = Coords(slot - cells.start[:, None], torch.zeros_like(slot), real)
        run = torch.zeros_like(place.positions) if segments is None else segments.run
        own = Coords(place.positions, run, None if segments is None else segments.real)
        b = b if segments is None else segments.hold(b)
        old = standardise(old) if spec.pre_norm == "approx" else old
        y = self.run(a, torch.cat([old, b], 1), queries=own, keys=softmax.cat(past, own), **how).y
        return y, new

    def _write(self, b: Tensor, cells: Growing | Slots, segments: Segments | None) -> Growing | Slots:
        """The cells after this call's real tokens, each in the slot of its rank."""
        read, count, start = cells
        batch, tokens = b.shape[:2]
        if segments is None:
            written, after = torch.full_like(count, tokens), start.clone()
        else:
            written = segments.real.sum(1)
            last = segments.run[:, -1:]
            mine = (segments.real & (segments.run == last)).sum(1)
            after = torch.where(last[:, 0] > 0, count + written - mine, start)
        if isinstance(cells, Slots):
            self._fits(count + written, read.shape[1])
        else:
            read = torch.cat([read, read.new_zeros(batch, tokens, self.hidden)], 1)
        rank = torch.arange(read.shape[1], device=b.device) - count[:, None]  # among this call's real tokens
        index = rank.clamp(0, tokens - 1)
        if segments is not None:
            index = segments.order()[0].gather(1, index)
        here = (rank >= 0) & (rank < written[:, None])
        read = torch.where(here[..., None], take(b.to(read.dtype), index), read)
        return type(cells)(read, count + written, after)

    def _fits(self, count: Tensor, size: int) -> None:
        """Raises: ValueError if a cache of fixed capacity is too short (on a GPU and in compiled code a failed assertion)."""
        if torch.compiler.is_compiling() or count.device.type == "cuda":
            torch._assert_async((count <= size).all(), f"a causal_relation cache of {size} slots is too short")
        elif count.device.type != "meta" and int(count.max()) > size:
            raise ValueError(f"CausalRelation: this call needs {int(count.max())} slots and the state has {size}; make it "
                             f"with init_state(batch, capacity={int(count.max())}) or more, or without capacity to let it grow")

    def _nothing(self, like: Tensor) -> Growing:
        return self.empty(like.shape[0], None, like.dtype, like.device)

    def empty(self, batch: int, capacity: int | None, dtype: torch.dtype, device: Any) -> Any:
        count = torch.zeros(batch, dtype=torch.int64, device=device)
        if self.spec.factorises:
            return log_sum.Total(torch.zeros(batch, self.hidden, dtype=accumulator(dtype), device=device), count)
        read = torch.zeros(batch, capacity or 0, self.hidden, dtype=dtype, device=device)
        return (Growing if capacity is None else Slots)(read, count, torch.zeros_like(count))
