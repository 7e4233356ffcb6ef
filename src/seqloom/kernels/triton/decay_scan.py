"""Matrix-state scan with decay on a GPU: S_t = diag(a_t) S_{t-1} + k_t v_t', y_t = S_t' q_t, by chunks of C tokens.

`_prepare`, all chunks side by side: the weights of each chunk's pairs, and queries and keys with the decays since the
chunk's start and until its end. `_forward`, one program per head and block of values: walks through the chunks with S in
float32 registers, writing outputs and the state that enters each chunk. Backward: `_walk`, the same from the end, then
`_apply` and the gradients, all chunks side by side. What a chunk's gradient needs is exact within the chunk: no sum runs over
the whole sequence, where it would lose what a strong decay leaves. Where rows are too few to fill a card, a walk is cut in
parts: each is walked from nothing first, for its last state alone, and then from what the parts before it add up to.

Inside a chunk, with r_i the count of boundaries and L_i the sum of log decays since the later of the chunk's start and
token i's own boundary: pairs weigh exp(L_i - L_j) where r_i = r_j, the entering state is read where r_i is the count before
the chunk, writes leave where r_j is the last.

A decay per channel does not factor out of a product of queries and keys: exp(L_i - c) and exp(c - L_j) are moved into them,
c half the lowest L, as long as no L falls below -RANGE, where they would overflow. Chunks that decay more in one of a block of
channels go through that block pair by pair, by products of decays.

Decays on the value axis are the same sums with the roles exchanged: sum_ij dy_i' M_ij v_j is sum_ij (q_i' k_j) (dy_i' W_ij v_j)
on either axis, so that with queries dy, keys v, values k and outputs' gradients q, what is y on one axis is the gradient of q
on the other, and the gradient of v that of k. The state is then kept transposed: the axis that decays first.
"""

from __future__ import annotations

import os
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from seqloom.kernels.triton.tiles import Tiles

INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")  # it multiplies bfloat16 as integers
LOWEST = tl.constexpr(-104.0)  # of a log decay: exp is 0 in float32 below, and sums of 64 of them keep 3 digits
STATE = 8192  # elements of the state that one walk carries, at most
FILL = 128    # walks that keep a card busy: with fewer rows T is cut in parts
LEAST = 8     # chunks of a part, at least
FINE = True   # factors of gradients per channel in tf32: 1.5 times plain PyTorch's error instead of 2 in bfloat16
MANY = 64     # blocks of channels that a program for steep ones looks at


class Tile(NamedTuple):
    """A launch: blocks of keys (0: all) and values, warps of a program, stages of its loop's loads."""

    keys: int
    values: int
    warps: int
    stages: int


class Config(NamedTuple):
    prepare: Tile
    forward: Tile
    walk: Tile
    apply: Tile
    gradient: Tile


# by gate: 0 and 1 for no decay or one per head (whose gradient needs all keys), 2 for one per channel, where `prepare` and
# `gradient` share blocks of keys. Measured on an H100, but for these two of gate 2, which are by registers alone
CONFIGS = Tiles("decay_scan", hopper={
    0: Config(Tile(128, 0, 4, 1), Tile(0, 64, 4, 2), Tile(0, 64, 4, 3), Tile(0, 64, 4, 1), Tile(0, 64, 8, 1)),
    1: Config(Tile(128, 0, 4, 1), Tile(0, 64, 4, 2), Tile(0, 64, 4, 3), Tile(0, 64, 4, 1), Tile(0, 64, 8, 1)),
    2: Config(Tile(32, 0, 4, 1), Tile(0, 64, 4, 3), Tile(0, 64, 4, 3), Tile(0, 64, 4, 1), Tile(32, 128, 4, 1)),
})


@triton.jit
def _cast(x, like_ptr):
    return x.to(like_ptr.dtype.element_ty)


@triton.jit
def _dot(a, b, PRECISION: tl.constexpr):
    return tl.dot(a, b, input_precision=PRECISION)


@triton.jit
def _top(x):
    """The 11 leading bits of float32, which tf32 keeps."""
    return (x.to(tl.int32, bitcast=True) & -8192).to(tl.float32, bitcast=True)


@triton.jit
def _factor(x, like_ptr, FINE: tl.constexpr):
    """x as one factor of a product, in the dtype of the streams, or FINE, rounded to tf32. Of float16 always that: exp(c) of a
    chunk's decay fits bfloat16 and float32, not float16."""
    if like_ptr.dtype.element_ty == tl.float32:
        y = x
    elif FINE or like_ptr.dtype.element_ty == tl.float16:
        y = _top(x.to(tl.float32))
    else:
        y = x.to(like_ptr.dtype.element_ty)
    return y


@triton.jit
def _total(pair, x, EXACT: tl.constexpr, PIECES: tl.constexpr):
    """Sums of x [C, K] over the pairs [C, C] of each row. A factor of ones is exact, so that pieces of x lose nothing: three of
    tf32 with EXACT, else PIECES of bfloat16, 8 bits each."""
    if EXACT or INTERPRETED:
        ones, high = pair.to(tl.float32), _top(x)
        middle = _top(x - high)
        total = tl.dot(ones, x - high - middle, input_precision="tf32")
        total = tl.dot(ones, middle, total, input_precision="tf32")
        total = tl.dot(ones, high, total, input_precision="tf32")
    else:
        ones, high = pair.to(tl.bfloat16), x.to(tl.bfloat16)
        x -= high.to(tl.float32)
        middle = x.to(tl.bfloat16)
        total = tl.dot(ones, middle)
        if PIECES == 3:
            total = tl.dot(ones, (x - middle.to(tl.float32)).to(tl.bfloat16), total)
        total = tl.dot(ones, high, total)
    return total


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
        code_ptr += b.to(tl.int64) * T
        code = tl.load(code_ptr + t, mask=inside, other=0)
        before = tl.load(code_ptr + n * C - 1, mask=n > 0, other=0) >> 1
        last = tl.load(code_ptr + tl.minimum(n * C + C, T) - 1) >> 1
        run = tl.where(inside, code >> 1, last)
        real = inside & ((code & 1) == 1)
        previous = tl.load(code_ptr + t - 1, mask=inside & (t > 0), other=0) >> 1
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
        between = _total(i[:, None] >= i[None, :], tl.where(i[:, None] > i[None, :], x[:, None], 0.0), True, 3)
    else:
        between = L[:, None] - L[None, :]
    return tl.exp(tl.where(pair, between, float("-inf")))


@triton.jit
def _gate(log_a_ptr, token, h, H, live, pair):
    """Log decays of a head [C], 0 where they reach no pair, and L [C]."""
    x = tl.load(log_a_ptr + token.to(tl.int64) * H + h, mask=live, other=0.0).to(tl.float32)
    x = tl.maximum(x, LOWEST)
    return x, tl.sum(tl.where(pair, x[None, :], 0.0), 1)


@triton.jit
def _gates(x, run, C: tl.constexpr, EXACT: tl.constexpr):
    """From log decays x [C, K] of a block of channels, 0 where they reach no pair: x in float32, L, and the sums from each
    token, not counting its own, to the chunk's end (of use in the last run only)."""
    x = tl.maximum(x.to(tl.float32), LOWEST)
    L = _total(_pairs(run, C, True), x, EXACT, 3)
    i = tl.arange(0, C)
    if EXACT:
        rest = _total(i[:, None] < i[None, :], x, True, 3)
    else:
        rest = tl.minimum(_row(L, C - 1, i)[None, :] - L, 0.0)
    return x, L, rest


@triton.jit
def _row(x, j, i):
    """Row j of x [C, K]."""
    return tl.sum(tl.where((i == j)[:, None], x, 0.0), 0)


@triton.jit
def _stretch(weight, a, j, i, run):
    """The decays [C, K] from token j to each later one of its run, from those from token j + 1: products, that lose no digits
    however strong."""
    weight = tl.where((i == j + 1)[:, None], 1.0, weight) * _row(a, j + 1, i)[None, :]
    return tl.where((run == tl.sum(tl.where(i == j, run, 0), 0))[:, None], weight, 0.0)


@triton.jit(do_not_specialize=["T", "N"])
def _prepare_kernel(q_ptr, k_ptr, log_a_ptr, code_ptr, scores_ptr, late_ptr, early_ptr, whole_ptr, steep_ptr, T, H, G,
                    K, N, GATE: tl.constexpr, SEG: tl.constexpr, DIAGONAL: tl.constexpr, READ: tl.constexpr,
                    EXACT: tl.constexpr, RANGE: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BLOCKS: tl.constexpr,
                    PRECISION: tl.constexpr):
    """Scores [B, N, H, C, C], and what decays are made into.

    With one per channel: late = q exp(L), early = k exp(L_end - L) [B, T, H, K], the decay of the whole chunk [B, N, H, K],
    and steep [B, N, H, blocks], was the block of channels computed pair by pair? Without READ there is no q, and neither late
    nor scores. With one per head: exp(L), exp(L_end - L) [B, T, H], whole [B, N, H].
    """
    n, bh = tl.program_id(0), tl.program_id(1)
    b, h = bh // H, bh % H
    i = tl.arange(0, C)
    inside, real, run, before, last, first = _place(code_ptr, b, n, T, SEG, C)
    token, g = b * T + n * C + i, h // (H // G)
    chunk = ((b * N + n) * H + h).to(tl.int64)
    reads, leaves = run == before, run == last
    scores = tl.zeros([C, C], tl.float32)
    if GATE == 2:
        pair = _pairs(run, C, False)
        own = tl.zeros([C], tl.float32)
        d = tl.arange(0, BK)
        live = real & (first == 0)
        next_k = _rows(k_ptr + g * K, token, G * K, d, real, K)
        next_x = _rows(log_a_ptr + h * K, token, H * K, d, live, K)
        if READ:
            next_q = _rows(q_ptr + g * K, token, G * K, d, real, K)
        for block in range(BLOCKS):
            k, x = next_k.to(tl.float32), next_x
            if READ:
                q = next_q.to(tl.float32)
                next_q = _rows(q_ptr + g * K, token, G * K, d + BK, real, K)  # asked for ahead; past the last block, nothing
            next_k = _rows(k_ptr + g * K, token, G * K, d + BK, real, K)
            next_x = _rows(log_a_ptr + h * K, token, H * K, d + BK, live, K)
            x, L, rest = _gates(x, run, C, EXACT)
            lowest = tl.min(L, 0)
            steep = tl.min(lowest, 0) <= -RANGE
            tl.store(steep_ptr + chunk * BLOCKS + block, steep.to(tl.int8))
            early = tl.where(leaves[:, None], k * tl.exp(rest), 0.0)
            _store_rows(early_ptr + h * K, token, H * K, d, inside, K, early)
            end = tl.where(last == before, tl.exp(_row(L, C - 1, i)), 0.0)
            tl.store(whole_ptr + chunk * K + d, end, mask=d < K)
            if READ:
                _store_rows(late_ptr + h * K, token, H * K, d, inside, K, tl.where(reads[:, None], q * tl.exp(L), 0.0))
                if DIAGONAL:
                    own += tl.sum(q * k, 1)
                if steep == 0:
                    c = 0.5 * lowest[None, :]
                    fallen, grown = _factor(q * tl.exp(L - c), q_ptr, True), _factor(k * tl.exp(c - L), k_ptr, True)
                    scores += _dot(fallen, tl.trans(grown), PRECISION)
                else:
                    a, weight = tl.exp(x), tl.zeros([C, BK], tl.float32)
                    for back in range(C):
                        j = C - 1 - back
                        weight = _stretch(weight, a, j, i, run)
                        column = tl.sum(q * _row(k, j, i)[None, :] * weight, 1)
                        scores += tl.where((i == j)[None, :], column[:, None], 0.0)
            d += BK
        scores = tl.where(pair, scores, 0.0)
        if DIAGONAL:
            scores = tl.where(i[:, None] == i[None, :], own[:, None], scores)
    else:
        for block in range(BLOCKS):
            d = block * BK + tl.arange(0, BK)
            q = _rows(q_ptr + g * K, token, G * K, d, real, K)
            k = _rows(k_ptr + g * K, token, G * K, d, real, K)
            scores += _dot(q, tl.trans(k), PRECISION)
        pair = _pairs(run, C, DIAGONAL)
        if GATE == 1:
            x, L = _gate(log_a_ptr, token, h, H, real & (first == 0), _pairs(run, C, True))
            end = tl.sum(tl.where(i == C - 1, L, 0.0), 0)
            scores *= _weights(x, L, pair, C, EXACT)
            if EXACT:  # the sums over what follows each token
                rest = tl.sum(tl.where(_pairs(run, C, False), x[:, None], 0.0), 0)
            else:
                rest = tl.minimum(end - L, 0.0)
            tl.store(late_ptr + token.to(tl.int64) * H + h, tl.where(reads, tl.exp(L), 0.0), mask=inside)
            tl.store(early_ptr + token.to(tl.int64) * H + h, tl.where(leaves, tl.exp(rest), 0.0), mask=inside)
            tl.store(whole_ptr + chunk, tl.where(last == before, tl.exp(end), 0.0))
        else:
            scores = tl.where(pair, scores, 0.0)
    if READ:
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
        since = tl.load(late_ptr + token.to(tl.int64) * H + h, mask=inside, other=0.0)
        until = tl.load(early_ptr + token.to(tl.int64) * H + h, mask=inside, other=0.0)
        whole = tl.load(whole_ptr + chunk)
    else:
        since, until = (run == before).to(tl.float32), (run == last).to(tl.float32)
        whole = tl.where(last == before, 1.0, 0.0)
    return since, until, whole


@triton.jit
def _enter(start_ptr, ends_ptr, decays_ptr, bh, part, parts, box, fits, d, K, V):
    """The state [K, V] before a part of the walk, from the start and what each part before it adds and leaves."""
    S = tl.load(start_ptr + bh.to(tl.int64) * K * V + box, mask=fits, other=0.0)
    for p in range(part):
        site = bh.to(tl.int64) * parts + p
        decay = tl.load(decays_ptr + site * K + d, mask=d < K, other=0.0)
        S = S * decay[:, None] + tl.load(ends_ptr + site * K * V + box, mask=fits, other=0.0)
    return S


@triton.jit(do_not_specialize=["T", "N", "PART"])
def _forward_kernel(q_ptr, k_ptr, v_ptr, late_ptr, early_ptr, whole_ptr, code_ptr, scores_ptr, start_ptr, ends_ptr, decays_ptr,
                    y_ptr, states_ptr, last_ptr, T, H, G, K, V, N, PART, GATE: tl.constexpr, SEG: tl.constexpr,
                    SAVE: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, PRECISION: tl.constexpr):
    """y, the last state, and with SAVE the state that enters each chunk [B, N, H, K, V]. A part is PART chunks."""
    bh, part = tl.program_id(1), tl.program_id(2)
    b, h = bh // H, bh % H
    g = h // (H // G)
    i, d, e = tl.arange(0, C), tl.arange(0, BK), tl.program_id(0) * BV + tl.arange(0, BV)
    box = d[:, None] * V + e[None, :]
    fits = (d < K)[:, None] & (e < V)[None, :]
    S = _enter(start_ptr, ends_ptr, decays_ptr, bh, part, tl.num_programs(2), box, fits, d, K, V)
    for n in range(part * PART, tl.minimum((part + 1) * PART, N)):
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
    if part == tl.num_programs(2) - 1:
        tl.store(last_ptr + bh.to(tl.int64) * K * V + box, S, mask=fits)


@triton.jit(do_not_specialize=["T", "N", "PART"])
def _walk_kernel(left_ptr, right_ptr, late_ptr, early_ptr, whole_ptr, code_ptr, start_ptr, ends_ptr, decays_ptr, states_ptr,
                 last_ptr, T, H, G, K, V, N, PART, GATE: tl.constexpr, SEG: tl.constexpr, REVERSE: tl.constexpr,
                 ENDS: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, PRECISION: tl.constexpr):
    """The state before each chunk [B, N, H, K, V] and the last, no outputs: left [B, T, G, K] is written against right
    [B, T, H, V]. With REVERSE from the end: the adjoint of the state that leaves each chunk, and of the one before the first.

    With ENDS, from nothing, only what each part but the last leaves, [B, H, parts, K, V], and its decay.
    """
    bh, part = tl.program_id(1), tl.program_id(2)
    b, h = bh // H, bh % H
    g = h // (H // G)
    i, d, e = tl.arange(0, C), tl.arange(0, BK), tl.program_id(0) * BV + tl.arange(0, BV)
    box = d[:, None] * V + e[None, :]
    fits = (d < K)[:, None] & (e < V)[None, :]
    if ENDS:
        S = tl.zeros([BK, BV], tl.float32)
    else:
        S = _enter(start_ptr, ends_ptr, decays_ptr, bh, part, tl.num_programs(2), box, fits, d, K, V)
    decay = tl.full([BK], 1.0, tl.float32)
    for step in range(part * PART, tl.minimum((part + 1) * PART, N)):
        n = step
        if REVERSE:
            n = N - 1 - step
        inside, real, run, before, last, first = _place(code_ptr, b, n, T, SEG, C)
        token = b * T + n * C + i
        chunk = ((b * N + n) * H + h).to(tl.int64)
        right = _rows(right_ptr + h * V, token, H * V, e, real, V)
        left = _rows(left_ptr + g * K, token, G * K, d, real, K)
        if not ENDS:
            tl.store(states_ptr + chunk * K * V + box, _cast(S, states_ptr), mask=fits)
        if GATE == 2:
            whole = tl.load(whole_ptr + chunk * K + d, mask=d < K, other=0.0)
            S = S * whole[:, None] + _dot(tl.trans(left), right, PRECISION)
        else:
            since, until, whole = _scales(late_ptr, early_ptr, whole_ptr, token, h, H, chunk, inside, run, before, last, GATE)
            if REVERSE:
                until = since
            S = S * whole + _dot(tl.trans(left), _cast(right.to(tl.float32) * until[:, None], right_ptr), PRECISION)
        if ENDS:
            decay *= whole
    if ENDS:
        site = bh.to(tl.int64) * (tl.num_programs(2) + 1) + part
        tl.store(ends_ptr + site * K * V + box, S, mask=fits)
        if tl.program_id(0) == 0:
            tl.store(decays_ptr + site * K + d, decay, mask=d < K)
    elif part == tl.num_programs(2) - 1:
        tl.store(last_ptr + bh.to(tl.int64) * K * V + box, S, mask=fits)


@triton.jit(do_not_specialize=["T", "N"])
def _apply_kernel(left_ptr, late_ptr, early_ptr, whole_ptr, code_ptr, scores_ptr, states_ptr, right_ptr, other_ptr, out_ptr,
                  products_ptr, T, H, G, K, V, N, GATE: tl.constexpr, SEG: tl.constexpr, TURN: tl.constexpr,
                  DIAGONAL: tl.constexpr, PRODUCTS: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
                  PRECISION: tl.constexpr):
    """left M + scores right of one chunk of one head, M its state; with TURN the scores transposed. The gradient of values from
    early, the adjoints and dy; that of queries on the value axis from late, the states and k.

    With PRODUCTS also the products of the rows of `right` and `other`, for the pairs of a run: dy_i' v_j.
    """
    n, bh = tl.program_id(0), tl.program_id(1)
    b, h = bh // H, bh % H
    i, d = tl.arange(0, C), tl.arange(0, BK)
    inside, real, run, before, last, first = _place(code_ptr, b, n, T, SEG, C)
    token = b * T + n * C + i
    chunk = ((b * N + n) * H + h).to(tl.int64)
    scores = _load_square(scores_ptr, chunk, i, C)
    if TURN:
        scores = tl.trans(scores)
    left = _rows(left_ptr + h // (H // G) * K, token, G * K, d, real, K)
    if GATE < 2:
        since, until, whole = _scales(late_ptr, early_ptr, whole_ptr, token, h, H, chunk, inside, run, before, last, GATE)
    products = tl.zeros([C, C], tl.float32)
    for block in range(0, V, BV):
        e = block + tl.arange(0, BV)
        right = _rows(right_ptr + h * V, token, H * V, e, real, V)
        M = tl.load(states_ptr + chunk * K * V + d[:, None] * V + e[None, :],
                    mask=(d < K)[:, None] & (e < V)[None, :], other=0.0)
        out = _dot(left, M, PRECISION)
        if GATE < 2:
            out *= until[:, None]
        out += _dot(scores, right, PRECISION)
        _store_rows(out_ptr + h * V, token, H * V, e, inside, V, tl.where(real[:, None], out, 0.0))
        if PRODUCTS:
            other = _rows(other_ptr + h * V, token, H * V, e, real, V)
            products += _dot(right, tl.trans(other), PRECISION)
    if PRODUCTS:
        _store_square(products_ptr, chunk, i, C, tl.where(_pairs(run, C, DIAGONAL), products, 0.0))


@triton.jit
def _channels(q_ptr, k_ptr, v_ptr, log_a_ptr, code_ptr, products_ptr, states_ptr, adjoints_ptr, whole_ptr, steep_ptr, dy_ptr,
              dq_ptr, dk_ptr, dlog_a_ptr, T, H, K, V, N, b, n, h, block, blocks, SEG: tl.constexpr, ALL: tl.constexpr,
              QUERY: tl.constexpr, EXACT: tl.constexpr, FINE: tl.constexpr, STEEP: tl.constexpr, C: tl.constexpr,
              BK: tl.constexpr, BV: tl.constexpr, PRECISION: tl.constexpr):
    """Gradients of one chunk and one block of its keys, with a decay per key channel: of q [B, T, H, K] with QUERY, of k and
    log_a with ALL. What dy_i' v_j are is given, as `products`. With STEEP pair by pair; without, such blocks stay unwritten."""
    chunk = ((b * N + n) * H + h).to(tl.int64)
    i, d = tl.arange(0, C), block * BK + tl.arange(0, BK)
    inside, real, run, before, last, first = _place(code_ptr, b, n, T, SEG, C)
    token = b * T + n * C + i
    # all that is read once is asked for ahead of the loop
    x = _rows(log_a_ptr + h * K, token, H * K, d, real & (first == 0), K)
    k = _rows(k_ptr + h * K, token, H * K, d, real, K)
    if ALL:
        q = _rows(q_ptr + h * K, token, H * K, d, real, K)
        whole = tl.load(whole_ptr + chunk * K + d, mask=d < K, other=0.0)
    own = tl.load(products_ptr + (chunk * C + i) * C + i)
    cross = _load_square(products_ptr, chunk, i, C)
    if not STEEP:
        inside &= tl.load(steep_ptr + chunk * blocks + block) == 0
    dq, dk = tl.zeros([C, BK], tl.float32), tl.zeros([C, BK], tl.float32)
    over = tl.zeros([BK], tl.float32)
    for column in range(0, V, BV):
        e = column + tl.arange(0, BV)
        dy = _rows(dy_ptr + h * V, token, H * V, e, real, V)
        box = d[:, None] * V + e[None, :]
        fits = (d < K)[:, None] & (e < V)[None, :]
        S = tl.load(states_ptr + chunk * K * V + box, mask=fits, other=0.0)
        dq += _dot(dy, tl.trans(S), PRECISION)
        if ALL:
            v = _rows(v_ptr + h * V, token, H * V, e, real, V)
            dS = tl.load(adjoints_ptr + chunk * K * V + box, mask=fits, other=0.0)
            dk += _dot(v, tl.trans(dS), PRECISION)
            over += tl.sum(S.to(tl.float32) * dS.to(tl.float32), 1)
    x, L, rest = _gates(x, run, C, EXACT)
    own, k = own.to(tl.float32)[:, None], k.to(tl.float32)
    cross = tl.where(i[:, None] == i[None, :], 0.0, cross)
    dq *= tl.where((run == before)[:, None], tl.exp(L), 0.0)
    if ALL:
        q = q.to(tl.float32)
        flow = q * dq  # what passes each token's decay: reads, and pairs that end here less pairs that begin here
        dk *= tl.where((run == last)[:, None], tl.exp(rest), 0.0)
    if STEEP:
        a, weight, pairs = tl.exp(x), tl.zeros([C, BK], tl.float32), tl.zeros([C, BK], tl.float32)
        for back in range(C):
            j = C - 1 - back
            weight = _stretch(weight, a, j, i, run)
            key = _row(k, j, i)[None, :]
            reads = tl.sum(tl.where((i == j)[None, :], cross.to(tl.float32), 0.0), 1)[:, None] * weight
            dq += reads * key
            if ALL:
                flow += reads * key * q
                row = tl.sum(reads * q, 0)[None, :]
                pairs += tl.where((i == j)[:, None], row, 0.0)
                flow -= tl.where((i == j)[:, None], row * key, 0.0)
    else:
        # both sides of a pair from the same rounded factors, so that pairs which no decay parts cancel exactly
        c = 0.5 * tl.min(L, 0)[None, :]
        low, since, until = _factor(cross, k_ptr, FINE), tl.exp(L - c), tl.exp(c - L)
        grown = _factor(k * until, k_ptr, FINE)
        inner = _dot(low, grown, PRECISION)
        dq += inner * since
        if ALL:
            fallen = _factor(q * since, k_ptr, FINE)
            flow += fallen.to(tl.float32) * inner
    if QUERY:
        _store_rows(dq_ptr + h * K, token, H * K, d, inside, K, tl.where(real[:, None], dq + own * k, 0.0))
    if ALL:
        writes = k * dk  # pass the decays of tokens after them
        if not STEEP:
            inner = _dot(tl.trans(low), fallen, PRECISION)
            pairs = inner * until
            flow -= grown.to(tl.float32) * inner
        dk += pairs + own * q
        _store_rows(dk_ptr + h * K, token, H * K, d, inside, K, tl.where(real[:, None], dk, 0.0))
        # over tokens at or after this one, of its run; of writes, which are of the last run, those before it
        if EXACT:
            dlog_a = _total(i[:, None] > i[None, :], writes, True, 3)
        else:
            flow -= writes
            dlog_a = tl.sum(writes, 0)[None, :]
        dlog_a = tl.where((run == last)[:, None], dlog_a, 0.0) + (whole * over)[None, :]
        dlog_a += _total((run[:, None] == run[None, :]) & (i[:, None] <= i[None, :]), flow, EXACT, 2)
        dlog_a = tl.where((real & (first == 0))[:, None], dlog_a, 0.0)
        _store_rows(dlog_a_ptr + h * K, token, H * K, d, inside, K, dlog_a)


@triton.jit(do_not_specialize=["T", "N"])
def _channels_kernel(q_ptr, k_ptr, v_ptr, log_a_ptr, code_ptr, products_ptr, states_ptr, adjoints_ptr, whole_ptr, steep_ptr,
                     dy_ptr, dq_ptr, dk_ptr, dlog_a_ptr, T, H, K, V, N, SEG: tl.constexpr, ALL: tl.constexpr,
                     QUERY: tl.constexpr, EXACT: tl.constexpr, FINE: tl.constexpr, C: tl.constexpr, BK: tl.constexpr,
                     BV: tl.constexpr, PRECISION: tl.constexpr):
    """`_channels` where no block of channels decays too much."""
    bh = tl.program_id(1)
    _channels(q_ptr, k_ptr, v_ptr, log_a_ptr, code_ptr, products_ptr, states_ptr, adjoints_ptr, whole_ptr, steep_ptr, dy_ptr,
              dq_ptr, dk_ptr, dlog_a_ptr, T, H, K, V, N, bh // H, tl.program_id(0), bh % H, tl.program_id(2),
              tl.num_programs(2), SEG, ALL, QUERY, EXACT, FINE, False, C, BK, BV, PRECISION)


@triton.jit(do_not_specialize=["T", "N", "sites"])
def _steep_kernel(q_ptr, k_ptr, v_ptr, log_a_ptr, code_ptr, products_ptr, states_ptr, adjoints_ptr, whole_ptr, steep_ptr,
                  dy_ptr, dq_ptr, dk_ptr, dlog_a_ptr, T, H, K, V, N, sites, blocks, MANY: tl.constexpr, SEG: tl.constexpr,
                  ALL: tl.constexpr, QUERY: tl.constexpr, EXACT: tl.constexpr, FINE: tl.constexpr, C: tl.constexpr,
                  BK: tl.constexpr, BV: tl.constexpr, PRECISION: tl.constexpr):
    """`_channels` where they do: a program looks at MANY blocks, of which there are mostly none."""
    begin = tl.program_id(0) * MANY
    many = begin + tl.arange(0, MANY)
    if tl.sum(tl.load(steep_ptr + many, mask=many < sites, other=0).to(tl.int32), 0) == 0:
        return
    for site in range(begin, tl.minimum(begin + MANY, sites)):
        if tl.load(steep_ptr + site) != 0:
            chunk = site // blocks
            _channels(q_ptr, k_ptr, v_ptr, log_a_ptr, code_ptr, products_ptr, states_ptr, adjoints_ptr, whole_ptr, steep_ptr,
                      dy_ptr, dq_ptr, dk_ptr, dlog_a_ptr, T, H, K, V, N, chunk // H // N, chunk // H % N, chunk % H,
                      site % blocks, blocks, SEG, ALL, QUERY, EXACT, FINE, True, C, BK, BV, PRECISION)


@triton.jit(do_not_specialize=["T", "N"])
def _heads_kernel(q_ptr, k_ptr, v_ptr, log_a_ptr, late_ptr, early_ptr, whole_ptr, code_ptr, scores_ptr, states_ptr,
                  adjoints_ptr, dy_ptr, dq_ptr, dk_ptr, dlog_a_ptr, T, H, G, K, V, N, GATE: tl.constexpr, SEG: tl.constexpr,
                  DIAGONAL: tl.constexpr, EXACT: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
                  PRECISION: tl.constexpr):
    """Gradients of one chunk of one head, with one decay or none; dq and dk [B, T, H, K] are summed over the heads of a group
    outside."""
    n, bh = tl.program_id(0), tl.program_id(1)
    b, h = bh // H, bh % H
    chunk = ((b * N + n) * H + h).to(tl.int64)
    g = h // (H // G)
    i, d = tl.arange(0, C), tl.arange(0, BK)
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
        tl.store(dlog_a_ptr + token.to(tl.int64) * H + h, _cast(dlog_a, dlog_a_ptr), mask=inside)
        dscores *= _weights(x, L, pair, C, EXACT)
    else:
        dscores = tl.where(pair, dscores, 0.0)
    small = _cast(dscores, q_ptr)
    dq += _dot(small, k, PRECISION)
    dk += _dot(tl.trans(small), q, PRECISION)
    _store_rows(dq_ptr + h * K, token, H * K, d, inside, K, tl.where(real[:, None], dq, 0.0))
    _store_rows(dk_ptr + h * K, token, H * K, d, inside, K, tl.where(real[:, None], dk, 0.0))


def widest(dtype: torch.dtype) -> int:
    """Channels of the axis that a walk holds whole, at most: more are given as more heads."""
    return 128 if dtype == torch.float32 else 256


def _keys(key: int) -> int:
    return max(triton.next_power_of_2(key), 32)  # below 32 the three passes of tf32x3 come out as one (Triton 3.6)


def _parts(chunks: int, walks: int) -> int:
    """Chunks of a part. Walking all of T twice is worth it where three walks or more come out of one."""
    parts = min(FILL // walks, chunks // LEAST)
    return triton.cdiv(chunks, parts) if parts > 2 else chunks


class Shape(NamedTuple):
    """Of streams as the kernels see them, the axis that decays first: q, k [B, T, G, K], v [B, T, H, V]."""

    batch: int
    tokens: int
    heads: int
    groups: int
    key: int
    value: int
    gate: int
    dtype: torch.dtype
    chunk: int  # tokens

    @property
    def chunks(self) -> int:
        return -(-self.tokens // self.chunk)

    @property
    def rows(self) -> int:
        return self.batch * self.heads

    @property
    def sites(self) -> list[int]:
        return [self.batch, self.chunks, self.heads]

    @property
    def sizes(self) -> tuple[int, ...]:
        return self.tokens, self.heads, self.groups, self.key, self.value, self.chunks

    @property
    def blocks(self) -> tuple[int, int]:
        """Channels of a block of `prepare`, and of the gradient where decays are per channel, and how many blocks there are."""
        size = min(_keys(self.key), CONFIGS[self.gate].prepare.keys)
        return size, -(-self.key // size)

    @property
    def exact(self) -> bool:
        return self.dtype == torch.float32

    def values(self, tile: Tile, bk: int) -> int:
        """Values of a block, beside bk keys."""
        return min(_keys(self.value), 32 if self.exact else tile.values if bk <= 128 else tile.values // 2)

    def options(self, code: Tensor | None, tile: Tile, bk: int) -> dict[str, Any]:
        """Of every kernel, with warps and stages. In float32 eight warps, for tiles twice as large, and no loads ahead: Triton
        3.6 reads out of bounds where tf32x3 meets a pipelined load. Keys of 256 channels leave shared memory for two stages."""
        stages = 1 if self.exact else min(tile.stages, 2) if bk > 128 else tile.stages
        return dict(SEG=code is not None, C=self.chunk, PRECISION="tf32x3" if self.exact else "tf32", num_stages=stages,
                    num_warps=8 if self.exact else tile.warps)


def _shape(q: Tensor, v: Tensor, log_a: Tensor | None, by_value: bool) -> Shape:
    batch, tokens, groups, key = q.shape
    heads, value = v.shape[2:]
    if by_value:
        key, value = value, key
    gate = 0 if log_a is None else log_a.ndim - 2
    chunk = 32 if q.dtype == torch.float32 and gate == 2 else 64  # what registers and shared memory hold
    return Shape(batch, tokens, heads, groups, key, value, gate, q.dtype, chunk)


class Prepared(NamedTuple):
    """What `prepare` leaves to the walks; empty tensors where a gate has no use for them."""

    scores: Tensor
    late: Tensor
    early: Tensor
    whole: Tensor
    steep: Tensor


def _prepared(like: Tensor, shape: Shape, read: bool = True) -> Prepared:
    """Room for it; without `read`, neither for scores nor for late."""
    each = [[0], [shape.batch, shape.tokens, shape.heads], [shape.batch, shape.tokens, shape.heads, shape.key]][shape.gate]
    vector, dtype = shape.gate == 2, like.dtype if shape.gate == 2 else torch.float32
    return Prepared(
        like.new_empty([*shape.sites, shape.chunk, shape.chunk] if read else 0),
        like.new_empty(each if read else 0, dtype=dtype),
        like.new_empty(each, dtype=dtype),
        like.new_empty([[0], shape.sites, [*shape.sites, shape.key]][shape.gate], dtype=torch.float32),
        like.new_empty([*shape.sites, shape.blocks[1]] if vector else 0, dtype=torch.int8))


def _prepare(q: Tensor | None, k: Tensor, log_a: Tensor | None, code: Tensor | None, shape: Shape, diagonal: bool) -> Prepared:
    ready, (size, blocks) = _prepared(k, shape, q is not None), shape.blocks
    _prepare_kernel[(shape.chunks, shape.rows)](
        k if q is None else q, k, log_a, code, *ready, shape.tokens, shape.heads, shape.groups, shape.key, shape.chunks,
        DIAGONAL=diagonal, READ=q is not None, EXACT=shape.exact, RANGE=32.0 if shape.exact else 160.0, BK=size, BLOCKS=blocks,
        GATE=shape.gate, **shape.options(code, CONFIGS[shape.gate].prepare, size))
    return ready


class Walk(NamedTuple):
    """How a walk is cut: values of a block, blocks, parts of T, chunks of a part."""

    block: int
    blocks: int
    parts: int
    part: int


def _cut(shape: Shape, tile: Tile) -> Walk:
    block = min(shape.values(tile, _keys(shape.key)), max(STATE // _keys(shape.key), 32))
    while True:
        blocks = triton.cdiv(shape.value, block)
        part = _parts(shape.chunks, shape.rows * blocks)
        parts = triton.cdiv(shape.chunks, part)
        if block == 32 or shape.rows * blocks * parts >= FILL // 2:
            return Walk(block, blocks, parts, part)
        block //= 2


def _ends(left: Tensor, right: Tensor, ready: Prepared, code: Tensor | None, start: Tensor, shape: Shape, cut: Walk,
          reverse: bool) -> tuple[Tensor, Tensor]:
    """What each part of T but the last leaves [B H, parts, K, V], and its decay [B H, parts, K]."""
    tile, bk = CONFIGS[shape.gate].walk, _keys(shape.key)
    site = [shape.rows, cut.parts] if cut.parts > 1 else [0]
    ends, decays = start.new_empty(*site, shape.key, shape.value), start.new_empty(*site, shape.key)
    if cut.parts > 1:
        _walk_kernel[(cut.blocks, shape.rows, cut.parts - 1)](
            left, right, ready.late, ready.early, ready.whole, code, start, ends, decays, right, start, *shape.sizes,
            cut.part, REVERSE=reverse, ENDS=True, BK=bk, BV=cut.block, GATE=shape.gate, **shape.options(code, tile, bk))
    return ends, decays


def _states(left: Tensor, right: Tensor, ready: Prepared, code: Tensor | None, start: Tensor, shape: Shape,
            reverse: bool) -> tuple[Tensor, Tensor]:
    """The states before each chunk [B, N, H, K, V] and the last; with `reverse` from the end."""
    tile, bk = CONFIGS[shape.gate].walk, _keys(shape.key)
    cut = _cut(shape, tile)
    ends = _ends(left, right, ready, code, start, shape, cut, reverse)
    states, last = right.new_empty(*shape.sites, shape.key, shape.value), torch.empty_like(start)
    _walk_kernel[(cut.blocks, shape.rows, cut.parts)](
        left, right, ready.late, ready.early, ready.whole, code, start, *ends, states, last, *shape.sizes, cut.part,
        REVERSE=reverse, ENDS=False, BK=bk, BV=cut.block, GATE=shape.gate, **shape.options(code, tile, bk))
    return states, last


def _apply(left: Tensor, scores: Tensor, states: Tensor, right: Tensor, other: Tensor | None, ready: Prepared,
           code: Tensor | None, shape: Shape, turn: bool, diagonal: bool) -> tuple[Tensor, Tensor]:
    """left M + scores right, or with the scores transposed, and the products of right and other if given."""
    bk, tile = _keys(shape.key), CONFIGS[shape.gate].apply
    out, products = torch.empty_like(right), scores.new_empty(scores.shape if other is not None else 0)
    _apply_kernel[(shape.chunks, shape.rows)](
        left, ready.late, ready.early, ready.whole, code, scores, states, right, other, out, products, *shape.sizes, TURN=turn,
        DIAGONAL=diagonal, PRODUCTS=other is not None, BK=bk, BV=shape.values(tile, bk), GATE=shape.gate,
        **shape.options(code, tile, bk))
    return out, products


def _gradients(q: Tensor | None, k: Tensor, v: Tensor | None, log_a: Tensor, dy: Tensor, products: Tensor, states: Tensor,
               adjoints: Tensor | None, ready: Prepared, code: Tensor | None, shape: Shape,
               dq: Tensor | None) -> tuple[Tensor, Tensor]:
    """Gradients of k and log_a with decays per channel, or none where no adjoints are given; that of q goes to dq if there is
    one."""
    every, (size, blocks), tile = adjoints is not None, shape.blocks, CONFIGS[shape.gate].gradient
    dk, dlog_a = (torch.empty_like(x) if every else x.new_empty(0) for x in (k, log_a))
    streams = (q, k, v, log_a, code, products, states, adjoints, ready.whole, ready.steep, dy, dq, dk, dlog_a, shape.tokens,
               shape.heads, shape.key, shape.value, shape.chunks)
    options = dict(ALL=every, QUERY=dq is not None, EXACT=shape.exact, FINE=FINE, BK=size,
                   BV=shape.values(tile, size), **shape.options(code, tile, size))
    _channels_kernel[(shape.chunks, shape.rows, blocks)](*streams, **options)
    sites = shape.chunks * shape.rows * blocks
    _steep_kernel[(triton.cdiv(sites, MANY),)](*streams, sites, blocks, MANY=MANY, **options)
    return dk, dlog_a


def forward(q: Tensor, k: Tensor, v: Tensor, log_a: Tensor | None, start: Tensor, code: Tensor | None, diagonal: bool,
            save: bool, by_value: bool) -> tuple[Tensor, Tensor, Tensor, Prepared]:
    """y [B, T, H, V], the last state [B, H, K, V] in float32, the states [B, N, H, K, V] if `save`; on the value axis with K
    and V exchanged, as in `start`."""
    shape, y = _shape(q, v, log_a, by_value), torch.empty_like(v)
    if by_value and log_a is not None:
        plain = shape._replace(key=shape.value, value=shape.key, gate=0)  # products of queries and keys bear no decays
        scores = _prepare(q, k, None, code, plain, diagonal).scores
        ready = _prepare(None, v, log_a, code, shape, diagonal)
        states, last = _states(ready.early, k, ready, code, start, shape, False)
        _gradients(None, v, None, log_a, q, scores, states, None, ready, code, shape, y)
        kept = Prepared(scores, *(x.new_empty(0) for x in ready[1:]))
        return y, last, states if save else states.new_empty(0), kept
    ready, tile = _prepare(q, k, log_a, code, shape, diagonal), CONFIGS[shape.gate].forward
    cut, bk = _cut(shape, tile), _keys(shape.key)
    left = ready.early if shape.gate == 2 else k
    ends = _ends(left, v, ready, code, start, shape, cut, False)
    last = torch.empty_like(start)
    states = v.new_empty([*shape.sites, shape.key, shape.value] if save else 0)
    _forward_kernel[(cut.blocks, shape.rows, cut.parts)](
        q, k, v, ready.late, ready.early, ready.whole, code, ready.scores, start, *ends, y, states, last, *shape.sizes,
        cut.part, SAVE=save, BK=bk, BV=cut.block, GATE=shape.gate, **shape.options(code, tile, bk))
    return y, last, states, ready


def backward(dy: Tensor, dlast: Tensor, q: Tensor, k: Tensor, v: Tensor, log_a: Tensor | None, code: Tensor | None,
             states: Tensor, ready: Prepared, diagonal: bool,
             by_value: bool) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, log_a (empty where there are no decays) and start."""
    shape = _shape(q, v, log_a, by_value)
    if by_value and log_a is not None:
        products, ready = ready.scores, _prepare(dy, v, log_a, code, shape, diagonal)
        adjoints, dstart = _states(ready.late, q, ready, code, dlast, shape, True)
        dq, _ = _apply(ready.late, ready.scores, states, k, None, ready, code, shape, False, diagonal)
        dk, _ = _apply(ready.early, ready.scores, adjoints, q, None, ready, code, shape, True, diagonal)
        dv, dlog_a = _gradients(dy, v, k, log_a, q, products, states, adjoints, ready, code, shape, None)
        return dq, dk, dv, dlog_a, dstart
    vector = shape.gate == 2
    adjoints, dstart = _states(ready.late if vector else q, dy, ready, code, dlast, shape, True)
    left, other = (ready.early, v) if vector else (k, None)
    dv, products = _apply(left, ready.scores, adjoints, dy, other, ready, code, shape, True, diagonal)
    if vector and log_a is not None:
        dq = torch.empty_like(q)
        dk, dlog_a = _gradients(q, k, v, log_a, dy, products, states, adjoints, ready, code, shape, dq)
        return dq, dk, dv, dlog_a, dstart
    dq, dk = (q.new_empty(shape.batch, shape.tokens, shape.heads, shape.key) for _ in range(2))
    dlog_a = q.new_empty(0) if log_a is None else torch.empty_like(log_a)
    bk, tile = _keys(shape.key), CONFIGS[shape.gate].gradient
    _heads_kernel[(shape.chunks, shape.rows)](
        q, k, v, log_a, ready.late, ready.early, ready.whole, code, ready.scores, states, adjoints, dy, dq, dk, dlog_a,
        *shape.sizes, DIAGONAL=diagonal, EXACT=shape.exact, BK=bk, BV=shape.values(tile, bk), GATE=shape.gate,
        **shape.options(code, tile, bk))
    if shape.groups < shape.heads:
        dq, dk = (x.unflatten(2, (shape.groups, -1)).sum(3) for x in (dq, dk))
    return dq, dk, dv, dlog_a, dstart


# Operators, so that torch.compile and torch.export pass through without a break -------------------------------------

@torch.library.custom_op("seqloom::decay_scan_fused", mutates_args=(), schema=(
    "(Tensor q, Tensor k, Tensor v, Tensor? log_a, Tensor start, Tensor? code, bool diagonal, bool save, bool by_value)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"))
def _scan(q: Tensor, k: Tensor, v: Tensor, log_a: Tensor | None, start: Tensor, code: Tensor | None, diagonal: bool,
          save: bool, by_value: bool) -> tuple[Tensor, ...]:
    y, last, states, ready = forward(q, k, v, log_a, start, code, diagonal, save, by_value)
    return y, last, states, *ready


@torch.library.custom_op("seqloom::decay_scan_fused_backward", mutates_args=(), schema=(
    "(Tensor dy, Tensor dlast, Tensor q, Tensor k, Tensor v, Tensor? log_a, Tensor? code, Tensor states, Tensor scores,"
    " Tensor late, Tensor early, Tensor whole, Tensor steep, bool diagonal, bool by_value)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)"))
def _scan_backward(dy: Tensor, dlast: Tensor, q: Tensor, k: Tensor, v: Tensor, log_a: Tensor | None, code: Tensor | None,
                   states: Tensor, scores: Tensor, late: Tensor, early: Tensor, whole: Tensor, steep: Tensor,
                   diagonal: bool, by_value: bool) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    ready = Prepared(scores, late, early, whole, steep)
    return backward(dy, dlast, q, k, v, log_a, code, states, ready, diagonal, by_value)


@_scan.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, log_a: Tensor | None, start: Tensor, code: Tensor | None, diagonal: bool,
      save: bool, by_value: bool) -> tuple[Tensor, ...]:
    shape, y = _shape(q, v, log_a, by_value), torch.empty_like(v)
    states = v.new_empty([*shape.sites, shape.key, shape.value] if save else 0)
    ready = _prepared(q, shape)
    if by_value:
        ready = Prepared(ready.scores, *(x.new_empty(0) for x in ready[1:]))
    return y, torch.empty_like(start), states, *ready


@_scan_backward.register_fake
def _(dy: Tensor, dlast: Tensor, q: Tensor, k: Tensor, v: Tensor, log_a: Tensor | None, *rest: Any) -> tuple[Tensor, ...]:
    decay = q.new_empty(0) if log_a is None else torch.empty_like(log_a)
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v), decay, torch.empty_like(dlast)


def _keep(ctx: Any, inputs: tuple, output: tuple) -> None:
    q, k, v, log_a, _, code, ctx.diagonal, _, ctx.by_value = inputs
    ctx.save_for_backward(q, k, v, log_a, code, *output[2:])


def _back(ctx: Any, dy: Tensor, dlast: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors
    dq, dk, dv, dlog_a, dstart = _scan_backward(
        dy.to(saved[0].dtype).contiguous(), dlast.contiguous(), *saved, ctx.diagonal, ctx.by_value)
    return dq, dk, dv, None if saved[3] is None else dlog_a, dstart, None, None, None, None


_scan.register_autograd(_back, setup_context=_keep)


def launch(q: Tensor, k: Tensor, v: Tensor, log_a: Tensor | None, start: Tensor, code: Tensor | None, *,
           diagonal: bool = True, by_value: bool = False) -> tuple[Tensor, Tensor]:
    """y and the last state, with gradients where a stream asks for one.

    The axis of the state that a walk holds whole, that of keys, or of values where these decay (`by_value`), has `widest`
    channels at most; queries and keys have H heads where decays are per channel; `start` and the last state are
    [B, H, K, V], or [B, H, V, K] with `by_value`.
    """
    streams = [x for x in (q, k, v, log_a, start) if x is not None]
    save = torch.is_grad_enabled() and any(x.requires_grad for x in streams)
    return _scan(q, k, v, log_a, start, code, diagonal, save, by_value)[:2]
