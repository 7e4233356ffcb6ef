"""Selective scan: a diagonal state space whose step and maps depend on the token, with a readout over its N states.

    h_t = exp(dt_t A) h_{t-1} + (dt_t x_t) B_t      y_t = h_t C_t + D x_t

Per channel e and state n: A [E, N] <= 0 and D [E] are parameters; x, dt [B, T, E] and B, C [B, T, N] are streams, B and C
shared by all channels; h is [B, E, N]. Euler's rule stands for the integral over a step in the write, as Mamba's code has
it; with discretise="zoh" it is exact for a held input: (exp(dt A) - 1) / A in place of dt ([mamba] Method 7).

What passes a boundary is multiplied by a = 0; at a hold dt = 0, so that a = 1 and the write is 0.
Sources: [mamba] Method 3, 4 and 9; [s4-survey] Method 9 and 12.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from seqloom.core.mixer import accumulator
from seqloom.core.scan import scan
from seqloom.core.segments import Segments
from seqloom.core.state import Mixed
from seqloom.kernels.diagonal_scan import advance, doubled

Discretisation = Literal["euler", "zoh"]

# States held at once, [tokens, N, E]: as many as caches hold on a CPU, and as launches are worth on another device.
CPU_BLOCK, OTHER_BLOCK, LEAST_TOKENS = 2**20, 2**26, 32
NATIVE_CHUNK = 16           # tokens between the states that the compiled form keeps
LOG2_E = math.log2(math.e)  # exp2 is four times as fast as exp on x86 CPUs
SMALL = 0.1                 # below it the derivative of phi is summed as a series, and cancels above


def step(state: Float[Tensor, "b e n"], x: Float[Tensor, "b e"], dt: Float[Tensor, "b e"], B: Float[Tensor, "b n"],
         C: Float[Tensor, "b n"], *, A: Float[Tensor, "e n"], D: Float[Tensor, " e"] | None = None,
         discretise: Discretisation = "euler") -> tuple[Tensor, Tensor]:
    """One token, as the paper writes it. This is the definition; every other form must agree with it."""
    wide, dtype = state.dtype, x.dtype
    x, dt, B, C, A = (value.to(wide) for value in (x, dt, B, C, A))
    move = dt[..., None] * A
    held = dt[..., None] if discretise == "euler" else torch.expm1(move) / A
    state = move.exp() * state + held * x[..., None] * B[..., None, :]
    y = (state * C[..., None, :]).sum(-1)
    return state, (y if D is None else y + D.to(wide) * x).to(dtype)


def recurrent(x: Float[Tensor, "b t e"], dt: Float[Tensor, "b t e"], B: Float[Tensor, "b t n"], C: Float[Tensor, "b t n"], *,
              A: Float[Tensor, "e n"], D: Float[Tensor, " e"] | None = None, state: Float[Tensor, "b e n"] | None = None,
              segments: Segments | None = None, discretise: Discretisation = "euler") -> Mixed:
    """Token by token."""
    return scan(partial(step, A=A, D=D, discretise=discretise), x, dt, B, C, state=_start(x, A, state), segments=segments)


def matrix(dt: Float[Tensor, "b t e"], B: Float[Tensor, "b t n"], C: Float[Tensor, "b t n"], *, A: Float[Tensor, "e n"],
           D: Float[Tensor, " e"] | None = None, segments: Segments | None = None,
           discretise: Discretisation = "euler") -> Float[Tensor, "b e t t"]:
    """The T x T weights of every channel: from a fresh state, y = M @ x with

    M_ts = C_t' exp(A (dt_{s+1} + .. + dt_t)) B_s dt_s for s <= t, and D on the diagonal.

    For small T: an oracle and a picture of what a token reads, quadratic in T. Source: [mamba] Method 9 (attention view).
    """
    wide = accumulator(dt.dtype)
    dt, B, C, A = (value.to(wide) for value in (dt, B, C, A))
    tokens = dt.shape[1]
    lower = torch.ones(tokens, tokens, dtype=torch.bool, device=dt.device).tril()
    keep = lower[None]
    if segments is not None:
        dt, B, C = segments.hold(dt), segments.hold(B), segments.hold(C)
        keep = keep & (segments.run[:, :, None] == segments.run[:, None, :])
    between = torch.where(lower.tril(-1)[..., None], dt[:, :, None], 0.0).cumsum(1)  # [b t s e]
    weight = torch.zeros_like(between)
    for n in range(A.shape[1]):
        held = dt if discretise == "euler" else torch.expm1(dt * A[:, n]) / A[:, n]
        weight = weight + (between * A[:, n]).exp() * (C[:, :, None, None, n] * B[:, None, :, None, n] * held[:, None])
    weight = torch.where(keep[..., None], weight, 0.0).movedim(-1, 1)
    return weight if D is None else weight + torch.diag_embed(D.to(wide)[:, None].expand(-1, tokens))


def parallel(x: Float[Tensor, "b t e"], dt: Float[Tensor, "b t e"], B: Float[Tensor, "b t n"], C: Float[Tensor, "b t n"], *,
             A: Float[Tensor, "e n"], D: Float[Tensor, " e"] | None = None, state: Float[Tensor, "b e n"] | None = None,
             segments: Segments | None = None, discretise: Discretisation = "euler") -> Mixed:
    """By doubling over the pairs (a, b): log-depth. Holds [B, T, E, N] of every level: an oracle, and for short sequences."""
    dtype, start = x.dtype, _start(x, A, state)
    wide = start.dtype
    if segments is not None:
        x, dt, B, C = (segments.hold(value) for value in (x, dt, B, C))
    x, dt, B, C, A = (value.to(wide) for value in (x, dt, B, C, A))
    move = dt[..., None] * A
    held = dt[..., None] if discretise == "euler" else torch.expm1(move) / A
    a, b = move.exp(), held * (x[..., None] * B[..., None, :])
    if segments is not None:
        a = torch.where(segments.starts()[..., None, None], 0.0, a)
    product, total = doubled(a, b)
    h = torch.addcmul(total, product, start[:, None])
    y = (h * C[..., None, :]).sum(-1)
    y = (y if D is None else y + D.to(wide) * x).to(dtype)
    return Mixed(y if segments is None else segments.hold(y), h[:, -1].clone())


def chunked(x: Float[Tensor, "b t e"], dt: Float[Tensor, "b t e"], B: Float[Tensor, "b t n"], C: Float[Tensor, "b t n"], *,
            A: Float[Tensor, "e n"], D: Float[Tensor, " e"] | None = None, state: Float[Tensor, "b e n"] | None = None,
            segments: Segments | None = None, discretise: Discretisation = "euler", block: int | None = None) -> Mixed:
    """By blocks of tokens whose states are held at once, and chunks of chunks in a block (`diagonal_scan.advance`).

    Linear in T in time and memory: states [B, T, E, N] exist a block at a time, and the backward pass makes them anew
    from the state that entered each block. First-order gradients by hand. `block` is the number of tokens in a block.
    """
    if block is None:
        most = CPU_BLOCK if x.device.type == "cpu" else OTHER_BLOCK
        block = 1 << max(most // A.numel(), LEAST_TOKENS).bit_length() - 1  # a power of two falls into whole chunks
    kind = "exact" if discretise == "zoh" else "euler"
    return _by_operator(x, dt, B, C, A, D, state, segments, kind, block)


def native(x: Float[Tensor, "b t e"], dt: Float[Tensor, "b t e"], B: Float[Tensor, "b t n"], C: Float[Tensor, "b t n"], *,
           A: Float[Tensor, "e n"], D: Float[Tensor, " e"] | None = None, state: Float[Tensor, "b e n"] | None = None,
           segments: Segments | None = None, discretise: Discretisation = "euler") -> Mixed:
    """By one compiled loop over tokens on the CPU (`native/selective_scan.py`); needs numba. Euler's rule only.

    First-order gradients by hand; the first call in an environment compiles for some seconds.
    """
    if discretise != "euler":
        raise ValueError(f"the native form has no discretise={discretise!r}; the chunked form has")
    return _by_operator(x, dt, B, C, A, D, state, segments, "native", NATIVE_CHUNK)


native.devices = ("cpu",)  # type: ignore[attr-defined]


def has_native() -> bool:
    """Whether numba is installed. Looks for it without importing it."""
    return importlib.util.find_spec("numba") is not None


def _by_operator(x: Tensor, dt: Tensor, B: Tensor, C: Tensor, A: Tensor, D: Tensor | None, state: Tensor | None,
                 segments: Segments | None, kind: str, block: int) -> Mixed:
    start = _start(x, A, state)
    # 0 holds, 1 is real, 2 is the first of its run
    marks = None if segments is None else segments.real.to(torch.int8) + segments.starts()
    y, new, _ = _forward(x, dt, B, C, A.to(start.dtype), D, start, marks, kind, block)
    return Mixed(y, new)


def _start(x: Tensor, A: Tensor, state: Tensor | None) -> Tensor:
    wide = accumulator(x.dtype)
    return torch.zeros(x.shape[0], *A.shape, dtype=wide, device=x.device) if state is None else state.to(wide)


# The chunked form: one operator for the compiler, since the number of blocks depends on T ----------------------------

def _blocks(x: Tensor, block: int) -> Iterator[tuple[slice, list[slice]]]:
    """Rows that are computed together, and the blocks of their tokens: many short rows, or `block` tokens of one."""
    batch, tokens = x.shape[:2]
    rows = max(1, block // tokens)
    spans = [slice(t, min(t + block, tokens)) for t in range(0, tokens, block)]
    return ((slice(row, min(row + rows, batch)), spans) for row in range(0, batch, rows))


def _memory(count: int, like: Tensor, A: Tensor, block: int) -> Callable[[int, tuple[int, ...]], Tensor]:
    """`count` buffers that all blocks share, viewed in each block's shape: fresh pages cost more than the arithmetic."""
    batch, tokens = like.shape[:2]
    slots = min(batch, max(1, block // tokens)) * (min(block, tokens) + 1)
    buffers = A.new_empty(count, slots * A.numel())
    return lambda i, shape: buffers[i, : math.prod(shape)].view(shape)


def _selected(marks: Tensor | None, wide: torch.dtype, *streams: Tensor) -> tuple[Tensor, ...]:
    """The streams [r, t, .] in `wide`, 0 where tokens hold."""
    streams = tuple(value.to(wide) for value in streams)
    held = None if marks is None else marks == 0
    if held is None or (held.device.type == "cpu" and not bool(held.any())):
        return streams
    return tuple(torch.where(held[..., None], 0.0, value) for value in streams)


def _survives(marks: Tensor | None, wide: torch.dtype) -> Tensor | None:
    """A factor of the decays [r, t]: 0 at boundaries, else 1; None without any."""
    return None if marks is None else (marks != 2).to(wide)


def _decays(dt: Tensor, A: Tensor, keep: Tensor | None, out: Tensor) -> Tensor:
    """exp(dt A), [r, t, N, E] from dt [r, t, E] and A [N, E], 0 at boundaries."""
    torch.mul(dt[:, :, None], A * LOG2_E, out=out)
    out.exp2_()
    return out if keep is None else out.mul_(keep[:, :, None, None])


def _over(dt: Tensor, A: Tensor, keep: Tensor | None) -> Callable[[Callable[[Tensor], Tensor]], Tensor]:
    """The product of the decays over a chunk, for `advance`, by the sum of its steps."""

    def whole(split: Callable[[Tensor], Tensor]) -> Tensor:
        product = (split(dt).sum(2)[:, :, None] * (A * LOG2_E)).exp2_()
        return product if keep is None else product.mul_(split(keep).amin(2)[:, :, None, None])

    return whole


def _phi(dt: Tensor, A: Tensor) -> tuple[Tensor, Tensor]:
    """phi(z) = (e^z - 1) / z at z = dt A, by which the exact write exceeds Euler's, and its derivative (e^z - phi) / z."""
    z = dt[:, :, None] * A
    phi = torch.where(z == 0, 1.0, torch.expm1(z) / z)
    slope = torch.zeros_like(z)
    for k in reversed(range(9)):
        slope = slope.mul_(z).add_((k + 1) / math.factorial(k + 2))
    return phi, torch.where(z.abs() < SMALL, slope, phi + (1 - phi) / z)


@torch.library.custom_op("seqloom::selective_scan", mutates_args=(), schema=(
    "(Tensor x, Tensor dt, Tensor B, Tensor C, Tensor A, Tensor? D, Tensor start, Tensor? marks, str kind, SymInt block)"
    " -> (Tensor, Tensor, Tensor)"))
def _forward(x: Tensor, dt: Tensor, B: Tensor, C: Tensor, A: Tensor, D: Tensor | None, start: Tensor, marks: Tensor | None,
             kind: str, block: int) -> tuple[Tensor, Tensor, Tensor]:
    """y [B, T, E], the last state [B, E, N], and the states [K, B, N, E] that enter the K blocks.

    Inside, states are [r, t, N, E] with the channels innermost, r rows of t tokens: long inner loops, and a readout that
    is a product with one row.
    """
    wide, A = A.dtype, A.mT.contiguous()
    if kind == "native":
        from seqloom.kernels.native import selective_scan as compiled  # lazy: numba is optional

        y, new, entering = compiled.forward(x, dt, B, C, A, D, start.mT, marks, block)
        return y, new.mT.contiguous(), entering
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    new = torch.empty(start.shape, dtype=wide, device=x.device)
    entering = start.new_empty(-(-x.shape[1] // block), x.shape[0], *A.shape)
    borrow = _memory(2, x, A, block)
    with torch.autocast(x.device.type, enabled=False):
        for rows, spans in _blocks(x, block):
            last = start[rows].mT.contiguous()
            for k, span in enumerate(spans):
                entering[k, rows] = last
                marks_in = None if marks is None else marks[rows, span]
                x_in, step, B_in, C_in = _selected(marks_in, wide, *(value[rows, span] for value in (x, dt, B, C)))
                keep = _survives(marks_in, wide)
                shape = (*x_in.shape[:2], *A.shape)
                decay, h = _decays(step, A, keep, borrow(0, shape)), borrow(1, shape)
                torch.mul((step * x_in)[:, :, None], B_in[..., None], out=h)
                if kind == "exact":
                    h.mul_(_phi(step, A)[0])
                advance(decay, h, last, whole=_over(step, A, keep))
                y_in = (C_in[:, :, None] @ h)[:, :, 0]
                y[rows, span] = y_in if D is None else y_in.addcmul_(x_in, D.to(wide))
                last = h[:, -1].clone()
            new[rows] = last.mT
    return y, new, entering


@torch.library.custom_op("seqloom::selective_scan_backward", mutates_args=(), schema=(
    "(Tensor dy, Tensor? dnew, Tensor x, Tensor dt, Tensor B, Tensor C, Tensor A, Tensor? D, Tensor entering, Tensor? marks,"
    " str kind, SymInt block) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"))
def _backward(dy: Tensor, dnew: Tensor | None, x: Tensor, dt: Tensor, B: Tensor, C: Tensor, A: Tensor, D: Tensor | None,
              entering: Tensor, marks: Tensor | None, kind: str, block: int) -> tuple[Tensor, ...]:
    """Gradients of x, dt, B, C, A, D [E] (0 without one) and of the state at the start.

    With g the gradient of h and z = dt A: g_t = C_t dy_t + a_{t+1} g_{t+1}; dz_t = g_t a_t h_{t-1}, and what is written
    has the gradient g_t.
    """
    wide, A = A.dtype, A.mT.contiguous()
    if kind == "native":
        from seqloom.kernels.native import selective_scan as compiled

        late = torch.zeros_like(entering[0]) if dnew is None else dnew.mT
        *grads, dA, dD, dstart = compiled.backward(dy, late, x, dt, B, C, A, D, entering, marks, block)
        return *grads, dA.mT.contiguous(), dD, dstart.mT.contiguous()
    dx, ddt, dB, dC = (torch.empty(value.shape, dtype=value.dtype, device=x.device) for value in (x, dt, B, C))
    dA, dD, dstart = torch.zeros_like(A), A.new_zeros(A.shape[1]), A.new_empty(x.shape[0], *A.mT.shape)
    borrow = _memory(3, x, A, block)
    with torch.autocast(x.device.type, enabled=False):
        for rows, spans in _blocks(x, block):
            late = torch.zeros_like(entering[0, rows]) if dnew is None else dnew[rows].mT.contiguous()
            for k, span in reversed(list(enumerate(spans))):
                marks_in = None if marks is None else marks[rows, span]
                x_in, step, B_in, C_in, dy_in = _selected(marks_in, wide, *(value[rows, span] for value in (x, dt, B, C, dy)))
                keep = _survives(marks_in, wide)
                written, (r, t) = step * x_in, x_in.shape[:2]
                decay, g = _decays(step, A, keep, borrow(0, (r, t, *A.shape))), borrow(1, (r, t, *A.shape))
                states = borrow(2, (r, t + 1, *A.shape))
                states[:, 0] = entering[k, rows]
                before, h = states[:, :-1], states[:, 1:]
                torch.mul(written[:, :, None], B_in[..., None], out=h)
                if kind == "exact":
                    phi, slope = _phi(step, A)
                    slope.mul_(h)  # how much more is written for a larger z
                    h.mul_(phi)
                advance(decay, h, states[:, 0], whole=_over(step, A, keep))
                torch.mul(C_in[..., None], dy_in[:, :, None], out=g)
                g[:, -1] += late
                if t > 1:
                    over = _over(step[:, 1:], A, None if keep is None else keep[:, 1:])
                    advance(decay[:, 1:], g[:, :-1], g[:, -1], reverse=True, whole=over)
                dC[rows, span] = (dy_in[:, :, None] @ h.mT)[:, :, 0]
                own = g * phi if kind == "exact" else g
                dB[rows, span] = (written[:, :, None] @ own.mT)[:, :, 0]
                dwritten = (B_in[:, :, None] @ own)[:, :, 0]
                if kind == "exact":
                    slope.mul_(g)
                dz = g.mul_(decay)
                late = dz[:, 0].clone()
                dz.mul_(before)
                if kind == "exact":
                    dz.add_(slope)
                torch.mul(dz, A, out=decay)
                (ddt[rows, span],) = _selected(marks_in, wide, decay.sum(2).addcmul_(dwritten, x_in))
                dA += dz.mul_(step[:, :, None]).sum((0, 1))
                dx_in = dwritten.mul_(step)
                if D is not None:
                    dx_in.addcmul_(dy_in, D.to(wide))
                    dD += (dy_in * x_in).sum((0, 1))
                dx[rows, span] = dx_in
            dstart[rows] = late.mT
    return dx, ddt, dB, dC, dA.mT.contiguous(), dD, dstart


@_forward.register_fake
def _(x, dt, B, C, A, D, start, marks, kind, block):
    blocks = (x.shape[1] + block - 1) // block
    return x.new_empty(x.shape), start.new_empty(start.shape), start.new_empty(blocks, x.shape[0], *A.mT.shape)


@_backward.register_fake
def _(dy, dnew, x, dt, B, C, A, D, entering, marks, kind, block):
    like = (x, dt, B, C, A)
    return (*(v.new_empty(v.shape) for v in like), A.new_empty(A.shape[0]), A.new_empty(x.shape[0], *A.shape))


def _keep(ctx: Any, inputs: tuple, output: tuple) -> None:
    x, dt, B, C, A, D, _, marks, ctx.kind, ctx.block = inputs
    ctx.save_for_backward(x, dt, B, C, A, D, output[2], marks)
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, dy: Tensor | None, dnew: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    x, *others, D, entering, marks = ctx.saved_tensors
    dy = torch.zeros_like(x) if dy is None else dy
    *grads, dA, dD, dstart = _backward(dy, dnew, x, *others, D, entering, marks, ctx.kind, ctx.block)
    return *grads, dA, None if D is None else dD.to(D.dtype), dstart, None, None, None


_forward.register_autograd(_differentiate, setup_context=_keep)

__all__ = ["Discretisation", "chunked", "has_native", "matrix", "native", "parallel", "recurrent", "step"]
