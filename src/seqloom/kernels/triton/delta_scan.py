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

Where heads are too few to fill a card, the chunks of a row are cut in spans. Each is walked from nothing first, for its last
state E alone, and from the identity, for the transition F [K, K] that takes the state before it to the one after; then
S_next = F S + E from span to span, and all spans are walked side by side. The same F, transposed, serves the adjoints.

Of 16-bit streams, what a product rounds is a factor's error of 2^-9, and plain PyTorch's only error is that of the result, so
two of them in a row are too many. So X - I is multiplied and not X, the rest added in float32; and where a factor is a sum
over many tokens or feeds one (S and D as the walks read them, gain R and since dV as they write them, dP and dA), it goes in
as two parts, high and low, in two products. For small keys, which the state sees again sooner, R is kept in two parts too.
Source: [deltanet] Method 4, with errors in place of its writes; the decay as in kernels/delta_scan.py.
"""

from __future__ import annotations

import contextlib
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from seqloom.kernels.triton.tiles import Tiles

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

    system: Tile    # P and X - I
    states: Tile    # R and S: the widest block of values
    outputs: Tile   # Y
    adjoints: Tile  # D and dV: the widest block of values
    grads: Tile     # all else


# (widest key, bytes of a stream's element): the first that fits is taken
CONFIGS = Tiles("delta_scan", hopper={
    (64, 2): Config(Tile(64, 0, 4, 1), Tile(0, 64, 4, 3), Tile(0, 64, 4, 1), Tile(0, 64, 4, 2), Tile(64, 32, 8, 1)),
    (128, 2): Config(Tile(64, 0, 4, 2), Tile(0, 64, 4, 3), Tile(0, 128, 4, 1), Tile(0, 64, 4, 2), Tile(128, 64, 8, 2)),
    (256, 2): Config(Tile(64, 0, 4, 2), Tile(0, 32, 4, 2), Tile(0, 64, 4, 1), Tile(0, 32, 8, 2), Tile(64, 64, 8, 2)),
    (64, 4): Config(Tile(32, 0, 4, 1), Tile(0, 32, 8, 1), Tile(0, 32, 8, 1), Tile(0, 32, 8, 1), Tile(32, 32, 8, 1)),
    (128, 4): Config(Tile(32, 0, 4, 1), Tile(0, 32, 8, 1), Tile(0, 32, 8, 1), Tile(0, 32, 8, 1), Tile(32, 32, 8, 1)),
    (256, 4): Config(Tile(32, 0, 4, 1), Tile(0, 16, 8, 1), Tile(0, 32, 8, 1), Tile(0, 16, 8, 1), Tile(32, 32, 8, 1)),
})
FILL = 128  # programs that fill a card: the walks through chunks take narrower blocks of values until there are as many
SPANS = 256  # programs of a walk over spans, and chunks of a span at least
SHORTEST = 32
SMALL = 64   # keys up to which R is kept in two parts


@triton.jit
def _dot(a, b, PRECISION: tl.constexpr):
    return tl.dot(a, b, input_precision=PRECISION)


@triton.jit
def _fine(a, b, total, PRECISION: tl.constexpr):
    """total + a b, for b in float32: as high and low parts in a's dtype where that is narrower."""
    high = b.to(a.dtype)
    total = tl.dot(a, high, total, input_precision=PRECISION)
    if a.dtype != tl.float32:
        total = tl.dot(a, (b - high.to(tl.float32)).to(a.dtype), total)
    return total


@triton.jit
def _solved(X, R, K: tl.constexpr, PRECISION: tl.constexpr):
    """R + X R. Among few keys the system's inverse is large, and with it what is lost of R: up to 16 it goes in two parts."""
    if K <= 16:
        R = _fine(X, R, R, PRECISION)
    else:
        R = tl.dot(X, R.to(X.dtype), R, input_precision=PRECISION)
    return R


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
    """P and X - I [B, N, H, C, C]; L, since and gain [B, N, H, C]."""
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
    tl.store(inverse + here * C + square, tl.where(i[:, None] == i[None, :], 0.0, X).to(inverse.dtype.element_ty))


@triton.jit(do_not_specialize=["T", "N", "spans", "span"])
def _states_kernel(k, v, code, inverse, since, gain, start, errors, lower, states, new, moves, T, N, H, spans, span, k_b, k_t,
                   k_h, v_b, v_t, v_h, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
                   C: tl.constexpr, SCALED: tl.constexpr, SEGMENTS: tl.constexpr, START: tl.constexpr, PARTED: tl.constexpr,
                   ENDS: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr):
    """R [B, T, H, V], the state that enters each chunk [B, N, H, K, V], and the last one in float32.

    Span p of `spans` of a row is chunks p `span` and following, from its own state of `start` [B, spans, H, K, V]. With ENDS
    from nothing, but the first from `start` [B, H, K, V], for `new` [B, spans, H, K, V] alone; and from the identity, in
    blocks of columns after those of V, for `moves` [B, spans, H, K, K].
    """
    blocks = tl.cdiv(V, BV)
    if ENDS:
        blocks += tl.cdiv(K, BV)
    row, p = tl.program_id(0) // blocks, tl.program_id(1)
    block = tl.program_id(0) % blocks
    h, b = row % H, (row // H).to(tl.int64)
    i, d, e = tl.arange(0, C), tl.arange(0, BK), block * BV + tl.arange(0, BV)
    k += b * k_b + h * k_h
    v += b * v_b + h * v_h
    errors += (b * T * H + h) * V
    lower += (b * T * H + h) * V
    square = i[:, None] * C + i[None, :]
    matrix, ok = d[:, None] * V + e[None, :], (d < K)[:, None] & (e < V)[None, :]
    begin, end = p * span, tl.minimum((p + 1) * span, N)
    S = tl.zeros([BK, BV], tl.float32)
    if ENDS:
        if START:
            S = tl.load(start + row.to(tl.int64) * K * V + matrix, mask=ok & (p == 0), other=0.0)
        column = e - tl.cdiv(V, BV) * BV
        moving = block * BV >= V
        S = tl.where(moving & (d[:, None] == column[None, :]), 1.0, S)
        end = tl.where(moving & (p == 0), begin, end)  # what enters the first is known
    elif START:
        S = tl.load(start + ((b * spans + p) * H + h) * K * V + matrix, mask=ok, other=0.0)
    length = tl.full([], C, tl.int64)
    for n in tl.range(begin, end, num_stages=STAGES):
        t0 = n * length
        here = (b * N + n) * H + h
        inside, real = _live(code, b, t0, T, i, SEGMENTS)
        keys = _load(k + t0 * k_t, i, k_t, d, real, K)
        values = _load(v + t0 * v_t, i, v_t, e, real, V)
        X = tl.load(inverse + here * C * C + square)
        g = tl.load(gain + here * C + i)
        if not ENDS:
            tl.store(states + here * K * V + matrix, S.to(states.dtype.element_ty), mask=ok)
        seen = _fine(keys, S, tl.zeros([C, BV], tl.float32), PRECISION)
        if SCALED:
            seen = _scaled(seen, tl.load(since + here * C + i))
        R = values.to(tl.float32) - seen
        R = _solved(X, R, K, PRECISION)
        if not ENDS:
            high = R.to(errors.dtype.element_ty)
            _store(errors + t0 * H * V, i, H * V, e, inside, V, high)
            if PARTED:
                _store(lower + t0 * H * V, i, H * V, e, inside, V, R - high.to(tl.float32))
        if SCALED:
            whole = tl.load(since + here * C + C - 1)
            S = tl.where(whole == 0.0, 0.0, S * whole)
        S = _fine(tl.trans(keys), R * g[:, None], S, PRECISION)
    if ENDS:
        here = (b * spans + p) * H + h
        tl.store(new + here * K * V + matrix, S, mask=ok)
        tl.store(moves + here * K * K + d[:, None] * K + column[None, :], S,
                 mask=(d < K)[:, None] & ((column >= 0) & (column < K))[None, :])
    else:
        tl.store(new + row.to(tl.int64) * K * V + matrix, S, mask=ok & (p == spans - 1))


@triton.jit(do_not_specialize=["T", "N", "spans", "span"])
def _join_kernel(ends, moves, start, code, enter, T, H, spans, span, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr,
                 BV: tl.constexpr, C: tl.constexpr, BACK: tl.constexpr, SEGMENTS: tl.constexpr, START: tl.constexpr,
                 PRECISION: tl.constexpr):
    """What enters each span, `enter` [B, spans, H, K, V]: the end of the one before from nothing, and F times what entered it.

    BACK: from the last to the first, by F'. `start` is what enters the first, and its end is from there and not from nothing.
    """
    blocks = tl.cdiv(V, BV)
    row = tl.program_id(0) // blocks
    h, b = row % H, (row // H).to(tl.int64)
    d, e, part = tl.arange(0, BK), (tl.program_id(0) % blocks) * BV + tl.arange(0, BV), tl.arange(0, 32)
    matrix, ok = d[:, None] * V + e[None, :], (d < K)[:, None] & (e < V)[None, :]
    S = tl.zeros([BK, BV], tl.float32)
    if START:
        S = tl.load(start + row.to(tl.int64) * K * V + matrix, mask=ok, other=0.0)
    p = 0
    if BACK:
        p = spans - 1
    tl.store(enter + ((b * spans + p) * H + h) * K * V + matrix, S, mask=ok)
    for step in range(1, spans):
        here = (b * spans + p) * H + h
        S = tl.load(ends + here * K * V + matrix, mask=ok, other=0.0)
        alive = step > 1
        if SEGMENTS:
            at = code + b * T
            before = tl.load(at + tl.minimum(p * span * C, T) - 1, mask=p > 0, other=0) >> 1  # the last ones may be empty
            alive = alive & (before == (tl.load(at + tl.minimum((p + 1) * span * C, T) - 1) >> 1))
        if alive:  # else F is 0 or known to be in the end
            for piece in range(tl.cdiv(K, 32)):
                r = piece * 32 + part
                if BACK:
                    F = tl.load(moves + here * K * K + r[None, :] * K + d[:, None],
                                mask=(d < K)[:, None] & (r < K)[None, :], other=0.0)
                else:
                    F = tl.load(moves + here * K * K + d[:, None] * K + r[None, :],
                                mask=(d < K)[:, None] & (r < K)[None, :], other=0.0)
                entered = tl.load(enter + here * K * V + r[:, None] * V + e[None, :],
                                  mask=(r < K)[:, None] & (e < V)[None, :], other=0.0)
                S = tl.dot(F, entered, S, input_precision=PRECISION)
        p = p - 1 if BACK else p + 1
        tl.store(enter + ((b * spans + p) * H + h) * K * V + matrix, S, mask=ok)
        tl.debug_barrier()  # the next step reads what other threads wrote


@triton.jit(do_not_specialize=["T", "N"])
def _outputs_kernel(q, code, scores, since, errors, lower, states, y, T, N, H, q_b, q_t, q_h, K: tl.constexpr, V: tl.constexpr,
                    BK: tl.constexpr, BV: tl.constexpr, C: tl.constexpr, SCALED: tl.constexpr, SEGMENTS: tl.constexpr,
                    PARTED: tl.constexpr, PRECISION: tl.constexpr):
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
    if PARTED:
        out += _dot(P, _load(lower + base, i, H * V, e, inside, V), PRECISION)
    _store(y + base, i, H * V, e, inside, V, out)


@triton.jit(do_not_specialize=["T", "N", "spans", "span"])
def _adjoints_kernel(q, k, dy, code, scores, inverse, since, gain, dnew, dv, after, dstart, T, N, H, spans, span, q_b, q_t, q_h,
                     k_b, k_t, k_h, y_b, y_t, y_h, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
                     C: tl.constexpr, SCALED: tl.constexpr, SEGMENTS: tl.constexpr, END: tl.constexpr,
                     ENDS: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr):
    """dV [B, T, H, V], the adjoint of the state that leaves each chunk [B, N, H, K, V], and that of the first in float32.

    Spans as in `_states_kernel`: each from its own of `dnew` [B, spans, H, K, V]; with ENDS from nothing, but the last from
    `dnew` [B, H, K, V], for `dstart` [B, spans, H, K, V] alone, of all spans but the first.
    """
    blocks = tl.cdiv(V, BV)
    row, p = tl.program_id(0) // blocks, tl.program_id(1)
    if ENDS:
        p += 1
    h, b = row % H, (row // H).to(tl.int64)
    i, d, e = tl.arange(0, C), tl.arange(0, BK), (tl.program_id(0) % blocks) * BV + tl.arange(0, BV)
    q += b * q_b + h * q_h
    k += b * k_b + h * k_h
    dy += b * y_b + h * y_h
    dv += (b * T * H + h) * V
    square = i[:, None] * C + i[None, :]
    matrix, ok = d[:, None] * V + e[None, :], (d < K)[:, None] & (e < V)[None, :]
    begin, end = p * span, tl.minimum((p + 1) * span, N)
    D = tl.zeros([BK, BV], tl.float32)
    if END:
        if ENDS:
            D = tl.load(dnew + row.to(tl.int64) * K * V + matrix, mask=ok & (p == spans - 1), other=0.0)
        else:
            D = tl.load(dnew + ((b * spans + p) * H + h) * K * V + matrix, mask=ok, other=0.0)
    length = tl.full([], C, tl.int64)
    for m in tl.range(begin, end, num_stages=STAGES):
        n = begin + end - 1 - m
        t0 = n * length
        here = (b * N + n) * H + h
        inside, real = _live(code, b, t0, T, i, SEGMENTS)
        queries = _load(q + t0 * q_t, i, q_t, d, real, K)
        keys = _load(k + t0 * k_t, i, k_t, d, real, K)
        late = _load(dy + t0 * y_t, i, y_t, e, real, V)
        P = tl.load(scores + here * C * C + square)
        X = tl.load(inverse + here * C * C + square)
        g = tl.load(gain + here * C + i)
        if not ENDS:
            tl.store(after + here * K * V + matrix, D.to(after.dtype.element_ty), mask=ok)
        dR = _dot(tl.trans(P), late, PRECISION) + _scaled(_fine(keys, D, tl.zeros([C, BV], tl.float32), PRECISION), g)
        dV = _solved(tl.trans(X), dR, K, PRECISION)
        if not ENDS:
            _store(dv + t0 * H * V, i, H * V, e, inside, V, dV)
        early = -dV
        if SCALED:
            s = tl.load(since + here * C + i)
            whole = tl.load(since + here * C + C - 1)
            D = tl.where(whole == 0.0, 0.0, D * whole)
            early = _scaled(early, s)
            late = _scaled(late.to(tl.float32), s).to(keys.dtype)
        D = tl.dot(tl.trans(queries), late, D, input_precision=PRECISION)
        D = _fine(tl.trans(keys), early, D, PRECISION)
    if ENDS:
        tl.store(dstart + ((b * spans + p) * H + h) * K * V + matrix, D, mask=ok)
    else:
        tl.store(dstart + row.to(tl.int64) * K * V + matrix, D, mask=ok & (p == 0))


@triton.jit
def _through(states, after, dY, dV, R, low, d, e, dQ, dK, out, over, K, V, DECAY: tl.constexpr, PARTED: tl.constexpr,
             PRECISION: tl.constexpr):
    """Adds what passes through a block of the entering state S and of the leaving one's adjoint D: dY S', -dV S', R D', S D."""
    at, ok = d[:, None] * V + e[None, :], (d < K)[:, None] & (e < V)[None, :]
    S, D = tl.load(states + at, mask=ok, other=0.0), tl.load(after + at, mask=ok, other=0.0)
    if DECAY:
        over += tl.sum(tl.sum(S.to(tl.float32) * D.to(tl.float32), 1), 0)
    dQ += _dot(dY, tl.trans(S), PRECISION)
    dK -= _dot(dV, tl.trans(S), PRECISION)
    out += _dot(R, tl.trans(D), PRECISION)
    if PARTED:
        out += _dot(low, tl.trans(D), PRECISION)
    return dQ, dK, out, over


@triton.jit(do_not_specialize=["T", "N"])
def _grads_kernel(q, k, beta, dy, code, total, since, errors, lower, states, dv, after, dq, dk, dbeta, dlog_a, T, N, H, q_b,
                  q_t, q_h, k_b, k_t, k_h, y_b, y_t, y_h, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr,
                  BV: tl.constexpr, C: tl.constexpr, DECAY: tl.constexpr, SEGMENTS: tl.constexpr, PARTED: tl.constexpr,
                  PRECISION: tl.constexpr, STAGES: tl.constexpr):
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
        low = R
        dp += _dot(dY, tl.trans(R), PRECISION)
        da -= _dot(dV, tl.trans(R), PRECISION)
        if PARTED:
            low = _load(lower + values, i, H * V, e, inside, V)
            dp += _dot(dY, tl.trans(low), PRECISION)
            da -= _dot(dV, tl.trans(low), PRECISION)
        if ONE:
            d = tl.arange(0, BK)
            dQ, dK, out, over = _through(states + here * K * V, after + here * K * V, dY, dV, R, low, d, e, dQ, dK, out, over,
                                         K, V, DECAY, PARTED, PRECISION)
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
    da += tl.trans(da)
    dp_high, da_high = dp.to(q.dtype.element_ty), da.to(q.dtype.element_ty)
    dp_low = (dp - dp_high.to(tl.float32)).to(q.dtype.element_ty)
    da_low = (da - da_high.to(tl.float32)).to(q.dtype.element_ty)

    for part in range(tl.cdiv(K, BK)):
        d = part * BK + tl.arange(0, BK)
        if not ONE:
            dQ, dK, out = tl.zeros([C, BK], tl.float32), tl.zeros([C, BK], tl.float32), tl.zeros([C, BK], tl.float32)
            for piece in tl.range(0, tl.cdiv(V, BV), num_stages=STAGES):
                e = piece * BV + tl.arange(0, BV)
                R, dY = _load(errors + values, i, H * V, e, inside, V), _load(dy, i, y_t, e, real, V)
                dV, low = _load(dv + values, i, H * V, e, inside, V), R
                if PARTED:
                    low = _load(lower + values, i, H * V, e, inside, V)
                dQ, dK, out, over = _through(states + here * K * V, after + here * K * V, dY, dV, R, low, d, e, dQ, dK, out,
                                             over, K, V, DECAY, PARTED, PRECISION)
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
        dQ = tl.dot(dp_high, key, dQ, input_precision=PRECISION)
        dK += out * beta_[:, None]
        dK = tl.dot(tl.trans(dp_high), Q, dK, input_precision=PRECISION)
        dK = tl.dot(da_high, key, dK, input_precision=PRECISION)
        if q.dtype.element_ty != tl.float32:
            dQ = tl.dot(dp_low, key, dQ)
            dK = tl.dot(tl.trans(dp_low), Q, dK)
            dK = tl.dot(da_low, key, dK)
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
    """The power of two that holds `size`, at least 32 (Triton 3.6 made one pass of float32's three where the inner size of
    a product is 16), at most `most`."""
    return min(max(1 << (size - 1).bit_length(), 32), most or WIDEST)


def _spans(x: Tensor, batch: int, tokens: int, heads: int, value: int) -> int:
    """In how many spans a row's chunks are cut, 0 or 4 and more. Without a branch: tokens and rows may be a tracer's."""
    walks = batch * heads * triton.cdiv(value, _pad(value, _config(x).states.values))
    return torch.sym_min(SPANS // walks, (tokens + CHUNK - 1) // CHUNK // SHORTEST) // 4 * 4


def _narrow(rows: int, value: int, most: int, spans: int) -> int:
    """The block of values of a walk through chunks: narrower, down to 16, until there are programs enough."""
    block = _pad(value, most)
    while not spans and block > 16 and rows * triton.cdiv(value, block) < FILL:
        block //= 2
    return block


def _precision(x: Tensor) -> str:
    """Of products of float32: as six of bfloat16 parts, which tensor cores take as they lie (a right factor in TF32 must be
    turned first); as three, with 16 bits, where PyTorch's setting allows for less."""
    if torch.version.hip or not x.is_cuda:
        return "ieee"
    return "bf16x6" if torch.get_float32_matmul_precision() == "highest" else "bf16x3"


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


def _parted(k: Tensor) -> bool:
    return k.element_size() == 2 and k.shape[-1] <= SMALL


def _empty(k: Tensor, v: Tensor, planes: int) -> tuple[Tensor, ...]:
    """For y, the last state, R and its low part, the states that enter chunks, P, X - I, F, and the numbers per token."""
    (batch, tokens, heads, key), value = k.shape, v.shape[-1]
    # flat: of more dimensions a tracer asks how they are laid out, and so whether there is one chunk
    blocks = batch * ((tokens + CHUNK - 1) // CHUNK) * heads
    new = v.new_empty(batch, heads, key, value, dtype=torch.float32)
    vectors = v.new_empty(planes, blocks * CHUNK, dtype=torch.float32)
    scores, inverse = (v.new_empty(blocks * CHUNK * CHUNK) for _ in range(2))
    lower = v.new_empty(v.shape if _parted(k) else 0)
    moves = v.new_empty(_spans(k, batch, tokens, heads, value) * batch * heads * key * key, dtype=torch.float32)
    return (v.new_empty(v.shape), new, v.new_empty(v.shape), lower, v.new_empty(blocks * key * value), scores, inverse, moves,
            vectors)


def _join(ends: Tensor, moves: Tensor, start: Tensor | None, code: Tensor | None, shape: tuple[int, ...], spans: int, span: int,
          precision: str, back: bool) -> Tensor:
    """What enters each span of shape [B, T, H, K, V]."""
    batch, tokens, heads, key, value = shape
    enter = torch.empty_like(ends)
    block = 32
    _join_kernel[(batch * heads * triton.cdiv(value, block),)](
        ends, moves, start, code, enter, tokens, heads, spans, span, K=key, V=value, BK=_pad(key), BV=block, C=CHUNK, BACK=back,
        SEGMENTS=code is not None, START=start is not None, PRECISION=precision, num_warps=4, num_stages=1)
    return enter


def forward(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, log_a: Tensor | None, start: Tensor | None,
            code: Tensor | None) -> tuple[Tensor, ...]:
    """y and the last state in float32; then what the backward pass reads, as `_empty` lists it."""
    q, k, v = _rows(q), _rows(k), _rows(v)
    (batch, tokens, heads, key), value = k.shape, v.shape[-1]
    chunks = triton.cdiv(tokens, CHUNK)
    y, new, errors, lower, states, scores, inverse, moves, vectors = outputs = _empty(k, v, _planes(log_a, code))
    gain, since, total = _vectors(vectors)
    decay, segments = log_a is not None, code is not None
    config, precision, wide = _config(q), _precision(q), _pad(key)
    blocks, rows = batch * chunks * heads, batch * heads
    spans = _spans(k, batch, tokens, heads, value)
    span = triton.cdiv(chunks, spans or 1)
    with _device(q):
        tile = config.system
        _system_kernel[(blocks,)](
            q, k, beta, log_a, code, scores, inverse, total, since, gain, tokens, chunks, heads, *q.stride()[:3],
            *k.stride()[:3], K=key, BK=_pad(key, tile.keys), C=CHUNK, DECAY=decay, SEGMENTS=segments, PRECISION=precision,
            num_warps=tile.warps, num_stages=tile.stages)
        tile = config.states
        block = _narrow(rows, value, tile.values, spans)
        sizes = tokens, chunks, heads, spans or 1, span, *k.stride()[:3], *v.stride()[:3]
        options = dict(K=key, V=value, BK=wide, BV=block, C=CHUNK, SCALED=decay or segments, SEGMENTS=segments,
                       PARTED=_parted(k), PRECISION=precision, STAGES=tile.stages, num_warps=tile.warps,
                       num_stages=tile.stages)
        if spans:
            ends = new.new_empty(batch, spans, heads, key, value)
            _states_kernel[(rows * (triton.cdiv(value, block) + triton.cdiv(key, block)), spans - 1)](
                k, v, code, inverse, since, gain, start, errors, lower, states, ends, moves, *sizes, START=start is not None,
                ENDS=True, **options)
            start = _join(ends, moves, start, code, (batch, tokens, heads, key, value), spans, span, precision, False)
        _states_kernel[(rows * triton.cdiv(value, block), spans or 1)](
            k, v, code, inverse, since, gain, start, errors, lower, states, new, moves, *sizes, START=start is not None,
            ENDS=False, **options)
        tile = config.outputs
        block = _pad(value, tile.values)
        _outputs_kernel[(blocks * triton.cdiv(value, block),)](
            q, code, scores, since, errors, lower, states, y, tokens, chunks, heads, *q.stride()[:3], K=key, V=value, BK=wide,
            BV=block, C=CHUNK, SCALED=decay or segments, SEGMENTS=segments, PARTED=_parted(k), PRECISION=precision,
            num_warps=tile.warps, num_stages=tile.stages)
    return outputs


def backward(dy: Tensor, dnew: Tensor | None, q: Tensor, k: Tensor, beta: Tensor, log_a: Tensor | None, code: Tensor | None,
             errors: Tensor, lower: Tensor, states: Tensor, scores: Tensor, inverse: Tensor, moves: Tensor,
             vectors: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v; in float32 those of beta, of log_a (empty if there is none), and of the first state."""
    q, k, dy = _rows(q), _rows(k), _rows(dy)
    (batch, tokens, heads, key), value = k.shape, dy.shape[-1]
    chunks = triton.cdiv(tokens, CHUNK)
    gain, since, total = _vectors(vectors)
    dq, dk, dv, dbeta, dlog_a, dstart = outputs = _grads(q, k, beta, log_a, errors)
    after = torch.empty_like(states)
    decay, segments = log_a is not None, code is not None
    config, precision, wide = _config(q), _precision(q), _pad(key)
    rows = batch * heads
    strides = *q.stride()[:3], *k.stride()[:3], *dy.stride()[:3]
    spans = len(moves) // (rows * key * key)
    span = triton.cdiv(chunks, spans or 1)
    with _device(q):
        tile = config.adjoints
        block = _narrow(rows, value, tile.values, spans)
        options = dict(K=key, V=value, BK=wide, BV=block, C=CHUNK, SCALED=decay or segments, SEGMENTS=segments,
                       PRECISION=precision, STAGES=tile.stages, num_warps=tile.warps, num_stages=tile.stages)
        streams, sizes = (q, k, dy, code, scores, inverse, since, gain), (tokens, chunks, heads, spans or 1, span, *strides)
        if spans:
            ends = dstart.new_empty(batch, spans, heads, key, value)
            _adjoints_kernel[(rows * triton.cdiv(value, block), spans - 1)](
                *streams, dnew, dv, after, ends, *sizes, END=dnew is not None, ENDS=True, **options)
            dnew = _join(ends, moves, dnew, code, (batch, tokens, heads, key, value), spans, span, precision, True)
        _adjoints_kernel[(rows * triton.cdiv(value, block), spans or 1)](
            *streams, dnew, dv, after, dstart, *sizes, END=dnew is not None, ENDS=False, **options)
        tile = config.grads
        _grads_kernel[(batch * chunks * heads,)](
            q, k, beta, dy, code, total, since, errors, lower, states, dv, after, dq, dk, dbeta, dlog_a, tokens, chunks, heads,
            *strides, K=key, V=value, BK=_pad(key, tile.keys), BV=_pad(value, tile.values), C=CHUNK, DECAY=decay,
            SEGMENTS=segments, PARTED=_parted(k), PRECISION=precision, STAGES=tile.stages, num_warps=tile.warps,
            num_stages=tile.stages)
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
    beta and log_a [B, T, H] of any, start [B, H, K, V] in float32; code: `Segments.code`."""
    key, value = k.shape[-1], v.shape[-1]
    if max(key, value) > WIDEST:
        raise ValueError(f"the fused delta scan takes keys and values of up to {WIDEST} per head, and found {key} and {value}; "
                         "use form 'chunked' or more heads")
    log_a = None if log_a is None else log_a.contiguous()
    # to multiples of 16, filled with zeros, which change no number: on an H100, keys of 8 and 24 in 16 bits came out wrong
    more_k, more_v = -key % 16, -value % 16
    if more_k or more_v:
        q, k, v = F.pad(q, (0, more_k)), F.pad(k, (0, more_k)), F.pad(v, (0, more_v))
        start = None if start is None else F.pad(start, (0, more_v, 0, more_k))
    y, new, *_ = _scan(q, k, v, beta.contiguous(), log_a, start, code)
    # whole, not a view: a state that is kept would keep the filling alive
    return y[..., :value], new[..., :key, :value].contiguous()


@torch.library.custom_op("seqloom::delta_scan_fused", mutates_args=(), schema=(
    "(Tensor q, Tensor k, Tensor v, Tensor beta, Tensor? log_a, Tensor? start, Tensor? code)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"))
def _scan(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, log_a: Tensor | None, start: Tensor | None,
          code: Tensor | None) -> tuple[Tensor, ...]:
    return forward(q, k, v, beta, log_a, start, code)


@_scan.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, log_a: Tensor | None, start: Tensor | None,
      code: Tensor | None) -> tuple[Tensor, ...]:
    return _empty(k, v, _planes(log_a, code))


@torch.library.custom_op("seqloom::delta_scan_fused_backward", mutates_args=(), schema=(
    "(Tensor dy, Tensor? dnew, Tensor q, Tensor k, Tensor beta, Tensor? log_a, Tensor? code, Tensor errors, Tensor lower,"
    " Tensor states, Tensor scores, Tensor inverse, Tensor moves, Tensor vectors)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"))
def _scan_backward(dy: Tensor, dnew: Tensor | None, q: Tensor, k: Tensor, beta: Tensor, log_a: Tensor | None,
                   code: Tensor | None, errors: Tensor, lower: Tensor, states: Tensor, scores: Tensor, inverse: Tensor,
                   moves: Tensor, vectors: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    return backward(dy, dnew, q, k, beta, log_a, code, errors, lower, states, scores, inverse, moves, vectors)


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
