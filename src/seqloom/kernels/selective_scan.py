"""Selective scan: a diagonal state space whose step and maps depend on the token, with a readout over its N states.

    h_t = exp(dt_t A) h_{t-1} + (dt_t x_t) B_t      y_t = h_t C_t + D x_t

Per channel e and state n: A [E, N] and D [E] are parameters, and the state stays bounded where A <= 0; x, dt [B, T, E] and
B, C [B, T, N] are streams, B and C shared by all channels; h is [B, E, N]. Euler's rule stands for the integral over a step in
the write, as Mamba's code has it; with discretise="zoh" it is exact for a held input: (exp(dt A) - 1) / A in place of dt
([mamba] Method 7). With A=None a state is erased by what is written to it, and there is no other decay:

    h_t = (1 - dt_t B_t^2) h_{t-1} + (dt_t x_t) B_t

the diagonal of the delta rule's I - dt_t B_t B_t' ([longhorn] Method 3); it is stable where dt_t B_t^2 lies in [0, 2].

What passes a boundary is multiplied by a = 0; at a hold dt = 0, so that a = 1 and the write is 0.
Sources: [mamba] Method 3, 4 and 9; [s4-survey] Method 9 and 12; [longhorn] Method 3.
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

from seqloom.core.forms import gpu_only, narrow
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
         C: Float[Tensor, "b n"], *, A: Float[Tensor, "e n"] | None, D: Float[Tensor, " e"] | None = None,
         discretise: Discretisation = "euler") -> tuple[Tensor, Tensor]:
    """One token, as the paper writes it. This is the definition; every other form must agree with it."""
    wide, dtype = state.dtype, x.dtype
    x, dt, B, C = (value.to(wide) for value in (x, dt, B, C))
    if A is None:
        decay, held = 1 - dt[..., None] * B[..., None, :].square(), dt[..., None]
    else:
        move = dt[..., None] * A.to(wide)
        held = dt[..., None] if discretise == "euler" else torch.expm1(move) / A
        decay = move.exp()
    state = decay * state + held * x[..., None] * B[..., None, :]
    y = (state * C[..., None, :]).sum(-1)
    return state, (y if D is None else y + D.to(wide) * x).to(dtype)


def recurrent(x: Float[Tensor, "b t e"], dt: Float[Tensor, "b t e"], B: Float[Tensor, "b t n"], C: Float[Tensor, "b t n"], *,
              A: Float[Tensor, "e n"] | None, D: Float[Tensor, " e"] | None = None, state: Float[Tensor, "b e n"] | None = None,
              segments: Segments | None = None, discretise: Discretisation = "euler") -> Mixed:
    """Token by token."""
    return scan(partial(step, A=A, D=D, discretise=discretise), x, dt, B, C, state=_start(x, B, A, state, discretise),
                segments=segments)


def matrix(dt: Float[Tensor, "b t e"], B: Float[Tensor, "b t n"], C: Float[Tensor, "b t n"], *,
           A: Float[Tensor, "e n"] | None, D: Float[Tensor, " e"] | None = None, segments: Segments | None = None,
           discretise: Discretisation = "euler") -> Float[Tensor, "b e t t"]:
    """The T x T weights of every channel: from a fresh state, y = M @ x with

    M_ts = C_t' exp(A (dt_{s+1} + .. + dt_t)) B_s dt_s for s <= t, and D on the diagonal; with A=None the decay between
    them is (1 - dt_{s+1} B_{s+1}^2) .. (1 - dt_t B_t^2).

    For small T: an oracle and a picture of what a token reads, quadratic in T. Source: [mamba] Method 9 (attention view).
    """
    wide = accumulator(dt.dtype)
    dt, B, C = (value.to(wide) for value in (dt, B, C))
    tokens = dt.shape[1]
    lower = torch.ones(tokens, tokens, dtype=torch.bool, device=dt.device).tril()
    keep = lower[None]
    if segments is not None:
        dt, B, C = segments.hold(dt), segments.hold(B), segments.hold(C)
        keep = keep & (segments.run[:, :, None] == segments.run[:, None, :])
    later = lower.tril(-1)[..., None]
    between = torch.where(later, dt[:, :, None], 0.0).cumsum(1)  # [b t s e]
    weight = torch.zeros_like(between)
    for n in range(B.shape[-1]):
        held = dt
        if A is None:
            decay = torch.where(later, 1 - (dt * B[..., n, None].square())[:, :, None], 1.0).cumprod(1)
        else:
            rate = A[:, n].to(wide)
            decay = (between * rate).exp()
            held = dt if discretise == "euler" else torch.expm1(dt * rate) / rate
        weight = weight + decay * (C[:, :, None, None, n] * B[:, None, :, None, n] * held[:, None])
    weight = torch.where(keep[..., None], weight, 0.0).movedim(-1, 1)
    return weight if D is None else weight + torch.diag_embed(D.to(wide)[:, None].expand(-1, tokens))


def parallel(x: Float[Tensor, "b t e"], dt: Float[Tensor, "b t e"], B: Float[Tensor, "b t n"], C: Float[Tensor, "b t n"], *,
             A: Float[Tensor, "e n"] | None, D: Float[Tensor, " e"] | None = None, state: Float[Tensor, "b e n"] | None = None,
             segments: Segments | None = None, discretise: Discretisation = "euler") -> Mixed:
    """By doubling over the pairs (a, b): log-depth. Holds [B, T, E, N] of every level: an oracle, and for short sequences."""
    dtype, start = x.dtype, _start(x, B, A, state, discretise)
    wide = start.dtype
    if segments is not None:
        x, dt, B, C = (segments.hold(value) for value in (x, dt, B, C))
    x, dt, B, C = (value.to(wide) for value in (x, dt, B, C))
    if A is None:
        a, held = 1 - dt[..., None] * B[..., None, :].square(), dt[..., None]
    else:
        move = dt[..., None] * A.to(wide)
        a, held = move.exp(), dt[..., None] if discretise == "euler" else torch.expm1(move) / A
    b = held * (x[..., None] * B[..., None, :])
    if segments is not None:
        a = torch.where(segments.starts()[..., None, None], 0.0, a)
    product, total = doubled(a, b)
    h = torch.addcmul(total, product, start[:, None])
    y = (h * C[..., None, :]).sum(-1)
    y = (y if D is None else y + D.to(wide) * x).to(dtype)
    return Mixed(y if segments is None else segments.hold(y), h[:, -1].clone())


def chunked(x: Float[Tensor, "b t e"], dt: Float[Tensor, "b t e"], B: Float[Tensor, "b t n"], C: Float[Tensor, "b t n"], *,
            A: Float[Tensor, "e n"] | None, D: Float[Tensor, " e"] | None = None, state: Float[Tensor, "b e n"] | None = None,
            segments: Segments | None = None, discretise: Discretisation = "euler", block: int | None = None) -> Mixed:
    """By blocks of tokens whose states are held at once, and chunks of chunks in a block (`diagonal_scan.advance`).

    Linear in T in time and memory: states [B, T, E, N] exist a block at a time, and the backward pass makes them anew
    from the state that entered each block. First-order gradients by hand. `block` is the number of tokens in a block.
    """
    if block is None:
        most = CPU_BLOCK if x.device.type == "cpu" else OTHER_BLOCK
        size = x.shape[-1] * B.shape[-1]
        block = 1 << max(most // size, LEAST_TOKENS).bit_length() - 1  # a power of two falls into whole chunks
    kind = "exact" if discretise == "zoh" else "erase" if A is None else "euler"
    return _by_operator(x, dt, B, C, A, D, state, segments, kind, block)


def native(x: Float[Tensor, "b t e"], dt: Float[Tensor, "b t e"], B: Float[Tensor, "b t n"], C: Float[Tensor, "b t n"], *,
           A: Float[Tensor, "e n"], D: Float[Tensor, " e"] | None = None, state: Float[Tensor, "b e n"] | None = None,
           segments: Segments | None = None, discretise: Discretisation = "euler") -> Mixed:
    """By one compiled loop over tokens on the CPU (`native/selective_scan.py`); needs numba. Euler's rule and A <= 0 only.

    First-order gradients by hand; the first call in an environment compiles for some seconds.
    """
    if discretise != "euler":
        raise ValueError(f"the native form has no discretise={discretise!r}; the chunked form has")
    if A is None:
        raise ValueError("the native form takes no A=None (erasure by what is written); the chunked form does")
    return _by_operator(x, dt, B, C, A, D, state, segments, "native", NATIVE_CHUNK)


native.devices = ("cpu",)  # type: ignore[attr-defined]


def has_native() -> bool:
    """Whether numba is installed. Looks for it without importing it."""
    return importlib.util.find_spec("numba") is not None


@gpu_only()
def fused(x: Float[Tensor, "b t e"], dt: Float[Tensor, "b t e"], B: Float[Tensor, "b t n"], C: Float[Tensor, "b t n"], *,
          A: Float[Tensor, "e n"] | None, D: Float[Tensor, " e"] | None = None, state: Float[Tensor, "b e n"] | None = None,
          segments: Segments | None = None, discretise: Discretisation = "euler") -> Mixed:
    """By Triton: every state in registers, tiles of tokens one after another and parts of T side by side, float32 inside.

    Linear in T in time and memory: of the states, one in 16 is kept for the gradients. First-order gradients by hand, every
    one of them deterministic.
    """
    from seqloom.kernels.triton import selective_scan  # lazy: the package runs without Triton

    start = _start(x, B, A, state, discretise)
    low = narrow(x.dtype)
    code = None if segments is None else segments.marks()
    kind = "exact" if discretise == "zoh" else "erase" if A is None else "euler"
    y, new = selective_scan.launch(
        x.to(low).contiguous(), dt.to(narrow(dt.dtype)).contiguous(), B.to(narrow(B.dtype)), C.to(narrow(C.dtype)),
        None if A is None else (A.mT.float() * LOG2_E).contiguous(), None if D is None else D.float().contiguous(),
        start.mT.float().contiguous(), code, kind)
    return Mixed(y.to(x.dtype), new.mT.to(start.dtype).contiguous())


def _by_operator(x: Tensor, dt: Tensor, B: Tensor, C: Tensor, A: Tensor | None, D: Tensor | None, state: Tensor | None,
                 segments: Segments | None, kind: str, block: int) -> Mixed:
    start = _start(x, B, A, state, "zoh" if kind == "exact" else "euler")
    marks = None if segments is None else segments.marks()
    y, new, _ = _forward(x, dt, B, C, None if A is None else A.to(start.dtype), D, start, marks, kind, block)
    return Mixed(y, new)


def _start(x: Tensor, B: Tensor, A: Tensor | None, state: Tensor | None, discretise: str) -> Tensor:
    if A is None and discretise != "euler":
        raise ValueError(f"discretise={discretise!r} holds an input over a decay A, and A is None; use discretise='euler'")
    wide, shape = accumulator(x.dtype), (x.shape[0], x.shape[-1], B.shape[-1])
    return torch.zeros(shape, dtype=wide, device=x.device) if state is None else state.to(wide)


# The chunked form: one operator for the compiler, since the number of blocks depends on T ----------------------------

def _blocks(x: Tensor, block: int) -> Iterator[tuple[slice, list[slice]]]:
    """Rows that are computed together, and the blocks of their tokens: many short rows, or `block` tokens of one."""
    batch, tokens = x.shape[:2]
    rows = max(1, block // tokens)
    spans = [slice(t, min(t + block, tokens)) for t in range(0, tokens, block)]
    return ((slice(row, min(row + rows, batch)), spans) for row in range(0, batch, rows))


def _memory(count: int, like: Tensor, states: Tensor, block: int) -> Callable[[int, tuple[int, ...]], Tensor]:
    """`count` buffers that all blocks share, viewed in each block's shape: fresh pages cost more than the arithmetic.

    `like` [B, T, .] gives the tokens, `states` [.., N, E] the size of a state and the dtype.
    """
    batch, tokens = like.shape[:2]
    slots = min(batch, max(1, block // tokens)) * (min(block, tokens) + 1)
    buffers = states.new_empty(count, slots * math.prod(states.shape[-2:]))
    return lambda i, shape: buffers[i, : math.prod(shape)].view(shape)


def _selected(marks: Tensor | None, wide: torch.dtype, *streams: Tensor) -> tuple[Tensor, ...]:
    """The streams [r, t, .] in `wide`, 0 where tokens hold."""
    streams = tuple(value.to(wide) for value in streams)
    held = None if marks is None else (marks & 1) == 0
    if held is None or (held.device.type == "cpu" and not bool(held.any())):
        return streams
    return tuple(torch.where(held[..., None], 0.0, value) for value in streams)


def _survives(marks: Tensor | None, wide: torch.dtype) -> Tensor | None:
    """A factor of the decays [r, t]: 0 at boundaries, else 1; None without any."""
    return None if marks is None else (marks < 2).to(wide)


def _decays(dt: Tensor, B: Tensor, A: Tensor | None, keep: Tensor | None, out: Tensor) -> Tensor:
    """exp(dt A), or 1 - dt B^2 without A, [r, t, N, E] from dt [r, t, E], B [r, t, N] and A [N, E]; 0 at boundaries."""
    if A is None:
        torch.mul(dt[:, :, None], B.square().neg()[..., None], out=out)
        out.add_(1)
    else:
        torch.mul(dt[:, :, None], A * LOG2_E, out=out)
        out.exp2_()
    return out if keep is None else out.mul_(keep[:, :, None, None])


def _over(dt: Tensor, A: Tensor | None, keep: Tensor | None) -> Callable[[Callable[[Tensor], Tensor]], Tensor] | None:
    """The product of the decays over a chunk, for `advance`, by the sum of its steps; None without A, where none is known."""
    if A is None:
        return None

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
    "(Tensor x, Tensor dt, Tensor B, Tensor C, Tensor? A, Tensor? D, Tensor start, Tensor? marks, str kind, SymInt block)"
    " -> (Tensor, Tensor, Tensor)"))
def _forward(x: Tensor, dt: Tensor, B: Tensor, C: Tensor, A: Tensor | None, D: Tensor | None, start: Tensor,
             marks: Tensor | None, kind: str, block: int) -> tuple[Tensor, Tensor, Tensor]:
    """y [B, T, E], the last state [B, E, N], and the states [K, B, N, E] that enter the K blocks.

    Inside, states are [r, t, N, E] with the channels innermost, r rows of t tokens: long inner loops, and a readout that
    is a product with one row.
    """
    wide, A = start.dtype, None if A is None else A.mT.contiguous()
    if A is not None and kind == "native":
        from seqloom.kernels.native import selective_scan as compiled  # lazy: numba is optional

        y, new, entering = compiled.forward(x, dt, B, C, A, D, start.mT, marks, block)
        return y, new.mT.contiguous(), entering
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    new = torch.empty(start.shape, dtype=wide, device=x.device)
    entering = start.new_empty(-(-x.shape[1] // block), *start.mT.shape)
    borrow = _memory(2, x, entering, block)
    with torch.autocast(x.device.type, enabled=False):
        for rows, spans in _blocks(x, block):
            last = start[rows].mT.contiguous()
            for k, span in enumerate(spans):
                entering[k, rows] = last
                marks_in = None if marks is None else marks[rows, span]
                x_in, step, B_in, C_in = _selected(marks_in, wide, *(value[rows, span] for value in (x, dt, B, C)))
                keep = _survives(marks_in, wide)
                shape = (*x_in.shape[:2], *last.shape[1:])
                decay, h = _decays(step, B_in, A, keep, borrow(0, shape)), borrow(1, shape)
                torch.mul((step * x_in)[:, :, None], B_in[..., None], out=h)
                if A is not None and kind == "exact":
                    h.mul_(_phi(step, A)[0])
                advance(decay, h, last, whole=_over(step, A, keep))
                y_in = (C_in[:, :, None] @ h)[:, :, 0]
                y[rows, span] = y_in if D is None else y_in.addcmul_(x_in, D.to(wide))
                last = h[:, -1].clone()
            new[rows] = last.mT
    return y, new, entering


@torch.library.custom_op("seqloom::selective_scan_backward", mutates_args=(), schema=(
    "(Tensor dy, Tensor? dnew, Tensor x, Tensor dt, Tensor B, Tensor C, Tensor? A, Tensor? D, Tensor entering, Tensor? marks,"
    " str kind, SymInt block) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"))
def _backward(dy: Tensor, dnew: Tensor | None, x: Tensor, dt: Tensor, B: Tensor, C: Tensor, A: Tensor | None, D: Tensor | None,
              entering: Tensor, marks: Tensor | None, kind: str, block: int) -> tuple[Tensor, ...]:
    """Gradients of x, dt, B, C, A [E, N] and D [E] (0 without them) and of the state at the start.

    With g the gradient of h: g_t = C_t dy_t + a_{t+1} g_{t+1}, and what is written has the gradient g_t. The decay a has
    da_t = g_t h_{t-1}; so z = dt A has dz_t = a_t da_t, and without A the step has -B_t^2 da_t and B has -2 dt_t B_t da_t.
    """
    wide, A = entering.dtype, None if A is None else A.mT.contiguous()
    if A is not None and kind == "native":
        from seqloom.kernels.native import selective_scan as compiled

        late = torch.zeros_like(entering[0]) if dnew is None else dnew.mT
        *grads, dA, dD, dstart = compiled.backward(dy, late, x, dt, B, C, A, D, entering, marks, block)
        return *grads, dA.mT.contiguous(), dD, dstart.mT.contiguous()
    dx, ddt, dB, dC = (torch.empty(value.shape, dtype=value.dtype, device=x.device) for value in (x, dt, B, C))
    states, channels = entering.shape[2:]
    dA, dD = entering.new_zeros(states, channels), entering.new_zeros(channels)
    dstart = entering.new_empty(x.shape[0], channels, states)
    borrow = _memory(3, x, entering, block)
    with torch.autocast(x.device.type, enabled=False):
        for rows, spans in _blocks(x, block):
            late = torch.zeros_like(entering[0, rows]) if dnew is None else dnew[rows].mT.contiguous()
            for k, span in reversed(list(enumerate(spans))):
                marks_in = None if marks is None else marks[rows, span]
                x_in, step, B_in, C_in, dy_in = _selected(marks_in, wide, *(value[rows, span] for value in (x, dt, B, C, dy)))
                keep = _survives(marks_in, wide)
                written, (r, t) = step * x_in, x_in.shape[:2]
                shape = (r, t, states, channels)
                decay, g = _decays(step, B_in, A, keep, borrow(0, shape)), borrow(1, shape)
                held = borrow(2, (r, t + 1, states, channels))
                held[:, 0] = entering[k, rows]
                before, h = held[:, :-1], held[:, 1:]
                torch.mul(written[:, :, None], B_in[..., None], out=h)
                if A is not None and kind == "exact":
                    phi, slope = _phi(step, A)
                    slope.mul_(h)  # how much more is written for a larger z
                    h.mul_(phi)
                advance(decay, h, held[:, 0], whole=_over(step, A, keep))
                torch.mul(C_in[..., None], dy_in[:, :, None], out=g)
                g[:, -1] += late
                if t > 1:
                    over = _over(step[:, 1:], A, None if keep is None else keep[:, 1:])
                    advance(decay[:, 1:], g[:, :-1], g[:, -1], reverse=True, whole=over)
                dC[rows, span] = (dy_in[:, :, None] @ h.mT)[:, :, 0]
                own = g * phi if kind == "exact" else g
                dB_in = (written[:, :, None] @ own.mT)[:, :, 0]
                dwritten = (B_in[:, :, None] @ own)[:, :, 0]
                if A is None:
                    late = decay[:, 0] * g[:, 0]
                    da = g.mul_(before)
                    if keep is not None:
                        da.mul_(keep[:, :, None, None])
                    dstep = (B_in.square()[:, :, None] @ da)[:, :, 0].neg_()
                    dB_in.addcmul_(B_in, (step[:, :, None] @ da.mT)[:, :, 0], value=-2)
                else:
                    if kind == "exact":
                        slope.mul_(g)
                    dz = g.mul_(decay)
                    late = dz[:, 0].clone()
                    dz.mul_(before)
                    if kind == "exact":
                        dz.add_(slope)
                    dstep = torch.mul(dz, A, out=decay).sum(2)
                    dA += dz.mul_(step[:, :, None]).sum((0, 1))
                dB[rows, span] = dB_in
                (ddt[rows, span],) = _selected(marks_in, wide, dstep.addcmul_(dwritten, x_in))
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
    return x.new_empty(x.shape), start.new_empty(start.shape), start.new_empty(blocks, *start.mT.shape)


@_backward.register_fake
def _(dy, dnew, x, dt, B, C, A, D, entering, marks, kind, block):
    states, channels = entering.shape[2:]
    shapes = ((channels, states), (channels,), (x.shape[0], channels, states))
    return (*(v.new_empty(v.shape) for v in (x, dt, B, C)), *(entering.new_empty(shape) for shape in shapes))


def _keep(ctx: Any, inputs: tuple, output: tuple) -> None:
    x, dt, B, C, A, D, _, marks, ctx.kind, ctx.block = inputs
    ctx.save_for_backward(x, dt, B, C, A, D, output[2], marks)
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, dy: Tensor | None, dnew: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    x, dt, B, C, A, D, entering, marks = ctx.saved_tensors
    dy = torch.zeros_like(x) if dy is None else dy
    *grads, dA, dD, dstart = _backward(dy, dnew, x, dt, B, C, A, D, entering, marks, ctx.kind, ctx.block)
    return *grads, None if A is None else dA, None if D is None else dD.to(D.dtype), dstart, None, None, None


_forward.register_autograd(_differentiate, setup_context=_keep)

__all__ = ["Discretisation", "chunked", "fused", "has_native", "matrix", "native", "parallel", "recurrent", "step"]
