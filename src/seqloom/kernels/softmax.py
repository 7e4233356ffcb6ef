"""Softmax attention over a pattern: y_i = sum_j softmax_j(scale q_i k_j + bias_ij) v_j over the keys j that i sees.

What a query sees is data (`Pattern`), stated in coordinates (`Coords`): the position in the segment, and which segment,
never the place in a tensor. Every form takes

    q [B, T, H, K], k [B, S, G, K], v [B, S, G, V], G key heads that divide H (query head h reads key head h // (H / G))

and returns `Partial(y [B, T, H, V], lse [B, T, H])`, lse the log-sum-exp of the scores (None from `fused`). Which form suits
a call is decided in one place, `preference`. There are three ways to say where the tokens stand:

    nothing       all tokens are real and of one segment; the last T of the S keys are the queries' own tokens
    segments      S = T: packed or padded rows; `at` may give other positions for the distance bias
    keys, queries explicit coordinates, for keys that were cached; causal and window patterns want the queries' own
                  tokens as the last T keys, in order, and the keys before them in order of position

A query without a visible key has y = 0 and lse = -inf, with finite gradients; so has a query that holds.
Source: [flashattention-2]; grouped queries and windows as in points 3 and 4 of its sheet.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from einops import einsum, rearrange
from jaxtyping import Bool, Float
from torch import Tensor

from seqloom.core.forms import gpu_only, narrow
from seqloom.core.mixer import accumulator
from seqloom.core.segments import Segments
from seqloom.kernels import cuda_attention
from seqloom.kernels.merge import Partial
from seqloom.kernels.rows import pack, regroup, take

BLOCK = 128  # keys a step of the online softmax: small enough that causal blocks skip most of what is not seen
SCORES = 1 << 17  # scores a row and head in one step, where there are few queries
CHUNK = 64   # least number of queries in a chunk of a banded window
LONG_BIAS = 1024  # tokens from which on, on a CPU, making a distance bias block by block is faster than T x T numbers a head
HALF = (torch.float16, torch.bfloat16)  # what the fast CUDA kernels of PyTorch read


@dataclass(frozen=True, kw_only=True)
class Pattern:
    """Which keys a query sees within its segment, and with what bias. i, j are positions of query and key.

    order:  causal: j <= i. dense: all.
    window: |i - j| < window, so that a causal query sees `window` keys, itself included
    prefix: keys with j < prefix are seen by every query of the segment, earlier ones too (a bidirectional prefix)
    slopes: one a query head: bias_ij = -slope |i - j| (ALiBi)
    """

    order: Literal["causal", "dense"] = "causal"
    window: int | None = None
    prefix: int = 0
    slopes: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        if self.window is not None and self.window < 1:
            raise ValueError(f"Pattern: a window of {self.window} shows no key; the least is 1 (the token itself)")
        if self.prefix and (self.window is not None or self.order == "dense"):
            raise ValueError("Pattern: a prefix needs order='causal' and no window; a dense pattern sees the prefix anyway")

    @property
    def causal(self) -> bool:
        return self.order == "causal"

    def sees(self, queries: Coords, keys: Coords) -> Bool[Tensor, "b t s"]:
        """Pairs that are kept. The definition of the pattern, for any blocks of queries and keys."""
        i, j = queries.position[:, :, None], keys.position[:, None, :]
        keep = queries.run[:, :, None] == keys.run[:, None, :]
        if self.causal:
            keep = keep & ((j <= i) | (j < self.prefix) if self.prefix else j <= i)
        if self.window is not None:
            keep = keep & (i - j < self.window)
            if not self.causal:
                keep = keep & (j - i < self.window)
        if queries.real is not None:
            keep = keep & queries.real[:, :, None]
        return keep if keys.real is None else keep & keys.real[:, None, :]

    def interval(self, queries: Coords, keys: Coords) -> Interval:
        """The same pairs as `sees`, as numbers per token: number the keys by (run, position), and every query sees an interval.

        Linear in T and S (a sort), where `sees` is T x S. No order of keys or queries is assumed, and nothing waits.
        """
        rows = max(queries.rows, keys.rows)
        queries, keys = queries.expand(rows), keys.expand(rows)
        least = keys.position.amin()
        span = keys.position.amax() - least + 2  # places of a run; no key stands in its last one
        i = queries.position - least
        low, high = torch.zeros_like(i), (span - 1).expand_as(i)
        if self.causal:
            high = i.clamp(min=self.prefix - 1 - least) if self.prefix else i
        if self.window is not None:
            low = i - (self.window - 1)
            high = high if self.causal else i + (self.window - 1)
        # a query may stand outside all positions of keys: bounds stay within its run, on the places without keys
        low, high = torch.minimum(low.clamp(min=0), span - 1), torch.minimum(high.clamp(min=-1), span - 1)
        base, code = queries.run * span, keys.run * span + (keys.position - least)
        if keys.real is not None:
            code = torch.where(keys.real, code, torch.iinfo(torch.int64).min)
        order = code.sort(1).values
        find = lambda x, right: torch.searchsorted(order, x.contiguous(), right=right, out_int32=True)  # noqa: E731
        first, last, rank = find(base + low, False), find(base + high, True) - 1, find(code, False)
        if keys.real is not None:
            rank = torch.where(keys.real, rank, -1)
        if queries.real is not None:
            first, last = torch.where(queries.real, first, cuda_attention.NOWHERE), torch.where(queries.real, last, -1)
        return Interval(first, last, rank)

    def bias(self, queries: Coords, keys: Coords, dtype: torch.dtype) -> Float[Tensor, "b h t s"] | None:
        """What is added to the scores: the distance bias, and log(count) of keys that stand for several tokens."""
        bias = None
        if self.slopes is not None:
            i = queries.position if queries.at is None else queries.at
            j = keys.position if keys.at is None else keys.at
            # filled on the device: a copy from the host would wait, and cannot be part of a CUDA graph
            slopes = torch.cat([torch.full((1, 1, 1), slope, dtype=dtype, device=i.device) for slope in self.slopes])
            bias = -slopes * (i[:, None, :, None] - j[:, None, None, :]).abs().to(dtype)
        if keys.counts is not None:
            counts = keys.counts.to(dtype).log()[:, None, None, :]
            bias = counts if bias is None else bias + counts
        return bias


class Interval(NamedTuple):
    """Query t sees key s where first[t] <= rank[s] <= last[t]. int32; a token that holds has rank -1 and first > last."""

    first: Tensor  # [B, T]
    last: Tensor   # [B, T]
    rank: Tensor   # [B, S]


class Coords(NamedTuple):
    """Where tokens stand. Every field is [B, T], or [1, T] where all rows agree.

    position: place in the segment, from 0, counting real tokens
    run:      which segment; tokens see each other only where it is equal
    real:     False where a token holds: it is not seen and sees nothing. None: all are real
    at:       positions for the distance bias, where they are not `position`
    counts:   how many tokens a key stands for (a log-count bias); None: one each
    """

    position: Tensor
    run: Tensor
    real: Tensor | None = None
    at: Tensor | None = None
    counts: Tensor | None = None

    def map(self, change: Callable[[Tensor], Tensor]) -> Coords:
        rest = (None if x is None else change(x) for x in self[2:])
        return Coords(change(self.position), change(self.run), *rest)

    def slice(self, start: int, stop: int) -> Coords:
        return self.map(lambda x: x[:, start:stop])

    def take(self, index: Tensor) -> Coords:
        """Tokens `index` [B, R] of every row."""
        return self.map(lambda x: x.expand(index.shape[0], -1).gather(1, index))

    def pad(self, before: int, after: int) -> Coords:
        """With tokens at either end that no query sees."""
        return self.all_real().map(lambda x: F.pad(x, (before, after)))

    def all_real(self) -> Coords:
        """The same with `real` written out."""
        return self if self.real is not None else self._replace(real=torch.ones_like(self.position, dtype=torch.bool))

    @property
    def rows(self) -> int:
        return max(x.shape[0] for x in self if x is not None)

    def expand(self, rows: int) -> Coords:
        return self.map(lambda x: x.expand(rows, -1))

    def window(self, size: int, step: int) -> Coords:
        """Overlapping windows of `size` tokens every `step`, as rows: [(B n), size]."""
        return self.map(lambda x: x.unfold(1, size, step).flatten(0, 1))


def cat(first: Coords, second: Coords) -> Coords:
    """The tokens of `first`, then those of `second`."""
    if first.real is not None or second.real is not None:
        first, second = first.all_real(), second.all_real()
    rows = max(first.rows, second.rows)
    a, b = first.expand(rows), second.expand(rows)
    rest = (None if x is None or y is None else torch.cat([x, y], 1) for x, y in zip(a[2:], b[2:], strict=True))
    return Coords(torch.cat([a.position, b.position], 1), torch.cat([a.run, b.run], 1), *rest)


def line(tokens: int, device: torch.device, start: int = 0) -> Coords:
    """One segment without padding, from position `start`: [1, T]."""
    position = torch.arange(start, start + tokens, device=device)[None]
    return Coords(position, torch.zeros_like(position))


def packed(segments: Segments, at: Tensor | None = None) -> Coords:
    """The coordinates that segments imply: positions count the real tokens of each run from 0."""
    rank = segments.real.cumsum(1) - 1
    first = torch.where(segments.starts(), rank, 0).cummax(1).values
    return Coords(rank - first, segments.run, segments.real, at)


def matrix(q: Float[Tensor, "b t h k"], k: Float[Tensor, "b s g k"], v: Float[Tensor, "b s g v"], *, pattern: Pattern,
           segments: Segments | None = None, at: Tensor | None = None, queries: Coords | None = None,
           keys: Coords | None = None, scale: float | None = None) -> Partial:
    """By the T x S mixing weights, masked. The definition; every other form must agree with it."""
    weight, lse = weights(q, k, pattern=pattern, segments=segments, at=at, queries=queries, keys=keys, scale=scale)
    _, _, v, _, _ = _placed(q, k, v, segments, at, queries, keys)
    weight = rearrange(weight, "b (g r) t s -> b g r t s", g=v.shape[2])
    y = einsum(weight, v.to(weight.dtype), "b g r t s, b s g v -> b t g r v")
    return Partial(rearrange(y, "b t g r v -> b t (g r) v").to(v.dtype), lse)


def weights(q: Float[Tensor, "b t h k"], k: Float[Tensor, "b s g k"], *, pattern: Pattern, segments: Segments | None = None,
            at: Tensor | None = None, queries: Coords | None = None, keys: Coords | None = None,
            scale: float | None = None) -> tuple[Float[Tensor, "b h t s"], Float[Tensor, "b t h"]]:
    """The mixing weights (rows sum to 1, or to 0 where no key is visible) and the log-sum-exp of their scores."""
    q, k, _, queries, keys = _placed(q, k, k, segments, at, queries, keys)
    wide = accumulator(q.dtype)
    q = rearrange(q.to(wide) * _scale(q, scale), "b t (g r) k -> b g r t k", g=_groups(q, k))
    score = rearrange(einsum(q, k.to(wide), "b g r t k, b s g k -> b g r t s"), "b g r t s -> b (g r) t s")
    bias = pattern.bias(queries, keys, wide)
    score = score if bias is None else score + bias
    keep = pattern.sees(queries, keys)[:, None]
    # a row without any key: its maximum is -inf, and exp(-inf + inf) would be NaN
    some = keep.any(-1, keepdim=True)
    score = torch.where(keep, score, -torch.inf)
    top = torch.where(some, score.detach().amax(-1, keepdim=True), 0.0)
    weight = (score - top).exp()
    total = weight.sum(-1, keepdim=True)
    safe = torch.where(some, total, 1.0)
    lse = torch.where(some, top + safe.log(), -torch.inf)[..., 0]
    return weight / safe, lse.transpose(1, 2)


def chunked(q: Float[Tensor, "b t h k"], k: Float[Tensor, "b s g k"], v: Float[Tensor, "b s g v"], *, pattern: Pattern,
            segments: Segments | None = None, at: Tensor | None = None, queries: Coords | None = None,
            keys: Coords | None = None, scale: float | None = None, block: int | None = None) -> Partial:
    """By blocks of keys with a running maximum, memory linear in T; a window by a band, linear in time as well.

    Each step takes `block` keys against all queries that may see them, and the backward pass recomputes the weights
    from the log-sum-exp ([flashattention-2] Algorithms 1 and 2). The work is quadratic, so the number of steps must
    grow with T for memory to be linear. block None: 128, or more where there are few queries.
    """
    q, k, v, queries, keys = _placed(q, k, v, segments, at, queries, keys)
    _groups(q, k)
    if _banded(pattern, k.shape[1]):
        return _band(q, k, v, pattern, segments, queries, keys, scale, _online)
    return _online(q, k, v, pattern, queries, keys, scale, block)


def fused(q: Float[Tensor, "b t h k"], k: Float[Tensor, "b s g k"], v: Float[Tensor, "b s g v"], *, pattern: Pattern,
          segments: Segments | None = None, at: Tensor | None = None, queries: Coords | None = None,
          keys: Coords | None = None, scale: float | None = None) -> Partial:
    """By PyTorch's own attention kernels, on CPU and CUDA. Returns no log-sum-exp.

    Whole rows go to scaled_dot_product_attention, unmasked. On CUDA in 16 bits, segments, windows and causal queries after
    cached keys go to its kernel for rows of any length (varlen_attn). Elsewhere segments are regrouped into rows of similar
    length (kernels/rows.py), each bucket one unmasked call. What is left takes a T x S mask (said once, where it is large):
    explicit coordinates, biases, prefixes, and compiled code over segments, where shapes may not depend on data.
    """
    _groups(q, k)
    if keys is None and _varlen(q, k, v, pattern, segments, at):
        return Partial(_by_length(q, k, v, pattern, segments, scale))
    if keys is None and segments is None and at is None:
        return Partial(_plain(q, k, v, pattern, scale))
    if keys is None and segments is not None and not torch.compiler.is_compiling():
        return Partial(_by_rows(q, k, v, pattern, segments, at, scale))
    q, k, v, queries, keys = _placed(q, k, v, segments, at, queries, keys)
    if _banded(pattern, k.shape[1]):
        return _band(q, k, v, pattern, segments, queries, keys, scale, _sdpa_masked)
    return _sdpa_masked(q, k, v, pattern, queries, keys, scale)


@gpu_only(*HALF)
def flex(q: Float[Tensor, "b t h k"], k: Float[Tensor, "b s g k"], v: Float[Tensor, "b s g v"], *, pattern: Pattern,
         segments: Segments | None = None, at: Tensor | None = None, queries: Coords | None = None,
         keys: Coords | None = None, scale: float | None = None) -> Partial:
    """By PyTorch's FlexAttention, compiled: any pattern, bias and coordinates, blocks without visible pairs skipped.

    Memory is linear in T. The first call of a shape compiles for some seconds; lengths are filled up to one of four sizes an
    octave (cached keys: one), so that new lengths seldom do. Called on a CPU, as tests do, it runs uncompiled and T x S.
    """
    _groups(q, k)
    own = keys is None and segments is None and at is None
    q, k, v, queries, keys = _placed(q, k, v, segments, at, queries, keys)
    shape = cuda_attention.filled(q.shape[1], k.shape[1])
    build = lambda: cuda_attention.blocks(*pattern.interval(queries, keys), *shape)  # noqa: E731
    mask = cuda_attention.remember((pattern, q.shape[1], k.shape[1], q.device), build) if own else build()
    places = None
    if pattern.slopes is not None:
        places = queries.position if queries.at is None else queries.at, keys.position if keys.at is None else keys.at
    weight = None if keys.counts is None else keys.counts.float().log()
    dtype = narrow(q.dtype)
    y, lse = cuda_attention.flex(q.to(dtype), k.to(dtype), v.to(dtype), mask, shape, slopes=pattern.slopes, places=places,
                                 weight=weight, scale=_scale(q, scale))
    return Partial(y.to(v.dtype), lse.to(accumulator(v.dtype)))


# only what a compiler has written for the card is worth its name: Triton's interpreter does not run it
flex.devices = tuple(kind for kind in flex.devices if kind == "cuda")  # type: ignore[attr-defined]

FORMS = {"matrix": matrix, "chunked": chunked, "fused": fused, "flex": flex}


def preference(q: Tensor, k: Tensor, v: Tensor, *, pattern: Pattern, segments: Segments | None = None, at: Tensor | None = None,
               queries: Coords | None = None, keys: Coords | None = None, lse: bool = False, **rest: Any) -> tuple[str, ...]:
    """The forms for a call, best first: the one place where it is decided. Arguments as those of a form.

    `lse`: the caller merges, so that only forms which return the log-sum-exp will do. `core.forms` takes the first that the
    device can run and that is chosen for the dtype (flex: 16 bits on CUDA).
    """
    (batch, tokens, heads), stored = q.shape[:3], k.shape[1]
    compiled = torch.compiler.is_compiling()
    kernels, blocks = ("fused", "flex", "chunked"), ("flex", "chunked", "fused")
    if q.device.type != "cuda":
        # a distance bias over all pairs is T x T numbers a head to `fused`
        long = not compiled and pattern.slopes is not None and pattern.window is None and tokens >= LONG_BIAS
        return ("chunked",) if lse or (long and q.device.type == "cpu") else ("fused", "chunked")
    if lse:
        return ("flex", "chunked")
    if tokens == 1 or q.dtype == torch.float64:  # a mask of one row is no matter; no fast kernel knows float64
        return kernels
    if keys is None and at is None:
        if (segments is None and _unmasked(pattern, tokens, stored)) or _varlen(q, k, v, pattern, segments, None):
            return kernels
        # in float32: causal rows of one segment each need no mask, and that of a narrow window is T x window
        rows = segments is not None and pattern.causal and not pattern.prefix and pattern.window is None
        if q.dtype not in HALF and not compiled and pattern.slopes is None and (rows or _banded(pattern, stored)):
            return kernels
    if compiled:  # there, `chunked` is as many copies of a step as T asks for
        return ("flex", "fused")
    pairs = batch * tokens * stored * (1 if pattern.slopes is None else heads)
    few = not torch.is_grad_enabled() and pairs <= cuda_attention.MASK
    # some tokens after cached ones: not worth compiling for, and a mask is small
    return kernels if few and (segments is None or keys is not None) else blocks


def _unmasked(pattern: Pattern, tokens: int, stored: int) -> bool:
    """Whether whole rows of one segment need no mask: is_causal is all."""
    wide = pattern.window is None or (pattern.window >= stored)
    return wide and pattern.slopes is None and not pattern.prefix and (not pattern.causal or tokens == stored)


def _varlen(q: Tensor, k: Tensor, v: Tensor, pattern: Pattern, segments: Segments | None, at: Tensor | None) -> bool:
    """Whether PyTorch's kernel for rows of any length takes this call, and is needed for it."""
    if q.device.type != "cuda" or q.dtype not in HALF or q.shape[1] == 1 or not q.dtype == k.dtype == v.dtype:
        return False
    if pattern.slopes is not None or pattern.prefix or at is not None or not cuda_attention.VARLEN:
        return False
    if q.shape[-1] != v.shape[-1] or q.shape[-1] % 8 or q.shape[-1] > 256 or cuda_attention.capability(q.device) < (8, 0):
        return False
    if segments is not None:  # how many there are is read from the device: not in compiled code, nor while a graph is captured
        return q.shape[1] == k.shape[1] and not torch.compiler.is_compiling() and not torch.cuda.is_current_stream_capturing()
    return not _unmasked(pattern, q.shape[1], k.shape[1]) and k.shape[1] >= q.shape[1]


# Where tokens stand -------------------------------------------------------------------------------------------------

def _placed(q: Tensor, k: Tensor, v: Tensor, segments: Segments | None, at: Tensor | None, queries: Coords | None,
            keys: Coords | None) -> tuple[Tensor, Tensor, Tensor, Coords, Coords]:
    """Coordinates of queries and keys, and the streams with what holds set to 0, by selection.

    Keys with coordinates of their own were held when they were stored: they are finite, and not copied again here.
    """
    tokens, stored = q.shape[1], k.shape[1]
    if keys is None:
        if segments is not None:
            if stored != tokens:
                raise ValueError(f"{tokens} tokens in segments over {stored} keys: give coordinates (queries=, keys=)")
            queries = keys = packed(segments, at)
        elif at is not None:
            queries = keys = line(tokens, q.device)._replace(at=at)
        else:
            queries, keys = line(tokens, q.device, stored - tokens), line(stored, q.device)
    else:
        queries = line(tokens, q.device) if queries is None else queries
        return q if segments is None else segments.hold(q), k, v, queries, keys
    if segments is not None:
        q, k, v = segments.hold(q), segments.hold(k), segments.hold(v)
    return q, k, v, queries, keys


def _groups(q: Tensor, k: Tensor) -> int:
    heads, groups = q.shape[2], k.shape[2]
    if heads % groups:
        raise ValueError(f"{heads} query heads do not share {groups} key heads evenly; use key heads that divide {heads}")
    return groups


def _scale(q: Tensor, scale: float | None) -> float:
    return q.shape[-1] ** -0.5 if scale is None else scale


# The online softmax -------------------------------------------------------------------------------------------------

def _online(q: Tensor, k: Tensor, v: Tensor, pattern: Pattern, queries: Coords, keys: Coords, scale: float | None,
            block: int | None = None) -> Partial:
    wide, tokens = accumulator(v.dtype), q.shape[1]
    aligned = pattern.causal and not pattern.prefix and k.shape[1] >= tokens > 1
    block = block or max(BLOCK, SCORES // tokens if tokens <= BLOCK else 0)
    fold = lambda x: rearrange(x.to(wide), "b t (g r) k -> b g r t k", g=k.shape[2])  # noqa: E731
    line_up = lambda x: rearrange(x.to(wide), "b s g k -> b g s k")  # noqa: E731
    q_in, k_in, v_in = fold(q) * _scale(q, scale), line_up(k), line_up(v)
    y, lse = _Online.apply(q_in, k_in, v_in, (pattern, queries, keys, block, aligned))
    unfold = lambda x: rearrange(x, "b g r t ... -> b t (g r) ...")  # noqa: E731
    return Partial(unfold(y).to(v.dtype), unfold(lse))


class _Online(torch.autograd.Function):
    """Streams in the accumulator dtype: q [B, G, R, T, K], scaled; k [B, G, S, K]; v [B, G, S, V]. R queries share a key."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, how: tuple) -> tuple[Tensor, Tensor]:
        pattern, queries, keys, block, aligned = how
        y = q.new_zeros(*q.shape[:-1], v.shape[-1])
        total, top = q.new_zeros(q.shape[:-1]), q.new_full(q.shape[:-1], -torch.inf)
        for rows, cols in _blocks(q, k, block, aligned):
            score = _block_scores(q, k, rows, cols, pattern, queries, keys)
            before = top[..., rows]
            now = torch.maximum(before, score.amax(-1))
            # where nothing was visible yet, exp(-inf + inf) would be NaN: any finite maximum does
            safe = torch.where(now == -torch.inf, 0.0, now)
            score.sub_(safe.unsqueeze(-1)).exp_()
            keep = (before - safe).exp()
            total[..., rows] = keep * total[..., rows] + score.sum(-1)
            y[..., rows, :] = keep.unsqueeze(-1) * y[..., rows, :] + _by_group(score, v[:, :, cols])
            top[..., rows] = now
        some = total > 0
        y = y / torch.where(some, total, 1.0).unsqueeze(-1)
        lse = torch.where(some, torch.where(some, top, 0.0) + torch.where(some, total, 1.0).log(), -torch.inf)
        ctx.save_for_backward(q, k, v, y, lse)
        ctx.how = how
        return y, lse

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor, dlse: Tensor) -> tuple:
        q, k, v, y, lse = ctx.saved_tensors
        pattern, queries, keys, block, aligned = ctx.how
        dq, dk, dv = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
        safe = torch.where(lse == -torch.inf, 0.0, lse).unsqueeze(-1)
        # a gradient of the log-sum-exp reaches each score by its weight, as -delta does
        delta = ((dy * y).sum(-1) - dlse).unsqueeze(-1)
        for rows, cols in _blocks(q, k, block, aligned):
            score = _block_scores(q, k, rows, cols, pattern, queries, keys)
            weight = score.sub_(safe[..., rows, :]).exp_()
            g = dy[..., rows, :]
            dv[:, :, cols] += _over_group(weight, g)
            score = (_by_group(g, v[:, :, cols].transpose(-1, -2)) - delta[..., rows, :]).mul_(weight)
            dq[..., rows, :] += _by_group(score, k[:, :, cols])
            dk[:, :, cols] += _over_group(score, q[..., rows, :])
        return dq, dk, dv, None


def _blocks(q: Tensor, k: Tensor, block: int, aligned: bool) -> list[tuple[slice, slice]]:
    """Slices of queries and keys, one pair a block of keys. Aligned: keys after a query's own are skipped."""
    tokens, stored = q.shape[-2], k.shape[-2]
    ahead = stored - tokens
    return [(slice(max(start - ahead, 0) if aligned else 0, tokens), slice(start, min(start + block, stored)))
            for start in range(0, stored, block)]


def _block_scores(q: Tensor, k: Tensor, rows: slice, cols: slice, pattern: Pattern, queries: Coords, keys: Coords) -> Tensor:
    """Scores [B, G, R, t, s] of a block, -inf where a key is not seen."""
    score = _by_group(q[..., rows, :], k[:, :, cols].transpose(-1, -2))
    keep, bias = _mask(pattern, queries.slice(rows.start, rows.stop), keys.slice(cols.start, cols.stop), q.shape[0], q.dtype)
    if bias is not None:
        score += bias.unflatten(1, (-1, q.shape[2])) if bias.shape[1] > 1 else bias.unsqueeze(1)
    return score.masked_fill_(~keep.unsqueeze(1), -torch.inf)


def _mask(pattern: Pattern, queries: Coords, keys: Coords, rows: int, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """Kept pairs [B or 1, 1, T, S] and bias [B or 1, H or 1, T, S] or None. Chunks of rows that all stand alike repeat."""
    keep, bias = pattern.sees(queries, keys)[:, None], pattern.bias(queries, keys, dtype)
    fit = lambda x: x if x is None or x.shape[0] in (1, rows) else x.repeat(rows // x.shape[0], 1, 1, 1)  # noqa: E731
    return fit(keep), fit(bias)


def _by_group(x: Tensor, y: Tensor) -> Tensor:
    """[B, G, R, t, a] times [B, G, a, b]: one product a group, its R heads as rows."""
    return (x.flatten(2, 3) @ y).unflatten(2, x.shape[2:4])


def _over_group(x: Tensor, y: Tensor) -> Tensor:
    """[B, G, R, t, a] transposed times [B, G, R, t, b], summed over the R heads of a group."""
    return x.flatten(2, 3).transpose(-1, -2) @ y.flatten(2, 3)


# Windows as a band ---------------------------------------------------------------------------------------------------

def _chunk(pattern: Pattern) -> tuple[int, int, int]:
    """Queries in a chunk; how many chunks before it hold what they see; keys that stand beside a chunk in all."""
    window = pattern.window or 1
    chunk = max(CHUNK, -(-window // 2))
    reach = -(-(window - 1) // chunk)
    return chunk, reach, chunk * (reach * (1 if pattern.causal else 2) + 1)


def _banded(pattern: Pattern, stored: int) -> bool:
    """Whether a window is much narrower than the keys there are."""
    return pattern.window is not None and stored > _chunk(pattern)[2]


def _band(q: Tensor, k: Tensor, v: Tensor, pattern: Pattern, segments: Segments | None, queries: Coords, keys: Coords,
          scale: float | None, attend: Any) -> Partial:
    """Chunks of queries as rows, each with the keys of its own and its neighbouring chunks: time and memory O(T window).

    Distance in the tensor bounds distance in position only if no pads stand between, so real tokens are moved
    together first. `attend(q, k, v, pattern, queries, keys, scale)` computes the rows.
    """
    batch, tokens = q.shape[:2]
    chunk, reach, size = _chunk(pattern)
    past = k.shape[1] - tokens
    place = None
    if segments is not None:
        source, place = segments.order()
        own = torch.cat([torch.arange(past, device=q.device).expand(batch, past), source + past], 1)
        q, k, v, queries, keys = take(q, source), take(k, own), take(v, own), queries.take(source), keys.take(own)
    # key r stands `reach` chunks before query r: drop or add keys in front, and fill the last chunk
    left, extra = reach * chunk - past, -tokens % chunk
    right = extra + (0 if pattern.causal else reach * chunk)
    if left < 0:
        k, v, keys = k[:, -left:], v[:, -left:], keys.slice(-left, k.shape[1])
        left = 0
    stand = max(queries.rows, keys.rows)
    queries, keys = queries.expand(stand), keys.expand(stand)
    frame = lambda x, a, b: F.pad(x, (0, 0, 0, 0, a, b))  # noqa: E731
    rows = lambda x: rearrange(frame(x, left, right).unfold(1, size, chunk), "b n h k c -> (b n) c h k")  # noqa: E731
    q = rearrange(frame(q, 0, extra), "b (n c) h k -> (b n) c h k", c=chunk)
    y, lse = attend(q, rows(k), rows(v), pattern, queries.pad(0, extra).window(chunk, chunk),
                    keys.pad(left, right).window(size, chunk), scale)

    def join(x: Tensor) -> Tensor:
        x = rearrange(x, "(b n) c ... -> b (n c) ...", b=batch)[:, :tokens]
        return x if place is None else take(x, place)

    return Partial(join(y), None if lse is None else join(lse))


# By scaled_dot_product_attention -------------------------------------------------------------------------------------

def _sdpa(q: Tensor, k: Tensor, v: Tensor, scale: float | None, mask: Tensor | None = None, causal: bool = False) -> Tensor:
    """scaled_dot_product_attention with our layout [B, T, H, K]; mask [B or 1, H or 1, T, S], bool or added."""
    group = q.shape[2] // k.shape[2]
    if group > 1 and q.is_cuda:
        if q.shape[1] == 1 and not causal:
            return _one_query(q, k, v, scale, mask)
        if mask is not None or q.dtype not in HALF:
            # the CUDA kernels that take masks or wider floats know no grouped heads, and the one left is quadratic in memory
            k, v, group = k.repeat_interleave(group, 2), v.repeat_interleave(group, 2), 1
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    with cuda_attention.backends(q, k, v, mask is not None):
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, scale=scale, enable_gqa=group > 1)
    return y.transpose(1, 2)


def _one_query(q: Tensor, k: Tensor, v: Tensor, scale: float | None, mask: Tensor | None) -> Tensor:
    """One query of grouped heads: those that share a key stand as its rows, so no kernel need know of groups or copy a key."""
    group = q.shape[2] // k.shape[2]
    q = rearrange(q, "b 1 (g r) k -> b r g k", r=group)
    if mask is not None and mask.shape[1] > 1:
        mask = rearrange(mask, "b (g r) 1 s -> b g r s", r=group)
    return rearrange(_sdpa(q, k, v, scale, mask), "b r g v -> b 1 (g r) v")


def _plain(q: Tensor, k: Tensor, v: Tensor, pattern: Pattern, scale: float | None, real: Tensor | None = None) -> Tensor:
    """Whole rows of one segment each, the queries last. `real` [B, S] where a dense row has pads at its end."""
    tokens, stored = q.shape[1], k.shape[1]
    if pattern.causal and tokens == 1:
        if pattern.window is not None:
            k, v = k[:, -pattern.window :], v[:, -pattern.window :]
        if pattern.slopes is None:
            return _sdpa(q, k, v, scale)
        stored = k.shape[1]
    windowed = pattern.window is not None and pattern.window < stored
    bare = not windowed and pattern.slopes is None and real is None and not pattern.prefix
    if bare and (not pattern.causal or tokens == stored):
        return _sdpa(q, k, v, scale, causal=pattern.causal)
    keys = line(stored, q.device)._replace(real=real)
    queries = line(tokens, q.device, stored - tokens)
    if _banded(pattern, stored):
        return _band(q, k, v, pattern, None, queries, keys, scale, _sdpa_masked).y
    return _sdpa_masked(q, k, v, pattern, queries, keys, scale).y


def _sdpa_masked(q: Tensor, k: Tensor, v: Tensor, pattern: Pattern, queries: Coords, keys: Coords,
                 scale: float | None) -> Partial:
    keep, bias = _mask(pattern, queries, keys, q.shape[0], q.dtype)
    some = None
    if queries.real is not None or keys.real is not None:
        # kernels differ in what they make of a row without keys, so such a row gets all of them and is then set to 0
        some = keep.any(-1, keepdim=True)
        keep = keep | ~some
    if q.is_cuda and q.shape[1] > 1:
        cuda_attention.announce_mask(keep.numel() if bias is None else bias.numel())
    y = _sdpa(q, k, v, scale, keep if bias is None else torch.where(keep, bias, -torch.inf))
    return Partial(y if some is None else torch.where(some.transpose(1, 2), y, 0.0))


def _by_length(q: Tensor, k: Tensor, v: Tensor, pattern: Pattern, segments: Segments | None, scale: float | None) -> Tensor:
    """Rows of any length, one after the other, each a segment: by PyTorch's kernel for them (`_varlen`)."""
    batch, tokens = q.shape[:2]
    left = -1 if pattern.window is None else pattern.window - 1
    window = (left, 0 if pattern.causal else left)
    if segments is None:
        stored = k.shape[1]
        row = torch.arange(batch + 1, dtype=torch.int32, device=q.device)
        y = cuda_attention.varlen(q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), row * tokens, row * stored, tokens, stored,
                                  window, _scale(q, scale))
        return y.unflatten(0, (batch, tokens))
    rows = pack(segments)
    if rows.even:
        whole = _unmasked(pattern, tokens, tokens)
        return _plain(q, k, v, pattern, scale) if whole else _by_length(q, k, v, pattern, None, scale)
    if rows.longest == 0:
        return torch.zeros_like(v).repeat_interleave(q.shape[2] // v.shape[2], 2)
    y = cuda_attention.varlen(rows.split(q), rows.split(k), rows.split(v), rows.starts, rows.starts, rows.longest, rows.longest,
                              window, _scale(q, scale))
    return rows.join(y)


def _by_rows(q: Tensor, k: Tensor, v: Tensor, pattern: Pattern, segments: Segments, at: Tensor | None,
             scale: float | None) -> Tensor:
    """Each segment a row of its own, in buckets of similar length: causal rows need no mask."""
    rows = regroup(segments)
    if not rows.buckets:
        return torch.zeros_like(v).repeat_interleave(q.shape[2] // v.shape[2], 2)
    parts = []
    for i, (q_in, k_in, v_in) in enumerate(zip(rows.split(q), rows.split(k), rows.split(v), strict=True)):
        real = rows.buckets[i].real
        if at is not None:
            place = line(real.shape[1], q.device)._replace(real=real, at=at.flatten()[rows.buckets[i].token])
            parts.append(_sdpa_masked(q_in, k_in, v_in, pattern, place, place, scale).y)
        else:
            unseen = pattern.causal and not pattern.prefix  # pads stand at the end of a row, after every real query
            parts.append(_plain(q_in, k_in, v_in, pattern, scale, None if unseen or rows.whole else real))
    return rows.join(parts)
