"""Softmax attention: every token reads a weighted mean of the values it sees.

    y_t = W_o sum_s softmax_s(scale q_t k_s + bias_ts) v_s        over the keys s of the same segment that t sees

Multi-head, or grouped queries (`kv_heads` keys and values shared by `heads` queries); causal, windowed, with a
bidirectional prefix, or bidirectional; positions by rotation (RoPE), by a distance bias (ALiBi), or none. What the heads
have read may be gated, y * sigmoid(W_g x). As a reader of another sequence (`read_in`) it sees all real tokens of the
source, without positions.

Source: [flashattention-2] for the computation. State: keys and values of the past in the compute dtype, growing with T,
or a ring of `window` slots.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from seqloom.core import BuildContext, Info, Memory, Mixer, Placement, Segments, Spec
from seqloom.core.context import split
from seqloom.core.forms import run
from seqloom.kernels import softmax
from seqloom.kernels.rows import take
from seqloom.kernels.softmax import Coords, Pattern
from seqloom.parts import RMSNorm, linear
from seqloom.parts.positions import LinearScaling, Llama3Scaling, Rope, YarnScaling, alibi_slopes, rotate, rotate_qkv


@dataclass(frozen=True, kw_only=True)
class SoftmaxAttention(Spec):
    heads: int
    kv_heads: int | None = None    # heads of keys and values, each read by heads / kv_heads queries; None: heads
    head_dim: int | None = None    # None: dim / heads
    window: int | None = None      # keys a query sees, itself included; bidirectional: |i - j| < window
    direction: Literal["causal", "bidirectional"] = "causal"
    prefix: int = 0                # the first tokens of a segment, which all of it sees
    position: Literal["rope", "alibi", "none"] = "rope"
    rope_theta: float = 10000.0
    rope_fraction: float = 1.0     # share of a head's channels that turn
    rope_scaling: LinearScaling | Llama3Scaling | YarnScaling | None = None
    bias: Literal["none", "qkv", "all"] = "none"
    gate: Literal["none", "sigmoid"] = "none"  # y * sigmoid(W_g x) before the output map
    qk_norm: Literal["none", "rms"] = "none"  # RMSNorm of every query and key head, before the rotation
    norm_eps: float = 1e-6
    scale: float | None = None     # of the scores; None: head_dim^-1/2

    key: ClassVar[str] = "softmax"
    forms: ClassVar[dict] = softmax.FORMS
    equation: ClassVar[str] = "y_t = sum_s softmax_s(scale q_t' k_s + bias_ts) v_s"
    source: ClassVar[str] = "flashattention-2"
    examples: ClassVar[dict] = {
        "": dict(heads=2),
        "gqa": dict(heads=4, kv_heads=2, rope_fraction=0.5, rope_scaling=LinearScaling(factor=2.0), scale=0.4),
        "window": dict(heads=2, window=16),
        "alibi": dict(heads=4, kv_heads=2, position="alibi"),
        "alibi-window": dict(heads=2, position="alibi", window=9),
        "none": dict(heads=2, head_dim=8, position="none"),
        "norm-bias": dict(heads=2, kv_heads=1, qk_norm="rms", bias="all"),
        "gate": dict(heads=2, head_dim=12, gate="sigmoid"),
        "prefix": dict(heads=2, prefix=12),
        "bidirectional": dict(heads=2, direction="bidirectional"),
        "bidirectional-window": dict(heads=2, direction="bidirectional", window=8, position="alibi"),
    }

    def __post_init__(self) -> None:
        kv = self.kv_heads or self.heads
        if kv < 1 or self.heads % kv:
            near = max(n for n in range(1, self.heads + 1) if self.heads % n == 0 and n <= max(kv, 1))
            raise ValueError(f"SoftmaxAttention: {self.heads} query heads do not share {kv} key heads; nearest is {near}")
        if self.direction == "bidirectional" and self.prefix:
            raise ValueError("SoftmaxAttention: a bidirectional layer sees all of its segment; use prefix=0")
        _ = self.pattern  # checks window and prefix

    @property
    def causal(self) -> bool:
        return self.direction == "causal" and self.prefix == 0

    @property
    def constant_state(self) -> bool:
        return self.streams and self.window is not None

    @property
    def pattern(self) -> Pattern:
        order = "causal" if self.direction == "causal" else "dense"
        slopes = alibi_slopes(self.heads) if self.position == "alibi" else None
        return Pattern(order=order, window=self.window, prefix=self.prefix, slopes=slopes)

    def build(self, ctx: BuildContext) -> SoftmaxAttentionLayer:
        return SoftmaxAttentionLayer(self, ctx)


# The three kinds of cache differ in type, so that which one a state is costs no look at its values. `count` is the
# number of tokens a row has written, `start` the number it had written when its current segment began; a token's rank
# is `count` before it was written. Positions [B, S] are kept for distance biases only.

class Full(NamedTuple):
    """Grows. Every row has written each of the S slots, in order, and has met no boundary."""

    keys: Tensor              # [B, G, S, K]: a head's keys side by side, as decoding reads them
    values: Tensor            # [B, G, S, K]
    positions: Tensor | None  # [B, S]
    count: Tensor             # [B]
    start: Tensor             # [B]


class Ragged(NamedTuple):
    """Grows. The token of rank r stands in slot r; rows may have written fewer tokens than there are slots."""

    keys: Tensor
    values: Tensor
    positions: Tensor | None
    count: Tensor
    start: Tensor


class Slots(NamedTuple):
    """Fixed. The token of rank r stands in slot r mod S: a preallocated cache (which must not wrap), or a window's ring."""

    keys: Tensor
    values: Tensor
    positions: Tensor | None
    count: Tensor
    start: Tensor


Cells = Full | Ragged | Slots


class Written(NamedTuple):
    """What a call writes. Ranks [B, T] of its tokens, `first` [B, T] the rank at which each one's segment began."""

    rank: Tensor
    first: Tensor
    tokens: Tensor | int  # real tokens a row, [B]
    count: Tensor
    start: Tensor


class SoftmaxAttentionLayer(Mixer):
    uses = frozenset({"segments", "positions"})

    def __init__(self, spec: SoftmaxAttention, ctx: BuildContext):
        super().__init__(spec)
        self.head = spec.head_dim or split(ctx.dim, spec.heads, "SoftmaxAttention")
        self.groups = spec.kv_heads or spec.heads
        self.pattern = spec.pattern
        self.qkv = linear(ctx.dim, (spec.heads + 2 * self.groups) * self.head, bias=spec.bias != "none")
        self.out = linear(spec.heads * self.head, ctx.dim, bias=spec.bias == "all", depth=ctx.depth)
        self.g_proj = None
        if spec.gate == "sigmoid":
            self.g_proj = linear(ctx.dim, spec.heads * self.head, bias=spec.bias != "none")
        self.q_norm = RMSNorm(self.head, spec.norm_eps) if spec.qk_norm == "rms" else None
        self.k_norm = RMSNorm(self.head, spec.norm_eps) if spec.qk_norm == "rms" else None
        self.rope = None
        if spec.position == "rope":
            self.rope = Rope(self.head, theta=spec.rope_theta, fraction=spec.rope_fraction, scaling=spec.rope_scaling)

    def mix(self, x: Tensor, cells: Cells | None, place: Placement, info: Info, donate: bool) -> tuple[Tensor, Any, dict]:
        segments = _needed(place.segments)
        fresh = cells is None and segments is None and info.positions is None
        # rows that all start at 0 share one table of angles
        positions = torch.arange(x.shape[1], device=x.device) if fresh else place.positions
        q, k, v = self._streams(x, positions)
        at = None if self.pattern.slopes is None else place.positions
        if not self.spec.streams:
            y, new = self._attend(q, k, v, segments, at, info), None
        elif cells is None:
            y = self._attend(q, k, v, segments, at, info)
            new = self._begin(k.to(x.dtype), v.to(x.dtype), at, segments)
        elif isinstance(cells, Full) and segments is None:
            y, new = self._append(q, k, v, at, cells)
        else:
            y, new = self._continue(q, k, v, at, cells, segments, info, donate)
        return self._out(y, x), new, {}

    def _out(self, y: Tensor, x: Tensor) -> Tensor:
        """The layer's output from what its heads have read, [B, T, H, K], and the layer's input."""
        y = y.flatten(2)
        return self.out(y if self.g_proj is None else y * self.g_proj(x).sigmoid())

    def _streams(self, x: Tensor, positions: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """q [B, T, H, K], k and v [B, T, G, K], normed and turned; positions None: not turned."""
        heads, groups = self.spec.heads, self.groups
        streams = self.qkv(x).unflatten(-1, (-1, self.head))
        angles = None
        if self.rope is not None and positions is not None:
            angles = self.rope.angles(positions, x.dtype)
        if self.q_norm is None:
            return streams.split((heads, groups, groups), 2) if angles is None else rotate_qkv(streams, *angles, heads, groups)
        q, k, v = streams.split((heads, groups, groups), 2)
        qk = torch.cat([self.q_norm(q), self.k_norm(k)], 2)
        q, k = (qk if angles is None else rotate(qk, *angles)).split((heads, groups), 2)
        return q, k, v

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, segments: Segments | None, at: Tensor | None, info: Info) -> Tensor:
        """Within this call. Distances follow from the order of tokens unless positions were given."""
        given = at if info.positions is not None else None
        return self.run(q, k, v, pattern=self.pattern, segments=segments, at=given, scale=self.spec.scale).y

    def run(self, *streams: Tensor, **options: Any) -> Any:
        """The form in force; unasked, the one that `softmax.preference` puts first for this call."""
        return run(self.spec.forms, *streams, name=self.spec.name(), layer_form=self.form,
                   prefer=softmax.preference(*streams, **options), **options)

    # -- the cache ----------------------------------------------------------------------------------------------
    def empty(self, batch: int, capacity: int | None, dtype: torch.dtype, device: Any) -> Cells:
        kind = Full if capacity is None and self.spec.window is None else Slots
        return kind(*self._slots(batch, self.spec.window or capacity or 0, dtype, device))

    def _slots(self, batch: int, size: int, dtype: torch.dtype, device: Any) -> tuple:
        keys = torch.zeros(batch, self.groups, size, self.head, dtype=dtype, device=device)
        count = torch.zeros(batch, dtype=torch.int64, device=device)
        positions = torch.zeros(batch, size, dtype=torch.int64, device=device) if self.pattern.slopes is not None else None
        return keys, torch.zeros_like(keys), positions, count, torch.zeros_like(count)

    def _begin(self, k: Tensor, v: Tensor, at: Tensor | None, segments: Segments | None) -> Cells:
        """The cache after a first call."""
        batch, tokens = k.shape[:2]
        count = torch.zeros(batch, dtype=torch.int64, device=k.device)
        if segments is None and self.spec.window is None:
            k, v = k.transpose(1, 2), v.transpose(1, 2)
            if not torch.is_grad_enabled():  # views would keep the whole projection in memory; autograd does so anyway
                k, v = k.contiguous(), v.contiguous()
            return Full(k, v, at, count + tokens, count)
        kind = Ragged if self.spec.window is None else Slots
        cells = kind(*self._slots(batch, self.spec.window or tokens, k.dtype, k.device))
        return self._write(cells, k, v, at, segments, _ranks(cells, segments, tokens), in_place=True)

    def _append(self, q: Tensor, k: Tensor, v: Tensor, at: Tensor | None, cells: Full) -> tuple[Tensor, Full]:
        """Rows that stand side by side: the cache is a concatenation, and what is seen needs no mask."""
        past, tokens = cells.keys.shape[2], k.shape[1]

        def join(old: Tensor, new: Tensor) -> Tensor:
            new = new.transpose(1, 2).to(old.dtype)
            return torch.cat([old, new], 2) if past else new

        positions = None if at is None else torch.cat([cells.positions, at], 1)
        new = Full(join(cells.keys, k), join(cells.values, v), positions, cells.count + tokens, cells.start.clone())
        keys = queries = None
        if at is not None:
            keys = softmax.line(past + tokens, k.device)._replace(at=positions)
            queries = softmax.line(tokens, k.device, past)._replace(at=at)
        stored = (x.transpose(1, 2).to(q.dtype) for x in new[:2])
        return self.run(q, *stored, pattern=self.pattern, queries=queries, keys=keys, scale=self.spec.scale).y, new

    def _continue(self, q: Tensor, k: Tensor, v: Tensor, at: Tensor | None, cells: Cells, segments: Segments | None,
                  info: Info, donate: bool) -> tuple[Tensor, Cells]:
        tokens = k.shape[1]
        written = _ranks(cells, segments, tokens)
        used, level = self._used(cells, written)
        # a ring's past is copied out before it is overwritten
        past = None if tokens == 1 or used == 0 else self._past(cells, used)
        grown = cells
        if not isinstance(cells, Slots):
            # new slots at the end are a copy anyway, and may be written in place
            keys, values = (torch.cat([x, x.new_zeros(*x.shape[:2], tokens, x.shape[3])], 2) for x in cells[:2])
            positions = None if at is None else torch.cat([cells.positions, torch.zeros_like(at)], 1)
            grown = Ragged(keys, values, positions, cells.count, cells.start)
        new = self._write(grown, k, v, at, segments, written, in_place=donate or grown is not cells)
        if tokens == 1:
            # the one query stands last: whatever is in the cache after it was written precedes it or is it
            return self._read(q, new, None if used is None else used + 1, at, level), new
        if past is None:
            return self._attend(q, k, v, segments, at, info), new
        keys = queries = None
        if at is not None or segments is not None or self.spec.window is not None or not level:
            real = None if segments is None else segments.real
            keys = softmax.cat(past[2], Coords(written.rank - written.first, written.first, real, at))
            queries = keys.slice(keys.position.shape[1] - tokens, keys.position.shape[1])
        k, v = torch.cat([past[0].to(q.dtype), k], 1), torch.cat([past[1].to(q.dtype), v], 1)
        y = self.run(q, k, v, pattern=self.pattern, segments=segments, queries=queries, keys=keys, scale=self.spec.scale).y
        return y, new

    def _used(self, cells: Cells, written: Written) -> tuple[int | None, bool]:
        """Where looking costs no wait for a device: the slots in use before this call (None: not known), and whether all
        rows stand level, with as many tokens each and none of an earlier segment, so that nothing need be masked.

        Raises: ValueError if a fixed cache is too short for this call.
        """
        size, fixed = cells.keys.shape[2], isinstance(cells, Slots) and self.spec.window is None
        if torch.compiler.is_compiling() or cells.count.device.type != "cpu":
            if fixed and cells.count.device.type in ("cpu", "cuda"):
                torch._assert_async((written.count <= size).all(), f"a softmax cache of {size} slots is too short")
            return None, False
        before, after, start = cells.count.tolist(), written.count.tolist(), written.start.tolist()
        if fixed and max(after) > size:
            raise ValueError(
                f"SoftmaxAttention: this call needs {max(after)} slots and the state has {size}; "
                f"make it with init_state(batch, capacity={max(after)}) or more, or without capacity to let it grow"
            )
        level = min(before) == max(before) and min(after) == max(after) and not any(start)
        return min(max(before), size), level

    def _write(self, cells: Cells, k: Tensor, v: Tensor, at: Tensor | None, segments: Segments | None, written: Written,
               in_place: bool) -> Cells:
        """The cells after this call's real tokens. Only their slots are touched; `in_place` keeps the tensors."""
        size, tokens = cells.keys.shape[2], k.shape[1]
        kept = min(size, tokens)  # of a call longer than a ring, its last tokens
        steps = torch.arange(kept, device=k.device)
        if segments is None:
            order = steps + (tokens - kept)
            slot = (cells.count[:, None] + order) % size
            source, real = None, None
            streams = (k[:, tokens - kept :], v[:, tokens - kept :], None if at is None else at[:, tokens - kept :])
        else:
            # a row's real tokens in order; the slots of ranks it does not reach keep what they hold
            order = (written.tokens - kept).clamp(min=0)[:, None] + steps
            slot = (cells.count[:, None] + order) % size
            real = order < written.tokens[:, None]
            source = segments.order()[0].gather(1, order.clamp(max=tokens - 1))
            streams = (take(k, source), take(v, source), None if at is None else at.gather(1, source))
        row = torch.arange(k.shape[0], device=k.device)[:, None]

        def put(old: Tensor | None, value: Tensor | None) -> Tensor | None:
            if old is None:
                return None
            old = old if in_place else old.clone()
            slots = old.transpose(1, 2) if old.ndim == 4 else old
            value = value.to(old.dtype)
            if real is not None:
                value = torch.where(real.reshape(*real.shape, *(1,) * (value.ndim - 2)), value, slots[row, slot])
            slots.index_put_((row, slot), value)
            return old

        return type(cells)(*map(put, cells[:3], streams), written.count, written.start)

    def _read(self, q: Tensor, cells: Cells, used: int | None, at: Tensor | None, level: bool) -> Tensor:
        """The one query of each row over a cache that holds its own key, `used` slots of it at most."""
        size = cells.keys.shape[2]
        stop = size if used is None else min(used, size)
        stored = [x[:, :, :stop].transpose(1, 2).to(q.dtype) for x in cells[:2]]
        if level and at is None:
            return self.run(q, *stored, pattern=Pattern(order="dense"), scale=self.spec.scale).y
        slot = torch.arange(stop, device=q.device)
        rank = slot
        if self.spec.window is not None:  # the last token that stood in a slot
            last = cells.count[:, None] - 1
            rank = last - (last - slot) % size
        real = (rank >= cells.start[:, None]) & (rank < cells.count[:, None])
        zero = torch.zeros_like(real, dtype=torch.int64)
        past = None if at is None else cells.positions[:, :stop]
        keys = Coords(zero, zero, real, past)
        queries = Coords(zero[:, :1], zero[:, :1], None, at)
        pattern = Pattern(order="dense", slopes=self.pattern.slopes)
        return self.run(q, *stored, pattern=pattern, queries=queries, keys=keys, scale=self.spec.scale).y

    def _past(self, cells: Cells, used: int | None) -> tuple[Tensor, Tensor, Coords]:
        """Keys and values of the cache in order of rank, and where they stand in the current segment."""
        size, count, start = cells.keys.shape[2], cells.count[:, None], cells.start[:, None]
        keys, values, at = cells[:3]
        if isinstance(cells, Slots) and self.spec.window is not None:
            rank = count - size + torch.arange(size, device=keys.device)
            slot = rank % size
            at = None if at is None else at.gather(1, slot)
            slot = slot[:, None, :, None].expand_as(keys)
            keys, values = keys.gather(2, slot), values.gather(2, slot)
        else:
            stop = size if used is None else used
            keys, values, at = keys[:, :, :stop], values[:, :, :stop], None if at is None else at[:, :stop]
            rank = torch.arange(stop, device=keys.device).expand(keys.shape[0], -1)
        real = (rank >= start) & (rank < count) & (rank >= 0)
        return keys.transpose(1, 2), values.transpose(1, 2), Coords(rank - start, start.expand_as(rank), real, at)

    # -- cross-mixing -------------------------------------------------------------------------------------------
    def read_in(self, source: Tensor, info: Info = Info()) -> Memory:
        """Keys and values of every token of the source; its padding (segment id 0) is never seen."""
        info.check("SoftmaxAttention", self.uses)
        real = None if info.segments is None else info.segments != 0
        if real is not None:
            source = torch.where(real[..., None], source, 0.0)
        _, k, v = self._streams(source, None)
        return Memory(Source(k, v), real)

    def read_out(self, x: Tensor, memory: Memory, place: Placement) -> Tensor:
        q, _, _ = self._streams(x, None)
        source: Source = memory.cells
        keys = None
        if memory.real is not None:
            keys = softmax.line(source.keys.shape[1], x.device)._replace(real=memory.real)
        y = self.run(q, source.keys.to(q.dtype), source.values.to(q.dtype), pattern=Pattern(order="dense"), keys=keys,
                     scale=self.spec.scale).y
        return self._out(y, x)


class Source(NamedTuple):
    """A source read in: one key and value a token, [B, S, G, K]."""

    keys: Tensor
    values: Tensor


def _needed(segments: Segments | None) -> Segments | None:
    """None where the segments are seen to say nothing: no padding, no boundary. Not looked at where that means waiting."""
    if segments is None or torch.compiler.is_compiling() or segments.real.device.type != "cpu":
        return segments
    return segments if bool(segments.run.any()) or not bool(segments.real.all()) else None


def _ranks(cells: Cells, segments: Segments | None, tokens: int) -> Written:
    """Where this call's tokens stand among all that a row ever wrote."""
    count, start = cells.count, cells.start
    if segments is None:
        rank = count[:, None] + torch.arange(tokens, device=count.device)
        return Written(rank, start[:, None].expand_as(rank), tokens, count + tokens, start.clone())
    order = segments.real.cumsum(1)
    rank = count[:, None] + order - 1
    begun = torch.where(segments.starts(), rank, 0).cummax(1).values
    first = torch.where(segments.run > 0, begun, start[:, None])
    return Written(rank, first, order[:, -1], count + order[:, -1], first[:, -1])

