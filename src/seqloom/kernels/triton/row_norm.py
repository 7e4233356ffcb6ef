"""Norms of rows on a GPU, with weight and gate: y = w * r u * SiLU(g), r = 1 / sqrt(sum(u^2) / N or sum(u^2), + eps).

u is x, or x SiLU(g) where the gate comes first. A program holds whole rows in registers: bytes decide, so r is computed
again in the gradient, and nothing is stored for it. With z = dy * w * SiLU(g), du = r z - u r^3 sum(z u) / N (or sum(z u)).

x and the gate are rows at two levels, [outer, inner, N] with any stride of either: heads that are a slice of a projection are
not copied first.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE = 2048   # elements that a program holds, unless one row is longer
FILL = 1056   # programs of the gradient; each leaves one row of partial sums for the weight


@triton.jit
def _rows_of(ptr, rows, n, ok, inner, outer_step, inner_step):
    at = (rows // inner).to(tl.int64) * outer_step + (rows % inner).to(tl.int64) * inner_step
    return tl.load(ptr + at[:, None] + n[None, :], mask=ok, other=0.0).to(tl.float32)


@triton.jit
def _read(x_ptr, gate_ptr, rows, n, ok, xi, xo_step, xi_step, gi, go_step, gi_step, GATE: tl.constexpr):
    """Rows of x, SiLU of their gates and its slope. GATE is 0 without one, 1 after the norm, 2 before it."""
    x = _rows_of(x_ptr, rows, n, ok, xi, xo_step, xi_step)
    if GATE == 0:
        opened, slope = x, x
    else:
        g = _rows_of(gate_ptr, rows, n, ok, gi, go_step, gi_step)
        share = tl.sigmoid(g)
        opened, slope = g * share, share * (1 + g * (1 - share))
    return x, opened, slope  # one return: two of different values do not compile, though the interpreter takes them


@triton.jit(do_not_specialize=["R", "xi", "gi"])
def _forward_kernel(x_ptr, w_ptr, gate_ptr, y_ptr, R, N, xi, xo_step, xi_step, gi, go_step, gi_step, eps, share,
                    WEIGHT: tl.constexpr, GATE: tl.constexpr, BR: tl.constexpr, BN: tl.constexpr):
    n = tl.arange(0, BN)
    rows = tl.program_id(0) * BR + tl.arange(0, BR)
    ok = (rows < R)[:, None] & (n < N)[None, :]
    x, open, _ = _read(x_ptr, gate_ptr, rows, n, ok, xi, xo_step, xi_step, gi, go_step, gi_step, GATE)
    if GATE == 2:
        x *= open
    y = x * tl.rsqrt(tl.sum(x * x, 1) * share + eps)[:, None]
    if WEIGHT:
        y *= tl.load(w_ptr + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    if GATE == 1:
        y *= open
    tl.store(y_ptr + rows.to(tl.int64)[:, None] * N + n[None, :], y.to(y_ptr.dtype.element_ty), mask=ok)


@triton.jit(do_not_specialize=["R", "xi", "gi", "TILES"])
def _backward_kernel(dy_ptr, x_ptr, w_ptr, gate_ptr, dx_ptr, dgate_ptr, sums_ptr, R, N, xi, xo_step, xi_step, gi, go_step,
                     gi_step, eps, share, TILES, WEIGHT: tl.constexpr, GATE: tl.constexpr, BR: tl.constexpr,
                     BN: tl.constexpr):
    n = tl.arange(0, BN)
    w = tl.load(w_ptr + n, mask=n < N, other=0.0).to(tl.float32) if WEIGHT else tl.full([BN], 1.0, tl.float32)
    dw = tl.zeros([BR, BN], tl.float32)
    for tile in range(TILES):
        rows = (tl.program_id(0) * TILES + tile) * BR + tl.arange(0, BR)
        ok = (rows < R)[:, None] & (n < N)[None, :]
        x, open, slope = _read(x_ptr, gate_ptr, rows, n, ok, xi, xo_step, xi_step, gi, go_step, gi_step, GATE)
        at = rows.to(tl.int64)[:, None] * N + n[None, :]
        dy = tl.load(dy_ptr + at, mask=ok, other=0.0).to(tl.float32)
        u = x * open if GATE == 2 else x
        r = tl.rsqrt(tl.sum(u * u, 1) * share + eps)[:, None]
        z = dy * open if GATE == 1 else dy
        if WEIGHT:
            dw += z * u * r
        if GATE == 1:
            tl.store(dgate_ptr + at, (dy * w[None, :] * u * r * slope).to(dgate_ptr.dtype.element_ty), mask=ok)
        z *= w[None, :]
        du = r * (z - u * (tl.sum(z * u, 1)[:, None] * share * r * r))
        if GATE == 2:
            tl.store(dgate_ptr + at, (du * x * slope).to(dgate_ptr.dtype.element_ty), mask=ok)
            du *= open
        tl.store(dx_ptr + at, du.to(dx_ptr.dtype.element_ty), mask=ok)
    if WEIGHT:
        tl.store(sums_ptr + tl.program_id(0) * N + n, tl.sum(dw, 0), mask=n < N)


def _levels(x: Tensor | None) -> tuple[Tensor | None, int, int, int]:
    """x [..., N], or a copy that is contiguous if its strides do not fold to two levels; rows of the inner one, both steps."""
    if x is None:
        return None, 1, 0, 0
    folded: list[tuple[int, int]] = []
    for size, step in zip(x.shape[:-1], x.stride()[:-1], strict=True):
        if size == 1:
            continue
        if folded and folded[-1][1] == size * step:
            folded[-1] = (folded[-1][0] * size, step)
        else:
            folded.append((size, step))
    if len(folded) > 2 or x.stride(-1) != 1:
        x, folded = x.contiguous(), [(x.numel() // x.shape[-1], x.shape[-1])]
    (_, outer), (size, inner) = [(1, 0)] * (2 - len(folded)) + folded
    return x, size, outer, inner


def _grid(rows: int, width: int) -> tuple[int, int, int, int]:
    """Rows and columns of a tile, warps, number of tiles."""
    columns = max(triton.next_power_of_2(width), 16)
    height = max(TILE // columns, 1)
    return height, columns, min(max(height * columns // 512, 4), 16), triton.cdiv(rows, height)


def forward(x: Tensor, weight: Tensor | None, gate: Tensor | None, dtype: torch.dtype, eps: float, mean: bool,
            gate_first: bool) -> Tensor:
    width = x.shape[-1]
    y = torch.empty(x.shape, dtype=dtype, device=x.device)
    rows = x.numel() // width
    height, columns, warps, tiles = _grid(rows, width)
    (a, *x_steps), (b, *gate_steps) = _levels(x), _levels(gate)
    _forward_kernel[(tiles,)](
        a, weight, b, y, rows, width, *x_steps, *gate_steps, eps, 1 / width if mean else 1.0, WEIGHT=weight is not None,
        GATE=0 if gate is None else 1 + gate_first, BR=height, BN=columns, num_warps=warps)
    return y


def backward(dy: Tensor, x: Tensor, weight: Tensor | None, gate: Tensor | None, eps: float, mean: bool,
             gate_first: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, weight and gate; empty for what is not there. The weight's: partial sums, added in one order."""
    width = x.shape[-1]
    rows = x.numel() // width
    height, columns, warps, tiles = _grid(rows, width)
    each = triton.cdiv(tiles, FILL)
    programs = triton.cdiv(tiles, each)
    like = lambda t: x.new_empty(0) if t is None else torch.empty(t.shape, dtype=t.dtype, device=x.device)  # noqa: E731
    dx, dgate = like(x), like(gate)
    sums = torch.empty(programs, width if weight is not None else 0, dtype=torch.float32, device=x.device)
    (a, *x_steps), (b, *gate_steps) = _levels(x), _levels(gate)
    _backward_kernel[(programs,)](
        dy, a, weight, b, dx, dgate, sums, rows, width, *x_steps, *gate_steps, eps, 1 / width if mean else 1.0, each,
        WEIGHT=weight is not None, GATE=0 if gate is None else 1 + gate_first, BR=height, BN=columns, num_warps=warps)
    return dx, x.new_empty(0) if weight is None else sums.sum(0).to(weight.dtype), dgate


ARGUMENTS = "Tensor x, Tensor? weight, Tensor? gate"
OPTIONS = "float eps, bool mean, bool gate_first"


def launch(x: Tensor, weight: Tensor | None, gate: Tensor | None, *, dtype: torch.dtype, eps: float, mean: bool,
           gate_first: bool) -> Tensor:
    """The norm over the last axis in `dtype`, with gradients. weight [N], gate as x; mean: of squares, else their sum."""
    return _norm(x, None if weight is None else weight.contiguous(), gate, dtype, eps, mean, gate_first)


@torch.library.custom_op("seqloom::row_norm_fused", mutates_args=(),
                         schema=f"({ARGUMENTS}, ScalarType dtype, {OPTIONS}) -> Tensor")
def _norm(x: Tensor, weight: Tensor | None, gate: Tensor | None, dtype: torch.dtype, eps: float, mean: bool,
          gate_first: bool) -> Tensor:
    return forward(x, weight, gate, dtype, eps, mean, gate_first)


@torch.library.custom_op("seqloom::row_norm_fused_backward", mutates_args=(),
                         schema=f"(Tensor dy, {ARGUMENTS}, {OPTIONS}) -> (Tensor, Tensor, Tensor)")
def _norm_backward(dy: Tensor, x: Tensor, weight: Tensor | None, gate: Tensor | None, eps: float, mean: bool,
                   gate_first: bool) -> tuple[Tensor, Tensor, Tensor]:
    return backward(dy, x, weight, gate, eps, mean, gate_first)


@_norm.register_fake
def _(x: Tensor, weight: Tensor | None, gate: Tensor | None, dtype: torch.dtype, *options: Any) -> Tensor:
    return x.new_empty(x.shape, dtype=dtype)


@_norm_backward.register_fake
def _(dy: Tensor, x: Tensor, weight: Tensor | None, gate: Tensor | None, *options: Any) -> tuple[Tensor, Tensor, Tensor]:
    like = lambda t: x.new_empty(0) if t is None else t.new_empty(t.shape)  # noqa: E731
    return like(x), like(weight), like(gate)


def _keep(ctx: Any, inputs: tuple, output: Tensor) -> None:
    x, weight, gate, _, *ctx.options = inputs
    ctx.save_for_backward(x, weight, gate)


def _gradients(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors
    found = _norm_backward(dy.contiguous(), *saved, *ctx.options)
    return *(None if t is None else g for t, g in zip(saved, found, strict=True)), None, None, None, None


_norm.register_autograd(_gradients, setup_context=_keep)
