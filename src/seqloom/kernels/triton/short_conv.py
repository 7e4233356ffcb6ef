"""Short depthwise causal convolution on a GPU, with its bias and SiLU: one pass over the tokens forward and one back.

A program walks a stretch of one row for a block of channels, and keeps the last W inputs in registers; in the gradient also
the W sums that are not yet complete. What is summed in the forward pass is summed again, not stored: bytes decide.

The walk is over the line of a row: its carried tail, then its real tokens by rank, then what holds. `order` [B, T] says
where the token of a rank stands, `count` [B] how many are real, `run` [B, T] their runs by place; without segments rank
and place are one. Taps of other runs are selected away, and what stands at a hold is never read.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

FILL = 2048   # programs that fill a card; each leaves one row of partial sums for weight and bias
LEAST = 16    # tokens of a part of T, at least
UNROLL = 4    # tokens of a turn of the loop, whose loads go out together


@triton.jit
def _place(order_ptr, run_ptr, r, count, T, SEG: tl.constexpr):
    """Of rank r: where it stands, its run (0 for the tail), and whether it is a real token."""
    live = (r >= 0) & (r < count)
    if SEG:
        at = tl.load(order_ptr + r, mask=(r >= 0) & (r < T), other=0)
        return at, tl.load(run_ptr + at, mask=live, other=0), live
    return r, 0, live


@triton.jit
def _row(ptr, at, step, d, mask):
    return tl.load(ptr + at.to(tl.int64) * step + d, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _before(x_ptr, tail_ptr, r, at, live, d, ok, D, step, W: tl.constexpr):
    """The line's entry r, which may be of the tail: those stand at r = -(W - 1) .. -1."""
    return _row(x_ptr, at, step, d, ok & live) + _row(tail_ptr, W - 1 + r, D, d, ok & (r < 0) & (r > -W))


@triton.jit
def _enter(x_ptr, tail_ptr, order_ptr, run_ptr, low, count, d, ok, T, D, step, W: tl.constexpr, SEG: tl.constexpr):
    """The W - 1 entries of the line before rank `low`: their values, runs and places."""
    seen, runs, places = (), (), ()  # type: tuple, tuple, tuple
    for j in tl.static_range(W - 1):
        r = low - (W - 1) + j
        at, run, live = _place(order_ptr, run_ptr, r, count, T, SEG)
        seen = seen + (_before(x_ptr, tail_ptr, r, at, live, d, ok, D, step, W),)
        runs, places = runs + (run,), places + (at,)
    return seen, runs, places


@triton.jit
def _taps(w_ptr, bias_ptr, d, ok, W: tl.constexpr, BIAS: tl.constexpr):
    w = ()  # type: tuple
    for j in tl.static_range(W):
        w = w + (tl.load(w_ptr + d * W + j, mask=ok, other=0.0).to(tl.float32),)
    bias = tl.load(bias_ptr + d, mask=ok, other=0.0).to(tl.float32) if BIAS else tl.zeros(d.shape, tl.float32)
    return w, bias


@triton.jit(do_not_specialize=["T", "LENGTH", "PARTS"])
def _forward_kernel(x_ptr, w_ptr, bias_ptr, tail_ptr, order_ptr, run_ptr, count_ptr, y_ptr, last_ptr, T, D, row, step, LENGTH,
                    PARTS, W: tl.constexpr, SILU: tl.constexpr, BIAS: tl.constexpr, SEG: tl.constexpr, U: tl.constexpr,
                    BD: tl.constexpr):
    d = tl.program_id(0) * BD + tl.arange(0, BD)
    ok = d < D
    b, part = (tl.program_id(1) // PARTS).to(tl.int64), tl.program_id(1) % PARTS
    w, bias = _taps(w_ptr, bias_ptr, d, ok, W, BIAS)
    x_ptr += b * row
    y_ptr += b * T * D
    tail_ptr += b * (W - 1) * D
    count = T
    if SEG:
        order_ptr += b * T
        run_ptr += b * T
        count = tl.load(count_ptr + b)
    low = part * LENGTH
    seen, runs, places = _enter(x_ptr, tail_ptr, order_ptr, run_ptr, low, count, d, ok, T, D, step, W, SEG)
    for n in range(tl.cdiv(min(LENGTH, T - low), U)):
        for u in tl.static_range(U):
            r = low + n * U + u
            at, run, live = _place(order_ptr, run_ptr, r, count, T, SEG)
            seen, runs = seen + (_row(x_ptr, at, step, d, ok & live),), runs + (run,)
            y = bias
            for j in tl.static_range(W):
                y += w[j] * (tl.where(runs[j] == run, seen[j], 0.0) if SEG else seen[j])
            if SILU:
                y = y * tl.sigmoid(y)
            if SEG:
                y = tl.where(live, y, 0.0)
            tl.store(y_ptr + at.to(tl.int64) * D + d, y.to(y_ptr.dtype.element_ty), mask=ok & (r < T))
            seen, runs = seen[1:], runs[1:]
    if part == 0:  # the new tail: the last entries of the line before its holds, if they are of the last run
        seen, runs, places = _enter(x_ptr, tail_ptr, order_ptr, run_ptr, count, count, d, ok, T, D, step, W, SEG)
        for j in tl.static_range(W - 1):
            x = seen[j]
            if SEG:
                x = tl.where(runs[j] == tl.load(run_ptr + T - 1), x, 0.0)
            tl.store(last_ptr + (b * (W - 1) + j) * D + d, x.to(last_ptr.dtype.element_ty), mask=ok)


@triton.jit
def _back(r, seen, runs, places, sums, dw, dbias, w, bias, x_ptr, dy_ptr, dlast_ptr, dx_ptr, dtail_ptr, order_ptr, run_ptr,
          low, count, end, d, ok, T, D, step, W: tl.constexpr, SILU: tl.constexpr, SEG: tl.constexpr, OWN: tl.constexpr):
    """One token of the gradient: what it read gets its share, and the oldest entry of the line, complete now, is stored."""
    at, run, live = _place(order_ptr, run_ptr, r, count, T, SEG)
    seen, runs, places = seen + (_row(x_ptr, at, step, d, ok & live),), runs + (run,), places + (at,)
    slope = _row(dy_ptr, at, D, d, ok & live)
    sums = sums + (tl.zeros_like(slope),)
    own = ()  # type: tuple
    for j in tl.static_range(W):
        own = own + ((tl.where(runs[j] == run, seen[j], 0.0) if SEG else seen[j]),)
    if SILU:
        z = bias
        for j in tl.static_range(W):
            z += w[j] * own[j]
        share = tl.sigmoid(z)
        slope *= share * (1 + z * (1 - share))
    more, grown = (), ()  # type: tuple, tuple
    for j in tl.static_range(W):
        more = more + (sums[j] + w[j] * (tl.where(runs[j] == run, slope, 0.0) if SEG else slope),)
        grown = grown + (dw[j] + slope * own[j],)
    if OWN:  # else a token of the next program, which counts it
        dw = grown
        dbias += slope
    s = r - (W - 1)
    k = s + W - 1 - count  # in the new tail
    kept = ok & (k >= 0) & (k < W - 1)
    if SEG:
        kept = kept & (runs[0] == end)
    done = more[0] + _row(dlast_ptr, k, D, d, kept)
    tl.store(dx_ptr + places[0].to(tl.int64) * D + d, done.to(dx_ptr.dtype.element_ty), mask=ok & (s >= low) & (s < T))
    tl.store(dtail_ptr + r * D + d, done.to(dtail_ptr.dtype.element_ty), mask=ok & (s < 0) & (low == 0))
    return seen[1:], runs[1:], places[1:], more[1:], dw, dbias


@triton.jit(do_not_specialize=["T", "LENGTH", "PARTS"])
def _backward_kernel(dy_ptr, dlast_ptr, x_ptr, w_ptr, bias_ptr, tail_ptr, order_ptr, run_ptr, count_ptr, dx_ptr, dtail_ptr,
                     sums_ptr, T, D, row, step, LENGTH, PARTS, W: tl.constexpr, SILU: tl.constexpr, BIAS: tl.constexpr,
                     SEG: tl.constexpr, U: tl.constexpr, BD: tl.constexpr):
    """Walks W - 1 tokens past its part, whose inputs they read; a sum of dx is complete W - 1 tokens after its own."""
    d = tl.program_id(0) * BD + tl.arange(0, BD)
    ok = d < D
    b, part = (tl.program_id(1) // PARTS).to(tl.int64), tl.program_id(1) % PARTS
    w, bias = _taps(w_ptr, bias_ptr, d, ok, W, BIAS)
    x_ptr += b * row
    dy_ptr += b * T * D
    dx_ptr += b * T * D
    tail_ptr += b * (W - 1) * D
    dlast_ptr += b * (W - 1) * D
    dtail_ptr += b * (W - 1) * D
    count, end = T, 0
    if SEG:
        order_ptr += b * T
        run_ptr += b * T
        count = tl.load(count_ptr + b)
        end = tl.load(run_ptr + T - 1)
    low = part * LENGTH
    seen, runs, places = _enter(x_ptr, tail_ptr, order_ptr, run_ptr, low, count, d, ok, T, D, step, W, SEG)
    dbias = tl.zeros([BD], tl.float32)
    dw, sums = (), ()  # type: tuple, tuple
    for _ in tl.static_range(W):
        dw = dw + (tl.zeros([BD], tl.float32),)
    for _ in tl.static_range(W - 1):
        sums = sums + (tl.zeros([BD], tl.float32),)
    steps = tl.cdiv(min(LENGTH, T - low), U) * U
    for n in range(steps // U):
        for u in tl.static_range(U):
            seen, runs, places, sums, dw, dbias = _back(
                low + n * U + u, seen, runs, places, sums, dw, dbias, w, bias, x_ptr, dy_ptr, dlast_ptr, dx_ptr, dtail_ptr,
                order_ptr, run_ptr, low, count, end, d, ok, T, D, step, W, SILU, SEG, True)
    for u in tl.static_range(W - 1):
        seen, runs, places, sums, dw, dbias = _back(
            low + steps + u, seen, runs, places, sums, dw, dbias, w, bias, x_ptr, dy_ptr, dlast_ptr, dx_ptr, dtail_ptr,
            order_ptr, run_ptr, low, count, end, d, ok, T, D, step, W, SILU, SEG, False)
    to = sums_ptr + tl.program_id(1).to(tl.int64) * (W + 1) * D + d
    for j in tl.static_range(W):
        tl.store(to + j * D, dw[j], mask=ok)
    tl.store(to + W * D, dbias, mask=ok)


class Shape(NamedTuple):
    """A launch: channels of a block and how many blocks, warps, tokens of a part of T (a multiple of UNROLL) and parts."""

    channels: int
    blocks: int
    warps: int
    length: int
    parts: int


def shape_of(batch: int, tokens: int, channels: int, *, block: int = 256, warps: int = 2, fill: int = FILL) -> Shape:
    block = min(block, max(triton.next_power_of_2(channels), 32))
    blocks = triton.cdiv(channels, block)
    length = max(triton.cdiv(tokens, max(fill // (batch * blocks), 1)), LEAST)
    length = triton.cdiv(length, UNROLL) * UNROLL
    return Shape(block, blocks, warps, length, triton.cdiv(tokens, length))


def _launch(kernel: Any, shape: Shape, x: Tensor, weight: Tensor, first: tuple, *rest: Tensor, bias: Tensor | None,
            tail: Tensor, order: Tensor | None, run: Tensor | None, count: Tensor | None, silu: bool) -> None:
    batch, tokens, channels = x.shape
    x = x if x.stride(2) == 1 else x.contiguous()
    kernel[(shape.blocks, batch * shape.parts)](
        *first, x, weight, bias, tail, order, run, count, *rest, tokens, channels, x.stride(0), x.stride(1), shape.length,
        PARTS=shape.parts, W=weight.shape[1], SILU=silu, BIAS=bias is not None, SEG=order is not None, U=UNROLL,
        BD=shape.channels, num_warps=shape.warps)


def forward(x: Tensor, weight: Tensor, bias: Tensor | None, tail: Tensor, order: Tensor | None, run: Tensor | None,
            count: Tensor | None, silu: bool, shape: Shape | None = None) -> tuple[Tensor, Tensor]:
    """y [B, T, D] in the dtype of x, and the new tail [B, W - 1, D]. x may be a slice of wider rows."""
    y, last = torch.empty(x.shape, dtype=x.dtype, device=x.device), torch.empty_like(tail)
    _launch(_forward_kernel, shape or shape_of(*x.shape), x, weight, (), y, last, bias=bias, tail=tail, order=order, run=run,
            count=count, silu=silu)
    return y, last


def backward(dy: Tensor, dlast: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, tail: Tensor, order: Tensor | None,
             run: Tensor | None, count: Tensor | None, silu: bool, shape: Shape | None = None) -> tuple[Tensor, ...]:
    """Gradients of x, weight, bias (of no use without one) and tail. Weight and bias: partial sums, added in one order."""
    shape = shape or shape_of(*x.shape)
    dx, dtail = torch.empty(x.shape, dtype=x.dtype, device=x.device), torch.empty_like(tail)
    parts = torch.empty(x.shape[0] * shape.parts, weight.shape[1] + 1, x.shape[2], dtype=torch.float32, device=x.device)
    _launch(_backward_kernel, shape, x, weight, (dy, dlast), dx, dtail, parts, bias=bias, tail=tail, order=order, run=run,
            count=count, silu=silu)
    sums = parts.sum(0)
    dbias = sums[-1].to((weight if bias is None else bias).dtype, copy=True)
    return dx, sums[:-1].t().to(weight.dtype).contiguous(), dbias, dtail


ARGUMENTS = "Tensor x, Tensor weight, Tensor? bias, Tensor tail, Tensor? order, Tensor? run, Tensor? count, bool silu"


def launch(x: Tensor, weight: Tensor, bias: Tensor | None, tail: Tensor, order: Tensor | None, run: Tensor | None,
           count: Tensor | None, silu: bool) -> tuple[Tensor, Tensor]:
    """y and the new tail, with gradients. order, run, count: int32, or None for tokens that are all of one run."""
    return _conv(x, weight, bias, tail, order, run, count, silu)


@torch.library.custom_op("seqloom::short_conv_fused", mutates_args=(), schema=f"({ARGUMENTS}) -> (Tensor, Tensor)")
def _conv(x: Tensor, weight: Tensor, bias: Tensor | None, tail: Tensor, order: Tensor | None, run: Tensor | None,
          count: Tensor | None, silu: bool) -> tuple[Tensor, Tensor]:
    return forward(x, weight, bias, tail, order, run, count, silu)


@torch.library.custom_op("seqloom::short_conv_fused_backward", mutates_args=(),
                         schema=f"(Tensor dy, Tensor dlast, {ARGUMENTS}) -> (Tensor, Tensor, Tensor, Tensor)")
def _conv_backward(dy: Tensor, dlast: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, tail: Tensor,
                   order: Tensor | None, run: Tensor | None, count: Tensor | None, silu: bool) -> tuple[Tensor, ...]:
    return backward(dy, dlast, x, weight, bias, tail, order, run, count, silu)


@_conv.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None, tail: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), torch.empty_like(tail)


@_conv_backward.register_fake
def _(dy: Tensor, dlast: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, tail: Tensor,
      *rest: Any) -> tuple[Tensor, ...]:
    like = weight if bias is None else bias
    return x.new_empty(x.shape), weight.new_empty(weight.shape), like.new_empty(x.shape[2]), torch.empty_like(tail)


def _keep(ctx: Any, inputs: tuple, output: tuple) -> None:
    *tensors, silu = inputs
    ctx.save_for_backward(*tensors)
    ctx.silu = silu


def _gradients(ctx: Any, dy: Tensor, dlast: Tensor) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors
    dx, dweight, dbias, dtail = _conv_backward(dy.contiguous(), dlast.contiguous(), *saved, ctx.silu)
    return dx, dweight, None if saved[2] is None else dbias, dtail, None, None, None, None


_conv.register_autograd(_gradients, setup_context=_keep)
