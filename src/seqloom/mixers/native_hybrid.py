"""Native hybrid attention: gated slots for what has left a window, the exact keys and values in it, one softmax over both.

    slots K_t, V_t: those of gated slot attention, W tokens late:  K_t = diag(a_{t-W}) K_{t-1} + (1 - a_{t-W}) k_{t-W}'
    y_t = W_o softmax(scale [K_t q_t ; k_s' q_t for t - W < s <= t])' [V_t ; v_s]

Every past token is in the slots or in the window, never in both. W changes no parameter: W = 0 is gated slot attention, and
with W >= T nothing ever leaves, which is softmax attention (slots that hold nothing yet are masked; `unwritten="sink"` reads
them with logit 0 and value 0 instead). Rotary positions turn queries and keys inside the window only: slots average keys,
and a mean of differently turned keys points nowhere.

Source: [native-hybrid-attention] Method 1 to 7; the forms by parts join the two log-sum-exps of point 7. The paper leaves
feature maps and the output to the layer: the defaults are those of softmax attention (none), `feature="silu", norm="rms"`
those of gated slot attention.
State: the slots' keys [B, G, K, M] and values [B, G, M, V]; a ring of the last W keys, values and log decays, which act when
their token leaves; how many tokens the segment has had. Constant in T.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial, wraps
from typing import Any, ClassVar, Literal, NamedTuple

import torch
import torch.nn.functional as F
from einops import einsum, rearrange
from jaxtyping import Float
from torch import Tensor

from seqloom.core import BuildContext, Info, Mixed, Placement, Segments, Spec, scan
from seqloom.core.mixer import accumulator
from seqloom.kernels import decay_scan, softmax
from seqloom.kernels.merge import Partial, merge
from seqloom.kernels.rows import take
from seqloom.kernels.softmax import Coords, Pattern
from seqloom.mixers import gated_slot
from seqloom.mixers.gated_slot import GatedSlotAttentionLayer, Slots
from seqloom.parts.positions import Rope, rotate

CHUNK = 64  # queries to a row of the window in compiled code


class Ring(NamedTuple):
    """The last W tokens, the newest last; a log decay of 0, hence no write, where there was none yet."""

    keys: Tensor    # [B, W, G, K], not turned
    values: Tensor  # [B, W, G, V]
    log_a: Tensor   # [B, W, G, M]


class Cells(NamedTuple):
    slots: Slots
    ring: Ring | None  # None without a window
    count: Tensor      # [B] tokens of the segment so far


# Token by token -----------------------------------------------------------------------------------------------------

def step(cells: Cells, q: Float[Tensor, "b h k"], k: Float[Tensor, "b g k"], v: Float[Tensor, "b g v"],
         log_a: Float[Tensor, "b g m"], *, scale: float, unwritten: str, rope: Rope | None) -> tuple[Cells, Tensor]:
    """One token, as the paper writes it: the oldest of the window leaves for the slots, the token enters, one softmax reads."""
    slots, ring, count = cells
    wide, window = slots.keys.dtype, ring.keys.shape[1]
    ring = Ring(*(torch.cat([old, new[:, None].to(old.dtype)], 1) for old, new in zip(ring, (k, v, log_a), strict=True)))
    with torch.autocast(q.device.type, enabled=False):
        slots = gated_slot.write(slots, *(x[:, 0] for x in ring))
        ring = Ring(*(x[:, 1:] for x in ring))
        far = scale * gated_slot.logits(slots, q)
        if unwritten == "mask":
            far = torch.where((count >= window)[:, None, None, None], far, -torch.inf)
        keys, age = ring.keys.to(wide), torch.arange(window - 1, -1, -1, device=q.device)
        if rope is not None and window:  # only the distance of query and key counts
            keys = rotate(keys, *rope.angles(-age, wide))
        q = rearrange(q.to(wide), "b (g r) k -> b g r k", g=keys.shape[2])
        near = scale * einsum(q, keys, "b g r k, b w g k -> b g r w")
        near = torch.where((age <= count[:, None])[:, None, None], near, -torch.inf)
        weight = torch.cat([far, near], -1).softmax(-1)
        y = einsum(weight[..., : far.shape[-1]], slots.values, "b g r m, b g m v -> b g r v")
        y = y + einsum(weight[..., far.shape[-1] :], ring.values.to(wide), "b g r w, b w g v -> b g r v")
    return Cells(slots, ring, count + 1), rearrange(y, "b g r v -> b (g r) v").to(v.dtype)


def recurrent(*streams: Tensor, state: Cells | None, window: int, segments: Segments | None = None, **how: Any) -> Mixed:
    """q [B, T, H, K], k [B, T, G, K], v [B, T, G, V], log a [B, T, G, M] by `step`."""
    state = start(*streams[1:], window) if state is None else state
    y, cells, _ = scan(partial(step, **how), *streams, state=_opened(state, *streams[1:]), segments=segments)
    return Mixed(y, _closed(Cells(cells.slots, Ring(*(x.clone() for x in cells.ring)), cells.count)))


# By parts -----------------------------------------------------------------------------------------------------------

def by_parts(form: Callable[..., Mixed], attend: Callable[..., Partial]) -> Callable[..., Mixed]:
    """Slots by two passes of `form` of the decay scan over streams that come W tokens late, the window by a form `attend` of
    softmax attention, joined by their log-sum-exps. Streams as those of `recurrent`."""

    @wraps(form, assigned=())
    def run(q: Tensor, k: Tensor, v: Tensor, log_a: Tensor, *, state: Cells | None, window: int, scale: float, unwritten: str,
            rope: Rope | None, segments: Segments | None = None) -> Mixed:
        dtype, wide, tokens = v.dtype, accumulator(v.dtype), q.shape[1]
        stored = (k.dtype, v.dtype, accumulator(log_a.dtype)) if state is None or state.ring is None else (
            x.dtype for x in state.ring)
        packed = segments
        if segments is not None:
            # a token is W real tokens late, so pads are moved to the end of a row
            source, place = segments.order()
            q, k, v, log_a = (take(segments.hold(x), source) for x in (q, k, v, log_a))
            real = segments.real.gather(1, source)
            packed = Segments(real, torch.where(real, segments.run.gather(1, source), segments.run[:, -1:]))
        cells = _opened(start(k, v, log_a, window) if state is None else state, k, v, log_a)
        near = softmax.line(tokens, q.device) if packed is None else softmax.packed(packed)
        # a ring before the first token stands at positions -W .. -1, that of the carried segment's token in it at least -count
        ahead = softmax.line(window, q.device, -window)
        ahead = ahead._replace(real=ahead.position >= -cells.count[:, None])
        coords = softmax.cat(ahead, near)
        full = Ring(*(torch.cat([old, new], 1) for old, new in zip(cells.ring, (k, v, log_a), strict=True)))
        late = Ring(*(x[:, :tokens] for x in full))
        if packed is not None:  # what has not left this token's own segment is not written
            own = (coords.run[:, :tokens] == packed.run)[..., None, None]
            late = Ring(*(torch.where(own, x, 0.0) for x in late))
        left = torch.where(near.run == 0, cells.count[:, None], 0) + near.position >= window
        with torch.autocast(q.device.type, enabled=False):
            q = q.to(wide)
            far, slots, found = gated_slot.passes(
                form, q, late.keys.to(wide), late.values.to(wide), late.log_a, lambda found: (scale * found).softmax(-1),
                state=cells.slots, segments=packed)
            lse = (scale * found).logsumexp(-1)
            lse = lse if unwritten == "sink" else torch.where(left[..., None], lse, -torch.inf)
            parts = [Partial(far, lse)]
            if window:
                # without a state there is nothing ahead
                keys, values, placed = (k, v, near) if state is None else (full.keys, full.values, coords)
                keys, values = keys.to(wide), values.to(wide)
                if rope is not None:
                    q, keys = (rotate(x, *rope.angles(at.position, wide)) for x, at in ((q, near), (keys, placed)))
                pattern = Pattern(order="causal", window=window)
                read = banded if torch.compiler.is_compiling() and attend is softmax.chunked else attend
                parts.append(read(q, keys, values, pattern=pattern, queries=near, keys=placed, scale=scale))
            y = merge(parts).y.to(dtype)
        count, ring = cells.count + tokens, Ring(*(x[:, tokens:].clone() for x in full))
        if segments is not None:
            y = segments.hold(take(y, place))
            last = (segments.run == segments.run[:, -1:]) & segments.real
            count = torch.where(segments.run[:, -1] == 0, cells.count, 0) + last.sum(1)
            index = segments.real.sum(1, keepdim=True) + torch.arange(window, device=q.device)
            kept = (coords.run.expand(q.shape[0], -1).gather(1, index) == segments.run[:, -1:])[..., None, None]
            ring = Ring(*(torch.where(kept, take(x, index), 0.0) for x in full))
        ring = Ring(*(x.to(kind) for x, kind in zip(ring, stored, strict=True)))
        return Mixed(y, _closed(Cells(slots, ring, count)))

    return run


def banded(q: Tensor, k: Tensor, v: Tensor, *, pattern: Pattern, queries: Coords, keys: Coords, scale: float) -> Partial:
    """The window for compiled code: chunks of queries as rows, each with the keys it sees, in operations that a compiler
    traces whole whatever T is. `softmax.chunked` walks through blocks of keys, as many as T asks for."""
    batch, tokens, window = q.shape[0], q.shape[1], pattern.window or 1
    size, extra = CHUNK + window - 1, -tokens % CHUNK
    ahead = window - 1 - (k.shape[1] - tokens)  # -1 where a whole ring stands ahead, of which the first token sees W - 1
    rows = lambda x: rearrange(  # noqa: E731
        F.pad(x, (0, 0, 0, 0, ahead, extra)).unfold(1, size, CHUNK), "b n h k c -> (b n) c h k")
    split = rearrange(F.pad(q, (0, 0, 0, 0, 0, extra)), "b (n c) h k -> (b n) c h k", c=CHUNK)
    queries = queries.expand(batch).pad(0, extra).window(CHUNK, CHUNK)
    keys = keys.expand(batch).pad(ahead, extra).window(size, CHUNK)
    y, lse = softmax.matrix(split, rows(k), rows(v), pattern=pattern, queries=queries, keys=keys, scale=scale)
    return Partial(*(rearrange(x, "(b n) c ... -> b (n c) ...", b=batch)[:, :tokens] for x in (y, lse)))


def start(k: Tensor, v: Tensor, log_a: Tensor, window: int) -> Cells:
    """The state before any token, for streams [B, T, G, .]."""
    wide, (batch, _, groups, slots) = accumulator(v.dtype), log_a.shape
    keys = k.new_zeros(batch, groups, k.shape[-1], slots, dtype=wide)
    ring = None
    if window:
        ring = Ring(*(x.new_zeros(batch, window, *x.shape[2:]) for x in (k, v)), log_a.new_zeros(
            batch, window, *log_a.shape[2:], dtype=accumulator(log_a.dtype)))
    count = torch.zeros(batch, dtype=torch.int64, device=k.device)
    return Cells(Slots(keys, keys.new_zeros(batch, groups, slots, v.shape[-1])), ring, count)


def _opened(cells: Cells, *streams: Tensor) -> Cells:
    """With a ring of no tokens where there is none."""
    return cells if cells.ring is not None else Cells(cells.slots, Ring(*(x[:, :0] for x in streams)), cells.count)


def _closed(cells: Cells) -> Cells:
    # made anew: PyTorch 2.11 does not compile a `_replace` whose result leaves the graph
    return cells if cells.ring.keys.shape[1] else Cells(cells.slots, None, cells.count)


FORMS = {
    "recurrent": recurrent,
    "chunked": by_parts(decay_scan.chunked, softmax.chunked),
    "parallel": by_parts(decay_scan.parallel, softmax.matrix),
    "fused": by_parts(decay_scan.fused, softmax.chunked),
}


@dataclass(frozen=True, kw_only=True)
class NativeHybridAttention(Spec):
    heads: int
    kv_heads: int | None = None   # heads of keys, values and slots, each read by heads / kv_heads queries; None: heads
    key_dim: int | None = None    # per head; None: dim / heads
    value_dim: int | None = None  # per head; None: dim / heads
    slots: int = 64
    window: int = 64              # tokens read exactly, the current one included; 0: slots alone
    unwritten: Literal["mask", "sink"] = "mask"  # slots before the first token has left the window
    feature: Literal["none", "silu", "relu", "t2r"] = "none"  # of q and k; t2r: relu of a learned map; v: none, or SiLU
    tau: float = 8.0              # divides the log decay
    scale: float | None = None    # of the logits; None: key_dim^-1/2
    position: Literal["rope", "none"] = "rope"   # inside the window
    rope_theta: float = 10000.0
    norm: Literal["none", "rms"] = "none"        # rms: RMSNorm(SiLU(.)) over all heads before the output map

    key: ClassVar[str] = "native_hybrid"
    forms: ClassVar[dict] = FORMS
    equation: ClassVar[str] = "y_t = softmax([K_t q_t ; k_s' q_t])' [V_t ; v_s], t-W < s <= t;  slots K_t, V_t hold s <= t-W"
    source: ClassVar[str] = "native-hybrid-attention"
    examples: ClassVar[dict] = {
        "": dict(heads=2, slots=8, window=5),
        "gqa": dict(heads=4, kv_heads=2, key_dim=6, value_dim=10, slots=12, window=3, feature="silu", norm="rms", tau=2.0),
        "sink": dict(heads=2, slots=6, window=4, unwritten="sink", position="none", scale=1.0),
        "one": dict(heads=2, slots=6, window=1, feature="t2r"),
        "slots": dict(heads=2, slots=6, window=0, feature="relu"),
    }

    # what the layer of gated slots may have besides, and this one has not
    gate: ClassVar[str] = "token"
    conv: ClassVar[int] = 0
    norm_eps: ClassVar[float] = 1e-6

    def __post_init__(self) -> None:
        kv = self.kv_heads or self.heads
        if kv < 1 or self.heads % kv:
            near = max(n for n in range(1, self.heads + 1) if self.heads % n == 0 and n <= max(kv, 1))
            raise ValueError(f"NativeHybridAttention: {self.heads} query heads do not share {kv} key heads; nearest is {near}")
        if self.window < 0:
            raise ValueError(f"NativeHybridAttention: a window of {self.window} tokens; use 0 (slots alone) or more")
        if self.slots < 1 or self.tau <= 0:
            raise ValueError("NativeHybridAttention: slots is at least 1 and tau above 0, found "
                             f"slots={self.slots}, tau={self.tau}")

    def build(self, ctx: BuildContext) -> NativeHybridAttentionLayer:
        return NativeHybridAttentionLayer(self, ctx)


class NativeHybridAttentionLayer(GatedSlotAttentionLayer):
    """The projections of gated slots. With value_dim = key_dim they are laid out as softmax attention's."""

    def __init__(self, spec: NativeHybridAttention, ctx: BuildContext):
        super().__init__(spec, ctx)
        self.rope = Rope(self.key, theta=spec.rope_theta) if spec.position == "rope" else None

    def mix(self, x: Tensor, cells: Cells | None, place: Placement, info: Info, donate: bool) -> tuple[Tensor, Any, dict]:
        spec = self.spec
        q, k, v, _ = self._streams(x, None, place)
        y, cells, _ = self.run(q, k, v, self._log_decay(x), state=cells, segments=place.segments, window=spec.window,
                               scale=self.scale, unwritten=spec.unwritten, rope=self.rope)
        return self._out(y), cells, {}

    def empty(self, batch: int, capacity: int | None, dtype: torch.dtype, device: Any) -> Cells:
        k = torch.zeros(batch, 1, self.groups, self.key, dtype=dtype, device=device)
        v, gate = (k.new_zeros(batch, 1, self.groups, n) for n in (self.value, self.spec.slots))
        return start(k, v, gate, self.spec.window)
