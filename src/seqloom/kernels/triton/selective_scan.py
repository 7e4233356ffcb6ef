"""Selective scan on a GPU: h_t = a_t h_{t-1} + dt_t x_t B_t, y_t = h_t C_t + D x_t; a program per row, channels and part of T.

Exponentials decide: one per token, channel and state forward, one more backward. A thread owns a channel. It takes the
tokens by tiles of 16 in registers and the states one after another, so that a step of the recurrence is one multiplication
and addition, and nothing is exchanged between threads. States [K, N, E] are kept where tiles begin; the backward pass
makes those inside a tile anew. Sums over channels, for the gradients of B and C, are products on the tensor cores that take a
thread's registers as they are; one partial sum per block of channels, and then a sum over the blocks: no atomics.

Where rows and channels do not fill the card, T is cut: a first pass finds what each part adds and lets through.
Inside, B and C are [B, N, T'] in float32, 0 at holds, with T' whole tiles and N whole groups of 4; A is [N, E] and in units of
log2: a = 2^(dt A).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

TILE = 16    # tokens of a tile
LANES = 32   # channels of a warp: with one thread to a channel nothing is exchanged
FILL = 256   # programs that fill a card
LEAST = 256  # tokens of a part of T, at least
GROUP = 4    # states whose memory is asked for together
LN2 = 0.6931471805599453
EULER, ERASE, EXACT = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
KINDS = {"euler": 0, "erase": 1, "exact": 2}
# bfloat16 numbers whose sum is a product summed over channels: one is rounded as the gradient will be
TERMS = {torch.bfloat16: 1, torch.float16: 2, torch.float32: 3}


@triton.jit
def _join(a1, w1, h1, q1, a2, w2, h2, q2):
    """Two stretches of h -> a h + w: the product of their decays, the same but for the last token, the state at the end and
    the one before the last token. From left to right, as a thread takes them, w2 is 1 and q2 is 0."""
    return a1 * a2, a1 * w2, a2 * h1 + h2, w2 * h1 + q2


@triton.jit
def _join_back(a1, w1, u1, g1, a2, w2, u2, g2):
    """Two stretches of g = p + u, u = a g: the last decay, the product of the others, and what leaves and reaches the end."""
    g = w2 * u1 + g2
    return a2, w1 * a1 * w2, a2 * g, g


@triton.jit
def _times(x, y):
    return x * y


@triton.jit
def _states(a, w):
    """The state after each token of a tile and the one before it, where the first write holds what entered."""
    # -0.0, since x + 0.0 is not x for x = -0.0, and is computed
    none = tl.full(a.shape, -0.0, tl.float32)
    _, _, h, before = tl.associative_scan((a, tl.full(a.shape, 1.0, tl.float32), w, none), 0, _join)
    return h, before


@triton.jit
def _adjoints(a, p):
    """u_t = a_t g_t and g_t = p_t + u_{t+1}, from the end of a tile. Flipping a thread's own registers costs nothing."""
    a, p = tl.flip(a, 0), tl.flip(p, 0)
    _, _, u, g = tl.associative_scan((a, tl.full(a.shape, 1.0, tl.float32), a * p, p), 0, _join_back)
    return tl.flip(u, 0), tl.flip(g, 0)


@triton.jit
def _row(x, i, which):
    """Row `which` of a tile, all of whose rows a thread holds."""
    return tl.sum(tl.where((i == which)[:, None], x, 0.0), 0)


@triton.jit
def _four(ptr, E: tl.constexpr, mask, other):
    return (tl.load(ptr, mask=mask, other=other), tl.load(ptr + E, mask=mask, other=other),
            tl.load(ptr + 2 * E, mask=mask, other=other), tl.load(ptr + 3 * E, mask=mask, other=other))


@triton.jit
def _decay(dt, A, b, keep, KIND: tl.constexpr, SEG: tl.constexpr, LN2: tl.constexpr):
    """The decays of a tile; by how much more than dt_t x_t B_t is written with KIND == EXACT, and the derivative of that.

    phi(z) = (e^z - 1) / z at z = dt A; phi and phi' are summed as series for small z, where differences cancel.
    """
    phi, slope = dt, dt
    if KIND == ERASE:
        a = 1.0 - dt * (b * b)[:, None]
    else:
        a = tl.exp2(dt * A[None, :])
    if KIND == EXACT:
        z = dt * (A * LN2)[None, :]
        small = tl.abs(z) < 0.5
        one_over = 1.0 / tl.where(small, 1.0, z)
        phi = 1 / 5040 + z * (1 / 40320 + z * (1 / 362880))
        phi = 1.0 + z * (1 / 2 + z * (1 / 6 + z * (1 / 24 + z * (1 / 120 + z * (1 / 720 + z * phi)))))
        slope = 1 / 840 + z * (1 / 5760 + z * (1 / 45360 + z * (1 / 403200)))
        slope = 1 / 2 + z * (1 / 3 + z * (1 / 8 + z * (1 / 30 + z * (1 / 144 + z * slope))))
        phi = tl.where(small, phi, (a - 1.0) * one_over)
        slope = tl.where(small, slope, (a - phi) * one_over)
    if SEG:
        a = a * keep[:, None]
    return a, phi, slope


@triton.jit
def _load(ptr, row, k, i, e, T, E: tl.constexpr, EDGE: tl.constexpr, BT: tl.constexpr):
    """Tile k of a stream [B, T, E] as it is stored; with EDGE, 0 out of range. One base, and distances that are constants."""
    at = (ptr + (row * T + k * BT).to(tl.int64) * E + e)[None, :] + (i * E)[:, None]
    if EDGE:
        return tl.load(at, mask=(k * BT + i < T)[:, None] & (e < E)[None, :], other=0.0)
    return tl.load(at)


@triton.jit
def _store(ptr, row, k, i, e, T, x, E: tl.constexpr, EDGE: tl.constexpr, BT: tl.constexpr):
    at = (ptr + (row * T + k * BT).to(tl.int64) * E + e)[None, :] + (i * E)[:, None]
    x = x.to(ptr.dtype.element_ty)
    if EDGE:
        tl.store(at, x, mask=(k * BT + i < T)[:, None] & (e < E)[None, :])
    else:
        tl.store(at, x)


@triton.jit
def _code(code_ptr, row, k, i, TILES, SEG: tl.constexpr, BT: tl.constexpr):
    """Which tokens of tile k are read, and 0 where a run begins, else 1."""
    code = tl.full([BT], 1, tl.int16)
    if SEG:
        code = tl.load(code_ptr + row.to(tl.int64) * TILES * BT + k * BT + i)
    return (code & 1) == 1, tl.where(code > 1, 0.0, 1.0)


@triton.jit
def _wide(x, live, SEG: tl.constexpr):
    """In float32, 0 at holds."""
    x = x.to(tl.float32)
    if SEG:
        x = tl.where(live[:, None], x, 0.0)
    return x


@triton.jit(do_not_specialize=["T"])
def _prepare_kernel(b_ptr, c_ptr, code_ptr, wide_ptr, T, N, NP, TP, ROWS, b_row, b_token, b_state, c_row, c_token, c_state,
                    SEG: tl.constexpr, BT: tl.constexpr, BN: tl.constexpr):
    """B and C [B, T, N], of any strides, as [2, B, N', T'] in float32, 0 at holds and beyond T and N."""
    t = tl.program_id(0) * BT + tl.arange(0, BT)
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    row = tl.program_id(2).to(tl.int64)
    live = t < T
    if SEG:
        live = (tl.load(code_ptr + row * TP + t, mask=live, other=0) & 1) == 1
    mask = live[:, None] & (n < N)[None, :]
    far = t.to(tl.int64)[:, None]
    b = tl.load(b_ptr + row * b_row + far * b_token + n[None, :] * b_state, mask=mask, other=0.0).to(tl.float32)
    c = tl.load(c_ptr + row * c_row + far * c_token + n[None, :] * c_state, mask=mask, other=0.0).to(tl.float32)
    mask = (t < TP)[:, None] & (n < NP)[None, :]
    tl.store(wide_ptr + (row * NP + n[None, :]) * TP + t[:, None], b, mask=mask)
    tl.store(wide_ptr + ((ROWS + row) * NP + n[None, :]) * TP + t[:, None], c, mask=mask)


@triton.jit(do_not_specialize=["x_ptr", "dt_ptr", "T", "LENGTH", "PARTS", "TILES"])
def _totals_kernel(x_ptr, dt_ptr, b_ptr, c_ptr, a_ptr, code_ptr, total_ptr, product_ptr, T, N, TP, LENGTH, PARTS, TILES,
                   E: tl.constexpr, KIND: tl.constexpr, SEG: tl.constexpr, EDGE: tl.constexpr, REVERSE: tl.constexpr,
                   BT: tl.constexpr, BE: tl.constexpr, LN2: tl.constexpr):
    """What each part of T adds to a state [N, E] and the product of its decays; REVERSE: to a gradient that comes from the
    end, of dy in place of x. The part that nothing follows is left out."""
    e = tl.program_id(0) * BE + tl.arange(0, BE)
    row, part = tl.program_id(1) // (PARTS - 1), tl.program_id(1) % (PARTS - 1)
    part += REVERSE
    i, ok = tl.arange(0, BT), e < E
    low, high = part * LENGTH, min(part * LENGTH + LENGTH, TILES)
    slot = (row * PARTS + part).to(tl.int64) * N * E + e
    streams = row.to(tl.int64) * N * TP
    step, through = tl.zeros([BE], tl.float32), tl.full([BE], 1.0, tl.float32)
    for m in range(high - low):
        k = high - 1 - m if REVERSE else low + m
        live, keep = _code(code_ptr, row, k, i, TILES, SEG, BT)
        x = _wide(_load(x_ptr, row, k, i, e, T, E, EDGE, BT), live, SEG)
        dt = _wide(_load(dt_ptr, row, k, i, e, T, E, EDGE, BT), live, SEG)
        step += tl.sum(dt, 0)
        if SEG:
            through *= tl.min(tl.broadcast_to(keep[:, None], (BT, BE)), 0)
        if not REVERSE:
            x *= dt
        tl.debug_barrier()  # what the tile before left in memory is seen by whoever reads it
        for first in range(0, N, 4):
            enter = _four(total_ptr + slot + first * E, E, ok & (m > 0), 0.0)
            rates = (step, step, step, step)
            if KIND != ERASE:
                rates = _four(a_ptr + first * E + e, E, ok, 0.0)
            for s in tl.static_range(4):
                n = first + s
                b = tl.load(b_ptr + streams + n * TP + k * BT + i)
                a, phi, slope = _decay(dt, rates[s], b, keep, KIND, SEG, LN2)
                if REVERSE:
                    c = tl.load(c_ptr + streams + n * TP + k * BT + i)
                    p = x * c[:, None]
                    p = tl.where((i == BT - 1)[:, None], p + enter[s][None, :], p)
                    u, g = _adjoints(a, p)
                    h = _row(u, i, 0)
                else:
                    w = x * b[:, None]
                    if KIND == EXACT:
                        w *= phi
                    w = tl.where((i == 0)[:, None], w + a * enter[s][None, :], w)
                    after, before = _states(a, w)
                    h = _row(after, i, BT - 1)
                tl.store(total_ptr + slot + n * E, h, mask=ok)
                if KIND == ERASE:
                    product = tl.load(product_ptr + slot + n * E, mask=ok & (m > 0), other=1.0)
                    tl.store(product_ptr + slot + n * E, product * tl.reduce(a, 0, _times), mask=ok)
    if KIND != ERASE:
        for n in range(N):
            A = tl.load(a_ptr + n * E + e, mask=ok, other=0.0)
            tl.store(product_ptr + slot + n * E, tl.exp2(step * A) * through, mask=ok)


@triton.jit(do_not_specialize=["PARTS", "SLOTS", "STEP"])
def _pass_kernel(first_ptr, total_ptr, product_ptr, enter_ptr, E, N, PARTS, SLOTS, STEP, REVERSE: tl.constexpr,
                 BE: tl.constexpr):
    """The state that enters each part, through all the parts before it (after it), put where the part's first slot is."""
    e = tl.program_id(0) * BE + tl.arange(0, BE)
    row, n = tl.program_id(1) // N, tl.program_id(1) % N
    at = n.to(tl.int64) * E + e
    h = tl.load(first_ptr + row.to(tl.int64) * N * E + at, mask=e < E, other=0.0)
    for m in range(PARTS):
        part = PARTS - 1 - m if REVERSE else m
        tl.store(enter_ptr + (row * SLOTS + part * STEP).to(tl.int64) * N * E + at, h, mask=e < E)
        slot = (row * PARTS + part).to(tl.int64) * N * E
        inner = (e < E) & (m < PARTS - 1)
        through = tl.load(product_ptr + slot + at, mask=inner, other=0.0)
        h = h * through + tl.load(total_ptr + slot + at, mask=inner, other=0.0)


@triton.jit(do_not_specialize=["x_ptr", "dt_ptr", "y_ptr", "T", "LENGTH", "PARTS", "TILES", "SLOTS"])
def _forward_kernel(x_ptr, dt_ptr, b_ptr, c_ptr, a_ptr, d_ptr, code_ptr, states_ptr, y_ptr, last_ptr, T, N, TP, LENGTH,
                    PARTS, TILES, SLOTS, E: tl.constexpr, KIND: tl.constexpr, SEG: tl.constexpr, EDGE: tl.constexpr,
                    SKIP: tl.constexpr, SAVE: tl.constexpr, BT: tl.constexpr, BE: tl.constexpr, LN2: tl.constexpr):
    """y and the last state. The first slot of a part in `states` holds what enters it; with SAVE each tile leaves what enters
    the next one in the next slot, else in the part's own."""
    e = tl.program_id(0) * BE + tl.arange(0, BE)
    row, part = tl.program_id(1) // PARTS, tl.program_id(1) % PARTS
    i, ok = tl.arange(0, BT), e < E
    low, high = part * LENGTH, min(part * LENGTH + LENGTH, TILES)
    streams = row.to(tl.int64) * N * TP
    ends = row.to(tl.int64) * N * E + e
    D = tl.zeros([BE], tl.float32)
    if SKIP:
        D = tl.load(d_ptr + e, mask=ok, other=0.0)
    next_x, next_dt = _load(x_ptr, row, low, i, e, T, E, EDGE, BT), _load(dt_ptr, row, low, i, e, T, E, EDGE, BT)
    for k in range(low, high):
        live, keep = _code(code_ptr, row, k, i, TILES, SEG, BT)
        x, dt = _wide(next_x, live, SEG), _wide(next_dt, live, SEG)
        # the next tile is on its way while this one is computed
        ahead = min(k + 1, high - 1)
        next_x, next_dt = _load(x_ptr, row, ahead, i, e, T, E, EDGE, BT), _load(dt_ptr, row, ahead, i, e, T, E, EDGE, BT)
        y = x * D[None, :]
        x *= dt
        slot = (row * SLOTS + (k if SAVE else part)).to(tl.int64) * N * E + e
        after = slot + (N * E if SAVE else 0)
        tl.debug_barrier()  # what the tile before left in memory is seen by whoever reads it
        for first in range(0, N, 4):
            enter = _four(states_ptr + slot + first * E, E, ok, 0.0)
            rates = (D, D, D, D)
            if KIND != ERASE:
                rates = _four(a_ptr + first * E + e, E, ok, 0.0)
            for s in tl.static_range(4):
                n = first + s
                b = tl.load(b_ptr + streams + n * TP + k * BT + i)
                c = tl.load(c_ptr + streams + n * TP + k * BT + i)
                a, phi, slope = _decay(dt, rates[s], b, keep, KIND, SEG, LN2)
                w = x * b[:, None]
                if KIND == EXACT:
                    w *= phi
                w = tl.where((i == 0)[:, None], w + a * enter[s][None, :], w)
                h, before = _states(a, w)
                y += h * c[:, None]
                leaves = _row(h, i, BT - 1)
                tl.store(states_ptr + after + n * E, leaves, mask=ok & (k + 1 < high))
                tl.store(last_ptr + ends + n * E, leaves, mask=ok & (k + 1 == TILES))
        _store(y_ptr, row, k, i, e, T, y, E, EDGE, BT)


@triton.jit
def _pick(WHICH: tl.constexpr, S: tl.constexpr, WARPS: tl.constexpr, SUM: tl.constexpr):
    """[warps, 16, 16]: from the row of a product that _add makes to row 8 WHICH + 4 S + token modulo 4."""
    to, k = tl.arange(0, 16), tl.arange(0, 16)
    pick = tl.where(to[:, None] == (8 * WHICH + 4 * S + (k >> 3) * 2 + (k & 1))[None, :], 1.0, 0.0).to(SUM)
    return tl.broadcast_to(pick[None, :, :], (WARPS, 16, 16))


@triton.jit
def _add(sums, pick, x, BT: tl.constexpr, LANES: tl.constexpr, SUM: tl.constexpr, TERMS: tl.constexpr):
    """Add to `sums` [warps, 16, BT / 4 x LANES / 4] a tile x [BT, BE] summed over each four neighbouring channels.

    The product's inner index is (token bit 1, channel modulo 4, token bit 0), its columns are (token / 4, channel of the warp
    / 4): in this order a thread's own values are its part of the operand, and none moves. x is taken as the sum of TERMS
    numbers of 8 bits, the last one rounded.
    """
    for term in tl.static_range(TERMS):
        high = x
        if term + 1 < TERMS:
            high = (x.to(tl.int32, bitcast=True) & -65536).to(tl.float32, bitcast=True)
        y = tl.reshape(high.to(SUM), (BT // 4, 2, 2, x.shape[1] // LANES, LANES // 4, 4))
        y = tl.reshape(tl.permute(y, (3, 1, 5, 2, 0, 4)), (x.shape[1] // LANES, 16, BT // 4 * (LANES // 4)))
        sums = tl.dot(pick, y, sums, input_precision="ieee")
        x -= high
    return sums


@triton.jit(do_not_specialize=["x_ptr", "dt_ptr", "dy_ptr", "dx_ptr", "ddt_ptr", "T", "LENGTH", "PARTS", "TILES"])
def _backward_kernel(x_ptr, dt_ptr, dy_ptr, b_ptr, c_ptr, a_ptr, d_ptr, code_ptr, states_ptr, late_ptr, dx_ptr, ddt_ptr,
                     sums_ptr, da_ptr, dd_ptr, T, N, TP, LENGTH, PARTS, TILES, E: tl.constexpr, KIND: tl.constexpr,
                     SEG: tl.constexpr, EDGE: tl.constexpr, SKIP: tl.constexpr, SUM: tl.constexpr, TERMS: tl.constexpr,
                     BT: tl.constexpr, BE: tl.constexpr, LANES: tl.constexpr, LN2: tl.constexpr):
    """Gradients of a part, from its end. With g the gradient of h, g_t = C_t dy_t + u_{t+1}, and u_t = a_t g_t goes to the
    token before; z = dt A has dz_t = u_t h_{t-1}. `late` holds u as it enters the part, and is left with the one that goes on.

    `sums` [blocks, B, N, 2, T'] are the gradients of B and C over a block of channels, da and dd those over a part's tokens.
    """
    e = tl.program_id(0) * BE + tl.arange(0, BE)
    row, part = tl.program_id(1) // PARTS, tl.program_id(1) % PARTS
    i, ok = tl.arange(0, BT), e < E
    low, high = part * LENGTH, min(part * LENGTH + LENGTH, TILES)
    streams = row.to(tl.int64) * N * TP
    own = (row * PARTS + part).to(tl.int64) * N * E + e
    block = (tl.program_id(0) * (tl.num_programs(1) // PARTS) + row).to(tl.int64) * N * 2 * TP
    D, dD = tl.zeros([BE], tl.float32), tl.zeros([BE], tl.float32)
    if SKIP:
        D = tl.load(d_ptr + e, mask=ok, other=0.0)
    WARPS: tl.constexpr = BE // LANES
    for m in range(high - low):
        k = high - 1 - m
        live, keep = _code(code_ptr, row, k, i, TILES, SEG, BT)
        x = _wide(_load(x_ptr, row, k, i, e, T, E, EDGE, BT), live, SEG)
        dt = _wide(_load(dt_ptr, row, k, i, e, T, E, EDGE, BT), live, SEG)
        dy = _wide(_load(dy_ptr, row, k, i, e, T, E, EDGE, BT), live, SEG)
        if SKIP:
            dD += tl.sum(dy * x, 0)
        x *= dt
        dwritten, dstep = tl.zeros([BT, BE], tl.float32), tl.zeros([BT, BE], tl.float32)
        states = (row * TILES + k).to(tl.int64) * N * E + e
        tl.debug_barrier()  # what the tile before left in memory is seen by whoever reads it
        for first in range(0, N, 2):
            enter = (tl.load(states_ptr + states + first * E, mask=ok, other=0.0),
                     tl.load(states_ptr + states + (first + 1) * E, mask=ok, other=0.0))
            late = (tl.load(late_ptr + own + first * E, mask=ok, other=0.0),
                    tl.load(late_ptr + own + (first + 1) * E, mask=ok, other=0.0))
            rates, so_far = (D, D), (D, D)
            if KIND != ERASE:
                rates = (tl.load(a_ptr + first * E + e, mask=ok, other=0.0),
                         tl.load(a_ptr + (first + 1) * E + e, mask=ok, other=0.0))
                so_far = (tl.load(da_ptr + own + first * E, mask=ok & (m > 0), other=0.0),
                          tl.load(da_ptr + own + (first + 1) * E, mask=ok & (m > 0), other=0.0))
            sums = tl.zeros([WARPS, 16, BT // 4 * (LANES // 4)], tl.float32)
            for s in tl.static_range(2):
                n = first + s
                b = tl.load(b_ptr + streams + n * TP + k * BT + i)
                c = tl.load(c_ptr + streams + n * TP + k * BT + i)
                a, phi, slope = _decay(dt, rates[s], b, keep, KIND, SEG, LN2)
                w = x * b[:, None]
                if KIND == EXACT:
                    slope *= w
                    w *= phi
                w = tl.where((i == 0)[:, None], w + a * enter[s][None, :], w)
                h, before = _states(a, w)
                before = tl.where((i == 0)[:, None], enter[s][None, :], before)
                sums = _add(sums, _pick(1, s, WARPS, SUM), h * dy, BT, LANES, SUM, TERMS)
                p = dy * c[:, None]
                p = tl.where((i == BT - 1)[:, None], p + late[s][None, :], p)
                u, g = _adjoints(a, p)
                tl.store(late_ptr + own + n * E, _row(u, i, 0), mask=ok)
                if KIND == ERASE:
                    da = g * before
                    if SEG:
                        da *= keep[:, None]
                    dstep -= da * (b * b)[:, None]
                    product = g * x - 2.0 * b[:, None] * (dt * da)
                else:
                    dz = u * before
                    if KIND == EXACT:
                        dz += g * slope
                        g *= phi
                    dstep += dz * rates[s][None, :]
                    tl.store(da_ptr + own + n * E, so_far[s] + tl.sum(dz * dt, 0), mask=ok)
                    product = g * x
                dwritten += g * b[:, None]
                sums = _add(sums, _pick(0, s, WARPS, SUM), product, BT, LANES, SUM, TERMS)
            # rows (B or C, state, token bits 1 and 0), columns (token / 4, channel / 4)
            total = tl.sum(tl.reshape(sums, (WARPS, 2, 2, 2, 2, BT // 4, LANES // 4)), 6)
            total = tl.permute(tl.sum(total, 0), (1, 0, 4, 2, 3))
            which = tl.arange(0, 4)
            tl.store(sums_ptr + block + (first * 2 + which)[:, None].to(tl.int64) * TP + k * BT + i[None, :],
                     tl.reshape(total, (4, BT)))
        if KIND != ERASE:
            dstep *= LN2
        # x again: it need not wait in registers
        x = _wide(_load(x_ptr, row, k, i, e, T, E, EDGE, BT), live, SEG)
        dstep += dwritten * x
        if SEG:
            dstep = tl.where(live[:, None], dstep, 0.0)
        _store(ddt_ptr, row, k, i, e, T, dstep, E, EDGE, BT)
        dx = dwritten * dt
        if SKIP:
            dx += dy * D[None, :]
        _store(dx_ptr, row, k, i, e, T, dx, E, EDGE, BT)
    if SKIP:
        tl.store(dd_ptr + (row * PARTS + part).to(tl.int64) * E + e, dD, mask=ok)


class Shape(NamedTuple):
    """A launch: tokens of a tile, tiles of T, channels and warps of a program, blocks of channels, parts of T and their tiles.
    """

    tile: int
    tiles: int
    channels: int
    warps: int
    blocks: int
    parts: int
    length: int


def shape_of(batch: int, tokens: int, channels: int, *, warps: int = 4) -> Shape:
    warps = min(triton.next_power_of_2(triton.cdiv(channels, LANES)), warps)
    blocks, tiles = triton.cdiv(channels, LANES * warps), triton.cdiv(tokens, TILE)
    parts = max(min(FILL // (batch * blocks), tokens // LEAST), 1)
    length = triton.cdiv(tiles, parts)
    return Shape(TILE, tiles, LANES * warps, warps, blocks, triton.cdiv(tiles, length), length)


class Plan(NamedTuple):
    """What all kernels of one call know: the launch, and the constants that they are compiled with."""

    shape: Shape
    padded: int  # states, a whole number of groups
    const: dict[str, Any]


def _plan(x: Tensor, states: int, code: Tensor | None, kind: int, shape: Shape | None) -> Plan:
    batch, tokens, channels = x.shape
    shape = shape or shape_of(batch, tokens, channels)
    edge = tokens % shape.tile > 0 or channels % shape.channels > 0
    const = dict(E=channels, KIND=kind, SEG=code is not None, EDGE=edge, BT=shape.tile, BE=shape.channels, LN2=LN2,
                 num_warps=shape.warps, num_stages=1)
    return Plan(shape, triton.cdiv(states, GROUP) * GROUP, const)


def _enter(plan: Plan, first: Tensor, x: Tensor, dt: Tensor, wide: Tensor, A: Tensor | None, code: Tensor | None,
           into: Tensor, step: int, reverse: bool) -> None:
    """Put what enters each part of T into its slot of `into` [B, slots, N, E], `step` slots from part to part."""
    shape, (batch, states, channels) = plan.shape, first.shape
    total = first.new_empty(batch, shape.parts, states, channels) if shape.parts > 1 else first
    product = torch.empty_like(total)
    if shape.parts > 1:
        _totals_kernel[(shape.blocks, batch * (shape.parts - 1))](
            x, dt, *wide, A, code, total, product, x.shape[1], states, wide.shape[-1], shape.length, shape.parts, shape.tiles,
            REVERSE=reverse, **plan.const)
    _pass_kernel[(triton.cdiv(channels, 256), batch * states)](
        first, total, product, into, channels, states, shape.parts, into.shape[1], step, REVERSE=reverse, BE=256, num_warps=4)


def _groups(x: Tensor, states: int) -> Tensor:
    """[.., N, E] with zeros up to `states`."""
    return x if x.shape[-2] == states else F.pad(x, (0, 0, 0, states - x.shape[-2]))


def forward(x: Tensor, dt: Tensor, B: Tensor, C: Tensor, A: Tensor | None, D: Tensor | None, start: Tensor,
            code: Tensor | None, kind: int, save: bool, shape: Shape | None = None) -> tuple[Tensor, ...]:
    """y [B, T, E], the last state [B, N, E], B and C as the kernels read them, and if `save` the states [B, K, N', E].

    A [N, E] in units of log2, D [E] and start [B, N, E] are float32; code [B, T'] int16: `Segments.marks`.
    """
    batch, tokens, channels = x.shape
    states = start.shape[1]
    plan = _plan(x, states, code, kind, shape)
    shape, padded = plan.shape, plan.padded
    wide = start.new_empty(2, batch, padded, shape.tiles * shape.tile)
    block = min(triton.next_power_of_2(padded), 32)
    _prepare_kernel[(triton.cdiv(wide.shape[-1], 64), triton.cdiv(padded, block), batch)](
        B, C, code, wide, tokens, states, padded, wide.shape[-1], batch, *B.stride(), *C.stride(), SEG=code is not None, BT=64,
        BN=block, num_warps=4)
    A, first = None if A is None else _groups(A, padded), _groups(start, padded)
    y, last = torch.empty_like(x), torch.empty_like(first)
    kept = start.new_empty(batch, shape.tiles if save else shape.parts, padded, channels)
    _enter(plan, first, x, dt, wide, A, code, kept, shape.length if save else 1, False)
    _forward_kernel[(shape.blocks, batch * shape.parts)](
        x, dt, *wide, A, D, code, kept, y, last, tokens, padded, wide.shape[-1], shape.length, shape.parts, shape.tiles,
        kept.shape[1], SKIP=D is not None, SAVE=save, **plan.const)
    last = last if padded == states else last[:, :states].contiguous()
    return y, last, wide, kept if save else kept.new_empty(0)


def backward(dy: Tensor, dlast: Tensor, x: Tensor, dt: Tensor, A: Tensor | None, D: Tensor | None, code: Tensor | None,
             wide: Tensor, kept: Tensor, kind: int, terms: int, shape: Shape | None = None) -> tuple[Tensor, ...]:
    """Gradients of x, dt, B and C [B, T, N] in float32, of A and D (empty without them) and of start.

    `wide` and `kept` are what `forward` leaves. Products whose sums over channels are the gradients of B and C are sums of
    `terms` numbers of bfloat16.
    """
    batch, tokens, channels = x.shape
    states = dlast.shape[1]
    plan = _plan(x, states, code, kind, shape)
    shape, padded = plan.shape, plan.padded
    A, first = None if A is None else _groups(A, padded), _groups(dlast, padded)
    dx, ddt = torch.empty_like(x), torch.empty_like(dt)
    late = dlast.new_empty(batch, shape.parts, padded, channels)
    _enter(plan, first, dy, dt, wide, A, code, late, 1, True)
    sums = dlast.new_empty(shape.blocks, batch, padded, 2, wide.shape[-1])
    da = torch.empty_like(late) if A is not None else late.new_empty(0)
    dd = late.new_empty(batch, shape.parts, channels) if D is not None else late.new_empty(0)
    # the interpreter does not multiply bfloat16
    exact = triton.knobs.runtime.interpret
    _backward_kernel[(shape.blocks, batch * shape.parts)](
        x, dt, dy, *wide, A, D, code, kept, late, dx, ddt, sums, da, dd, tokens, padded, wide.shape[-1], shape.length,
        shape.parts, shape.tiles, SKIP=D is not None, SUM=tl.float32 if exact else tl.bfloat16, TERMS=terms, LANES=LANES,
        **plan.const)
    db, dc = (sums.sum(0) if shape.blocks > 1 else sums[0])[:, :states, :, :tokens].permute(2, 0, 3, 1)
    da = da.sum((0, 1))[:states].mul_(LN2) if A is not None else da
    dd = dd.sum((0, 1)) if D is not None else dd
    return dx, ddt, db, dc, da, dd, late[:, 0, :states].clone()


# Operators, so that torch.compile and torch.export pass through without a break -------------------------------------

@torch.library.custom_op("seqloom::selective_scan_fused", mutates_args=(), schema=(
    "(Tensor x, Tensor dt, Tensor B, Tensor C, Tensor? A, Tensor? D, Tensor start, Tensor? code, int kind, bool save)"
    " -> (Tensor, Tensor, Tensor, Tensor)"))
def _scan(x: Tensor, dt: Tensor, B: Tensor, C: Tensor, A: Tensor | None, D: Tensor | None, start: Tensor, code: Tensor | None,
          kind: int, save: bool) -> tuple[Tensor, ...]:
    return forward(x, dt, B, C, A, D, start, code, kind, save)


@torch.library.custom_op("seqloom::selective_scan_fused_backward", mutates_args=(), schema=(
    "(Tensor dy, Tensor dlast, Tensor x, Tensor dt, Tensor B, Tensor C, Tensor? A, Tensor? D, Tensor? code, Tensor wide,"
    " Tensor kept, int kind) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"))
def _scan_backward(dy: Tensor, dlast: Tensor, x: Tensor, dt: Tensor, B: Tensor, C: Tensor, A: Tensor | None, D: Tensor | None,
                   code: Tensor | None, wide: Tensor, kept: Tensor, kind: int) -> tuple[Tensor, ...]:
    terms = max(TERMS[B.dtype], TERMS[C.dtype])
    dx, ddt, db, dc, *rest = backward(dy, dlast, x, dt, A, D, code, wide, kept, kind, terms)
    # copies of their own, which an operator's results have to be
    db, dc = (g.to(s.dtype, copy=True, memory_format=torch.contiguous_format) for g, s in ((db, B), (dc, C)))
    return dx, ddt, db, dc, *rest


@_scan.register_fake
def _(x: Tensor, dt: Tensor, B: Tensor, C: Tensor, A: Tensor | None, D: Tensor | None, start: Tensor, code: Tensor | None,
      kind: int, save: bool) -> tuple[Tensor, ...]:
    batch, tokens, states = B.shape
    tiles, padded = (tokens + TILE - 1) // TILE, (states + GROUP - 1) // GROUP * GROUP
    kept = start.new_empty((batch, tiles, padded, x.shape[2]) if save else 0)
    return torch.empty_like(x), torch.empty_like(start), start.new_empty(2, batch, padded, tiles * TILE), kept


@_scan_backward.register_fake
def _(dy: Tensor, dlast: Tensor, x: Tensor, dt: Tensor, B: Tensor, C: Tensor, A: Tensor | None, D: Tensor | None,
      *rest: Any) -> tuple[Tensor, ...]:
    optional = (dlast.new_empty(0) if value is None else torch.empty_like(value) for value in (A, D))
    return *(value.new_empty(value.shape) for value in (x, dt, B, C)), *optional, torch.empty_like(dlast)


def _keep(ctx: Any, inputs: tuple, output: tuple) -> None:
    x, dt, B, C, A, D, _, code, ctx.kind, _ = inputs
    ctx.save_for_backward(x, dt, B, C, A, D, code, *output[2:])


def _back(ctx: Any, dy: Tensor, dlast: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    dx, ddt, db, dc, da, dd, dstart = _scan_backward(dy.contiguous(), dlast.contiguous(), *ctx.saved_tensors, ctx.kind)
    A, D = ctx.saved_tensors[4:6]
    return dx, ddt, db, dc, None if A is None else da, None if D is None else dd, dstart, None, None, None


_scan.register_autograd(_back, setup_context=_keep)


def launch(x: Tensor, dt: Tensor, B: Tensor, C: Tensor, A: Tensor | None, D: Tensor | None, start: Tensor,
           code: Tensor | None, kind: str) -> tuple[Tensor, Tensor]:
    """y [B, T, E] and the last state [B, N, E] in float32, with gradients where a stream or parameter asks for one.

    x and dt are contiguous; A [N, E] in units of log2, D [E] and start [B, N, E] contiguous and float32; code [B, T] int8.
    """
    given = [value for value in (x, dt, B, C, A, D, start) if value is not None]
    save = torch.is_grad_enabled() and any(value.requires_grad for value in given)
    if code is not None:
        # 16 bits: the operands of _add are laid out for the narrowest stream that they depend on
        code = F.pad(code.to(torch.int16), (0, -code.shape[1] % TILE))
    return _scan(x, dt, B, C, A, D, start, code, KINDS[kind], save)[:2]
