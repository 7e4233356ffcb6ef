"""Selective scan: a diagonal recurrence per channel whose step, input map and readout depend on the token.

    h_t = exp(dt_t A) h_{t-1} + (dt_t x_t) B_t'      y_t = h_t C_t        h [B, E, N], A [E, N] <= 0

Streams: x, dt [B, T, E], B, C [B, T, N]. Carries Mamba. With `zoh` the input is held over the step exactly:
h_t = exp(dt_t A) h_{t-1} + (exp(dt_t A) - 1) / A * x_t B_t'.
Source: [mamba] Method 3, 4 and 9.

The chunked form views T tokens as n chunks of C positions and walks the C positions of all chunks side by side, so that the
work on a step is a large tensor and the number of steps does not grow with T. It never holds [B, T, E, N] for the whole T: states are
made again in the backward pass, for a block of channels and a span of tokens at a time.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from seqloom.core.mixer import accumulator
from seqloom.core.scan import carry
from seqloom.core.segments import Segments
from seqloom.core.state import Mixed

SPAN = 8192          # tokens of a row handled at a time
BLOCK = 1 << 18      # elements of a step's working set: 1 MB in float32, a core's second-level cache
STORE = 1 << 22      # elements of states kept while a block's backward pass runs: 16 MB


def step(state: Float[Tensor, "b e n"], x: Float[Tensor, "b e"], dt: Float[Tensor, "b e"], B: Float[Tensor, "b n"],
         C: Float[Tensor, "b n"], *, A: Float[Tensor, "e n"], zoh: bool = False) -> tuple[Tensor, Tensor]:
    """One token, as the paper writes it. This is the definition; every other form must agree with it."""
    wide = state.dtype
    decay = dt.to(wide)[..., None] * A.to(wide)
    held = torch.expm1(decay) / A.to(wide) if zoh else dt.to(wide)[..., None]
    state = decay.exp() * state + held * x.to(wide)[..., None] * B.to(wide)[:, None, :]
    return state, (state * C.to(wide)[:, None, :]).sum(-1).to(x.dtype)


def parallel(x: Float[Tensor, "b t e"], dt: Float[Tensor, "b t e"], B: Float[Tensor, "b t n"], C: Float[Tensor, "b t n"], *,
             A: Float[Tensor, "e n"], state: Float[Tensor, "b e n"], segments: Segments | None = None, zoh: bool = False) -> Mixed:
    """The attention view, y_t = sum_s C_t' exp(A sum_{r=s+1..t} dt_r) B_s dt_s x_s: quadratic in T, an oracle for small T."""
    dtype, wide = x.dtype, state.dtype
    if segments is not None:
        x, dt, B, C = (segments.hold(stream) for stream in (x, dt, B, C))
    x, dt, B, C, A = (stream.to(wide) for stream in (x, dt, B, C, A))
    tokens = x.shape[1]
    run = torch.zeros(x.shape[:2], dtype=torch.int64, device=x.device) if segments is None else segments.run
    keep = (run[:, :, None] == run[:, None, :]) & torch.ones(tokens, tokens, dtype=torch.bool, device=x.device).tril()
    # sums of steps s+1..t, each over its own pairs: a difference of running sums would keep an earlier segment's rounding
    later = torch.where(keep.tril(-1)[..., None], dt.unsqueeze(2), 0.0)  # [b r s e]: dt_r where s < r
    span = torch.einsum("btr,brse->btse", keep.to(wide), later)
    weight = torch.where(keep[..., None, None], span[..., None] * A, -torch.inf).exp()  # [b t s e n]
    held = torch.expm1(dt[..., None] * A) / A if zoh else dt[..., None]
    write = held * x[..., None] * B[:, :, None, :]  # [b s e n]
    hidden = torch.einsum("btsen,bsen->bten", weight, write)
    since = torch.einsum("btr,bre->bte", (keep & (run == 0)[:, None, :]).to(wide), dt)[..., None] * A
    hidden = hidden + torch.where((run == 0)[..., None, None], since.exp() * state[:, None], 0.0)
    y = torch.einsum("bten,btn->bte", hidden, C).to(dtype)
    return Mixed(y if segments is None else segments.hold(y), hidden[:, -1])


def chunked(x: Float[Tensor, "b t e"], dt: Float[Tensor, "b t e"], B: Float[Tensor, "b t n"], C: Float[Tensor, "b t n"], *,
            A: Float[Tensor, "e n"], state: Float[Tensor, "b e n"], segments: Segments | None = None) -> Mixed:
    """Linear in T in time and memory; gradients (first order) by hand, with states made again."""
    batch, tokens, _ = x.shape
    dtype, wide = x.dtype, accumulator(x.dtype)
    starts = None
    if segments is not None:
        x, dt, B, C = (segments.hold(stream) for stream in (x, dt, B, C))  # a hold: no step, no write
        starts = segments.starts()
    chunk = min(1 << max(round(math.log2(max(min(tokens, SPAN), 1)) / 2), 2), 64)
    extra = -tokens % chunk
    x, dt, B, C = (F.pad(stream.to(wide), (0, 0, 0, extra)) for stream in (x, dt, B, C))
    if starts is not None:
        starts = F.pad(starts, (0, extra))
    ys, state = [], state.to(wide)
    for start in range(0, tokens, SPAN):
        part = slice(start, start + SPAN)
        y, state, _ = _selective_scan(x[:, part], dt[:, part], B[:, part], C[:, part], A.to(wide), state,
                                      None if starts is None else starts[:, part], chunk)
        ys.append(y)
    y = (ys[0] if len(ys) == 1 else torch.cat(ys, 1))[:, :tokens].to(dtype)
    return Mixed(y if segments is None else segments.hold(y), state)


@torch.library.custom_op("seqloom::selective_scan", mutates_args=())
def _selective_scan(x: Tensor, dt: Tensor, B: Tensor, C: Tensor, A: Tensor, state: Tensor, starts: Tensor | None,
                    chunk: int) -> tuple[Tensor, Tensor, Tensor]:
    """y [B, T, E], the last state, and the states entering each chunk [B, n, E, N]; T is a multiple of chunk."""
    walk = _Walk(x, dt, B, C, A, starts, chunk)
    write = torch.empty(*walk.rows, *A.shape, dtype=x.dtype, device=x.device)
    for channels in walk.blocks(BLOCK):
        h = write[:, channels].zero_().contiguous()
        scratch = torch.empty_like(h)
        for c in range(chunk):
            walk.advance(h, c, channels, scratch)
        write[:, channels] = h
    total = walk.total()
    split = lambda rows: rows.unflatten(0, (x.shape[0], -1))  # noqa: E731
    before, last = carry(split(total), split(write), state)
    y = torch.empty_like(walk.x)
    flat = before.flatten(0, 1)
    for channels in walk.blocks(BLOCK):
        h = flat[:, channels].clone()
        scratch = torch.empty_like(h)  # a new tensor each step would be new pages each step
        for c in range(chunk):
            walk.advance(h, c, channels, scratch)
            y[:, c, channels] = torch.bmm(h, walk.C[:, c, :, None])[..., 0]
    return y.reshape(x.shape), last.clone(), before.contiguous()


@_selective_scan.register_fake
def _(x: Tensor, dt: Tensor, B: Tensor, C: Tensor, A: Tensor, state: Tensor, starts: Tensor | None, chunk: int) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape), state.new_empty(state.shape), x.new_empty(x.shape[0], x.shape[1] // chunk, *A.shape)


@torch.library.custom_op("seqloom::selective_scan_backward", mutates_args=())
def _backward(dy: Tensor, dlast: Tensor, x: Tensor, dt: Tensor, B: Tensor, C: Tensor, A: Tensor, before: Tensor,
              starts: Tensor | None, chunk: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, dt, B, C, A and the incoming state.

    With g_t the gradient of h_t: g_t = C_t dy_t + a_{t+1} g_{t+1}; the decayed part of h_t is r_t = h_t - dt_t x_t B_t', so
    d(dt_t A) = g_t r_t without a division by the decay.
    """
    walk = _Walk(x, dt, B, C, A, starts, chunk)
    dy = dy.reshape(walk.x.shape)
    split = lambda rows: rows.unflatten(0, (x.shape[0], -1))  # noqa: E731
    # the gradient of each chunk's entering state from its own outputs, then from all later ones
    own = torch.empty(*walk.rows, *A.shape, dtype=x.dtype, device=x.device)
    for channels in walk.blocks(BLOCK):
        g = own[:, channels].zero_().contiguous()
        scratch = torch.empty_like(g)
        for c in reversed(range(chunk)):
            g.addcmul_(dy[:, c, channels, None], walk.C[:, c, None, :])
            g.mul_(walk.decay(c, channels, scratch))
        own[:, channels] = g
    after, dstate = carry(split(walk.total()).flip(1), split(own).flip(1), dlast)
    after = after.flip(1).flatten(0, 1)
    du, ddt = torch.empty_like(walk.x), torch.empty_like(walk.x)
    dB, dC = torch.zeros_like(walk.B), torch.zeros_like(walk.C)
    dA = torch.zeros_like(A)
    flat = before.flatten(0, 1)
    for channels in walk.blocks(STORE // chunk):
        h = flat[:, channels].clone()
        hs = torch.empty(chunk, *h.shape, dtype=h.dtype, device=h.device)
        decays = torch.empty_like(hs)
        for c in range(chunk):
            walk.advance(h, c, channels, decays[c])
            hs[c] = h
        g = after[:, channels].clone()
        a = A[channels]
        for c in reversed(range(chunk)):
            slope, u = dy[:, c, channels], walk.u[:, c, channels]
            g.addcmul_(slope[..., None], walk.C[:, c, None, :])
            dC[:, c] += torch.bmm(slope[:, None, :], hs[c])[:, 0]
            dB[:, c] += torch.bmm(u[:, None, :], g)[:, 0]
            du[:, c, channels] = torch.bmm(g, walk.B[:, c, :, None])[..., 0]
            decayed = hs[c].addcmul_(u[..., None], walk.B[:, c, None, :], value=-1).mul_(g)
            ddt[:, c, channels] = torch.einsum("ren,en->re", decayed, a)
            dA[channels] += torch.einsum("ren,re->en", decayed, walk.dt[:, c, channels])
            g.mul_(decays[c])
    ddt.addcmul_(du, walk.x)
    dx = du.mul_(walk.dt)
    return dx.reshape(x.shape), ddt.reshape(x.shape), dB.reshape(B.shape), dC.reshape(C.shape), dA, dstate.clone()


@_backward.register_fake
def _(dy: Tensor, dlast: Tensor, x: Tensor, dt: Tensor, B: Tensor, C: Tensor, A: Tensor, before: Tensor, starts: Tensor | None,
      chunk: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    return tuple(like.new_empty(like.shape) for like in (x, dt, B, C, A, dlast))


def _keep(ctx, inputs, output) -> None:  # noqa: ANN001
    x, dt, B, C, A, _, starts, chunk = inputs
    ctx.save_for_backward(x, dt, B, C, A, output[2], starts)
    ctx.chunk = chunk
    ctx.set_materialize_grads(True)


def _gradients(ctx, dy: Tensor, dlast: Tensor, _dbefore: Tensor) -> tuple:  # noqa: ANN001
    x, dt, B, C, A, before, starts = ctx.saved_tensors
    return (*_backward(dy.contiguous(), dlast.contiguous(), x, dt, B, C, A, before, starts, ctx.chunk), None, None)


_selective_scan.register_autograd(_gradients, setup_context=_keep)


class _Walk:
    """Streams as rows of chunks [R, C, ...] with R = B n, and one step of all chunks at a position."""

    def __init__(self, x: Tensor, dt: Tensor, B: Tensor, C: Tensor, A: Tensor, starts: Tensor | None, chunk: int):
        rows = lambda stream: stream.reshape(-1, chunk, *stream.shape[2:])  # noqa: E731
        self.x, self.dt, self.B, self.C, self.A = rows(x), rows(dt), rows(B).contiguous(), rows(C).contiguous(), A.contiguous()
        self.u = self.x * self.dt
        self.rows = self.x.shape[:1]
        self.resets: list[Tensor | None] = [None] * chunk
        self.alive = None
        if starts is not None and bool(starts.any()):
            starts = rows(starts)
            self.alive = ~starts.any(1)
            self.resets = [place if len(place := starts[:, c].nonzero()[:, 0]) else None for c in range(chunk)]

    def blocks(self, elements: int) -> list[slice]:
        """Blocks of channels such that a step's tensor has about `elements` elements."""
        size = max(elements // (self.rows[0] * self.A.shape[1]), 1)
        return [slice(i, i + size) for i in range(0, self.A.shape[0], size)]

    def decay(self, c: int, channels: slice, out: Tensor) -> Tensor:
        """exp(dt_c A), 0 where a run begins: [R, E', N]."""
        decay = torch.mul(self.dt[:, c, channels, None], self.A[channels], out=out).exp_()
        if self.resets[c] is not None:
            decay[self.resets[c]] = 0.0  # a selection: what was before is dropped, whatever its size
        return decay

    def advance(self, h: Tensor, c: int, channels: slice, decay: Tensor) -> None:
        """h <- exp(dt_c A) h + u_c B_c' in place; the decay is left in `decay`."""
        h.mul_(self.decay(c, channels, decay)).addcmul_(self.u[:, c, channels, None], self.B[:, c, None, :])

    def total(self) -> Tensor:
        """The decay over each chunk, exp(A sum dt): [R, E, N]; 0 where a run begins inside."""
        total = torch.mul(self.dt.sum(1)[..., None], self.A).exp_()
        return total if self.alive is None else torch.where(self.alive[:, None, None], total, 0.0)
