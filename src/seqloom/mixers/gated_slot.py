"""Gated slot attention: a memory of M slots, each a gated average of keys and of values, read by a softmax over the slots.

    K_t = diag(a_t) K_{t-1} + (1 - a_t) k_t'      V_t = diag(a_t) V_{t-1} + (1 - a_t) v_t'      a_t = sigmoid(W_f x_t)^(1/tau)
    y_t = W_o RMSNorm(SiLU(V_t' softmax(scale K_t q_t)))      q, k, v = SiLU(W x)

Two passes of the matrix-state scan compute it: the first, with keys k, values 1 - a and decays on the value axis, returns
the logits K_t q_t; the second, with queries softmax(logits), keys 1 - a, values v and decays on the key axis, returns y.
A slot that was never written is read like any other, with logit 0 and value 0.

Heads may share slots: `kv_heads` sets of them, each read by heads / kv_heads queries.
Source: [gated-slot-attention] Method 1 to 3, 6 and 7.  State: the slots' keys [B, G, K, M] and values [B, G, M, V], and the
convolution's tail, constant in T.
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
from torch import Tensor, nn

from seqloom.core import BuildContext, Info, Mixed, Mixer, Placement, Segments, Spec, scan
from seqloom.core.marks import mark
from seqloom.core.mixer import accumulator
from seqloom.kernels import decay_scan
from seqloom.parts import RMSNorm, ShortConv, linear
from seqloom.parts.heads import head_widths


class Slots(NamedTuple):
    keys: Tensor    # [B, G, K, M]
    values: Tensor  # [B, G, M, V]


READS = {"softmax": lambda logits: logits.softmax(-1), "linear": lambda logits: logits}


# Token by token -----------------------------------------------------------------------------------------------------

def write(slots: Slots, k: Float[Tensor, "b g k"], v: Float[Tensor, "b g v"], log_a: Float[Tensor, "b g m"]) -> Slots:
    """The slots after one token: what each held times a, and the token's key and value times 1 - a."""
    wide = slots.keys.dtype
    log_a = log_a.to(wide)
    a, new = log_a.exp(), -log_a.expm1()
    keys = a[..., None, :] * slots.keys + k.to(wide)[..., :, None] * new[..., None, :]
    return Slots(keys, a[..., :, None] * slots.values + new[..., :, None] * v.to(wide)[..., None, :])


def logits(slots: Slots, q: Float[Tensor, "b h k"]) -> Float[Tensor, "b g r m"]:
    """K q for the r queries that share a set of slots."""
    q = rearrange(q.to(slots.keys.dtype), "b (g r) k -> b g r k", g=slots.keys.shape[1])
    return einsum(q, slots.keys, "b g r k, b g k m -> b g r m")


def step(slots: Slots, q: Float[Tensor, "b h k"], k: Float[Tensor, "b g k"], v: Float[Tensor, "b g v"],
         log_a: Float[Tensor, "b g m"], *, scale: float = 1.0, read: str = "softmax") -> tuple[Slots, Tensor]:
    """One token, as the paper writes it: write, then read with the token's own key and value among the rest."""
    with torch.autocast(q.device.type, enabled=False):
        slots = write(slots, k, v, log_a)
        y = einsum(READS[read](scale * logits(slots, q)), slots.values, "b g r m, b g m v -> b g r v")
    return slots, rearrange(y, "b g r v -> b (g r) v").to(v.dtype)


def recurrent(*streams: Tensor, state: Slots, segments: Segments | None = None, **how: Any) -> Mixed:
    """q [B, T, H, K], k [B, T, G, K], v [B, T, G, V], log a [B, T, G, M] by `step`."""
    return scan(partial(step, **how), *streams, state=state, segments=segments)


# By two passes --------------------------------------------------------------------------------------------------------

class Passed(NamedTuple):
    """y [B, T, H, V], the slots after the last token, the unscaled logits [B, T, H, M]."""

    y: Tensor
    slots: Slots
    logits: Tensor


def passes(form: Callable[..., Mixed], q: Float[Tensor, "b t h k"], k: Float[Tensor, "b t g k"], v: Float[Tensor, "b t g v"],
           log_a: Float[Tensor, "b t g m"], weigh: Callable[[Tensor], Tensor], *, state: Slots,
           segments: Segments | None = None) -> Passed:
    """Two runs of `form` of the decay scan, `weigh` between them. Source: [gated-slot-attention] Method 3.

    All of it in float32 or wider: in two chained scans the roundings of 16-bit products add up to 3 times the error of plain
    PyTorch, wherever one of the two still has them.
    """
    heads, groups = q.shape[2], k.shape[2]
    if heads % groups:
        raise ValueError(f"{heads} query heads do not share {groups} sets of slots; use a number of sets that divides {heads}")
    if segments is not None:  # before any arithmetic: NaN at a pad would reach the gradient of 1 - a
        q, k, v, log_a = (segments.hold(x) for x in (q, k, v, log_a))
    dtype, wide = v.dtype, accumulator(v.dtype)
    q, k, v, log_a = (x.to(wide) for x in (q, k, v, log_a))
    new = -log_a.expm1()
    repeat = lambda x, dim: x if heads == groups else x.repeat_interleave(heads // groups, dim)  # noqa: E731
    k, v, log_a, new = (repeat(x, 2) for x in (k, v, log_a, new))
    start = Slots(*(repeat(x, 1) for x in state))
    found, keys, _ = form(q, k, new, log_a, state=start.keys, segments=segments, axis="value")
    y, values, _ = form(weigh(found), new, v, log_a, state=start.values, segments=segments)
    if heads > groups:  # heads that share slots have written the same
        keys, values = (x[:, :: heads // groups].clone() for x in (keys, values))
    return Passed(y.to(dtype), Slots(keys, values), found)


def two_passes(form: Callable[..., Mixed]) -> Callable[..., Mixed]:
    """`form` of the decay scan as a form of gated slots, with the streams of `recurrent`."""

    @wraps(form, assigned=())
    def run(*streams: Tensor, state: Slots, segments: Segments | None = None, scale: float = 1.0,
            read: str = "softmax") -> Mixed:
        y, slots, _ = passes(form, *streams, lambda found: READS[read](scale * found), state=state, segments=segments)
        return Mixed(y, slots)

    return run


FORMS = {"recurrent": recurrent, "chunked": two_passes(decay_scan.chunked), "parallel": two_passes(decay_scan.parallel),
         "fused": two_passes(decay_scan.fused)}
FEATURES = {"silu": F.silu, "relu": F.relu, "t2r": F.relu, "none": lambda x: x}


@dataclass(frozen=True, kw_only=True)
class GatedSlotAttention(Spec):
    heads: int
    kv_heads: int | None = None   # heads of keys, values and slots, each read by heads / kv_heads queries; None: heads
    key_dim: int | None = None    # per head; None: dim / heads
    value_dim: int | None = None  # per head; None: dim / heads
    slots: int = 64
    feature: Literal["silu", "relu", "t2r", "none"] = "silu"  # of q and k; t2r: relu of a learned map; v: SiLU, or none
    tau: float = 8.0              # divides the log decay, so that a gate at 0 has a half-life of tau tokens
    scale: float | None = 1.0     # of the logits; None: key_dim^-1/2
    gate: Literal["token", "constant"] = "token"  # constant: one learned decay per slot, whatever the token
    read: Literal["softmax", "linear"] = "softmax"
    norm: Literal["rms", "none"] = "rms"  # RMSNorm(SiLU(.)) over all heads before the output map
    norm_eps: float = 1e-6
    conv: int = 0                 # width of the short convolution on q, k, v; 0 is none

    key: ClassVar[str] = "gated_slot"
    forms: ClassVar[dict] = FORMS
    equation: ClassVar[str] = ("K_t = diag(a_t) K_{t-1} + (1 - a_t) k_t', V_t alike;  y_t = V_t' softmax(K_t q_t);  "
                               "a_t = sigmoid(W x_t)^(1/8)")
    source: ClassVar[str] = "gated-slot-attention"
    examples: ClassVar[dict] = {
        "": dict(heads=2, slots=8),
        "gqa": dict(heads=4, kv_heads=2, key_dim=6, value_dim=10, slots=12, feature="relu", tau=2.0, scale=None, conv=4),
        "t2r": dict(heads=2, slots=8, feature="t2r"),
        "constant": dict(heads=2, slots=8, feature="none", gate="constant", norm="none"),
        "linear": dict(heads=2, slots=6, read="linear"),
    }

    def __post_init__(self) -> None:
        name, kv = type(self).__name__, self.kv_heads or self.heads
        if kv < 1 or self.heads % kv:
            near = max(n for n in range(1, self.heads + 1) if self.heads % n == 0 and n <= max(kv, 1))
            raise ValueError(f"{name}: {self.heads} query heads do not share {kv} key heads; nearest is {near}")
        if self.slots < 1 or self.tau <= 0:
            raise ValueError(f"{name}: slots is at least 1 and tau above 0, found slots={self.slots}, tau={self.tau}")

    def build(self, ctx: BuildContext) -> GatedSlotAttentionLayer:
        return GatedSlotAttentionLayer(self, ctx)


class Cells(NamedTuple):
    slots: Slots
    tail: Tensor | None  # [B, conv - 1, H K + G K + G V]


class GatedSlotAttentionLayer(Mixer):
    def __init__(self, spec: GatedSlotAttention, ctx: BuildContext):
        super().__init__(spec)
        heads = spec.heads
        self.key, self.value = head_widths(ctx.dim, spec)
        self.groups = spec.kv_heads or heads
        self.scale = self.key**-0.5 if spec.scale is None else spec.scale
        self.widths = (heads * self.key, self.groups * self.key, self.groups * self.value)
        self.qkv = linear(ctx.dim, sum(self.widths))
        self.conv = ShortConv(sum(self.widths), spec.conv, activation=None) if spec.conv else None
        # the map keeps the scale of its input
        self.feature = linear(self.key, self.key, std=self.key**-0.5) if spec.feature == "t2r" else nn.Identity()
        if spec.gate == "token":
            self.f_proj = linear(ctx.dim, self.groups * spec.slots)
        else:  # slots of equal gates would stay equal for ever
            self.gates = mark(nn.Parameter(torch.randn(self.groups, spec.slots)), no_decay=True)
        self.o_norm = RMSNorm(heads * self.value, spec.norm_eps) if spec.norm == "rms" else None
        self.o_proj = linear(heads * self.value, ctx.dim, depth=ctx.depth)

    def mix(self, x: Tensor, cells: Cells | None, place: Placement, info: Info, donate: bool) -> tuple[Tensor, Any, dict]:
        q, k, v, tail = self._streams(x, None if cells is None else cells.tail, place)
        slots = self._slots(x.shape[0], x.dtype, x.device) if cells is None else cells.slots
        y, slots, _ = self.run(q, k, v, self._log_decay(x), state=slots, segments=place.segments, scale=self.scale,
                               read=self.spec.read)
        return self._out(y), Cells(slots, tail), {}

    def _streams(self, x: Tensor, tail: Tensor | None, place: Placement) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """q [B, T, H, K], k [B, T, G, K], v [B, T, G, V], and the convolution's new tail."""
        qkv, after = self.qkv(x), None
        if self.conv is not None:
            qkv, after, _ = self.conv(qkv, tail, place.segments)
        q, k, v = qkv.split(self.widths, -1)
        q = rearrange(q, "b t (h k) -> b t h k", h=self.spec.heads)
        k, v = (rearrange(part, "b t (g d) -> b t g d", g=self.groups) for part in (k, v))
        phi = FEATURES[self.spec.feature]
        return phi(self.feature(q)), phi(self.feature(k)), v if self.spec.feature == "none" else F.silu(v), after

    def _log_decay(self, x: Tensor) -> Tensor:
        """log a_t <= 0, [B, T, G, M] in float32 or wider."""
        wide = accumulator(x.dtype)
        if self.spec.gate == "constant":
            return (F.logsigmoid(self.gates.to(wide)) / self.spec.tau).expand(*x.shape[:2], -1, -1)
        log_a = F.logsigmoid(self.f_proj(x).to(wide)) / self.spec.tau
        return rearrange(log_a, "b t (g m) -> b t g m", g=self.groups)

    def _out(self, y: Tensor) -> Tensor:
        y = rearrange(y, "b t h v -> b t (h v)")
        return self.o_proj(y if self.o_norm is None else self.o_norm(F.silu(y)))

    def _slots(self, batch: int, dtype: torch.dtype, device: Any) -> Slots:
        keys = torch.zeros(batch, self.groups, self.key, self.spec.slots, dtype=accumulator(dtype), device=device)
        return Slots(keys, keys.new_zeros(batch, self.groups, self.spec.slots, self.value))

    def empty(self, batch: int, capacity: int | None, dtype: torch.dtype, device: Any) -> Cells:
        tail = None if self.conv is None else self.conv.empty(batch, dtype, device)
        return Cells(self._slots(batch, dtype, device), tail)
