"""Matrix-state scan with decay: S_t = diag(a_t) S_{t-1} + k_t v_t', y_t = S_t' q_t.

Carries linear attention (a = 1), retention (a constant per head), Mamba-2 (a per head and token), gated linear
attention (a per key channel) and gated slots (a per value channel in the first of two passes, `axis="value"`:
S_t = S_{t-1} diag(a_t) + k_t v_t'). Streams: q, k [B, T, G, K]; v [B, T, H, V]; the logarithm of the decay, `log_a` <= 0,
is [B, T, H] (one per head), [B, T, H, K] (one per key channel; [B, T, H, V] with axis="value") or None (no decay). G
divides H: head h reads and writes with query and key h // (H / G), as Mamba-2's B and C are shared.

Weights are products of the decays between two tokens, made from sums or products over just these: a difference of
running sums would bring in the rounding of all that came before, in other segments too. They are all <= 1.

Bidirectional forms add the same sum over the future, M_ij = prod_{s=i..j-1} a_s for j > i (query side), with the
diagonal counted once ([lion] section 3).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from einops import einsum, rearrange
from jaxtyping import Bool, Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from seqloom.core.forms import gpu_only, narrow
from seqloom.core.mixer import accumulator
from seqloom.core.segments import Segments
from seqloom.core.state import Mixed

Axis = Literal["key", "value"]  # of the state: what a decay per channel multiplies
SPAN = 64  # elements that a loop over states walks through, longer stretches of them side by side


def step(state: Float[Tensor, "b h k v"], q: Float[Tensor, "b g k"], k: Float[Tensor, "b g k"],
         v: Float[Tensor, "b h v"], log_a: Tensor | None = None, *, axis: Axis = "key") -> tuple[Tensor, Tensor]:
    """One token, as the papers write it. This is the definition; every other form must agree with it."""
    wide, heads = state.dtype, state.shape[1]
    q, k = (_per_head(x.to(wide), heads) for x in (q, k))
    if log_a is not None:
        a = log_a.to(wide).exp()
        if log_a.ndim == 2:
            a = a[..., None]
        state = (a[..., None, :] if axis == "value" else a[..., None]) * state
    state = state + k[..., :, None] * v.to(wide)[..., None, :]
    return state, (q[..., :, None] * state).sum(-2).to(v.dtype)


def matrix(q: Float[Tensor, "b t g k"], k: Float[Tensor, "b t g k"], log_a: Tensor | None = None, *,
           segments: Segments | None = None, bidirectional: bool = False, axis: Axis = "key") -> Tensor:
    """The T x T mixing weights [B, H, T, T]: y = matrix @ v. For small T: an oracle and a picture, quadratic in T.

    Without decay it has G heads, since heads that share a query and key share their weights. With a decay per value
    channel every channel has weights of its own: [B, H, V, T, T].
    """
    tokens = q.shape[1]
    wide = accumulator(q.dtype)
    q, k = q.to(wide), k.to(wide)
    if segments is not None:
        q, k = segments.hold(q), segments.hold(k)
    keep = _same_run(segments, tokens, q.device)
    lower = torch.ones(tokens, tokens, dtype=torch.bool, device=q.device).tril()
    keep = keep if bidirectional else keep & lower
    with torch.autocast(q.device.type, enabled=False):
        if log_a is None:
            return einsum(q, k, "b i h k, b j h k -> b h i j") * keep[:, None]
        log_a = log_a.to(wide) if segments is None else segments.hold(log_a.to(wide))
        # forward pairs decay over s = j+1..i, backward ones over s = i..j-1: sums along i and along j, [b i j h (k)]
        channels = (1,) * (log_a.ndim - 2)
        after = lower.tril(-1).reshape(1, tokens, tokens, *channels)
        weight = torch.where(after, log_a[:, :, None], 0.0).cumsum(1)
        if bidirectional:
            earlier = F.pad(log_a, (0, 0) * (log_a.ndim - 2) + (1, 0))[:, :-1]
            weight = weight + torch.where(after.transpose(1, 2), earlier[:, None], 0.0).cumsum(2)
        weight = torch.where(keep.reshape(*keep.shape, *channels), weight, -torch.inf).exp()
        q, k = (_per_head(x, log_a.shape[2]) for x in (q, k))
        if axis == "value" and log_a.ndim == 4:
            return einsum(einsum(q, k, "b i h k, b j h k -> b h i j"), weight, "b h i j, b i j h v -> b h v i j")
        return einsum(q, k, weight, f"b i h k, b j h k, b i j h{' k' * (log_a.ndim - 3)} -> b h i j")


def parallel(q: Float[Tensor, "b t g k"], k: Float[Tensor, "b t g k"], v: Float[Tensor, "b t h v"],
             log_a: Tensor | None = None, *, state: Float[Tensor, "b h k v"] | None = None,
             segments: Segments | None = None, bidirectional: bool = False, axis: Axis = "key") -> Mixed:
    """By the T x T weights. Quadratic in T: an oracle, and fastest for very short sequences."""
    wide, heads = accumulator(v.dtype), v.shape[2]
    by_value = _by_value(k, v, log_a, axis)
    q, k, values = q.to(wide), k.to(wide), v.to(wide)
    if segments is not None:
        q, k, values = segments.hold(q), segments.hold(k), segments.hold(values)
    with torch.autocast(q.device.type, enabled=False):
        weights = _per_head(matrix(q, k, log_a, segments=segments, bidirectional=bidirectional, axis=axis), heads, 1)
        y = einsum(weights, values, f"b h{' v' * by_value} i j, b j h v -> b i h v")
        if bidirectional:
            return Mixed(y.to(v.dtype))
        q, k = (_per_head(x, heads) for x in (q, k))
        run = torch.zeros(q.shape[:2], dtype=torch.int64, device=q.device) if segments is None else segments.run
        decay = torch.zeros_like(q[..., 0]) if log_a is None else log_a.to(wide)
        decay = decay if segments is None else segments.hold(decay)
        decay = decay if decay.ndim == 4 else decay[..., None]
        since = decay.cumsum(1)                                                            # of tokens 0..t
        until = F.pad(decay[:, 1:], (0, 0, 0, 0, 0, 1)).flip(1).cumsum(1).flip(1)          # of tokens t+1..T-1
        kept = (run == run[:, -1:])[..., None, None]
        until, since = torch.where(kept, until.exp(), 0.0), since.exp()
        k, values = (k, values * until) if by_value else (k * until, values)
        new = einsum(k, values, "b t h k, b t h v -> b h k v")
        if state is not None:
            late = torch.where((run == 0)[..., None, None], since, 0.0)
            read = einsum(q if by_value else q * late, state, "b t h k, b h k v -> b t h v")
            y = y + (read * late if by_value else read)
            last = since[:, -1, :, None] if by_value else since[:, -1, :, :, None]
            new = new + torch.where((run[:, -1] == 0)[:, None, None, None], last * state, 0.0)
    y = y.to(v.dtype)
    return Mixed(y if segments is None else segments.hold(y), new)


def chunked(q: Float[Tensor, "b t g k"], k: Float[Tensor, "b t g k"], v: Float[Tensor, "b t h v"],
            log_a: Tensor | None = None, *, state: Float[Tensor, "b h k v"] | None = None,
            segments: Segments | None = None, chunk: int = 64, diagonal: bool = True, axis: Axis = "key") -> Mixed:
    """By chunks: masked products inside, one state per chunk between. Linear in T in time and memory.

    A chunk is one masked matrix product, and one [K, V] write to the state that goes from chunk to chunk. Gradients are
    written by hand (first order): the backward pass keeps the streams and the states between chunks, and makes the C x C
    weights anew. `diagonal=False` leaves out each token's own write (the second direction of a bidirectional pass).
    `chunk` is the number of tokens in a chunk; with a decay per channel it is rounded up to a power of two.
    """
    batch, tokens, groups, key = q.shape
    heads, dtype, wide = v.shape[2], v.dtype, accumulator(v.dtype)
    shared, by_value = _sharing(groups, heads), _by_value(k, v, log_a, axis)
    vector = log_a is not None and log_a.ndim == 4
    chunk = tokens if tokens < chunk else chunk
    if vector:  # blocks are joined in pairs
        chunk = 1 << (chunk - 1).bit_length()
    extra = -tokens % chunk
    if vector and shared > 1 and not by_value:  # decays differ by head inside every product: nothing is left to share
        q, k, groups, shared = _per_head(q, heads), _per_head(k, heads), heads, 1
    same = reads = None
    if segments is not None:
        q, k, v = segments.hold(q), segments.hold(k), segments.hold(v)
        if log_a is not None:  # the decay of a first token reaches only pairs that the selection drops
            still = segments.starts() | ~segments.real
            log_a = torch.where(still.reshape(batch, tokens, *(1,) * (log_a.ndim - 2)), 0.0, log_a)
        run = segments.pad(extra).run.unflatten(1, (-1, chunk))  # [b n c]
        same = run[..., :, None] == run[..., None, :]
        reads = run == F.pad(run[..., -1], (1, 0))[:, :-1, None]  # the count of boundaries before each chunk

    def split(x: Tensor) -> Tensor:
        """[b t h d] in chunks [b n g c (r d)]: the r heads of a group side by side."""
        x = F.pad(x.to(wide), (0, 0, 0, 0, 0, extra)) if extra else x.to(wide)
        return rearrange(x, "b (n c) (g r) d -> b n g c (r d)", c=chunk, g=groups).contiguous()

    start = v.new_zeros(batch, heads, key, v.shape[-1], dtype=wide) if state is None else state.to(wide)
    start = rearrange(start, "b (g r) k v -> b g k (r v)", g=groups)
    if log_a is not None and vector:
        y, new, _ = _channels(split(q), split(k), split(v), split(log_a), start.contiguous(), same, reads, diagonal, by_value)
    else:
        decay = None if log_a is None else rearrange(split(log_a[..., None]), "b n g c r -> b n g r c").contiguous()
        y, new = _Heads.apply(split(q), split(k), split(v), decay, start, same, reads, diagonal)
    y = rearrange(y, "b n g c (r v) -> b (n c) (g r) v", r=shared)
    new = rearrange(new, "b g k (r v) -> b (g r) k v", r=shared)
    return Mixed((y[:, :tokens] if extra else y).to(dtype), new)


@gpu_only()
def fused(q: Float[Tensor, "b t g k"], k: Float[Tensor, "b t g k"], v: Float[Tensor, "b t h v"],
          log_a: Tensor | None = None, *, state: Float[Tensor, "b h k v"] | None = None,
          segments: Segments | None = None, diagonal: bool = True, axis: Axis = "key") -> Mixed:
    """As `chunked`, by Triton kernels: matrix products in the streams' dtype, sums and states in float32.

    Of the axis that decays (that of keys, where there is one decay per head or none) a kernel holds 256 channels, in float32
    128: more are as many more heads, and what these read along keys is added.
    """
    from seqloom.kernels.triton import decay_scan  # lazy: the package runs without Triton

    (groups, key), (heads, value), dtype, low = q.shape[2:], v.shape[2:], v.dtype, narrow(v.dtype)
    shared, by_value = _sharing(groups, heads), _by_value(k, v, log_a, axis)
    if log_a is not None and log_a.ndim == 4:  # a product of decays with queries or keys, of each head: nothing left to share
        q, k, groups, shared = _per_head(q, heads), _per_head(k, heads), heads, 1
    start = v.new_zeros(v.shape[0], heads, key, value, dtype=torch.float32) if state is None else state.float()
    start = start.mT if by_value else start
    code = None if segments is None else segments.code()
    q, k, v = (x.to(low) for x in (q, k, v))
    log_a = None if log_a is None else log_a.to(narrow(log_a.dtype))
    whole = value if by_value else key
    parts = -(-whole // decay_scan.widest(low))
    if parts > 1:
        cut = lambda x: rearrange(  # noqa: E731
            F.pad(x, (0, -whole % parts)), "b t g (n k) -> b t (g n) k", n=parts)
        repeat = lambda x: x.unflatten(2, (groups, 1, -1)).expand(  # noqa: E731
            *x.shape[:2], groups, parts, *[-1] * (x.ndim - 2)).flatten(2, 4)
        start = rearrange(F.pad(start, (0, 0, 0, -whole % parts)), "b (g r) (n k) v -> b (g n r) k v", n=parts, g=groups)
        if log_a is not None:
            log_a = cut(log_a) if log_a.ndim == 4 else repeat(log_a)
        q, k, v = (repeat(q), repeat(k), cut(v)) if by_value else (cut(q), cut(k), repeat(v))
    q, k, v, start = (x.contiguous() for x in (q, k, v, start))
    y, new = decay_scan.launch(q, k, v, None if log_a is None else log_a.contiguous(), start, code, diagonal=diagonal,
                               by_value=by_value)
    if parts > 1:
        y = (rearrange(y, "b t (h n) v -> b t h (n v)", n=parts)[..., :value] if by_value else
             y.unflatten(2, (groups, parts, shared)).sum(3).flatten(2, 3))
        new = rearrange(new, "b (g n r) k v -> b (g r) (n k) v", n=parts, g=groups)[:, :, :whole]
    return Mixed(y.to(dtype), (new.mT if by_value else new).to(accumulator(dtype)))


def bidirectional(q: Tensor, k: Tensor, v: Tensor, log_a: Tensor | None = None, *, state: None = None,
                  segments: Segments | None = None, form: Callable[..., Mixed] = chunked, **options: Any) -> Mixed:
    """Both directions by two passes of `form`, the second over the flipped sequence without its diagonal."""
    ahead = form(q, k, v, log_a, segments=segments, **options)
    flipped = None if segments is None else flip(segments)
    later = None if log_a is None else log_a.flip(1)
    behind = form(q.flip(1), k.flip(1), v.flip(1), later, segments=flipped, diagonal=False, **options)
    return Mixed(ahead.y + behind.y.flip(1))


def flip(segments: Segments) -> Segments:
    """The same segments read from the end: runs count from the other side."""
    run = segments.run
    return Segments(segments.real.flip(1), (run[:, -1:] - run).flip(1))


class _Heads(torch.autograd.Function):
    """Chunks [b n g c .] with one decay per head, or none. Score matrices are transposed: [b n g r j i], weight of
    token j in the output of token i.

    From the state S that enters a chunk: A = (Q K') W, y = A V + since Q S, and whole S + K' (until V) leaves it. W_ij,
    since_i, until_j and whole are the decays from token j to i, from before the chunk to i, from j to the chunk's end,
    and over all of it. Scaling values and outputs, not keys and queries, leaves these shared by the heads of a group.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, log_a: Tensor | None, start: Tensor, same: Tensor | None,
                reads: Tensor | None, diagonal: bool) -> tuple[Tensor, Tensor]:
        with torch.autocast(q.device.type, enabled=False):
            weight, since, until, whole = _weights(log_a, same, reads, v)
            r = whole.shape[3]
            scores = _scores(q, k, weight, same, diagonal)
            write = k.mT @ _scale(v, until)
            before, new = _carry(_over(whole, write), write, start)
            y = _scale_(q @ before, since)
            _by_head(y, r).add_(scores.mT @ _by_head(v, r))
        ctx.save_for_backward(q, k, v, log_a, before, same, reads)
        ctx.diagonal = diagonal
        return y, new

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor, dnew: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, log_a, before, same, reads = ctx.saved_tensors
        dy = dy.contiguous()
        with torch.autocast(q.device.type, enabled=False):
            weight, since, until, whole = _weights(log_a, same, reads, v)
            r = whole.shape[3]
            late, early = _scale(dy, since), _scale(v, until)
            # the adjoint of the state that leaves each chunk runs from the end
            after, dstart = _carry(_over(whole, before).flip(1), (q.mT @ late).flip(1), dnew)
            after = after.flip(1)
            v_heads, dy_heads = _by_head(v, r).contiguous(), _by_head(dy, r).contiguous()
            scores = _scores(q, k, weight, same, ctx.diagonal)
            dscores = v_heads @ dy_heads.mT
            dq, dk, dv = late @ before.mT, early @ after.mT, k @ after
            dlog_a = None
            if ctx.needs_input_grad[3]:
                # log_a_s decays what is read at i >= s, what is written at j < s, the whole, and the pairs j < s <= i: those
                # that end at s or later less those that begin there, without the diagonal, which no decay reaches
                read = q * dq if r == 1 else late * (q @ before)
                write, over = (_by_head(x, r).sum(-1) for x in (early * dv, before * after))
                pairs = (dscores * scores).triu_(1)
                lower = torch.ones(q.shape[-2], q.shape[-2], dtype=q.dtype, device=q.device).tril()
                here = lower if same is None else lower * same[:, :, None]
                dlog_a = (pairs.sum(-2) - pairs.sum(-1) + _by_head(read, r).sum(-1)) @ here
                dlog_a.add_(write @ (1 - lower)).add_((over.sum(-1) * whole[..., 0])[..., None])
            _by_head(_scale_(dv, until), r).add_(scores @ dy_heads)
            dscores = _masked(dscores, weight, same, ctx.diagonal).sum(3)
            dq.add_(dscores.mT @ k)
            dk.add_(dscores @ q)
        return dq, dk, dv, dlog_a, dstart, None, None, None


def _weights(log_a: Tensor | None, same: Tensor | None, reads: Tensor | None,
             like: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor]:
    """W [b n g r j i], since and until [b n g r c], whole [b n g r 1] from log decays [b n g r c]; None stands for ones.

    Source: [s4-survey] Method 12, the segment sums of SSD.
    """
    if log_a is None:
        if same is None or reads is None:
            return None, None, None, like.new_ones(1, 1, 1, 1, 1)
        since, until = (mask[:, :, None, None].to(like.dtype) for mask in (reads, same[..., -1]))
        return None, since, until, since[..., -1:]
    chunk = log_a.shape[-1]
    # sums over s = j+1..i: nothing is subtracted, and no exponent is above 0
    later = torch.ones(chunk, chunk, dtype=torch.bool, device=log_a.device).triu(1)
    weight = torch.where(later, log_a[..., None, :], 0.0).cumsum(-1).exp_().triu_()
    if same is not None:
        weight = torch.where(same[:, :, None, None], weight, 0.0)
    since = log_a[..., :1].exp() * weight[..., 0, :]
    if reads is not None:
        since = torch.where(reads[:, :, None, None], since, 0.0)
    return weight, since, weight[..., -1].clone(), since[..., -1:]


def _masked(scores: Tensor, weight: Tensor | None, same: Tensor | None, diagonal: bool) -> Tensor:
    """Scores [b n g r j i] times W, in place: 0 where causality or a boundary forbids the pair."""
    if weight is not None:
        scores = scores.mul_(weight)
        return scores if diagonal else scores.triu_(1)
    scores = scores.triu_(0 if diagonal else 1)
    return scores if same is None else scores.mul_(same[:, :, None, None])


def _scores(q: Tensor, k: Tensor, weight: Tensor | None, same: Tensor | None, diagonal: bool) -> Tensor:
    """A [b n g r j i]: the products of a group's queries and keys are computed once, and weighted for each of its heads."""
    scores = (k @ q.mT)[:, :, :, None]
    if weight is None:
        return _masked(scores, None, same, diagonal)
    scores = scores * weight
    return scores if diagonal else scores.triu_(1)


def _scale(x: Tensor, weight: Tensor | None) -> Tensor:
    """x [b n g c (r v)] with each head's rows scaled by weight [b n g r c]."""
    if weight is None:
        return x
    return (x.unflatten(-1, (weight.shape[3], -1)) * weight.mT[..., None]).flatten(-2)


def _scale_(x: Tensor, weight: Tensor | None) -> Tensor:
    """The same in place."""
    if weight is not None:
        x.unflatten(-1, (weight.shape[3], -1)).mul_(weight.mT[..., None])
    return x


def _over(whole: Tensor, states: Tensor) -> Tensor:
    """whole [b n g r 1] as what multiplies states [b n g k (r v)]."""
    r = whole.shape[3]
    return whole.expand(*states.shape[:3], r, states.shape[-1] // r).flatten(-2)[..., None, :]


def _by_head(x: Tensor, r: int) -> Tensor:
    """x [b n g c (r v)] as [b n g r c v], a view."""
    return x.unflatten(-1, (r, -1)).transpose(-2, -3)


def _carry(decay: Tensor, write: Tensor, start: Tensor) -> tuple[Tensor, Tensor]:
    """States [b n ..] of h_i = decay_i h_{i-1} + write_i before each element, and the last one; spends `write`."""
    _advance(decay, write, start)
    return torch.cat([start[:, None], write[:, :-1]], 1), write[:, -1].clone()


def _advance(decay: Tensor, h: Tensor, start: Tensor) -> None:
    """Writes [b n ..] become states, in place: what `core.scan.carry` does, in a third of its time, but no gradient can be
    traced through it. Spans of elements run side by side from nothing, then their ends do, then what entered each is added.
    """
    n = h.shape[1]
    if n <= SPAN:
        for i in range(n):
            h[:, i].addcmul_(decay[:, i], h[:, i - 1] if i else start)
        return
    whole = n - n % SPAN
    inside, a = (x[:, :whole].unflatten(1, (-1, SPAN)) for x in (h, decay))
    for i in range(1, SPAN):
        inside[:, :, i].addcmul_(a[:, :, i], inside[:, :, i - 1])
    since, ends = a.cumprod(2), inside[:, :, -1].clone()
    _advance(since[:, :, -1], ends, start)
    inside.addcmul_(since, torch.cat([start[:, None], ends[:, :-1]], 1)[:, :, None])
    if whole < n:
        _advance(decay[:, whole:], h[:, whole:], ends[:, -1])


@torch.library.custom_op("seqloom::decay_scan_channels", mutates_args=(), schema=(
    "(Tensor q, Tensor k, Tensor v, Tensor log_a, Tensor start, Tensor? same, Tensor? reads, bool diagonal, bool by_value)"
    " -> (Tensor, Tensor, Tensor)"))
def _channels(q: Tensor, k: Tensor, v: Tensor, log_a: Tensor, start: Tensor, same: Tensor | None, reads: Tensor | None,
              diagonal: bool, by_value: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Chunks [b n h c .] with one decay per key channel, or per value channel, log_a [b n g c (r v)].

    Neighbouring blocks are joined again and again: a pair of tokens in two blocks that become one is weighted by the decays
    from the first token's to its block's end, and from the second block's start to the second token. Both are products of
    decays inside one block, and grow with it by one factor. On the key axis they go into keys and queries. On the value axis
    ([gated-slot-attention] Method 3) into values and outputs: products of queries and keys bear no weights, and the heads of
    a group share them, whatever their decays.
    Returns y, the state after the last chunk and those before each. An operator, so that no compiler traces its many views.
    """
    with torch.autocast(q.device.type, enabled=False):
        a = log_a.exp()
        if by_value:
            scores = _inside(q @ k.mT, same, diagonal)
            y = scores.diagonal(dim1=-2, dim2=-1)[..., None] * v
            late, early, whole = a.clone(), v.clone(), a
            for level in _levels(late, early, a):
                y.unflatten(-2, (-1, 2, level.size))[..., 1, :, :].addcmul_(
                    level.right, _corner(scores, level.size) @ level.left)
                whole = level.first * level.second
            late, early, whole = _bound(late, early, whole[..., 0, :], same, reads)
            before, new = _carry(whole[..., None, :], k.mT @ early, start)
            return y.addcmul_(late, q @ before), new, before
        scores, late, early, whole, _ = _join(q, k, a, same, reads, diagonal)
        before, new = _carry(whole[..., None], early.mT @ v, start)
        return (scores @ v).add_(late @ before), new, before


@_channels.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, log_a: Tensor, start: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    return torch.empty_like(v), torch.empty_like(start), v.new_empty(*v.shape[:3], k.shape[-1], v.shape[-1])


@torch.library.custom_op("seqloom::decay_scan_channels_backward", mutates_args=(), schema=(
    "(Tensor dy, Tensor dnew, Tensor q, Tensor k, Tensor v, Tensor log_a, Tensor before, Tensor? same, Tensor? reads,"
    " bool diagonal, bool by_value) -> (Tensor, Tensor, Tensor, Tensor, Tensor)"))
def _channels_backward(dy: Tensor, dnew: Tensor, q: Tensor, k: Tensor, v: Tensor, log_a: Tensor, before: Tensor,
                       same: Tensor | None, reads: Tensor | None, diagonal: bool,
                       by_value: bool) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, log_a and start in `_channels`.

    sum_ij dy_i' y_ij = sum_ij (q_i' k_j) (dy_i' W_ij v_j) on the value axis is the same on the key axis with the roles
    exchanged: queries dy, keys v, values k, outputs' gradients q. What was the gradient of values is then that of keys, and
    the outputs are the gradient of queries.
    """
    with torch.autocast(q.device.type, enabled=False):
        if by_value:
            q, k, v, dy, before, dnew = dy, v, k, q, before.mT, dnew.mT
        a = log_a.exp()
        scores, late, early, whole, levels = _join(q, k, a, same, reads, diagonal, keep=True)
        after, dstart = _carry(whole.flip(1)[..., None], (late.mT @ dy).flip(1), dnew)
        after = after.flip(1)
        y = (scores @ v).add_(late @ before) if by_value else None
        dv = (scores.mT @ dy).add_(early @ after)
        dscores = dy @ v.mT
        own = dscores.diagonal(dim1=-2, dim2=-1)[..., None].clone() if diagonal else None
        if same is not None:
            dscores = torch.where(same[:, :, None], dscores, 0.0)
        dlate, dearly, dwhole = _bound(dy @ before.mT, v @ after.mT, (before * after).sum(-1), same, reads)
        dq, dk, da = _part(dlate, dearly, dwhole, dscores, levels)
        da.add_(dq * q).mul_(a)
        dq.mul_(a)
        if own is not None:
            dq.addcmul_(own, k)
            dk.addcmul_(own, q)
        return (y, dv, dk, da, dstart.mT.contiguous()) if y is not None else (dq, dk, dv, da, dstart)


@_channels_backward.register_fake
def _(dy: Tensor, dnew: Tensor, q: Tensor, k: Tensor, v: Tensor, log_a: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    return *(torch.empty_like(x) for x in (q, k, v, log_a)), torch.empty_like(dnew)


def _keep(ctx: Any, inputs: tuple, output: tuple) -> None:
    q, k, v, log_a, _, same, reads, *ctx.how = inputs
    ctx.save_for_backward(q, k, v, log_a, output[2], same, reads)


def _back(ctx: Any, dy: Tensor, dnew: Tensor, _: Any) -> tuple[Tensor | None, ...]:
    return *_channels_backward(dy.contiguous(), dnew.contiguous(), *ctx.saved_tensors, *ctx.how), None, None, None, None


_channels.register_autograd(_back, setup_context=_keep)


class Level(NamedTuple):
    """Two blocks of `size` tokens about to become one: of all pairs of blocks, what is late and early [.. blocks size k] of the
    second and of the first, views, and the decay over each [.. blocks k]."""

    size: int
    right: Tensor
    left: Tensor
    first: Tensor
    second: Tensor


def _levels(late: Tensor, early: Tensor, whole: Tensor) -> Iterator[Level]:
    """Every level. After it late [.. c k], decays since each block's start, gains those of the first block, early those of the
    second, in place: at the end both are of the whole chunk."""
    size = 1
    while size < late.shape[-2]:
        right, left = (x.unflatten(-2, (-1, 2, size))[..., i, :, :] for x, i in ((late, 1), (early, 0)))
        first, second = whole.unflatten(-2, (-1, 2)).unbind(-2)
        yield Level(size, right, left, first, second)
        right.mul_(first[..., None, :])
        left.mul_(second[..., None, :])
        whole = first * second
        size *= 2


def _join(q: Tensor, k: Tensor, a: Tensor, same: Tensor | None, reads: Tensor | None, diagonal: bool,
          keep: bool = False) -> tuple[Tensor, Tensor, Tensor, Tensor, list[Level]]:
    """Scores [b n h i j] inside chunks, q times the decays since the chunk's start where it reads what enters, k times those
    until its end where it is among what leaves, the decay over all of it [b n h k], and with `keep` the levels, for `_part`."""
    chunk = q.shape[-2]
    scores = q.new_zeros(*q.shape[:-1], chunk)
    if diagonal:
        scores.diagonal(dim1=-2, dim2=-1).copy_((q * k).sum(-1))
    late, early, whole, levels = q * a, k.clone(), a, []
    for level in _levels(late, early, a):
        _corner(scores, level.size).copy_(level.right @ level.left.mT)
        whole = level.first * level.second
        if keep:
            levels.append(level._replace(right=level.right.clone(), left=level.left.clone()))
    if same is not None:
        scores = torch.where(same[:, :, None], scores, 0.0)
    return scores, *_bound(late, early, whole[..., 0, :], same, reads), levels


def _part(dlate: Tensor, dearly: Tensor, dwhole: Tensor, dscores: Tensor,
          levels: list[Level]) -> tuple[Tensor, Tensor, Tensor]:
    """The adjoint of `_join` at its first level: gradients of q a and k (in place of dlate and dearly), and of a."""
    dwhole = dwhole[..., None, :]
    for size, right, left, first, second in reversed(levels):
        dright, dleft = (x.unflatten(-2, (-1, 2, size))[..., i, :, :] for x, i in ((dlate, 1), (dearly, 0)))
        dcross = _corner(dscores, size).contiguous()
        parts = torch.stack([dwhole * second + (dright * right).sum(-2), dwhole * first + (dleft * left).sum(-2)], -2)
        dwhole = parts.flatten(-3, -2)
        dright.mul_(first[..., None, :]).add_(dcross @ left)
        dleft.mul_(second[..., None, :]).add_(dcross.mT @ right)
    return dlate, dearly, dwhole


def _inside(scores: Tensor, same: Tensor | None, diagonal: bool) -> Tensor:
    """Scores [b n g i j], in place: 0 where causality or a boundary forbids the pair."""
    scores = scores.tril_(0 if diagonal else -1)
    return scores if same is None else scores.masked_fill_(~same[:, :, None], 0.0)


def _corner(scores: Tensor, size: int) -> Tensor:
    """Of scores [.. c c], the blocks [.. c/2s s s] in which the second s tokens of every 2s meet the first s, a view."""
    blocks = scores.unflatten(-1, (-1, 2 * size)).unflatten(-3, (-1, 2 * size)).diagonal(dim1=-4, dim2=-2)  # [.. i j block]
    return blocks.movedim(-1, -3)[..., size:, :size]


def _bound(late: Tensor, early: Tensor, whole: Tensor, same: Tensor | None,
           reads: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Late tokens read the incoming state, early ones write the outgoing one, and it lives on: where no boundary is between."""
    if same is None or reads is None:
        return late, early, whole
    masks = reads[:, :, None, :, None], same[:, :, None, -1, :, None], reads[:, :, None, -1:]
    late, early, whole = (torch.where(mask, x, 0.0) for mask, x in zip(masks, (late, early, whole), strict=True))
    return late, early, whole


def _per_head(x: Tensor, heads: int, dim: int = -2) -> Tensor:
    """The G groups of x repeated to H heads: head h takes group h // (H / G)."""
    shared = _sharing(x.shape[dim], heads)
    return x if shared == 1 else x.repeat_interleave(shared, dim)


def _by_value(k: Tensor, v: Tensor, log_a: Tensor | None, axis: Axis) -> bool:
    """Whether decays act on the value axis, channel by channel.

    Raises: ValueError for an unknown axis, or for decays of another number of channels than that axis has.
    """
    if axis not in ("key", "value"):
        raise ValueError(f"decays act on axis 'key' or 'value' of the state, not {axis!r}")
    if log_a is None or log_a.ndim == 3:
        return False
    wanted = (v if axis == "value" else k).shape[-1]
    if log_a.shape[-1] != wanted:
        raise ValueError(f"decays on the {axis} axis need {wanted} channels, found {log_a.shape[-1]}")
    return axis == "value"


def _sharing(groups: int, heads: int) -> int:
    """Heads to a group."""
    if heads % groups:
        raise ValueError(f"{groups} heads of queries and keys cannot be shared by {heads} heads of values; "
                         f"use a divisor of {heads}")
    return heads // groups


def _same_run(segments: Segments | None, tokens: int, device: torch.device) -> Bool[Tensor, "b i j"]:
    """[B or 1, T, T]: pairs with no boundary between them."""
    if segments is None:
        return torch.ones(1, tokens, tokens, dtype=torch.bool, device=device)
    return segments.run[:, :, None] == segments.run[:, None, :]
