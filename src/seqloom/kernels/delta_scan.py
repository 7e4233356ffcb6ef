"""Delta-rule scan: the state forgets what it holds for a key before it stores the key's new value.

    S_t = a_t (I - b_t k_t k_t') S_{t-1} + b_t k_t v_t'      y_t = S_t' q_t

The decay comes first: with S = a_t S_{t-1}, S_t = S + b_t k_t (v_t - S' k_t)'. It is one step of size b_t down the
gradient of |S' k_t - v_t|^2 / 2 from the decayed state. Carries DeltaNet (no decay) and gated DeltaNet (one decay per
head and token). Streams: q, k [B, T, H, K], v [B, T, H, V], beta [B, T, H], log_a = log of the decay, <= 0, [B, T, H] or None.
It is stable where b_t |k_t|^2 lies in [0, 2], so keys are normalised by the caller; above 1 the transition reflects: its
eigenvalue along k_t is negative.

A token may take n steps (DeltaProduct): with k [B, T, n, H, K], v [B, T, n, H, V] and beta [B, T, n, H] the decay comes
before the first step and the query reads after the last one. This is the same scan over n T tokens (`interleave`).

Inside a stretch of tokens that starts from state S_0, with L the running sum of log decays, the written rows
u_t = b_t (v_t - a_t S_{t-1}' k_t) solve one unit lower triangular system, and everything else is linear in them:

    (I + A) U = b (V - e^L K S_0)      A_ij = b_i e^{L_i - L_j} k_i'k_j for j < i
    y_i = e^{L_i} S_0' q_i + sum_{j <= i} e^{L_i - L_j} (k_j'q_i) u_j
    S_end = e^{L_end} S_0 + sum_j e^{L_end - L_j} k_j u_j'

Source: [deltanet] Method 3 to 5 (the beta of A is on the row; the scores include the diagonal, A excludes it).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from einops import einsum, rearrange
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from seqloom.core.forms import gpu_only, narrow
from seqloom.core.mixer import accumulator
from seqloom.core.scan import carry
from seqloom.core.segments import Segments
from seqloom.core.state import Mixed


def step(state: Float[Tensor, "b h k v"], q: Float[Tensor, "b h k"], k: Float[Tensor, "b *n h k"],
         v: Float[Tensor, "b *n h v"], beta: Float[Tensor, "b *n h"],
         log_a: Float[Tensor, "b h"] | None = None) -> tuple[Tensor, Tensor]:
    """One token, as the papers write it. This is the definition; every other form must agree with it."""
    wide = state.dtype
    if log_a is not None:
        state = log_a.to(wide).exp()[..., None, None] * state
    steps = [(k, v, beta)] if k.ndim == 3 else zip(k.unbind(1), v.unbind(1), beta.unbind(1), strict=True)
    for k, v, beta in steps:
        key = k.to(wide)[..., :, None]
        error = v.to(wide) - (key * state).sum(-2)
        state = state + key * (beta.to(wide)[..., None] * error)[..., None, :]
    return state, (q.to(wide)[..., :, None] * state).sum(-2).to(v.dtype)


def interleave(q: Float[Tensor, "b t h k"], k: Float[Tensor, "b t n h k"], v: Tensor | None, beta: Float[Tensor, "b t n h"],
               log_a: Float[Tensor, "b t h"] | None, segments: Segments | None) -> tuple[Any, ...]:
    """n steps a token as the same streams and segments over n T tokens, of which every n-th output is wanted.

    A token's decay goes with its first step, its query with its last; the other queries and log decays are 0, and all of a
    token's steps are of its segment. Returns its arguments, in their order. Source: [deltaproduct] Method 4.
    """
    n = k.shape[2]
    q = F.pad(q[:, :, None], (0, 0, 0, 0, n - 1, 0)).flatten(1, 2)
    log_a = None if log_a is None else F.pad(log_a[:, :, None], (0, 0, 0, n - 1)).flatten(1, 2)
    if segments is not None:
        segments = Segments(*(x.repeat_interleave(n, 1) for x in segments))
    return q, k.flatten(1, 2), None if v is None else v.flatten(1, 2), beta.flatten(1, 2), log_a, segments


def matrix(q: Float[Tensor, "b t h k"], k: Float[Tensor, "b t *n h k"], beta: Float[Tensor, "b t *n h"],
           log_a: Float[Tensor, "b t h"] | None = None, *, segments: Segments | None = None) -> Float[Tensor, "b h t s"]:
    """The T x T mixing weights: from a fresh state, y = matrix @ v. Cubic in T: an oracle and a picture.

    With n steps a token it is T x n T: a column for each write, v's rows in the order of `interleave`.
    Source: [deltanet] Method 5: lower(Q K') (I + A)^{-1} diag(b).
    """
    if k.ndim == 5:
        q, *long, apart = interleave(q, k, None, beta, log_a, segments)
        return matrix(q, long[0], *long[2:], segments=apart)[:, :, k.shape[2] - 1 :: k.shape[2]]
    wide = accumulator(q.dtype)
    if segments is not None:
        q, k, beta = (segments.hold(x) for x in (q, k, beta))
        log_a = None if log_a is None else segments.hold(log_a)
    with torch.autocast(q.device.type, enabled=False):
        scores, system, _ = _whole(q.to(wide), k.to(wide), beta.to(wide), None if log_a is None else log_a.to(wide), segments)
        b = torch.diag_embed(rearrange(beta.to(wide), "b t h -> b h t"))
        return scores @ torch.linalg.solve_triangular(system, b, upper=False, unitriangular=True)


def parallel(q: Float[Tensor, "b t h k"], k: Float[Tensor, "b t *n h k"], v: Float[Tensor, "b t *n h v"],
             beta: Float[Tensor, "b t *n h"], log_a: Float[Tensor, "b t h"] | None = None, *,
             state: Float[Tensor, "b h k v"] | None = None, segments: Segments | None = None) -> Mixed:
    """By one triangular system over all T tokens. Quadratic in T: an oracle, and good for very short sequences."""
    if k.ndim == 5:
        *streams, apart = interleave(q, k, v, beta, log_a, segments)
        y, state, _ = parallel(*streams, state=state, segments=apart)
        return Mixed(y[:, k.shape[2] - 1 :: k.shape[2]], state)
    dtype, wide = v.dtype, accumulator(v.dtype)
    if segments is not None:
        q, k, v, beta = (segments.hold(x) for x in (q, k, v, beta))
        log_a = None if log_a is None else segments.hold(log_a)
    q, k, v, beta = (x.to(wide) for x in (q, k, v, beta))
    with torch.autocast(q.device.type, enabled=False):
        scores, system, total = _whole(q, k, beta, None if log_a is None else log_a.to(wide), segments)
        run = torch.zeros(q.shape[:2], dtype=torch.int64, device=q.device) if segments is None else segments.run
        reads, stays = (run == 0)[..., None, None], (run == run[:, -1:])[..., None, None]
        decay = total.exp()[..., None]  # [b t h 1]
        if state is None:
            state = v.new_zeros(v.shape[0], *k.shape[2:], v.shape[-1])
        seen = einsum(torch.where(reads, decay * k, 0.0), state, "b t h k, b h k v -> b t h v")
        right = rearrange(beta[..., None] * (v - seen), "b t h v -> b h t v")
        writes = torch.linalg.solve_triangular(system, right, upper=False, unitriangular=True)
        y = rearrange(scores @ writes, "b h t v -> b t h v")
        y = y + einsum(torch.where(reads, decay * q, 0.0), state, "b t h k, b h k v -> b t h v")
        until = torch.where(stays, (total[:, -1:] - total)[..., None], -torch.inf).exp()
        new = einsum(until * k, writes, "b t h k, b h t v -> b h k v")
        new = new + torch.where((run[:, -1] == 0)[:, None, None, None], decay[:, -1, :, :, None] * state, 0.0)
    y = y.to(dtype)
    return Mixed(y if segments is None else segments.hold(y), new)


def chunked(q: Float[Tensor, "b t h k"], k: Float[Tensor, "b t *n h k"], v: Float[Tensor, "b t *n h v"],
            beta: Float[Tensor, "b t *n h"], log_a: Float[Tensor, "b t h"] | None = None, *,
            state: Float[Tensor, "b h k v"] | None = None, segments: Segments | None = None,
            chunk: int = 64, group: int = 8) -> Mixed:
    """By chunks: one small triangular system each, their [K, K] transitions joined by a prefix. Linear in T.

    Gradients are written by hand (first order): the backward pass keeps eight streams and makes the C x C weights anew.
    `chunk` is the number of steps in a chunk, `group` that of chunks in a group of `core.scan.carry`.
    Source: [deltanet] Method 4, with decay; computed in float32 or wider whatever the streams' dtype.
    """
    if k.ndim == 5:
        tokens, n = k.shape[1:3]
        *streams, apart = interleave(q, k, v, beta, log_a, segments)
        if extra := -tokens % chunk if tokens > chunk else 0:  # whole chunks of tokens, so that near lengths share a graph
            streams = [x if x is None else F.pad(x, (0, 0) * (x.ndim - 2) + (0, extra * n)) for x in streams]
            apart = None if apart is None else apart.pad(extra * n)
        y, state, _ = chunked(*streams, state=state, segments=apart, chunk=chunk, group=group)
        return Mixed(y[:, n - 1 : n * tokens : n], state)
    batch, tokens, heads, key = q.shape
    dtype, wide = v.dtype, accumulator(v.dtype)
    chunk = min(chunk, tokens)
    extra = -tokens % chunk
    if segments is not None:
        q, k, v, beta = (segments.hold(x) for x in (q, k, v, beta))
        if log_a is not None:  # the decay of a first token reaches only pairs that the selection drops
            log_a = torch.where(segments.starts()[..., None], 0.0, segments.hold(log_a))
        segments = segments.pad(extra)

    def split(x: Tensor) -> Tensor:
        x = F.pad(x.to(wide), (0, 0, 0, 0, 0, extra)) if extra else x.to(wide)
        return rearrange(x, "b (n c) h d -> b n h c d", c=chunk).contiguous()

    q, k, v, beta = split(q), split(k), split(v), split(beta[..., None])
    start = v.new_zeros(batch, heads, key, v.shape[-1]) if state is None else state.to(wide)
    keep, reads, writes, alive = _select(segments, chunk, q.device)
    total = None if log_a is None else _running(split(log_a[..., None]), keep)
    y, new = _Chunks.apply(q, k, v, beta, total, start, keep, reads, writes, alive, group)
    return Mixed(rearrange(y, "b n h c v -> b (n c) h v")[:, :tokens].to(dtype), new)


@gpu_only(torch.bfloat16, torch.float16)  # float32 faulted on an H100 in some shapes (Triton 3.6, tf32x3): not unasked
def fused(q: Float[Tensor, "b t h k"], k: Float[Tensor, "b t *n h k"], v: Float[Tensor, "b t *n h v"],
          beta: Float[Tensor, "b t *n h"], log_a: Float[Tensor, "b t h"] | None = None, *,
          state: Float[Tensor, "b h k v"] | None = None, segments: Segments | None = None) -> Mixed:
    """As `chunked`, by Triton kernels: matrix products in the streams' dtype, sums and states in float32.

    Keys and values of up to 256 per head. Every gradient is deterministic, and first order. Shapes: as `chunked`.
    """
    from seqloom.kernels.triton import delta_scan  # lazy: the package runs without Triton

    if k.ndim == 5:
        *streams, apart = interleave(q, k, v, beta, log_a, segments)
        y, state, _ = fused(*streams, state=state, segments=apart)
        return Mixed(y[:, k.shape[2] - 1 :: k.shape[2]], state)
    dtype, low = v.dtype, narrow(torch.promote_types(torch.promote_types(q.dtype, k.dtype), v.dtype))
    code = None if segments is None else segments.code()
    q, k, v = (x.to(low) for x in (q, k, v))
    beta, log_a = beta.to(narrow(beta.dtype)), None if log_a is None else log_a.to(narrow(log_a.dtype))
    y, new = delta_scan.launch(q, k, v, beta, log_a, None if state is None else state.float().contiguous(), code)
    return Mixed(y.to(dtype), new.to(accumulator(dtype)))


def _whole(q: Tensor, k: Tensor, beta: Tensor, log_a: Tensor | None,
           segments: Segments | None) -> tuple[Tensor, Tensor, Tensor]:
    """Scores [b h t t], the triangular system I + A [b h t t] and L [b t h] since the last boundary, over a whole call."""
    tokens = q.shape[1]
    keep = torch.ones(tokens, tokens, dtype=torch.bool, device=q.device).tril()[None, None]
    if segments is not None:
        keep = keep & (segments.run[:, :, None] == segments.run[:, None, :])[:, None]
    total, weight = torch.zeros_like(beta), keep.to(q.dtype)
    if log_a is not None:
        total = einsum(weight[:, 0].expand(len(q), -1, -1), log_a, "b i s, b s h -> b i h")
        # log weights as sums over s = j+1..i, not as differences of running sums, which cancel
        later = torch.where(keep.tril(-1), rearrange(log_a, "b s h -> b h s")[..., None], 0.0)
        weight = torch.where(keep, weight @ later, -torch.inf).exp()
    scores = einsum(q, k, "b i h k, b j h k -> b h i j") * weight
    pairs = (einsum(beta[..., None] * k, k, "b i h k, b j h k -> b h i j") * weight).tril(-1)
    return scores, pairs + torch.eye(tokens, dtype=pairs.dtype, device=pairs.device), total


def _select(segments: Segments | None, chunk: int,
            device: torch.device) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """What boundaries leave of a chunk: pairs kept [.. c c], tokens that read the incoming state and tokens whose
    writes leave [.. c 1], chunks that the incoming state survives [.. 1 1]; the last three None without segments."""
    lower = torch.ones(chunk, chunk, dtype=torch.bool, device=device).tril()
    if segments is None:
        return lower, None, None, None
    run = segments.run.unflatten(1, (-1, chunk))[:, :, None, :, None]  # [b n 1 c 1]
    last = run[..., -1:, :]
    entering = F.pad(last, (0, 0, 0, 0, 0, 0, 1, 0))[:, :-1]  # the count of boundaries before each chunk
    return lower & (run == run.mT), run == entering, run == last, last == entering


def _running(log_a: Tensor, keep: Tensor) -> Tensor:
    """Running sums of log decays [b n h c 1] inside each chunk, from the last boundary: a sum over all of a chunk would
    leave a segment the rounding error of its neighbour's decays, however large."""
    if keep.ndim == 2:
        return log_a.cumsum(-2)
    with torch.autocast(log_a.device.type, enabled=False):
        return (keep[:, :, 0].to(log_a.dtype) @ log_a[..., 0].mT).mT.unsqueeze(-1)


def _inside(q: Tensor, k: Tensor, total: Tensor | None, keep: Tensor, reads: Tensor | None, writes: Tensor | None,
            alive: Tensor | None) -> tuple[Tensor, ...]:
    """What decay and selection make of every chunk: the weights e^{L_i - L_j} of its pairs, these times k_i'k_j and times
    q_i'k_j [b n h c c], diagonals included; the decay since its start, until its end [.. c 1], and over the whole [.. 1 1]."""
    one = torch.ones(1, 1, 1, 1, 1, dtype=q.dtype, device=q.device)
    if total is None:
        weight, since, until, whole = keep.to(q.dtype), one, one, one
    else:
        # mask before exp: a future pair has a positive exponent and overflows to inf
        weight = torch.where(keep, total - total.mT, -torch.inf).exp_()
        since, until, whole = total.exp(), (total[..., -1:, :] - total).exp(), total[..., -1:, :].exp()
    if reads is not None and writes is not None and alive is not None:
        since, until, whole = (torch.where(mask, x, 0.0) for mask, x in ((reads, since), (writes, until), (alive, whole)))
    return weight, (k @ k.mT).mul_(weight), (q @ k.mT).mul_(weight), since, until, whole


class _Chunks(torch.autograd.Function):
    """All chunks [b n h c d] at once; names follow the module's equations, with T = (I + A)^{-1}.

    From the state S that enters a chunk: E = V - since K S, U = T (beta E), y = since Q S + scores U, and the chunk
    passes on whole S + (until K)' U = M S + N (beta V), with N = (until K)' T and M = whole I - N (beta since K).
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, beta: Tensor, total: Tensor | None, start: Tensor, keep: Tensor,
                reads: Tensor | None, writes: Tensor | None, alive: Tensor | None, group: int) -> tuple[Tensor, Tensor]:
        with torch.autocast(q.device.type, enabled=False):
            _, pairs, scores, since, until, whole = _inside(q, k, total, keep, reads, writes, alive)
            eye = torch.eye(q.shape[-2], dtype=q.dtype, device=q.device).expand_as(pairs)
            # what stands on and above the diagonal is not read
            inverse = torch.linalg.solve_triangular(pairs.mul_(beta), eye, upper=False, unitriangular=True)
            leave = (until * k).mT @ inverse
            seen = since * k
            move = (leave @ (beta * seen)).neg_()
            move.diagonal(dim1=-2, dim2=-1).add_(whole[..., 0])
            if alive is not None:  # already 0 there, as long as no neighbour has overflowed
                move = torch.where(alive, move, 0.0)
            before, new = carry(move, leave @ (beta * v), start, act=torch.matmul, compose=torch.matmul, group=group)
            error = v - seen @ before
            rows = inverse @ (beta * error)
            # not added in place: of a result that is, PyTorch 2.11 compiles wrong gradients, without a word
            y = (since * q) @ before + scores @ rows
        ctx.save_for_backward(q, k, beta, total, keep, reads, writes, alive, inverse, leave, move, before, error, rows)
        ctx.group = group
        return y, new

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor, dnew: Tensor) -> tuple[Tensor | None, ...]:
        q, k, beta, total, keep, reads, writes, alive, inverse, leave, move, before, error, rows = ctx.saved_tensors
        dy = dy.contiguous()
        with torch.autocast(q.device.type, enabled=False):
            weight, pairs, scores, since, until, whole = _inside(q, k, total, keep, reads, writes, alive)
            # the adjoint of each chunk's outgoing state runs from the end, by the transposed transitions
            inner = inverse.mT @ (scores.mT @ dy)
            read = (since * q).mT @ dy - (beta * since * k).mT @ inner
            after, dstart = carry(move.flip(1).mT, read.flip(1), dnew, act=torch.matmul, compose=torch.matmul, group=ctx.group)
            after = after.flip(1)
            inner += leave.mT @ after
            dv = beta * inner
            dscores = dy @ rows.mT
            dsystem = (inner @ rows.mT).neg_()
            dsystem.diagonal(dim1=-2, dim2=-1).zero_()  # A has no diagonal; above it, the weights are 0
            dq = (dy @ before.mT).mul_(since)
            dk = (dv @ before.mT).mul_(since).neg_()
            dk_out = (rows @ after.mT).mul_(until)
            dpairs = dsystem * pairs
            dbeta = (inner * error).sum(-1, keepdim=True).add_(dpairs.sum(-1, keepdim=True))
            dtotal = None
            if total is not None:
                flow = (dscores * scores).add_(dpairs.mul_(beta))
                out = (k * dk_out).sum(-1, keepdim=True)
                dtotal = flow.sum(-1, keepdim=True) - flow.sum(-2).unsqueeze(-1) - out
                dtotal += (q * dq).sum(-1, keepdim=True) + (k * dk).sum(-1, keepdim=True)
                dtotal[..., -1:, :] += out.sum(-2, keepdim=True) + whole * (after * before).sum((-1, -2), keepdim=True)
            dscores.mul_(weight)
            dsystem.mul_(weight).mul_(beta)
            dq.add_(dscores @ k)
            dk.add_(dk_out).add_(dscores.mT @ q).add_((dsystem + dsystem.mT) @ k)
        return dq, dk, dv, dbeta, dtotal, dstart, None, None, None, None, None
