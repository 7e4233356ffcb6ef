"""Delta-rule scan on a GPU: S_t = a_t (I - b_t k_t k_t') S_{t-1} + b_t k_t v_t', y_t = S_t' q_t, by chunks of C tokens.

In terms of the error R_i = v_i - a_i S_{i-1}' k_i of every token, whose write is b_i k_i R_i', a chunk that S enters is

    (I + A) R = V - since K S      A_ij = W_ij k_i'k_j b_j for j < i       W_ij = e^{L_i - L_j}, L the sum of log decays
    Y = since Q S + P R            P_ij = W_ij q_i'k_j b_j for j <= i      since_i = e^{L_i}
    S_next = whole S + K' (gain R)                                         gain_j = b_j e^{L_end - L_j}, whole = e^{L_end}

Errors, not writes, are kept: every product is of numbers as large as the streams, and no difference of two rounded products
stands for one. With X = (I + A)^{-1}, the adjoint D of S_next gives those of R, of V, and of S:

    dV = X' (P' dY + gain K D)      D_before = whole D + Q' (since dY) - K' (since dV)

and everything else from chunk to chunk is parallel: dP = dY R', dA = -dV R', and
    dQ = since dY S' + (dP W b) K,  dK = gain R D' - since dV S' + (dP W b)' Q + (M + M') K with M = dA W b.

Passes: P and X of all chunks; R and S from the first chunk on, one program per head and block of values; Y of all chunks;
D and dV from the last chunk back; the other gradients of all chunks. Pairs and states are selected by runs (0 across a
boundary), so that no number of one segment is in a sum of another's. Nothing is added atomically.
Source: [deltanet] Method 4, with errors in place of its writes; the decay as in kernels/delta_scan.py.
"""

from __future__ import annotations

import contextlib
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

CHUNK = 64
WIDEST = 256  # of a key or a value


class Tile(NamedTuple):
    """Keys and values of a tile (0: as many as there are), warps of a program, stages of its pipelined loads."""

    keys: int
    values: int
    warps: int
    stages: int


class Config(NamedTuple):
    """How the five passes are cut, for a key of up to `key` and streams of `width` bytes."""

    system: Tile    # P and X
    states: Tile    # R and S: the widest block of values
    outputs: Tile   # Y
    adjoints: Tile  # D and dV: the widest block of values
    grads: Tile     # all else


# (widest key, bytes of a stream's element): the first that fits is taken
CONFIGS = {
    (64, 2): Config(Tile(64, 0, 4, 1), Tile(0, 64, 4, 3), Tile(0, 64, 4, 1), Tile(0, 64, 4, 2), Tile(64, 64, 8, 1)),
    (128, 2): Config(Tile(64, 0, 4, 2), Tile(0, 64, 4, 2), Tile(0, 128, 4, 1), Tile(0, 64, 4, 2), Tile(128, 64, 8, 2)),
    (256, 2): Config(Tile(64, 0, 4, 2), Tile(0, 32, 4, 2), Tile(0, 64, 4, 1), Tile(0, 32, 8, 2), Tile(64, 64, 8, 2)),
    (64, 4): Config(Tile(32, 0, 4, 1), Tile(0, 32, 8, 1), Tile(0, 32, 8, 1), Tile(0, 32, 8, 1), Tile(32, 32, 8, 1)),
    (128, 4): Config(Tile(32, 0, 4, 1), Tile(0, 32, 8, 1), Tile(0, 32, 8, 1), Tile(0, 32, 8, 1), Tile(32, 32, 8, 1)),
    (256, 4): Config(Tile(32, 0, 4, 1), Tile(0, 16, 8, 1), Tile(0, 32, 8, 1), Tile(0, 16, 8, 1), Tile(32, 32, 8, 1)),
}
FILL = 128  # programs that fill a card: the walks through chunks take narrower blocks of values until there are as many


@triton.jit
def _dot(a, b, PRECISION: tl.constexpr):
    return tl.dot(a, b, input_precision=PRECISION)


@triton.jit
def _load(ptr, rows, stride, columns, live, WIDTH):
    """Rows of a stream, 0 where not live."""
    return tl.load(ptr + rows[:, None] * stride + columns[None, :], mask=live[:, None] & (columns < WIDTH)[None, :], other=0.0)


@triton.jit
def _store(ptr, rows, stride, columns, live, WIDTH, x):
    tl.store(ptr + rows[:, None] * stride + columns[None, :], x.to(ptr.dtype.element_ty),
             mask=live[:, None] & (columns < WIDTH)[None, :])


@triton.jit
def _scaled(x, rows):
    """x [C, D] times rows [C], 0 where that is 0 whatever x is."""
    return tl.where((rows == 0.0)[:, None], 0.0, x * rows[:, None])


@triton.jit
def _live(code, b, t0, T, i, SEGMENTS: tl.constexpr):
    """Rows of the chunk at t0 that stand inside T, and those that are real. code = 2 run + real."""
    inside = t0 + i < T
    if SEGMENTS:
        real = inside & ((tl.load(code + b * T + t0 + i, mask=inside, other=0) & 1) == 1)
    else:
        real = inside
    return inside, real


@triton.jit
def _runs(code, b, t0, T, i, SEGMENTS: tl.constexpr, C: tl.constexpr):
    """The run of each row of the chunk (that of its last token beyond T), before the chunk, at its end; first tokens."""
    if SEGMENTS:
        at = code + b * T + t0
        run = tl.load(at + tl.minimum(i, T - 1 - t0)) >> 1
        before = tl.load(at - 1, mask=t0 > 0, other=0) >> 1
        last = tl.load(at + tl.minimum(C, T - t0) - 1) >> 1
        first = run != (tl.load(at + i - 1, mask=(t0 + i > 0) & (t0 + i < T), other=0) >> 1)
    else:
        run = tl.zeros([C], tl.int32)
        before = 0
        last = 0
        first = i < 0
    return run, before, last, first


@triton.jit
def _pairs(total, run, i, DECAY: tl.constexpr):
    """W [C, C]: the decay from token j to token i of a run where j <= i, 0 elsewhere."""
    keep = (i[:, None] >= i[None, :]) & (run[:, None] == run[None, :])
    if DECAY:  # mask before exp: a future pair has a positive exponent and overflows to inf
        return tl.exp(tl.where(keep, total[:, None] - total[None, :], float("-inf")))
    return keep.to(tl.float32)


@triton.jit
def _quarters(x, G: tl.constexpr, S: tl.constexpr):
    """Of blocks [G, 2S, 2S]: the upper left, lower left and lower right quarters [G, S, S]."""
    parts = tl.permute(tl.reshape(x, (G, 2, S, 2, S)), (0, 2, 4, 1, 3))  # [G, S, S, row, column]
    left, right = tl.split(parts)
    first, below = tl.split(left)
    _, second = tl.split(right)
    return first, below, second


@triton.jit
def _merge(x, below, G: tl.constexpr, S: tl.constexpr):
    """From the inverses x [2G, S, S] of diagonal blocks and what stands below them [G, S, S], the inverses [G, 2S, 2S]."""
    first, second = tl.split(tl.permute(tl.reshape(x, (G, 2, S, S)), (0, 2, 3, 1)))
    corner = -_dot(_dot(second, below, "ieee"), first, "ieee")  # too small for tensor cores to pay
    rows = tl.join(tl.join(first, tl.zeros_like(first)), tl.join(corner, second))  # [G, S, S, column, row]
    return tl.reshape(tl.permute(rows, (0, 4, 1, 3, 2)), (G, 2 * S, 2 * S))


@triton.jit
def _inverse(a, scratch, C: tl.constexpr):
    """(I + A)^{-1} of a strictly lower A [64, 64]: blocks of 16 by substitution, then joined in pairs; `scratch` holds 1024.

    Not by powers of A: those grow like binomials where keys repeat, and cancel. A thread solves a column of a block in
    its registers, so that the rows of A, which all columns of a block need, come back from memory; twice as many columns
    as there are, so that four warps share out columns and not rows.
    """
    i = tl.arange(0, C)
    same = (i[:, None] // 16) == (i[None, :] // 16)
    tl.store(scratch + i[:, None] * 16 + (i % 16)[None, :], a, mask=same)
    tl.debug_barrier()
    r, c = tl.arange(0, 16), tl.arange(0, 2 * C) % C
    x = (r[:, None] == (c % 16)[None, :]).to(tl.float32)
    for s in tl.static_range(1, 16):
        row = tl.load(scratch + (c // 16 * 256)[None, :] + s * 16 + r[:, None])
        x -= tl.where(r[:, None] == s, tl.sum(row * x, 0)[None, :], 0.0)
    tl.debug_barrier()  # nothing is read from here on
    x, _ = tl.split(tl.permute(tl.reshape(x, (16, 2, C)), (0, 2, 1)))
    x = tl.permute(tl.reshape(x, (16, 4, 16)), (1, 0, 2))
    first, below, second = _quarters(tl.reshape(a, (1, C, C)), 1, 32)
    halves = tl.reshape(tl.permute(tl.join(first, second), (0, 3, 1, 2)), (2, 32, 32))
    x = _merge(x, _quarters(halves, 2, 16)[1], 2, 16)
    return tl.reshape(_merge(x, below, 1, 32), (C, C))


@triton.jit(do_not_specialize=["T", "N"])
def _system_kernel(q, k, beta, log_a, code, scores, inverse, total, since, gain, T, N, H, q_b, q_t, q_h, k_b, k_t, k_h,
                   K: tl.constexpr, BK: tl.constexpr, C: tl.constexpr, DECAY: tl.constexpr, SEGMENTS: tl.constexpr,
                   PRECISION: tl.constexpr):
    """P and X [B, N, H, C, C]; L, since and gain [B, N, H, C]."""
    block = tl.program_id(0)
    h, n, b = block % H, (block // H) % N, (block // H // N).to(tl.int64)
    i, t0 = tl.arange(0, C), n * C
    _, real = _live(code, b, t0, T, i, SEGMENTS)
    run, before, last, first = _runs(code, b, t0, T, i, SEGMENTS, C)
    at = (b * T + t0) * H + h + i * H
    beta_ = tl.load(beta + at, mask=real, other=0.0).to(tl.float32)
    here = block.to(tl.int64) * C
    L = tl.zeros([C], tl.float32)
    until = (run == last).to(tl.float32)
    if DECAY:
        # the decay of a first token reaches only pairs that the selection drops
        decay = tl.load(log_a + at, mask=real & (first == 0), other=0.0).to(tl.float32)
        keep = (i[:, None] >= i[None, :]) & (run[:, None] == run[None, :])
        L = tl.sum(tl.where(keep, decay[None, :], 0.0), 1)
        end = tl.sum(tl.where(i == C - 1, L, 0.0), 0)
        until = tl.exp(tl.where(run == last, end - L, float("-inf")))
        tl.store(total + here + i, L)
    if DECAY or SEGMENTS:
        tl.store(since + here + i, tl.where(run == before, tl.exp(L), 0.0))
    tl.store(gain + here + i, until * beta_)

    q += b * q_b + t0.to(tl.int64) * q_t + h * q_h
    k += b * k_b + t0.to(tl.int64) * k_t + h * k_h
    qk, kk = tl.zeros([C, C], tl.float32), tl.zeros([C, C], tl.float32)
    for part in range(tl.cdiv(K, BK)):
        d = part * BK + tl.arange(0, BK)
        queries, keys = _load(q, i, q_t, d, real, K), _load(k, i, k_t, d, real, K)
        qk += _dot(queries, tl.trans(keys), PRECISION)
        kk += _dot(keys, tl.trans(keys), PRECISION)
    weight = _pairs(L, run, i, DECAY) * beta_[None, :]
    square = i[:, None] * C + i[None, :]
    tl.store(scores + here * C + square, (qk * weight).to(scores.dtype.element_ty))
    system = tl.where(i[:, None] > i[None, :], kk * weight, 0.0)
    X = _inverse(system, (inverse + here * C).to(tl.pointer_type(tl.float32)), C)
    tl.store(inverse + here * C + square, X.to(inverse.dtype.element_ty))


@triton.jit(do_not_specialize=["T", "N"])
def _states_kernel(k, v, code, inverse, since, gain, start, errors, states, new, T, N, H, k_b, k_t, k_h, v_b, v_t, v_h,
                   K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr,
                   SCALED: tl.constexpr, SEGMENTS: tl.constexpr, START: tl.constexpr, PRECISION: tl.constexpr,
                   STAGES: tl.constexpr):
    """R [B, T, H, V], the state that enters each chunk [B, N, H, K, V], and the last one in float32."""
    parts = tl.cdiv(V, BV)
    row = tl.program_id(0) // parts
    h, b = row % H, (row // H).to(tl.int64)
    i, d, e = tl.arange(0, C), tl.arange(0, BK), (tl.program_id(0) % parts) * BV + tl.arange(0, BV)
    k += b * k_b + h * k_h
    v += b * v_b + h * v_h
    errors += (b * T * H + h) * V
    square = i[:, None] * C + i[None, :]
    matrix, ok = d[:, None] * V + e[None, :], (d < K)[:, None] & (e < V)[None, :]
    S = tl.zeros([BK, BV], tl.float32)
    if START:
        S = tl.load(start + row.to(tl.int64) * K * V + matrix, mask=ok, other=0.0)
    length = tl.full([], C, tl.int64)
    for n in tl.range(0, N, num_stages=STAGES):
        t0 = n * length
        here = (b * N + n) * H + h
        inside, real = _live(code, b, t0, T, i, SEGMENTS)
        keys = _load(k + t0 * k_t, i, k_t, d, real, K)
        values = _load(v + t0 * v_t, i, v_t, e, real, V)
        X = tl.load(inverse + here * C * C + square)
        g = tl.load(gain + here * C + i)
        low = S.to(keys.dtype)
        tl.store(states + here * K * V + matrix, low, mask=ok)
        seen = _dot(keys, low, PRECISION)
        if SCALED:
            seen = _scaled(seen, tl.load(since + here * C + i))
        R = _dot(X, (values.to(tl.float32) - seen).to(keys.dtype), PRECISION)
        _store(errors + t0 * H * V, i, H * V, e, inside, V, R)
        if SCALED:
            whole = tl.load(since + here * C + C - 1)
            S = tl.where(whole == 0.0, 0.0, S * whole)
        S += _dot(tl.trans(keys), (R * g[:, None]).to(keys.dtype), PRECISION)
    tl.store(new + row.to(tl.int64) * K * V + matrix, S, mask=ok)


@triton.jit(do_not_specialize=["T", "N"])
def _outputs_kernel(q, code, scores, since, errors, states, y, T, N, H, q_b, q_t, q_h, K: tl.constexpr, V: tl.constexpr,
                    BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr, SCALED: tl.constexpr, SEGMENTS: tl.constexpr,
                    PRECISION: tl.constexpr):
    """Y [B, T, H, V]."""
    parts = tl.cdiv(V, BV)
    block = tl.program_id(0) // parts
    h, n, b = block % H, (block // H) % N, (block // H // N).to(tl.int64)
    i, d, e = tl.arange(0, C), tl.arange(0, BK), (tl.program_id(0) % parts) * BV + tl.arange(0, BV)
    t0, here = (n * C).to(tl.int64), block.to(tl.int64)
    inside, real = _live(code, b, t0, T, i, SEGMENTS)
    queries = _load(q + b * q_b + t0 * q_t + h * q_h, i, q_t, d, real, K)
    S = tl.load(states + here * K * V + d[:, None] * V + e[None, :], mask=(d < K)[:, None] & (e < V)[None, :], other=0.0)
    out = _dot(queries, S, PRECISION)
    if SCALED:
        out = _scaled(out, tl.load(since + here * C + i))
    base = ((b * T + t0) * H + h) * V
    P = tl.load(scores + here * C * C + i[:, None] * C + i[None, :])
    out += _dot(P, _load(errors + base, i, H * V, e, inside, V), PRECISION)
    _store(y + base, i, H * V, e, inside, V, out)


@triton.jit(do_not_specialize=["T", "N"])
def _adjoints_kernel(q, k, dy, code, scores, inverse, since, gain, dnew, dv, after, dstart, T, N, H, q_b, q_t, q_h, k_b, k_t,
                     k_h, y_b, y_t, y_h, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
                     C: tl.constexpr, SCALED: tl.constexpr, SEGMENTS: tl.constexpr, END: tl.constexpr,
                     PRECISION: tl.constexpr, STAGES: tl.constexpr):
    """dV [B, T, H, V], the adjoint of the state that leaves each chunk [B, N, H, K, V], and that of the first in float32."""
    parts = tl.cdiv(V, BV)
    row = tl.program_id(0) // parts
    h, b = row % H, (row // H).to(tl.int64)
    i, d, e = tl.arange(0, C), tl.arange(0, BK), (tl.program_id(0) % parts) * BV + tl.arange(0, BV)
    q += b * q_b + h * q_h
    k += b * k_b + h * k_h
    dy += b * y_b + h * y_h
    dv += (b * T * H + h) * V
    square = i[:, None] * C + i[None, :]
    matrix, ok = d[:, None] * V + e[None, :], (d < K)[:, None] & (e < V)[None, :]
    D = tl.zeros([BK, BV], tl.float32)
    if END:
        D = tl.load(dnew + row.to(tl.int64) * K * V + matrix, mask=ok, other=0.0)
    length = tl.full([], C, tl.int64)
    for m in tl.range(0, N, num_stages=STAGES):
        n = N - 1 - m
        t0 = n * length
        here = (b * N + n) * H + h
        inside, real = _live(code, b, t0, T, i, SEGMENTS)
        queries = _load(q + t0 * q_t, i, q_t, d, real, K)
        keys = _load(k + t0 * k_t, i, k_t, d, real, K)
        late = _load(dy + t0 * y_t, i, y_t, e, real, V)
        P = tl.load(scores + here * C * C + square)
        X = tl.load(inverse + here * C * C + square)
        g = tl.load(gain + here * C + i)
        low = D.to(keys.dtype)
        tl.store(after + here * K * V + matrix, low, mask=ok)
        dR = _scaled(_dot(keys, low, PRECISION), g) + _dot(tl.trans(P), late, PRECISION)
        dV = _dot(tl.trans(X), dR.to(keys.dtype), PRECISION)
        _store(dv + t0 * H * V, i, H * V, e, inside, V, dV)
        early = -dV
        if SCALED:
            s = tl.load(since + here * C + i)
            whole = tl.load(since + here * C + C - 1)
            D = tl.where(whole == 0.0, 0.0, D * whole)
            early = _scaled(early, s)
            late = _scaled(late.to(tl.float32), s).to(keys.dtype)
        D += _dot(tl.trans(queries), late, PRECISION)
        D += _dot(tl.trans(keys), early.to(keys.dtype), PRECISION)
    tl.store(dstart + row.to(tl.int64) * K * V + matrix, D, mask=ok)


@triton.jit
def _through(states, after, dY, dV, R, d, e, dQ, dK, out, over, K, V, DECAY: tl.constexpr, PRECISION: tl.constexpr):
    """Adds what passes through a block of the entering state S and of the leaving one's adjoint D: dY S', -dV S', R D', S D."""
    at, ok = d[:, None] * V + e[None, :], (d < K)[:, None] & (e < V)[None, :]
    S, D = tl.load(states + at, mask=ok, other=0.0), tl.load(after + at, mask=ok, other=0.0)
    if DECAY:
        over += tl.sum(tl.sum(S.to(tl.float32) * D.to(tl.float32), 1), 0)
    dQ += _dot(dY, tl.trans(S), PRECISION)
    dK -= _dot(dV, tl.trans(S), PRECISION)
    out += _dot(R, tl.trans(D), PRECISION)
    return dQ, dK, out, over


@triton.jit(do_not_specialize=["T", "N"])
def _grads_kernel(q, k, beta, dy, code, total, since, errors, states, dv, after, dq, dk, dbeta, dlog_a, T, N, H, q_b, q_t,
                  q_h, k_b, k_t, k_h, y_b, y_t, y_h, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
                  C: tl.constexpr, DECAY: tl.constexpr, SEGMENTS: tl.constexpr, PRECISION: tl.constexpr,
                  STAGES: tl.constexpr):
    """dQ, dK [B, T, H, K]; those of beta and of the log decays [B, T, H] in float32."""
    block = tl.program_id(0)
    h, n, b = block % H, (block // H) % N, (block // H // N).to(tl.int64)
    i, t0, here = tl.arange(0, C), (n * C).to(tl.int64), block.to(tl.int64)
    inside, real = _live(code, b, t0, T, i, SEGMENTS)
    run, _, last, first = _runs(code, b, t0, T, i, SEGMENTS, C)
    at = (b * T + t0) * H + h + i * H
    beta_ = tl.load(beta + at, mask=real, other=0.0).to(tl.float32)
    q += b * q_b + t0 * q_t + h * q_h
    k += b * k_b + t0 * k_t + h * k_h
    dy += b * y_b + t0 * y_t + h * y_h
    values, keys = ((b * T + t0) * H + h) * V, ((b * T + t0) * H + h) * K
    L, whole = tl.zeros([C], tl.float32), 1.0
    late, until = tl.full([C], 1.0, tl.float32), (run == last).to(tl.float32)
    if DECAY:
        L = tl.load(total + here * C + i)
        end = tl.load(total + here * C + C - 1)
        until = tl.exp(tl.where(run == last, end - L, float("-inf")))
    if DECAY or SEGMENTS:
        late = tl.load(since + here * C + i)
        whole = tl.load(since + here * C + C - 1)

    # one pass over values where a block holds whole keys, else one for the pairs and one for each block of keys
    ONE: tl.constexpr = BK >= K
    over = 0.0
    dQ, dK, out = tl.zeros([C, BK], tl.float32), tl.zeros([C, BK], tl.float32), tl.zeros([C, BK], tl.float32)
    # what a unit of W b at each pair is worth: dP W b = dp, dA W b = da
    dp, da = tl.zeros([C, C], tl.float32), tl.zeros([C, C], tl.float32)
    for part in tl.range(0, tl.cdiv(V, BV), num_stages=STAGES):
        e = part * BV + tl.arange(0, BV)
        R, dY = _load(errors + values, i, H * V, e, inside, V), _load(dy, i, y_t, e, real, V)
        dV = _load(dv + values, i, H * V, e, inside, V)
        dp += _dot(dY, tl.trans(R), PRECISION)
        da -= _dot(dV, tl.trans(R), PRECISION)
        if ONE:
            d = tl.arange(0, BK)
            dQ, dK, out, over = _through(states + here * K * V, after + here * K * V, dY, dV, R, d, e, dQ, dK, out, over, K, V,
                                         DECAY, PRECISION)
    qk, kk = tl.zeros([C, C], tl.float32), tl.zeros([C, C], tl.float32)
    for part in range(tl.cdiv(K, BK)):
        d = part * BK + tl.arange(0, BK)
        Q, key = _load(q, i, q_t, d, real, K), _load(k, i, k_t, d, real, K)
        qk += _dot(Q, tl.trans(key), PRECISION)
        kk += _dot(key, tl.trans(key), PRECISION)
    weight = _pairs(L, run, i, DECAY)
    dp *= weight
    da = tl.where(i[:, None] > i[None, :], da * weight, 0.0)
    flow = dp * qk + da * kk
    into = tl.sum(flow, 0)
    dbeta_ = into
    dL = tl.sum(flow * beta_[None, :], 1) - beta_ * into
    dp *= beta_[None, :]
    da *= beta_[None, :]
    dp_low, da_low = dp.to(q.dtype.element_ty), (da + tl.trans(da)).to(q.dtype.element_ty)

    for part in range(tl.cdiv(K, BK)):
        d = part * BK + tl.arange(0, BK)
        if not ONE:
            dQ, dK, out = tl.zeros([C, BK], tl.float32), tl.zeros([C, BK], tl.float32), tl.zeros([C, BK], tl.float32)
            for piece in tl.range(0, tl.cdiv(V, BV), num_stages=STAGES):
                e = piece * BV + tl.arange(0, BV)
                R, dY = _load(errors + values, i, H * V, e, inside, V), _load(dy, i, y_t, e, real, V)
                dV = _load(dv + values, i, H * V, e, inside, V)
                dQ, dK, out, over = _through(states + here * K * V, after + here * K * V, dY, dV, R, d, e, dQ, dK, out, over, K,
                                             V, DECAY, PRECISION)
        Q, key = _load(q, i, q_t, d, real, K), _load(k, i, k_t, d, real, K)
        if DECAY or SEGMENTS:
            dQ, dK, out = _scaled(dQ, late), _scaled(dK, late), _scaled(out, until)
        wide = key.to(tl.float32)
        written = tl.sum(wide * out, 1)
        dbeta_ += written
        if DECAY:
            written *= beta_
            dL += tl.sum(Q.to(tl.float32) * dQ, 1) + tl.sum(wide * dK, 1) - written
            dL += tl.where(i == C - 1, tl.sum(written, 0), 0.0)
        dQ += _dot(dp_low, key, PRECISION)
        dK += out * beta_[:, None] + _dot(tl.trans(dp_low), Q, PRECISION) + _dot(da_low, key, PRECISION)
        _store(dq + keys, i, H * K, d, inside, K, tl.where(real[:, None], dQ, 0.0))
        _store(dk + keys, i, H * K, d, inside, K, tl.where(real[:, None], dK, 0.0))
    tl.store(dbeta + at, tl.where(real, dbeta_, 0.0), mask=inside)
    if DECAY:
        dL += tl.where(i == C - 1, tl.where(whole == 0.0, 0.0, whole * over), 0.0)
        # a log decay is in the sums L of its own run from its token on
        keep = (i[:, None] >= i[None, :]) & (run[:, None] == run[None, :])
        grad = tl.sum(tl.where(keep, dL[:, None], 0.0), 0)
        tl.store(dlog_a + at, tl.where(real & (first == 0), grad, 0.0), mask=inside)


def _config(q: Tensor) -> Config:
    key, width = q.shape[-1], q.element_size()
    return next(config for (most, size), config in CONFIGS.items() if key <= most and width <= size)


def _pad(size: int, most: int = WIDEST) -> int:
    """The power of two that holds `size`, at least 16 (the least of a matrix product), at most `most`."""
    return min(max(triton.next_power_of_2(size), 16), most or WIDEST)


def _narrow(rows: int, value: int, most: int) -> int:
    """The block of values of a walk through chunks: narrower, down to 16, until there are programs enough."""
    block = _pad(value, most)
    while block > 16 and rows * triton.cdiv(value, block) < FILL:
        block //= 2
    return block


def _precision(x: Tensor) -> str:
    """Of products: float32 ones take three passes on tensor cores, and one if PyTorch's setting allows TF32."""
    if torch.version.hip or not x.is_cuda:
        return "ieee"
    return "tf32x3" if torch.get_float32_matmul_precision() == "highest" else "tf32"


def _device(x: Tensor) -> Any:
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


def _rows(x: Tensor) -> Tensor:
    """A stream whose last dimension is dense; the others may be strided."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _planes(log_a: Tensor | None, code: Tensor | None) -> int:
    """Of numbers per token that the passes share: gain; with decays or segments also since; with decays also L."""
    return 3 if log_a is not None else 1 if code is None else 2


def _vectors(vectors: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """gain, since and L; any of them for what there is no need of."""
    return vectors[0], vectors[min(1, len(vectors) - 1)], vectors[-1]


def _empty(k: Tensor, v: Tensor, planes: int) -> tuple[Tensor, ...]:
    """For y, the last state, R, the states that enter chunks, P, X, and the numbers per token."""
    (batch, tokens, heads, key), value = k.shape, v.shape[-1]
    # flat: of more dimensions a tracer asks how they are laid out, and so whether there is one chunk
    blocks = batch * ((tokens + CHUNK - 1) // CHUNK) * heads
    new = v.new_empty(batch, heads, key, value, dtype=torch.float32)
    vectors = v.new_empty(planes, blocks * CHUNK, dtype=torch.float32)
    squares = (v.new_empty(blocks * CHUNK * CHUNK) for _ in range(2))
    return v.new_empty(v.shape), new, v.new_empty(v.shape), v.new_empty(blocks * key * value), *squares, vectors


def forward(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, log_a: Tensor | None, start: Tensor | None,
            code: Tensor | None) -> tuple[Tensor, ...]:
    """y and the last state in float32; then what the backward pass reads: R, states, P, X, and the numbers per token."""
    q, k, v, beta = _rows(q), _rows(k), _rows(v), beta.contiguous()
    (batch, tokens, heads, key), value = k.shape, v.shape[-1]
    chunks = triton.cdiv(tokens, CHUNK)
    y, new, errors, states, scores, inverse, vectors = outputs = _empty(k, v, _planes(log_a, code))
    gain, since, total = _vectors(vectors)
    decay, segments = log_a is not None, code is not None
    config, precision, wide = _config(q), _precision(q), _pad(key)
    blocks, rows = batch * chunks * heads, batch * heads
    with _device(q):
        tile = config.system
        _system_kernel[(blocks,)](
            q, k, beta, log_a, code, scores, inverse, total, since, gain, tokens, chunks, heads, *q.stride()[:3],
            *k.stride()[:3], K=key, BK=_pad(key, tile.keys), C=CHUNK, DECAY=decay, SEGMENTS=segments, PRECISION=precision,
            num_warps=tile.warps, num_stages=tile.stages)
        tile = config.states
        block = _narrow(rows, value, tile.values)
        _states_kernel[(rows * triton.cdiv(value, block),)](
            k, v, code, inverse, since, gain, start, errors, states, new, tokens, chunks, heads, *k.stride()[:3],
            *v.stride()[:3], K=key, V=value, BK=wide, BV=block, C=CHUNK, SCALED=decay or segments, SEGMENTS=segments,
            START=start is not None, PRECISION=precision, STAGES=tile.stages, num_warps=tile.warps, num_stages=tile.stages)
        tile = config.outputs
        block = _pad(value, tile.values)
        _outputs_kernel[(blocks * triton.cdiv(value, block),)](
            q, code, scores, since, errors, states, y, tokens, chunks, heads, *q.stride()[:3], K=key, V=value, BK=wide,
            BV=block, C=CHUNK, SCALED=decay or segments, SEGMENTS=segments, PRECISION=precision, num_warps=tile.warps,
            num_stages=tile.stages)
    return outputs


def backward(dy: Tensor, dnew: Tensor | None, q: Tensor, k: Tensor, beta: Tensor, log_a: Tensor | None, code: Tensor | None,
             errors: Tensor, states: Tensor, scores: Tensor, inverse: Tensor,
             vectors: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v; in float32 those of beta, of log_a (empty if there is none), and of the first state."""
    q, k, dy, beta = _rows(q), _rows(k), _rows(dy), beta.contiguous()
    (batch, tokens, heads, key), value = k.shape, dy.shape[-1]
    chunks = triton.cdiv(tokens, CHUNK)
    gain, since, total = _vectors(vectors)
    dq, dk, dv, dbeta, dlog_a, dstart = outputs = _grads(q, k, beta, log_a, errors)
    after = torch.empty_like(states)
    decay, segments = log_a is not None, code is not None
    config, precision, wide = _config(q), _precision(q), _pad(key)
    rows = batch * heads
    strides = *q.stride()[:3], *k.stride()[:3], *dy.stride()[:3]
    with _device(q):
        tile = config.adjoints
        block = _narrow(rows, value, tile.values)
        _adjoints_kernel[(rows * triton.cdiv(value, block),)](
            q, k, dy, code, scores, inverse, since, gain, dnew, dv, after, dstart, tokens, chunks, heads, *strides, K=key,
            V=value, BK=wide, BV=block, C=CHUNK, SCALED=decay or segments, SEGMENTS=segments, END=dnew is not None,
            PRECISION=precision, STAGES=tile.stages, num_warps=tile.warps, num_stages=tile.stages)
        tile = config.grads
        _grads_kernel[(batch * chunks * heads,)](
            q, k, beta, dy, code, total, since, errors, states, dv, after, dq, dk, dbeta, dlog_a, tokens, chunks, heads,
            *strides, K=key, V=value, BK=_pad(key, tile.keys), BV=_pad(value, tile.values), C=CHUNK, DECAY=decay,
            SEGMENTS=segments, PRECISION=precision, STAGES=tile.stages, num_warps=tile.warps, num_stages=tile.stages)
    return outputs


def _grads(q: Tensor, k: Tensor, beta: Tensor, log_a: Tensor | None,
           errors: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    def wide(*shape: int) -> Tensor:
        return q.new_empty(shape, dtype=torch.float32)

    return (q.new_empty(q.shape), k.new_empty(k.shape), errors.new_empty(errors.shape), wide(*beta.shape),
            wide(0) if log_a is None else wide(*log_a.shape), wide(k.shape[0], *k.shape[2:], errors.shape[-1]))


def launch(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, log_a: Tensor | None, start: Tensor | None,
           code: Tensor | None) -> tuple[Tensor, Tensor]:
    """y [B, T, H, V] and the last state [B, H, K, V], with gradients. q, k [B, T, H, K] and v [B, T, H, V] of one dtype,
    beta and log_a [B, T, H] of any, start [B, H, K, V] in float32; code [B, T] int32: 2 run + real."""
    key, value = k.shape[-1], v.shape[-1]
    if max(key, value) > WIDEST:
        raise ValueError(f"the fused delta scan takes keys and values of up to {WIDEST} per head, and found {key} and {value}; "
                         "use form 'chunked' or more heads")
    y, new, *_ = _scan(q, k, v, beta, log_a, start, code)
    return y, new


@torch.library.custom_op("seqloom::delta_scan_fused", mutates_args=(), schema=(
    "(Tensor q, Tensor k, Tensor v, Tensor beta, Tensor? log_a, Tensor? start, Tensor? code)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"))
def _scan(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, log_a: Tensor | None, start: Tensor | None,
          code: Tensor | None) -> tuple[Tensor, ...]:
    return forward(q, k, v, beta, log_a, start, code)


@_scan.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, log_a: Tensor | None, start: Tensor | None,
      code: Tensor | None) -> tuple[Tensor, ...]:
    return _empty(k, v, _planes(log_a, code))


@torch.library.custom_op("seqloom::delta_scan_fused_backward", mutates_args=(), schema=(
    "(Tensor dy, Tensor? dnew, Tensor q, Tensor k, Tensor beta, Tensor? log_a, Tensor? code, Tensor errors, Tensor states,"
    " Tensor scores, Tensor inverse, Tensor vectors) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"))
def _scan_backward(dy: Tensor, dnew: Tensor | None, q: Tensor, k: Tensor, beta: Tensor, log_a: Tensor | None,
                   code: Tensor | None, errors: Tensor, states: Tensor, scores: Tensor, inverse: Tensor,
                   vectors: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    return backward(dy, dnew, q, k, beta, log_a, code, errors, states, scores, inverse, vectors)


@_scan_backward.register_fake
def _(dy: Tensor, dnew: Tensor | None, q: Tensor, k: Tensor, beta: Tensor, log_a: Tensor | None, code: Tensor | None,
      errors: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    return _grads(q, k, beta, log_a, errors)


def _keep(ctx: Any, inputs: tuple, output: tuple) -> None:
    q, k, _, beta, log_a, start, code = inputs
    ctx.fresh = start is None
    ctx.set_materialize_grads(False)  # no one differentiates what is only kept for the backward pass
    ctx.save_for_backward(q, k, beta, log_a, code, *output[2:])


def _back(ctx: Any, dy: Tensor | None, dnew: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    q, k, beta, log_a, code, errors, *kept = ctx.saved_tensors
    if dy is None:
        dy = torch.zeros_like(errors)
    dnew = None if dnew is None else dnew.contiguous()
    dq, dk, dv, dbeta, dlog_a, dstart = _scan_backward(dy, dnew, q, k, beta, log_a, code, errors, *kept)
    return (dq, dk, dv, dbeta.to(beta.dtype), None if log_a is None else dlog_a.to(log_a.dtype),
            None if ctx.fresh else dstart, None)


_scan.register_autograd(_back, setup_context=_keep)
