"""Diagonal scan on a GPU: h_t = a_t h_{t-1} + b_t over rows [B, T, D], one program per row, block of channels and part of T.

Bytes decide: a, b are read and h written once where rows and channels fill the card, else twice: a first pass finds what
each part of T adds and lets through, and the second starts each part from what entered it.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

FILL = 512    # programs that fill a card
ENOUGH = 256  # that come near it
LEAST = 512   # tokens of a part of T, at least


@triton.jit
def _join(a1, b1, a2, b2):
    return a1 * a2, a2 * b1 + b2


@triton.jit
def _load(a_ptr, b_ptr, code_ptr, row, t_a, t_b, d, ok_a, ok_b, T, D, SEG: tl.constexpr):
    """a at tokens t_a and b at t_b as they are stored, and the code of t_a; what is out of range is given a = 1, b = 0."""
    at_a = (row * T + t_a).to(tl.int64)[:, None] * D + d[None, :]
    at_b = (row * T + t_b).to(tl.int64)[:, None] * D + d[None, :]
    wide = (d < D)[None, :]
    if SEG:
        # a is read where a token goes on (code 1), b where it is real (bit 0): what stands at a hold may be NaN
        code = tl.load(code_ptr + row * T + t_a, mask=ok_a, other=0)
        a = tl.load(a_ptr + at_a, mask=(code == 1)[:, None] & wide, other=0.0)
        real = (tl.load(code_ptr + row * T + t_b, mask=ok_b, other=0) & 1) == 1
        return a, tl.load(b_ptr + at_b, mask=real[:, None] & wide, other=0.0), code
    code = tl.full(t_a.shape, 1, tl.int8)
    return (tl.load(a_ptr + at_a, mask=ok_a[:, None] & wide, other=1.0),
            tl.load(b_ptr + at_b, mask=ok_b[:, None] & wide, other=0.0), code)


@triton.jit
def _scan_tile(a, b, code, SEG: tl.constexpr):
    """Prefixes of the pairs in float32; code 0 holds (a = 1), bit 1 clears (a = 0, as loaded)."""
    a, b = a.to(tl.float32), b.to(tl.float32)
    if SEG:
        a = tl.where((code == 0)[:, None], 1.0, a)
    return tl.associative_scan((a, b), 0, _join)


@triton.jit
def _tokens(n, i, low, high, BT: tl.constexpr, REVERSE: tl.constexpr):
    """Tokens of tile n of a part, and which are in it: a's and b's. From the end, b_t meets a_{t+1}."""
    if REVERSE:
        t = high - 1 - (n * BT + i)
        return t + 1, t, t >= low
    t = low + n * BT + i
    return t, t, t < high


@triton.jit
def _enter(start_ptr, total_ptr, product_ptr, row, part, d, D, PARTS, REVERSE: tl.constexpr):
    """The state that enters a part of T: through all the parts before it."""
    ok = d < D
    h = tl.load(start_ptr + row * D + d, mask=ok, other=0.0).to(tl.float32)
    before = PARTS - 1 - part if REVERSE else part
    for i in range(before):
        p = PARTS - 1 - i if REVERSE else i
        at = (row * PARTS + p) * D + d
        h = h * tl.load(product_ptr + at, mask=ok, other=0.0) + tl.load(total_ptr + at, mask=ok, other=0.0)
    return h


@triton.jit(do_not_specialize=["T", "LENGTH", "PARTS"])
def _totals_kernel(a_ptr, b_ptr, code_ptr, total_ptr, product_ptr, T, D, LENGTH, PARTS, SEG: tl.constexpr,
                   REVERSE: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr):
    """What each part of T adds to a state, and the product of its decays. REVERSE: h_t = b_t + a_{t+1} h_{t+1}."""
    d = tl.program_id(0) * BD + tl.arange(0, BD)
    row, part = tl.program_id(1) // PARTS, tl.program_id(1) % PARTS
    i = tl.arange(0, BT)
    low, high = part * LENGTH, min(part * LENGTH + LENGTH, T)
    h = tl.zeros([BD], tl.float32)
    product = tl.full([BD], 1.0, tl.float32)
    t_a, t_b, ok = _tokens(0, i, low, high, BT, REVERSE)
    a, b, code = _load(a_ptr, b_ptr, code_ptr, row, t_a, t_b, d, ok & (t_a < T), ok, T, D, SEG)
    for n in range(tl.cdiv(high - low, BT)):
        # the next tile is on its way while this one is scanned
        t_a, t_b, ok = _tokens(n + 1, i, low, high, BT, REVERSE)
        more, next_b, next_code = _load(a_ptr, b_ptr, code_ptr, row, t_a, t_b, d, ok & (t_a < T), ok, T, D, SEG)
        decay, state = _scan_tile(a, b, code, SEG)
        last = (i == BT - 1)[:, None]
        whole = tl.sum(tl.where(last, decay, 0.0), 0)
        h = h * whole + tl.sum(tl.where(last, state, 0.0), 0)
        product *= whole
        a, b, code = more, next_b, next_code
    at = (row * PARTS + part) * D + d
    tl.store(total_ptr + at, h, mask=d < D)
    tl.store(product_ptr + at, product, mask=d < D)


@triton.jit(do_not_specialize=["T", "LENGTH", "PARTS"])
def _forward_kernel(a_ptr, b_ptr, code_ptr, start_ptr, total_ptr, product_ptr, h_ptr, last_ptr, T, D, LENGTH,
                    PARTS, SEG: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr):
    d = tl.program_id(0) * BD + tl.arange(0, BD)
    row, part = tl.program_id(1) // PARTS, tl.program_id(1) % PARTS
    i = tl.arange(0, BT)
    low, high = part * LENGTH, min(part * LENGTH + LENGTH, T)
    h = _enter(start_ptr, total_ptr, product_ptr, row, part, d, D, PARTS, False)
    t, _, ok = _tokens(0, i, low, high, BT, False)
    a, b, code = _load(a_ptr, b_ptr, code_ptr, row, t, t, d, ok, ok, T, D, SEG)
    for n in range(tl.cdiv(high - low, BT)):
        t, _, ok = _tokens(n + 1, i, low, high, BT, False)
        more, next_b, next_code = _load(a_ptr, b_ptr, code_ptr, row, t, t, d, ok, ok, T, D, SEG)
        decay, state = _scan_tile(a, b, code, SEG)
        state += decay * h[None, :]
        t, _, ok = _tokens(n, i, low, high, BT, False)
        at = (row * T + t).to(tl.int64)[:, None] * D + d[None, :]
        tl.store(h_ptr + at, state.to(h_ptr.dtype.element_ty), mask=ok[:, None] & (d < D)[None, :])
        h = tl.sum(tl.where((i == BT - 1)[:, None], state, 0.0), 0)
        a, b, code = more, next_b, next_code
    tl.store(last_ptr + row * D + d, h, mask=(d < D) & (part == PARTS - 1))


@triton.jit(do_not_specialize=["T", "LENGTH", "PARTS"])
def _backward_kernel(a_ptr, h_ptr, code_ptr, start_ptr, dh_ptr, dlast_ptr, total_ptr, product_ptr, da_ptr, db_ptr,
                     dstart_ptr, T, D, LENGTH, PARTS, SEG: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr):
    """g_t = dh_t + a_{t+1} g_{t+1}, from the end; db_t = g_t, da_t = g_t h_{t-1}, 0 where a or b is not read."""
    d = tl.program_id(0) * BD + tl.arange(0, BD)
    row, part = tl.program_id(1) // PARTS, tl.program_id(1) % PARTS
    i = tl.arange(0, BT)
    low, high = part * LENGTH, min(part * LENGTH + LENGTH, T)
    g = _enter(dlast_ptr, total_ptr, product_ptr, row, part, d, D, PARTS, True)
    first = tl.load(start_ptr + row * D + d, mask=d < D, other=0.0).to(tl.float32)
    t_a, t, ok = _tokens(0, i, low, high, BT, True)
    a, b, code = _load(a_ptr, dh_ptr, code_ptr, row, t_a, t, d, ok & (t_a < T), ok, T, D, SEG)
    for n in range(tl.cdiv(high - low, BT)):
        _, t, ok = _tokens(n, i, low, high, BT, True)
        live = ok[:, None] & (d < D)[None, :]
        at = (row * T + t).to(tl.int64)[:, None] * D + d[None, :]
        before = tl.load(h_ptr + at - D, mask=live & (t > 0)[:, None], other=0.0)
        t_a, t_b, more = _tokens(n + 1, i, low, high, BT, True)
        next_a, next_b, next_code = _load(a_ptr, dh_ptr, code_ptr, row, t_a, t_b, d, more & (t_a < T), more, T, D, SEG)
        decay, grad = _scan_tile(a, b, code, SEG)
        grad += decay * g[None, :]
        before = tl.where((t == 0)[:, None], first[None, :], before.to(tl.float32))
        da, db = grad * before, grad
        if SEG:
            own = tl.load(code_ptr + row * T + t, mask=ok, other=0)[:, None]
            da, db = tl.where(own == 1, da, 0.0), tl.where((own & 1) == 1, db, 0.0)
        tl.store(da_ptr + at, da.to(da_ptr.dtype.element_ty), mask=live)
        tl.store(db_ptr + at, db.to(db_ptr.dtype.element_ty), mask=live)
        g = tl.sum(tl.where((i == BT - 1)[:, None], grad, 0.0), 0)
        a, b, code = next_a, next_b, next_code
    if part == 0:  # through the first token, to the state it read
        own = tl.load(a_ptr + row.to(tl.int64) * T * D + d, mask=d < D, other=0.0).to(tl.float32)
        if SEG:
            what = tl.load(code_ptr + row * T)
            own = tl.where(what == 1, own, tl.where(what == 0, 1.0, 0.0))
        tl.store(dstart_ptr + row * D + d, g * own, mask=d < D)


class Shape(NamedTuple):
    """A launch: channels and tokens of a tile, warps of a program, parts of T and their length, blocks of channels."""

    channels: int
    tokens: int
    warps: int
    parts: int
    length: int
    blocks: int


def shape_of(batch: int, tokens: int, channels: int) -> Shape:
    """Blocks of 64 channels, and parts of T until they fill the card; whole rows where blocks of 32 come near it: longer tiles
    then keep enough bytes on their way, and everything is read once."""
    programs = lambda block: batch * triton.cdiv(channels, block)  # noqa: E731
    block, tile, warps, parts = 64, 32, 2, max(min(FILL // programs(64), tokens // LEAST), 1)
    if parts > 1 and programs(32) >= ENOUGH:
        block, tile, warps, parts = 32, 128, 4, 1
    block = min(block, max(triton.next_power_of_2(channels), 16))
    length = triton.cdiv(triton.cdiv(tokens, parts), tile) * tile
    return Shape(block, tile, warps, triton.cdiv(tokens, length), length, triton.cdiv(channels, block))


def _parts(a: Tensor, b: Tensor, code: Tensor | None, shape: Shape, reverse: bool) -> tuple[Tensor, Tensor]:
    batch, tokens, channels = b.shape
    total = torch.empty(batch, shape.parts, channels, dtype=torch.float32, device=b.device)
    product = torch.empty_like(total)
    if shape.parts > 1:
        _totals_kernel[(shape.blocks, batch * shape.parts)](
            a, b, code, total, product, tokens, channels, shape.length, PARTS=shape.parts, SEG=code is not None,
            REVERSE=reverse, BT=shape.tokens, BD=shape.channels, num_warps=shape.warps)
    return total, product


def forward(a: Tensor, b: Tensor, start: Tensor, code: Tensor | None, shape: Shape | None = None) -> tuple[Tensor, Tensor]:
    """All states [B, T, D] in the dtype of b, and the last one in float32. code: `Segments.marks`."""
    batch, tokens, channels = b.shape
    shape = shape or shape_of(batch, tokens, channels)
    h, last = torch.empty_like(b), torch.empty_like(start)
    total, product = _parts(a, b, code, shape, False)
    _forward_kernel[(shape.blocks, batch * shape.parts)](
        a, b, code, start, total, product, h, last, tokens, channels, shape.length, PARTS=shape.parts, SEG=code is not None,
        BT=shape.tokens, BD=shape.channels, num_warps=shape.warps)
    return h, last


def backward(dh: Tensor, dlast: Tensor, a: Tensor, h: Tensor, start: Tensor, code: Tensor | None,
             shape: Shape | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of a, b and start."""
    batch, tokens, channels = h.shape
    shape = shape or shape_of(batch, tokens, channels)
    da, db, dstart = torch.empty_like(a), torch.empty_like(h), torch.empty_like(start)
    total, product = _parts(a, dh, code, shape, True)
    _backward_kernel[(shape.blocks, batch * shape.parts)](
        a, h, code, start, dh, dlast, total, product, da, db, dstart, tokens, channels, shape.length, PARTS=shape.parts,
        SEG=code is not None, BT=shape.tokens, BD=shape.channels, num_warps=shape.warps)
    return da, db, dstart


def launch(a: Tensor, b: Tensor, start: Tensor, code: Tensor | None) -> tuple[Tensor, Tensor]:
    """All states and the last one, with gradients."""
    return _scan(a, b, start, code)


@torch.library.custom_op("seqloom::diagonal_scan_fused", mutates_args=(),
                         schema="(Tensor a, Tensor b, Tensor start, Tensor? code) -> (Tensor, Tensor)")
def _scan(a: Tensor, b: Tensor, start: Tensor, code: Tensor | None) -> tuple[Tensor, Tensor]:
    return forward(a, b, start, code)


@torch.library.custom_op(
    "seqloom::diagonal_scan_fused_backward", mutates_args=(),
    schema="(Tensor dh, Tensor dlast, Tensor a, Tensor h, Tensor start, Tensor? code) -> (Tensor, Tensor, Tensor)")
def _scan_backward(dh: Tensor, dlast: Tensor, a: Tensor, h: Tensor, start: Tensor,
                   code: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    return backward(dh, dlast, a, h, start, code)


@_scan.register_fake
def _(a: Tensor, b: Tensor, start: Tensor, code: Tensor | None) -> tuple[Tensor, Tensor]:
    return torch.empty_like(b), torch.empty_like(start)


@_scan_backward.register_fake
def _(dh: Tensor, dlast: Tensor, a: Tensor, h: Tensor, start: Tensor,
      code: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(a), torch.empty_like(h), torch.empty_like(start)


def _keep(ctx: Any, inputs: tuple, output: tuple) -> None:
    a, _, start, code = inputs
    ctx.save_for_backward(a, output[0], start, code)


def _back(ctx: Any, dh: Tensor, dlast: Tensor) -> tuple[Tensor | None, ...]:
    return *_scan_backward(dh.contiguous(), dlast.contiguous(), *ctx.saved_tensors), None


_scan.register_autograd(_back, setup_context=_keep)
