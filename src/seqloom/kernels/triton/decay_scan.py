"""Matrix-state scan with decay on a GPU: S_t = diag(a_t) S_{t-1} + k_t v_t', y_t = S_t' q_t, by chunks of C tokens.

Four passes. `_prepare`, all chunks side by side: the weights of each chunk's pairs, and queries and keys with the decays since
the chunk's start and until its end. `_forward`, one program per head and block of values: walks through the chunks with S in
float32 registers, writing outputs and the state that enters each chunk. Backward: `_adjoint`, the same walk from the end, then
`_values` and `_gradient`, all chunks side by side. What a chunk's gradient needs is exact within the chunk: no sum runs over
the whole sequence, where it would lose what a strong decay leaves.

Inside a chunk, with r_i the count of boundaries and L_i the sum of log decays since the later of the chunk's start and
token i's own boundary: pairs weigh exp(L_i - L_j) where r_i = r_j, the entering state is read where r_i is the count before
the chunk, writes leave where r_j is the last.

A decay per channel does not factor out of a product of queries and keys: exp(L_i) and exp(-L_j) are moved into them as long
as no L falls below -RANGE, where exp(-L) would overflow; a chunk that decays more is computed pair by pair, exactly.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

RANGE = tl.constexpr(80.0)
STATE = 8192  # elements of the state that one walk carries, at most
FILL = 64     # walks that keep a card busy, at least: smaller blocks of values make more of them


class Tile(NamedTuple):
    """A launch: blocks of keys (0: all) and values, warps of a program, stages of its loop's loads."""

    keys: int
    values: int
    warps: int
    stages: int


class Config(NamedTuple):
    prepare: Tile
    forward: Tile
    adjoint: Tile
    values: Tile
    gradient: Tile


# by gate: 0 and 1 for no decay or one per head (whose gradient needs all keys), 2 for one per channel. Measured on an H100
CONFIGS = {
    0: Config(Tile(0, 0, 4, 1), Tile(0, 64, 4, 2), Tile(0, 64, 4, 3), Tile(0, 64, 4, 1), Tile(0, 64, 8, 1)),
    1: Config(Tile(0, 0, 4, 1), Tile(0, 64, 4, 2), Tile(0, 64, 4, 3), Tile(0, 64, 4, 1), Tile(0, 64, 8, 1)),
    2: Config(Tile(0, 0, 8, 1), Tile(0, 64, 4, 3), Tile(0, 64, 4, 3), Tile(0, 64, 4, 1), Tile(32, 64, 4, 2)),
}


@triton.jit
def _cast(x, like_ptr):
    return x.to(like_ptr.dtype.element_ty)


@triton.jit
def _dot(a, b, PRECISION: tl.constexpr):
    return tl.dot(a, b, input_precision=PRECISION)


@triton.jit
def _add(first1, x1, first2, x2):
    return first1 | first2, tl.where(first2 != 0, x2, x1 + x2)


@triton.jit
def _sums(x, starts, SEG: tl.constexpr, REVERSE: tl.constexpr):
    """Running sums of x [C, K] over the tokens of each run; with REVERSE from the end, where `starts` marks last tokens."""
    if SEG:
        flags = tl.broadcast_to(starts.to(tl.int32)[:, None], x.shape)
        _, total = tl.associative_scan((flags, x), 0, _add, reverse=REVERSE)
        return total
    return tl.cumsum(x, 0, reverse=REVERSE)


@triton.jit
def _rows(ptr, token, stride, d, live, D):
    """A tile of [.., T, H, D] at tokens `token` (of all batches), 0 where not live."""
    return tl.load(ptr + token.to(tl.int64)[:, None] * stride + d[None, :], mask=live[:, None] & (d < D)[None, :], other=0.0)


@triton.jit
def _store_rows(ptr, token, stride, d, live, D, x):
    tl.store(ptr + token.to(tl.int64)[:, None] * stride + d[None, :], x.to(ptr.dtype.element_ty),
             mask=live[:, None] & (d < D)[None, :])


@triton.jit
def _place(code_ptr, b, n, T, SEG: tl.constexpr, C: tl.constexpr):
    """Of a chunk: which rows are in range, which are real, their runs, the run before and at the end, first tokens of runs.

    code = 2 run + real. Rows out of range hold, in the last run.
    """
    t = n * C + tl.arange(0, C)
    inside = t < T
    if SEG:
        code = tl.load(code_ptr + b * T + t, mask=inside, other=0)
        before = tl.load(code_ptr + b * T + n * C - 1, mask=n > 0, other=0) >> 1
        last = tl.load(code_ptr + b * T + tl.minimum(n * C + C, T) - 1) >> 1
        run = tl.where(inside, code >> 1, last)
        real = inside & ((code & 1) == 1)
        previous = tl.load(code_ptr + b * T + t - 1, mask=inside & (t > 0), other=0) >> 1
        first = inside & (run != previous)
    else:
        real = inside
        run = tl.zeros([C], tl.int32)
        before = 0
        last = 0
        first = t < 0
    return inside, real, run, before, last, first


@triton.jit
def _pairs(run, C: tl.constexpr, DIAGONAL: tl.constexpr):
    """Pairs [C, C] of a run with j <= i; j < i without the diagonal."""
    i = tl.arange(0, C)
    same = run[:, None] == run[None, :]
    if DIAGONAL:
        return same & (i[:, None] >= i[None, :])
    return same & (i[:, None] > i[None, :])


@triton.jit
def _weights(x, L, pair, C: tl.constexpr, EXACT: tl.constexpr):
    """exp(L_i - L_j) for `pair` and 0 elsewhere, from log decays x [C]. Masked before exp: other pairs may overflow.

    EXACT sums over s = j+1..i instead, subtracting nothing: float32 would lose digits where L is large.
    """
    if EXACT:
        i = tl.arange(0, C)
        between = tl.dot((i[:, None] >= i[None, :]).to(tl.float32), tl.where(i[:, None] > i[None, :], x[:, None], 0.0),
                         input_precision="tf32x3")
    else:
        between = L[:, None] - L[None, :]
    return tl.exp(tl.where(pair, between, float("-inf")))


@triton.jit
def _gate(log_a_ptr, token, h, H, live, pair):
    """Log decays of a head [C], 0 where they reach no pair, and L [C]."""
    x = tl.load(log_a_ptr + token * H + h, mask=live, other=0.0).to(tl.float32)
    return x, tl.sum(tl.where(pair, x[None, :], 0.0), 1)


@triton.jit
def _last(L, C: tl.constexpr):
    """The last row of L [C, K]."""
    return tl.sum(tl.where((tl.arange(0, C) == C - 1)[:, None], L, 0.0), 0)


@triton.jit
def _key(k, L, j, i, run):
    """Row j of the keys and the decays [C, K] from it to each later token of its run."""
    pick = (i == j)[:, None]
    key, L_j = tl.sum(tl.where(pick, k, 0.0), 0), tl.sum(tl.where(pick, L, 0.0), 0)
    alive = (i > j) & (run == tl.sum(tl.where(i == j, run, 0), 0))
    return key, tl.exp(tl.where(alive[:, None], L - L_j[None, :], float("-inf")))


@triton.jit
def _prepare_kernel(q_ptr, k_ptr, log_a_ptr, code_ptr, scores_ptr, late_ptr, early_ptr, whole_ptr, steep_ptr, T, H, G,
                    K, N, GATE: tl.constexpr, SEG: tl.constexpr, DIAGONAL: tl.constexpr, EXACT: tl.constexpr, C: tl.constexpr,
                    BK: tl.constexpr, PRECISION: tl.constexpr):
    """Scores [B, N, H, C, C], and what decays are made into.

    With one per channel: late = q exp(L), early = k exp(L_end - L) [B, T, H, K], the decay of the whole chunk [B, N, H, K],
    and steep [B, N, H], was the chunk computed pair by pair? With one per head: exp(L), exp(L_end - L) [B, T, H], whole
    [B, N, H].
    """
    n, bh = tl.program_id(0), tl.program_id(1)
    b, h = bh // H, bh % H
    i, d = tl.arange(0, C), tl.arange(0, BK)
    inside, real, run, before, last, first = _place(code_ptr, b, n, T, SEG, C)
    token, g = b * T + n * C + i, h // (H // G)
    chunk = ((b * N + n) * H + h).to(tl.int64)
    reads, leaves = run == before, run == last
    q = _rows(q_ptr + g * K, token, G * K, d, real, K)
    k = _rows(k_ptr + g * K, token, G * K, d, real, K)
    if GATE == 2:
        x = _rows(log_a_ptr + h * K, token, H * K, d, real & (first == 0), K).to(tl.float32)
        L = _sums(x, first, SEG, False)
        end = _last(L, C)
        q32, k32 = q.to(tl.float32), k.to(tl.float32)
        late = q32 * tl.exp(L)
        pair = _pairs(run, C, False)
        steep = tl.min(tl.min(L, 1), 0) <= -RANGE
        tl.store(steep_ptr + chunk, steep.to(tl.int8))
        if steep == 0:
            grown = k32 * tl.exp(-L)
            scores = tl.where(pair, _dot(_cast(late, q_ptr), tl.trans(_cast(grown, k_ptr)), PRECISION), 0.0)
        else:
            scores = tl.zeros([C, C], tl.float32)
            for j in range(C):
                key, weight = _key(k32, L, j, i, run)
                column = tl.sum(q32 * key[None, :] * weight, 1)
                scores = tl.where((i == j)[None, :], column[:, None], scores)
        if DIAGONAL:
            scores = tl.where(i[:, None] == i[None, :], tl.sum(q32 * k32, 1)[:, None], scores)
        _store_rows(late_ptr + h * K, token, H * K, d, inside, K, tl.where(reads[:, None], late, 0.0))
        early = tl.where(leaves[:, None], k32 * tl.exp(tl.minimum(end[None, :] - L, 0.0)), 0.0)
        _store_rows(early_ptr + h * K, token, H * K, d, inside, K, early)
        tl.store(whole_ptr + chunk * K + d, tl.where(last == before, tl.exp(end), 0.0), mask=d < K)
    else:
        pair = _pairs(run, C, DIAGONAL)
        scores = _dot(q, tl.trans(k), PRECISION)
        if GATE == 1:
            x, L = _gate(log_a_ptr, token, h, H, real & (first == 0), _pairs(run, C, True))
            end = tl.sum(tl.where(i == C - 1, L, 0.0), 0)
            scores *= _weights(x, L, pair, C, EXACT)
            if EXACT:  # the sums over what follows each token
                rest = tl.sum(tl.where(_pairs(run, C, False), x[:, None], 0.0), 0)
            else:
                rest = tl.minimum(end - L, 0.0)
            tl.store(late_ptr + token * H + h, tl.where(reads, tl.exp(L), 0.0), mask=inside)
            tl.store(early_ptr + token * H + h, tl.where(leaves, tl.exp(rest), 0.0), mask=inside)
            tl.store(whole_ptr + chunk, tl.where(last == before, tl.exp(end), 0.0))
        else:
            scores = tl.where(pair, scores, 0.0)
    _store_square(scores_ptr, chunk, i, C, scores)


@triton.jit
def _store_square(ptr, chunk, i, C: tl.constexpr, x):
    tl.store(ptr + (chunk * C + i)[:, None] * C + i[None, :], x.to(ptr.dtype.element_ty))


@triton.jit
def _load_square(ptr, chunk, i, C: tl.constexpr):
    return tl.load(ptr + (chunk * C + i)[:, None] * C + i[None, :])


@triton.jit
def _scales(late_ptr, early_ptr, whole_ptr, token, h, H, chunk, inside, run, before, last, GATE: tl.constexpr):
    """since [C] and until [C] of a head, and the decay of the whole chunk."""
    if GATE == 1:
        since = tl.load(late_ptr + token * H + h, mask=inside, other=0.0)
        until = tl.load(early_ptr + token * H + h, mask=inside, other=0.0)
        whole = tl.load(whole_ptr + chunk)
    else:
        since, until = (run == before).to(tl.float32), (run == last).to(tl.float32)
        whole = tl.where(last == before, 1.0, 0.0)
    return since, until, whole


@triton.jit
def _forward_kernel(q_ptr, k_ptr, v_ptr, late_ptr, early_ptr, whole_ptr, code_ptr, scores_ptr, start_ptr, y_ptr, states_ptr,
                    last_ptr, T, H, G, K, V, N, GATE: tl.constexpr, SEG: tl.constexpr, SAVE: tl.constexpr, C: tl.constexpr,
                    BK: tl.constexpr, BV: tl.constexpr, PRECISION: tl.constexpr):
    """y, the last state, and with SAVE the state that enters each chunk [B, N, H, K, V]."""
    bh = tl.program_id(1)
    b, h = bh // H, bh % H
    g = h // (H // G)
    i, d, e = tl.arange(0, C), tl.arange(0, BK), tl.program_id(0) * BV + tl.arange(0, BV)
    box = d[:, None] * V + e[None, :]
    fits = (d < K)[:, None] & (e < V)[None, :]
    S = tl.load(start_ptr + bh.to(tl.int64) * K * V + box, mask=fits, other=0.0)
    for n in range(N):
        inside, real, run, before, last, first = _place(code_ptr, b, n, T, SEG, C)
        token = b * T + n * C + i
        chunk = ((b * N + n) * H + h).to(tl.int64)
        v = _rows(v_ptr + h * V, token, H * V, e, real, V)
        scores = _load_square(scores_ptr, chunk, i, C)
        if SAVE:
            tl.store(states_ptr + chunk * K * V + box, _cast(S, states_ptr), mask=fits)
        y = _dot(scores, v, PRECISION)
        if GATE == 2:
            late = _rows(late_ptr + h * K, token, H * K, d, inside, K)
            early = _rows(early_ptr + h * K, token, H * K, d, inside, K)
            whole = tl.load(whole_ptr + chunk * K + d, mask=d < K, other=0.0)
            y += _dot(late, _cast(S, v_ptr), PRECISION)
            S = S * whole[:, None] + _dot(tl.trans(early), v, PRECISION)
        else:
            q = _rows(q_ptr + g * K, token, G * K, d, real, K)
            k = _rows(k_ptr + g * K, token, G * K, d, real, K)
            since, until, whole = _scales(late_ptr, early_ptr, whole_ptr, token, h, H, chunk, inside, run, before, last, GATE)
            y += _dot(q, _cast(S, v_ptr), PRECISION) * since[:, None]
            S = S * whole + _dot(tl.trans(k), _cast(v.to(tl.float32) * until[:, None], v_ptr), PRECISION)
        _store_rows(y_ptr + h * V, token, H * V, e, inside, V, y)
    tl.store(last_ptr + bh.to(tl.int64) * K * V + box, S, mask=fits)


@triton.jit
def _adjoint_kernel(q_ptr, dy_ptr, late_ptr, early_ptr, whole_ptr, code_ptr, dlast_ptr, adjoints_ptr, dstart_ptr, T, H, G, K,
                    V, N, GATE: tl.constexpr, SEG: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
                    PRECISION: tl.constexpr):
    """The adjoint of the state that leaves each chunk [B, N, H, K, V], and of the one before the first."""
    bh = tl.program_id(1)
    b, h = bh // H, bh % H
    g = h // (H // G)
    i, d, e = tl.arange(0, C), tl.arange(0, BK), tl.program_id(0) * BV + tl.arange(0, BV)
    box = d[:, None] * V + e[None, :]
    fits = (d < K)[:, None] & (e < V)[None, :]
    S = tl.load(dlast_ptr + bh.to(tl.int64) * K * V + box, mask=fits, other=0.0)
    for back in range(N):
        n = N - 1 - back
        inside, real, run, before, last, first = _place(code_ptr, b, n, T, SEG, C)
        token = b * T + n * C + i
        chunk = ((b * N + n) * H + h).to(tl.int64)
        dy = _rows(dy_ptr + h * V, token, H * V, e, real, V)
        tl.store(adjoints_ptr + chunk * K * V + box, _cast(S, adjoints_ptr), mask=fits)
        if GATE == 2:
            late = _rows(late_ptr + h * K, token, H * K, d, inside, K)
            whole = tl.load(whole_ptr + chunk * K + d, mask=d < K, other=0.0)
            S = S * whole[:, None] + _dot(tl.trans(late), dy, PRECISION)
        else:
            q = _rows(q_ptr + g * K, token, G * K, d, real, K)
            since, until, whole = _scales(late_ptr, early_ptr, whole_ptr, token, h, H, chunk, inside, run, before, last, GATE)
            S = S * whole + _dot(tl.trans(q), _cast(dy.to(tl.float32) * since[:, None], dy_ptr), PRECISION)
    tl.store(dstart_ptr + bh.to(tl.int64) * K * V + box, S, mask=fits)


@triton.jit
def _values_kernel(k_ptr, late_ptr, early_ptr, whole_ptr, code_ptr, scores_ptr, adjoints_ptr, dy_ptr, dv_ptr, T, H, G, K, V, N,
                   GATE: tl.constexpr, SEG: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
                   PRECISION: tl.constexpr):
    """Gradient of the values of one chunk of one head: scores' dy, and what the state that leaves the chunk is asked for."""
    n, bh = tl.program_id(0), tl.program_id(1)
    b, h = bh // H, bh % H
    i, d = tl.arange(0, C), tl.arange(0, BK)
    inside, real, run, before, last, first = _place(code_ptr, b, n, T, SEG, C)
    token = b * T + n * C + i
    chunk = ((b * N + n) * H + h).to(tl.int64)
    scores = tl.trans(_load_square(scores_ptr, chunk, i, C))
    if GATE == 2:
        early = _rows(early_ptr + h * K, token, H * K, d, inside, K)
    else:
        since, until, whole = _scales(late_ptr, early_ptr, whole_ptr, token, h, H, chunk, inside, run, before, last, GATE)
        early = _rows(k_ptr + h // (H // G) * K, token, G * K, d, real, K)
    for block in range(0, V, BV):
        e = block + tl.arange(0, BV)
        dy = _rows(dy_ptr + h * V, token, H * V, e, real, V)
        dS = tl.load(adjoints_ptr + chunk * K * V + d[:, None] * V + e[None, :],
                     mask=(d < K)[:, None] & (e < V)[None, :], other=0.0)
        dv = _dot(early, dS, PRECISION)
        if GATE < 2:
            dv *= until[:, None]
        dv += _dot(scores, dy, PRECISION)
        _store_rows(dv_ptr + h * V, token, H * V, e, inside, V, tl.where(real[:, None], dv, 0.0))


@triton.jit
def _gradient_kernel(q_ptr, k_ptr, v_ptr, log_a_ptr, late_ptr, early_ptr, whole_ptr, code_ptr, scores_ptr, states_ptr,
                     adjoints_ptr, steep_ptr, dy_ptr, dq_ptr, dk_ptr, dlog_a_ptr, T, H, G, K, V, N, GATE: tl.constexpr,
                     SEG: tl.constexpr, DIAGONAL: tl.constexpr, EXACT: tl.constexpr, STEEP: tl.constexpr, C: tl.constexpr,
                     BK: tl.constexpr, BV: tl.constexpr, PRECISION: tl.constexpr):
    """Other gradients of one chunk of one head, and of a block of its keys where decays are per channel; dq and dk
    [B, T, H, K] are summed over the heads of a group outside.

    With a decay per channel there are two launches: STEEP does the chunks computed pair by pair, the other all the rest.
    """
    n, bh = tl.program_id(0), tl.program_id(1)
    b, h = bh // H, bh % H
    chunk = ((b * N + n) * H + h).to(tl.int64)
    if GATE == 2:
        if (tl.load(steep_ptr + chunk) != 0) != STEEP:
            return
    g = h // (H // G)
    i, d = tl.arange(0, C), tl.program_id(2) * BK + tl.arange(0, BK)
    inside, real, run, before, last, first = _place(code_ptr, b, n, T, SEG, C)
    token = b * T + n * C + i
    dscores = tl.zeros([C, C], tl.float32)
    dq, dk = tl.zeros([C, BK], tl.float32), tl.zeros([C, BK], tl.float32)
    over = tl.zeros([BK], tl.float32)
    for block in range(0, V, BV):
        e = block + tl.arange(0, BV)
        v = _rows(v_ptr + h * V, token, H * V, e, real, V)
        dy = _rows(dy_ptr + h * V, token, H * V, e, real, V)
        box = d[:, None] * V + e[None, :]
        fits = (d < K)[:, None] & (e < V)[None, :]
        S = tl.load(states_ptr + chunk * K * V + box, mask=fits, other=0.0)
        dS = tl.load(adjoints_ptr + chunk * K * V + box, mask=fits, other=0.0)
        dscores += _dot(dy, tl.trans(v), PRECISION)
        dq += _dot(dy, tl.trans(S), PRECISION)
        dk += _dot(v, tl.trans(dS), PRECISION)
        if GATE > 0:
            over += tl.sum(S.to(tl.float32) * dS.to(tl.float32), 1)
    if GATE == 2:
        x = _rows(log_a_ptr + h * K, token, H * K, d, real & (first == 0), K).to(tl.float32)
        L = _sums(x, first, SEG, False)
        cross = tl.where(_pairs(run, C, False), dscores, 0.0)
        own = tl.sum(tl.where(i[:, None] == i[None, :], dscores, 0.0), 1)[:, None]
        k = _rows(k_ptr + g * K, token, G * K, d, real, K).to(tl.float32)
        dk *= tl.where((run == last)[:, None], tl.exp(tl.minimum(_last(L, C)[None, :] - L, 0.0)), 0.0)
        # what passes each token's decay: reads, and pairs that end here less pairs that begin here; writes of earlier tokens
        flow = -k * dk
        writes = tl.sum(-flow, 0)
        q = _rows(q_ptr + g * K, token, G * K, d, real, K).to(tl.float32)
        dq *= tl.where((run == before)[:, None], tl.exp(L), 0.0)
        flow += q * dq
        if STEEP:
            for j in range(C):
                key, weight = _key(k, L, j, i, run)
                column = tl.sum(tl.where((i == j)[None, :], cross, 0.0), 1)[:, None] * weight
                dq += column * key[None, :]
                flow += column * key[None, :] * q
                row = tl.sum(column * q, 0)[None, :]
                dk += tl.where((i == j)[:, None], row, 0.0)
                flow -= tl.where((i == j)[:, None], row * key[None, :], 0.0)
        else:
            # both sides of a pair from the same rounded factors, so that pairs which no decay parts cancel exactly
            low, grown = _cast(cross, q_ptr), _cast(k * tl.exp(-L), q_ptr)
            fallen = _cast(q * tl.exp(L), q_ptr)
            inner = _dot(low, grown, PRECISION)
            dq += inner * tl.exp(L)
            flow += fallen.to(tl.float32) * inner
            inner = _dot(tl.trans(low), fallen, PRECISION)
            dk += inner * tl.exp(-L)
            flow -= grown.to(tl.float32) * inner
        if DIAGONAL:
            dq += own * k
            dk += own * q
        ends = first
        if SEG:
            after = tl.load(code_ptr + token + 1, mask=inside & (n * C + i + 1 < T), other=-1) >> 1
            ends = inside & (run != after)
        # over tokens at or after this one, of its run; of writes, which are of the last run, those before it
        dlog_a = _sums(flow, ends, SEG, True) + tl.where((run == last)[:, None], writes[None, :], 0.0)
        whole_k = tl.load(whole_ptr + chunk * K + d, mask=d < K, other=0.0)
        dlog_a += (whole_k * over)[None, :]
        dlog_a = tl.where((real & (first == 0))[:, None], dlog_a, 0.0)
        _store_rows(dlog_a_ptr + h * K, token, H * K, d, inside, K, dlog_a)
    else:
        since, until, whole = _scales(late_ptr, early_ptr, whole_ptr, token, h, H, chunk, inside, run, before, last, GATE)
        q = _rows(q_ptr + g * K, token, G * K, d, real, K)
        k = _rows(k_ptr + g * K, token, G * K, d, real, K)
        dq *= since[:, None]
        dk *= until[:, None]
        pair = _pairs(run, C, DIAGONAL)
        if GATE == 1:
            x, L = _gate(log_a_ptr, token, h, H, real & (first == 0), _pairs(run, C, True))
            scores = _load_square(scores_ptr, chunk, i, C).to(tl.float32)
            between = tl.where(i[:, None] > i[None, :], dscores * scores, 0.0)
            flow = tl.sum(q.to(tl.float32) * dq, 1) + tl.sum(between, 1) - tl.sum(between, 0)
            write = tl.sum(k.to(tl.float32) * dk, 1)
            dlog_a = tl.sum(tl.where(_pairs(run, C, True), flow[:, None], 0.0), 0)
            dlog_a += tl.sum(tl.where(i[:, None] > i[None, :], write[None, :], 0.0), 1) + whole * tl.sum(over, 0)
            dlog_a = tl.where(real & (first == 0), dlog_a, 0.0)
            tl.store(dlog_a_ptr + token * H + h, _cast(dlog_a, dlog_a_ptr), mask=inside)
            dscores *= _weights(x, L, pair, C, EXACT)
        else:
            dscores = tl.where(pair, dscores, 0.0)
        small = _cast(dscores, q_ptr)
        dq += _dot(small, k, PRECISION)
        dk += _dot(tl.trans(small), q, PRECISION)
    _store_rows(dq_ptr + h * K, token, H * K, d, inside, K, tl.where(real[:, None], dq, 0.0))
    _store_rows(dk_ptr + h * K, token, H * K, d, inside, K, tl.where(real[:, None], dk, 0.0))


def _chunk(dtype: torch.dtype, key: int) -> int:
    """Tokens of a chunk: float32 tiles of 256 channels leave room for 32."""
    return 32 if dtype == torch.float32 and key > 128 else 64


def _keys(key: int) -> int:
    return max(triton.next_power_of_2(key), 32)  # below 32 the three passes of tf32x3 come out as one (Triton 3.6)


def _values(value: int, most: int, bk: int, walks: int | None = None) -> int:
    """Values of a block. A walk carries keys x values in registers, and `walks` times its blocks fill the card."""
    bv = min(max(triton.next_power_of_2(value), 32), most if bk <= 128 else most // 2)
    if walks is not None:
        bv = min(bv, max(STATE // bk, 32))
        while bv > 32 and walks * triton.cdiv(value, bv) < FILL:
            bv //= 2
    return bv


def _launch(tile: Tile, x: Tensor) -> dict[str, int]:
    """Warps and stages. In float32 no loads ahead: Triton 3.6 reads out of bounds where tf32x3 meets a pipelined load. Keys of
    256 channels leave shared memory for two stages."""
    most = 1 if x.dtype == torch.float32 else 2 if x.shape[-1] > 128 else tile.stages
    return dict(num_warps=tile.warps, num_stages=min(tile.stages, most))


def _options(x: Tensor, log_a: Tensor | None, code: Tensor | None) -> dict[str, Any]:
    return dict(GATE=0 if log_a is None else log_a.ndim - 2, SEG=code is not None, C=_chunk(x.dtype, x.shape[-1]),
                PRECISION="tf32x3" if x.dtype == torch.float32 else "tf32")


class Prepared(NamedTuple):
    """What `_prepare` leaves to the walks; empty tensors where a gate has no use for them."""

    scores: Tensor
    late: Tensor
    early: Tensor
    whole: Tensor
    steep: Tensor


def _prepared(q: Tensor, v: Tensor, log_a: Tensor | None) -> Prepared:
    batch, tokens, _, key = q.shape
    heads, chunk = v.shape[2], _chunk(q.dtype, key)
    gate = 0 if log_a is None else log_a.ndim - 2
    sites = [batch, -(-tokens // chunk), heads]
    each = [[0], [batch, tokens, heads], [batch, tokens, heads, key]][gate]
    late, early = (q.new_empty(each, dtype=q.dtype if gate == 2 else torch.float32) for _ in range(2))
    whole = q.new_empty([[0], sites, [*sites, key]][gate], dtype=torch.float32)
    steep = q.new_empty(sites if gate == 2 else [0], dtype=torch.int8)
    return Prepared(q.new_empty([*sites, chunk, chunk]), late, early, whole, steep)


def forward(q: Tensor, k: Tensor, v: Tensor, log_a: Tensor | None, start: Tensor, code: Tensor | None, diagonal: bool,
            save: bool) -> tuple[Tensor, Tensor, Tensor, Prepared]:
    """y [B, T, H, V], the last state [B, H, K, V] in float32, the states [B, N, H, K, V] if `save`."""
    batch, tokens, groups, key = q.shape
    heads, value = v.shape[2:]
    chunks, rows, bk = triton.cdiv(tokens, _chunk(q.dtype, key)), batch * heads, _keys(key)
    options, ready = _options(q, log_a, code), _prepared(q, v, log_a)
    config = CONFIGS[options["GATE"]]
    _prepare_kernel[(chunks, rows)](
        q, k, log_a, code, *ready, tokens, heads, groups, key, chunks, DIAGONAL=diagonal, EXACT=q.dtype == torch.float32, BK=bk,
        **_launch(config.prepare, q), **options)
    y, last = torch.empty_like(v), torch.empty_like(start)
    states = v.new_empty((batch, chunks, heads, key, value) if save else 0)
    block = _values(value, config.forward.values, bk, rows)
    _forward_kernel[(triton.cdiv(value, block), rows)](
        q, k, v, ready.late, ready.early, ready.whole, code, ready.scores, start, y, states, last, tokens, heads, groups, key,
        value, chunks, SAVE=save, BK=bk, BV=block, **_launch(config.forward, q), **options)
    return y, last, states, ready


def backward(dy: Tensor, dlast: Tensor, q: Tensor, k: Tensor, v: Tensor, log_a: Tensor | None, code: Tensor | None,
             states: Tensor, ready: Prepared, diagonal: bool) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor]:
    """Gradients of q, k, v, log_a and start."""
    batch, tokens, groups, key = q.shape
    heads, value = v.shape[2:]
    chunks, rows, bk = triton.cdiv(tokens, _chunk(q.dtype, key)), batch * heads, _keys(key)
    options = _options(q, log_a, code)
    config = CONFIGS[options["GATE"]]
    scores, late, early, whole, steep = ready
    sizes = (tokens, heads, groups, key, value, chunks)
    adjoints, dstart = torch.empty_like(states), torch.empty_like(dlast)
    block = _values(value, config.adjoint.values, bk, rows)
    _adjoint_kernel[(triton.cdiv(value, block), rows)](
        q, dy, late, early, whole, code, dlast, adjoints, dstart, *sizes, BK=bk, BV=block, **_launch(config.adjoint, q),
        **options)
    dq, dk = (q.new_empty(batch, tokens, heads, key) for _ in range(2))
    dv = torch.empty_like(v)
    dlog_a = None if log_a is None else torch.empty_like(log_a)
    _values_kernel[(chunks, rows)](
        k, late, early, whole, code, scores, adjoints, dy, dv, *sizes, BK=bk, BV=_values(value, config.values.values, bk),
        **_launch(config.values, q), **options)
    keys = min(bk, config.gradient.keys or bk)
    for hard in (False, True)[: 2 if options["GATE"] == 2 else 1]:
        _gradient_kernel[(chunks, rows, triton.cdiv(key, keys))](
            q, k, v, log_a, late, early, whole, code, scores, states, adjoints, steep, dy, dq, dk, dlog_a, *sizes,
            DIAGONAL=diagonal, EXACT=q.dtype == torch.float32, STEEP=hard, BK=keys,
            BV=_values(value, config.gradient.values, keys), **_launch(config.gradient, q), **options)
    if groups < heads:
        dq, dk = (x.unflatten(2, (groups, -1)).sum(3) for x in (dq, dk))
    return dq, dk, dv, dlog_a, dstart


# Operators, so that torch.compile and torch.export pass through without a break -------------------------------------

@torch.library.custom_op("seqloom::decay_scan_fused", mutates_args=(), schema=(
    "(Tensor q, Tensor k, Tensor v, Tensor? log_a, Tensor start, Tensor? code, bool diagonal, bool save)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"))
def _scan(q: Tensor, k: Tensor, v: Tensor, log_a: Tensor | None, start: Tensor, code: Tensor | None, diagonal: bool,
          save: bool) -> tuple[Tensor, ...]:
    y, last, states, ready = forward(q, k, v, log_a, start, code, diagonal, save)
    return y, last, states, *ready


@torch.library.custom_op("seqloom::decay_scan_fused_backward", mutates_args=(), schema=(
    "(Tensor dy, Tensor dlast, Tensor q, Tensor k, Tensor v, Tensor? log_a, Tensor? code, Tensor states, Tensor scores,"
    " Tensor late, Tensor early, Tensor whole, Tensor steep, bool diagonal) -> (Tensor, Tensor, Tensor, Tensor, Tensor)"))
def _scan_backward(dy: Tensor, dlast: Tensor, q: Tensor, k: Tensor, v: Tensor, log_a: Tensor | None, code: Tensor | None,
                   states: Tensor, scores: Tensor, late: Tensor, early: Tensor, whole: Tensor, steep: Tensor,
                   diagonal: bool) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    ready = Prepared(scores, late, early, whole, steep)
    dq, dk, dv, dlog_a, dstart = backward(dy, dlast, q, k, v, log_a, code, states, ready, diagonal)
    return dq, dk, dv, q.new_empty(0) if dlog_a is None else dlog_a, dstart


@_scan.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, log_a: Tensor | None, start: Tensor, code: Tensor | None, diagonal: bool,
      save: bool) -> tuple[Tensor, ...]:
    batch, tokens, _, key = q.shape
    heads, value = v.shape[2:]
    states = v.new_empty((batch, -(-tokens // _chunk(q.dtype, key)), heads, key, value) if save else 0)
    return torch.empty_like(v), torch.empty_like(start), states, *_prepared(q, v, log_a)


@_scan_backward.register_fake
def _(dy: Tensor, dlast: Tensor, q: Tensor, k: Tensor, v: Tensor, log_a: Tensor | None, *rest: Any) -> tuple[Tensor, ...]:
    decay = q.new_empty(0) if log_a is None else torch.empty_like(log_a)
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v), decay, torch.empty_like(dlast)


def _keep(ctx: Any, inputs: tuple, output: tuple) -> None:
    q, k, v, log_a, _, code, ctx.diagonal, _ = inputs
    ctx.save_for_backward(q, k, v, log_a, code, *output[2:])


def _back(ctx: Any, dy: Tensor, dlast: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    *grads, dstart = _scan_backward(dy.contiguous(), dlast.contiguous(), *ctx.saved_tensors, ctx.diagonal)
    if ctx.saved_tensors[3] is None:
        grads[3] = None
    return *grads, dstart, None, None, None


_scan.register_autograd(_back, setup_context=_keep)


def launch(q: Tensor, k: Tensor, v: Tensor, log_a: Tensor | None, start: Tensor, code: Tensor | None, *,
           diagonal: bool = True) -> tuple[Tensor, Tensor]:
    """y and the last state, with gradients where a stream asks for one."""
    streams = [x for x in (q, k, v, log_a, start) if x is not None]
    save = torch.is_grad_enabled() and any(x.requires_grad for x in streams)
    return _scan(q, k, v, log_a, start, code, diagonal, save)[:2]
