"""Diagonal scan: h_t = a_t * h_{t-1} + b_t for every channel on its own, real or complex, and every state is returned.

Carries HGRN, and with a readout over N the selective scan. Streams a, b: [B, T, ...], the state [B, ...]. The work is on
pairs (a, b), where a boundary is a = 0: the write is kept and what came before is not, exactly.

Gradients, with dy_t that of h_t: g_t = dy_t + conj(a_{t+1}) g_{t+1}, the same scan from the end; db_t = g_t, da_t = g_t
conj(h_{t-1}).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from jaxtyping import Shaped
from torch import Tensor

from seqloom.core.forms import gpu_only, narrow
from seqloom.core.mixer import accumulator
from seqloom.core.segments import Segments
from seqloom.core.state import Mixed
from seqloom.kernels.decay_scan import flip

CHUNK = 16  # positions that the loop inside a chunk walks through; a power of two


def step(state: Shaped[Tensor, "b ..."], a: Shaped[Tensor, "b ..."], b: Shaped[Tensor, "b ..."]) -> tuple[Tensor, Tensor]:
    """One token, as the papers write it. This is the definition; every other form must agree with it."""
    state = a.to(state.dtype) * state + b.to(state.dtype)
    return state, state.to(torch.promote_types(a.dtype, b.dtype))


def matrix(a: Shaped[Tensor, "b t d"], *, segments: Segments | None = None) -> Shaped[Tensor, "b d t t"]:
    """The T x T weights of every channel, M_ts = a_{s+1} .. a_t for s <= t: from a fresh state, h = M @ b.

    For small T: an oracle and a picture, quadratic in T.
    """
    tokens = a.shape[1]
    a = a.to(accumulator(a.dtype)) if segments is None else segments.hold(a.to(accumulator(a.dtype)), 1.0)
    lower = torch.ones(tokens, tokens, dtype=torch.bool, device=a.device).tril()
    keep = lower[None]
    if segments is not None:
        keep = keep & (segments.run[:, :, None] == segments.run[:, None, :]) & segments.real[:, None, :]
    weight = torch.where(lower.tril(-1)[..., None], a[:, :, None], 1.0).cumprod(1)
    return torch.where(keep[..., None], weight, 0.0).movedim(-1, 1)


def parallel(a: Shaped[Tensor, "b t ..."], b: Shaped[Tensor, "b t ..."], *, state: Tensor | None = None,
             segments: Segments | None = None) -> Mixed:
    """By doubling: after k rounds every token holds the last 2^k steps. Log-depth, T log T work and memory."""
    dtype, a, b, start = _prepare(a, b, state, segments)
    product, total = doubled(a, b)
    h = total + product * start[:, None]
    last, h = h[:, -1].clone(), h.to(dtype)
    return Mixed(h if segments is None else segments.hold(h), last)


def doubled(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """All prefixes of the pairs (a, b) along axis 1 under (a2, b2) . (a1, b1) = (a1 a2, a2 b1 + b2), each [B, T, ...].

    Source: [mamba] Method 9.
    """
    span = 1
    while span < a.shape[1]:
        b = torch.cat([b[:, :span], torch.addcmul(b[:, span:], a[:, span:], b[:, :-span])], 1)
        a = torch.cat([a[:, :span], a[:, span:] * a[:, :-span]], 1)
        span *= 2
    return a, b


def chunked(a: Shaped[Tensor, "b t ..."], b: Shaped[Tensor, "b t ..."], *, state: Tensor | None = None,
            segments: Segments | None = None) -> Mixed:
    """By chunks of chunks, all of a level side by side. Linear in T in time and memory; first-order gradients by hand."""
    dtype, a, b, start = _prepare(a, b, state, segments)
    h, last = _states(a, b, start)
    h = h.to(dtype)
    return Mixed(h if segments is None else segments.hold(h), last)


@gpu_only()
def fused(a: Shaped[Tensor, "b t ..."], b: Shaped[Tensor, "b t ..."], *, state: Tensor | None = None,
          segments: Segments | None = None) -> Mixed:
    """One Triton kernel over parts of T side by side, with states in float32. Every gradient is deterministic.

    Complex decays are turned away first: with Phi_t the sum of the angles of a, e^{-i Phi_t} h_t has the real decays |a_t|.
    """
    from seqloom.kernels.triton import diagonal_scan  # lazy: the package runs without Triton

    dtype = torch.promote_types(a.dtype, b.dtype)
    wide, shape = accumulator(dtype), torch.broadcast_shapes(a.shape, b.shape)
    a, b = a.expand(shape), b.expand(shape)
    turn = None
    if dtype.is_complex:
        if segments is not None:
            a, b = segments.hold(a, 1.0), segments.hold(b)
        # the sum in float64: an angle of thousands of radians has few digits left in float32
        turn = torch.polar(torch.ones_like(a.real), a.angle().double().cumsum(1).remainder(2 * torch.pi).to(a.real.dtype))
        a, b = torch.cat([a.abs()] * 2, -1), _parts(b * turn.conj())
        state = None if state is None else _parts(state)
    low, real = narrow(b.dtype), b.shape
    a, b = (x.to(low).reshape(*real[:2], -1).contiguous() for x in (a, b))
    shape = b[:, 0].shape
    start = b.new_zeros(shape, dtype=torch.float32) if state is None else state.reshape(shape).float().contiguous()
    code = None if segments is None else segments.marks()
    h, last = diagonal_scan.launch(a, b, start, code)
    h, last = h.reshape(real), last.reshape(real[0], *real[2:])
    if turn is not None:
        h, last = (torch.complex(*x.to(torch.empty(0, dtype=wide).real.dtype).chunk(2, -1)) for x in (h, last))
        h, last = h * turn, last * turn[:, -1]
    h, last = h.to(dtype), last.to(wide)
    return Mixed(h if segments is None else segments.hold(h), last)


def _parts(numbers: Tensor) -> Tensor:
    return torch.cat([numbers.real, numbers.imag], -1)


def both_ways(form: Callable[..., Mixed]) -> Callable[..., Mixed]:
    """`form` over the sequence and over its flip, summed: h_t + the state that a scan from the end has at t."""

    @wraps(form, assigned=())
    def run(a: Tensor, b: Tensor, *, state: None = None, segments: Segments | None = None, **options: Any) -> Mixed:
        ahead = form(a, b, state=None, segments=segments, **options).y
        flipped = None if segments is None else flip(segments)
        behind = form(a.flip(1), b.flip(1), state=None, segments=flipped, **options).y
        return Mixed(ahead + behind.flip(1))

    return run


def _prepare(a: Tensor, b: Tensor, state: Tensor | None,
             segments: Segments | None) -> tuple[torch.dtype, Tensor, Tensor, Tensor]:
    """The dtype of the result; a and b in the accumulator's, boundaries and holds selected; the state to start from."""
    dtype = torch.promote_types(a.dtype, b.dtype)
    wide = accumulator(dtype)
    a, b = torch.broadcast_tensors(a.to(wide), b.to(wide))
    if segments is not None:
        first = segments.starts().reshape(*a.shape[:2], *(1,) * (a.ndim - 2))
        a, b = torch.where(first, 0.0, segments.hold(a, 1.0)), segments.hold(b)
    start = torch.zeros_like(b[:, 0]) if state is None else state.to(wide)
    return dtype, a, b, start


# The scan in place --------------------------------------------------------------------------------------------------

def advance(decay: Tensor, h: Tensor, start: Tensor, *, reverse: bool = False,
            whole: Callable[[Callable[[Tensor], Tensor]], Tensor] | None = None) -> None:
    """Turn the writes h [B, T, ...] into the states h_t = decay_t h_{t-1} + h_t in place, h_{-1} = `start` [B, ...].

    T is cut in chunks. A loop over the positions of a chunk, all chunks side by side, finds what each one adds and how
    much it lets through; the same problem over chunks is solved by this function; a second loop starts from its answer.
    `reverse` runs from the last token: h_t = decay_t h_{t+1} + h_t, h_T = `start`. `whole(split)`, where it is cheaper
    than the product of decays, gives that of every chunk [B, n, ...], with split(x [B, T, ...]) = [B, n, C, ...].
    No gradient is traced through this.
    """
    tokens = h.shape[1]
    if tokens <= CHUNK:
        _walk(decay.unbind(1), h.unbind(1), start, reverse)
        return
    chunk = min(CHUNK, 1 << (tokens.bit_length() - 1) // 2)  # about the square root
    count = tokens // chunk
    extra = tokens - count * chunk
    low = extra if reverse else 0  # the tokens that fill no chunk come last

    def split(x: Tensor) -> Tensor:
        return x.narrow(1, low, count * chunk).unflatten(1, (count, chunk))

    a, b = split(decay).unbind(2), split(h).unbind(2)
    a, b = (a[::-1], b[::-1]) if reverse else (a, b)
    total = b[0].clone()
    for i in range(1, chunk):
        torch.addcmul(b[i], a[i], total, out=total)
    if whole is not None:
        product = whole(split)
    else:
        product = a[0].clone()
        for i in range(1, chunk):
            product.mul_(a[i])
    advance(product, total, start, reverse=reverse)
    head, tail = (slice(None, -1), slice(1, None)) if reverse else (slice(1, None), slice(None, -1))
    b[0][:, head].addcmul_(a[0][:, head], total[:, tail])
    edge = -1 if reverse else 0
    b[0][:, edge].addcmul_(a[0][:, edge], start)
    for i in range(1, chunk):
        b[i].addcmul_(a[i], b[i - 1])
    if extra:
        rest = slice(None, extra) if reverse else slice(tokens - extra, None)
        _walk(decay[:, rest].unbind(1), h[:, rest].unbind(1), h[:, extra if reverse else tokens - extra - 1], reverse)


def _walk(decay: tuple[Tensor, ...], h: tuple[Tensor, ...], start: Tensor, reverse: bool) -> None:
    for a, b in zip(decay[::-1], h[::-1], strict=True) if reverse else zip(decay, h, strict=True):
        b.addcmul_(a, start)
        start = b


# One operator for the compiler: the recursion above depends on T, and a graph must not ------------------------------

@torch.library.custom_op("seqloom::diagonal_scan", mutates_args=(),
                         schema="(Tensor a, Tensor b, Tensor start) -> (Tensor, Tensor)")
def _states(a: Tensor, b: Tensor, start: Tensor) -> tuple[Tensor, Tensor]:
    """All states [B, T, ...], and the last one."""
    h = b.clone(memory_format=torch.contiguous_format)
    advance(a, h, start)
    return h, h[:, -1].clone()


@torch.library.custom_op("seqloom::diagonal_scan_backward", mutates_args=(),
                         schema="(Tensor dh, Tensor? dlast, Tensor a, Tensor h, Tensor start) -> (Tensor, Tensor, Tensor)")
def _gradients(dh: Tensor, dlast: Tensor | None, a: Tensor, h: Tensor, start: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of a, b and start."""
    a = a.conj().resolve_conj()
    g = dh.clone(memory_format=torch.contiguous_format)
    if dlast is not None:
        g[:, -1] += dlast
    if g.shape[1] > 1:
        advance(a[:, 1:], g[:, :-1], g[:, -1], reverse=True)
    da = torch.empty_like(g)
    torch.mul(g[:, 0], start.conj(), out=da[:, 0])
    torch.mul(g[:, 1:], h[:, :-1].conj(), out=da[:, 1:])
    return da, g, a[:, 0] * g[:, 0]


@_states.register_fake
def _(a: Tensor, b: Tensor, start: Tensor) -> tuple[Tensor, Tensor]:
    return b.new_empty(b.shape), start.new_empty(start.shape)


@_gradients.register_fake
def _(dh: Tensor, dlast: Tensor | None, a: Tensor, h: Tensor, start: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return a.new_empty(a.shape), a.new_empty(a.shape), start.new_empty(start.shape)


def _keep(ctx: Any, inputs: tuple, output: tuple) -> None:
    a, _, start = inputs
    ctx.save_for_backward(a, output[0], start)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, dh: Tensor | None, dlast: Tensor | None) -> tuple[Tensor | None, ...]:
    a, h, start = ctx.saved_tensors
    if dh is None:
        if dlast is None:
            return None, None, None
        dh = torch.zeros_like(h)
    return _gradients(dh, dlast, a, h, start)


_states.register_autograd(_backward, setup_context=_keep)

__all__ = ["advance", "both_ways", "chunked", "doubled", "matrix", "parallel", "step"]
