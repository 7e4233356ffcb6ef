"""Long convolution y_t = sum_{s <= t} k_{t-s} u_s, with a kernel per channel that may be as long as the sequence.

Two kinds of kernel. A given one, k [D, L], is applied by FFT (`convolve`). One made by a diagonal state space,

    h_t = Abar h_{t-1} + b u_t      y_t = 2 Re(c' h_t)      k_l = 2 Re sum_n c_n b_n Abar_n^l,

has a state, and so it also streams: `recurrent` (the definition), `chunked` (linear in T) and `parallel` (the FFT of
k). A = exp(log_a), b and c are complex [D, N], one of each conjugate pair of poles; powers are exp(l log_a). No form
holds a [D, N, T] or [B, T, D, N] tensor. The state is [B, D, N, 2] (real, imaginary).

Both directions: y_t = sum_{s <= t} k_{t-s} u_s + sum_{s > t} k'_{s-t-1} u_s, the kernel pad(k) + pad(flip(k')).
Sources: [s4d] Method 4, 5 and 10; [s4-survey] Method 1 and 5.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from einops import einsum, rearrange
from jaxtyping import Complex, Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from seqloom.core.mixer import accumulator
from seqloom.core.scan import carry, scan
from seqloom.core.segments import Segments
from seqloom.core.state import Mixed
from seqloom.kernels.decay_scan import flip
from seqloom.kernels.rows import regroup, take

CHUNK = 64
SHORT = 64  # tokens of a row up to which many of them are one product with a matrix, faster than transforms of each


# A given kernel ---------------------------------------------------------------------------------------------------

def toeplitz(k: Float[Tensor, "d l"], tokens: int, *, back: Float[Tensor, "d l"] | None = None,
             segments: Segments | None = None) -> Float[Tensor, "b d t t"]:
    """The T x T mixing weights, [1 or B, D, T, T]: y = toeplitz @ u. The definition of `convolve`, quadratic in T.

    Lags count real tokens, so that padding inside a segment takes no time.
    """
    at = torch.arange(tokens, device=k.device)[None] if segments is None else segments.real.cumsum(1)
    lag = at[:, :, None] - at[:, None, :]
    forward, backward = (lag >= 0) & (lag < k.shape[1]), lag < 0
    if segments is not None:
        pair = segments.real[:, :, None] & segments.real[:, None, :] & (segments.run[:, :, None] == segments.run[:, None, :])
        forward, backward = forward & pair, backward & pair
    pick = lambda k, lag, keep: torch.where(keep, k[:, lag.clamp(0, k.shape[1] - 1)], 0.0)  # noqa: E731
    weight = pick(k, lag, forward)
    if back is not None:
        weight = weight + pick(back, -lag - 1, backward & (-lag - 1 < back.shape[1]))
    return rearrange(weight, "d b i j -> b d i j")


def convolve(u: Float[Tensor, "b t d"], k: Float[Tensor, "d l"], *, back: Float[Tensor, "d l"] | None = None,
             segments: Segments | None = None) -> Float[Tensor, "b t d"]:
    """y = k * u within every segment, with `back` towards the past of later tokens (module docstring): by FFT, or where rows
    are short and many by a product with a matrix.

    The transform is at least as long as signal and kernel together, so that nothing wraps around. Each segment gets
    a row of its own (`rows.regroup`), so that a loud one leaves no rounding error in a quiet one. Sizes of rows depend
    on the data: compiled code takes `_by_halves`, whose shapes do not.
    """
    wide = accumulator(u.dtype)
    with _full_precision(u):
        return _within(u.to(wide), k.to(wide), None if back is None else back.to(wide), segments).to(u.dtype)


def _within(u: Tensor, k: Tensor, back: Tensor | None, segments: Segments | None) -> Tensor:
    if segments is None:
        return _fft(u, k, back)
    u = segments.hold(u)
    if torch.compiler.is_compiling():
        y = _by_halves(u, k, segments)
        return y if back is None else y + _by_halves(u.flip(1), F.pad(back, (1, 0)), flip(segments)).flip(1)
    rows = regroup(segments)
    if not rows.buckets:
        return torch.zeros_like(u)
    return rows.join([_fft(part, k, back) for part in rows.split(u)])


def _fft(u: Float[Tensor, "b t d"], k: Float[Tensor, "d l"], back: Tensor | None) -> Float[Tensor, "b t d"]:
    tokens, compiling = u.shape[1], torch.compiler.is_compiling()
    k = k[:, :tokens]
    if tokens <= min(SHORT, 2 * u.shape[0]) and not compiling:
        return _tokens(_chunks(u, tokens) @ _square(k, back, tokens), u.shape[0])
    size = 2 * tokens if compiling else _smooth(2 * tokens)
    if back is not None:  # lag -1 stands at the very end of the period
        back = back[:, : tokens - 1]
        k = F.pad(k, (0, size - k.shape[1])) + F.pad(back.flip(1), (size - back.shape[1], 0))
    if not compiling:
        return _Periodic.apply(u, k, size)
    product = torch.fft.rfft(u.transpose(1, 2), n=size) * torch.fft.rfft(k, n=size)
    return torch.fft.irfft(product, n=size)[..., :tokens].transpose(1, 2)


class _Periodic(torch.autograd.Function):
    """The first T values of the convolution of u [B, T, D] and k [D, L] with a period of `size` >= T, L.

    Autograd of a real transform is a complex one of twice the work; here all are real. Channels go in groups that fit
    a processor's cache, and spectra are taken again in the backward pass, so that none is kept.
    """

    @staticmethod
    def forward(u: Tensor, k: Tensor, size: int) -> Tensor:
        line = u.transpose(1, 2).contiguous()
        y = torch.empty_like(line)
        for part in _groups(line, size):
            spectrum = torch.fft.rfft(line[:, part], n=size) * torch.fft.rfft(k[part], n=size)
            y[:, part] = torch.fft.irfft(spectrum, n=size)[..., : u.shape[1]]
        return y.transpose(1, 2).contiguous()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        u, k, ctx.size = inputs
        ctx.save_for_backward(u, k)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple:
        (u, k), size = ctx.saved_tensors, ctx.size
        for_u, for_k = ctx.needs_input_grad[:2]
        gradient = gradient.transpose(1, 2).contiguous()
        line = u.transpose(1, 2).contiguous()
        d_u, d_k = torch.empty_like(line), torch.empty_like(k)
        for part in _groups(gradient, size):
            g = torch.fft.rfft(gradient[:, part], n=size)
            if for_u:
                spectrum = g * torch.fft.rfft(k[part], n=size).conj()
                d_u[:, part] = torch.fft.irfft(spectrum, n=size)[..., : u.shape[1]]
            if for_k:
                spectrum = (g * torch.fft.rfft(line[:, part], n=size).conj()).sum(0)
                d_k[part] = torch.fft.irfft(spectrum, n=size)[..., : k.shape[1]]
        return d_u.transpose(1, 2).contiguous() if for_u else None, d_k if for_k else None, None


def _groups(u: Float[Tensor, "b d t"], size: int) -> list[slice]:
    """Channels in groups of about a megabyte of signal; all at once where the device is not a CPU."""
    channels = u.shape[1]
    group = channels if u.device.type != "cpu" else min(max((1 << 18) // (size * u.shape[0]), 1), channels)
    return [slice(start, start + group) for start in range(0, channels, group)]


def _smooth(size: int) -> int:
    """The least even number from `size` on without a prime factor above 5, which transforms fast."""
    best = 1 << max(size - 1, 1).bit_length()
    five = 1
    while five < best:
        three = five
        while three < best:
            number = three * 1 << max(-(-size // three) - 1, 0).bit_length()
            if number % 2 == 0:
                best = min(best, number)
            three *= 3
        five *= 5
    return best


def _by_halves(u: Float[Tensor, "b t d"], k: Float[Tensor, "d l"], segments: Segments) -> Float[Tensor, "b t d"]:
    """The causal convolution within segments in fixed shapes: u has zeros at holds.

    Blocks are joined pairwise, log2(T) times. What passes from the first half of a block to the second comes from
    tokens in the run that the middle stands in, and goes to tokens in that run: a selection of inputs and one of
    outputs around a plain convolution, and no mask over pairs.
    """
    tokens = u.shape[1]
    source, place, run, _ = _together(segments)
    size = 1
    while size < tokens:
        size *= 2
    x = F.pad(take(u, source), (0, 0, 0, size - tokens)).transpose(1, 2)
    run = torch.cat([run, run[:, -1:].expand(-1, size - tokens)], 1)[:, None]
    k = F.pad(k, (0, max(size - k.shape[1], 0)))
    small = min(CHUNK, size)
    y = _masked_toeplitz(rearrange(x, "b d (m r) -> d (b m) r", r=small), k[:, :small], run.reshape(-1, small))
    y = rearrange(y, "d (b m) r -> b d (m r)", b=u.shape[0])
    half = small
    while half < size:
        first, second = x.unflatten(-1, (-1, 2, half)).unbind(-2)
        run_1, run_2 = run.unflatten(-1, (-1, 2, half)).unbind(-2)
        middle = run_1[..., -1:]
        first = torch.where(run_1 == middle, first, 0.0)
        spectrum = torch.fft.rfft(first, n=2 * half) * torch.fft.rfft(k[:, : 2 * half], n=2 * half)[:, None]
        # positions below `half` wrap around; those read here, from `half` on, do not
        joined = torch.where(run_2 == middle, torch.fft.irfft(spectrum, n=2 * half)[..., half:], 0.0)
        y = y + torch.stack([torch.zeros_like(second), joined], -2).flatten(-3)
        half *= 2
    return segments.hold(take(y[..., :tokens].transpose(1, 2), place))


# A diagonal state space -------------------------------------------------------------------------------------------

def step(state: Float[Tensor, "b d n 2"], u: Float[Tensor, "b d"], *, log_a: Complex[Tensor, "d n"],
         b: Complex[Tensor, "d n"], c: Complex[Tensor, "d n"]) -> tuple[Tensor, Tensor]:
    """One token, as the papers write it. This is the definition; every other form must agree with it."""
    h = _complex(state)
    h = log_a.exp() * h + b * u.to(state.dtype)[..., None]
    return torch.view_as_real(h), 2 * (c * h).sum(-1).real.to(u.dtype)


def recurrent(u: Float[Tensor, "b t d"], *, log_a: Tensor, b: Tensor, c: Tensor, state: Tensor | None = None,
              segments: Segments | None = None) -> Mixed:
    """Token by token. state None: from nothing."""
    if state is None:
        state = _nothing(u, log_a)
    with _full_precision(u):
        return scan(lambda state, u: step(state, u, log_a=log_a, b=b, c=c), u, state=state, segments=segments)


def matrix(u: Float[Tensor, "b t d"], *, log_a: Tensor, b: Tensor, c: Complex[Tensor, "2 d n"], state: None = None,
           segments: Segments | None = None) -> Mixed:
    """Both directions by the T x T weights: their definition. c holds the read-out of the past and of the future."""
    tokens = u.shape[1]
    power = torch.exp(log_a[..., None] * torch.arange(tokens, device=u.device))
    k, back = 2 * einsum(c * b, power, "s d n, d n t -> s d t").real
    weight = toeplitz(k, tokens, back=back, segments=segments)
    u = u if segments is None else segments.hold(u)
    with _full_precision(u):
        y = einsum(weight.expand(u.shape[0], -1, -1, -1), u.to(k.dtype), "b d i j, b j d -> b i d")
    return Mixed(y.to(u.dtype))


def parallel(u: Float[Tensor, "b t d"], *, log_a: Tensor, b: Tensor, c: Tensor, state: Tensor | None = None,
             segments: Segments | None = None) -> Mixed:
    """By FFT. The kernel and the final state are matrix products of two short tables of powers."""
    tokens, wide = u.shape[1], accumulator(u.dtype)
    with _full_precision(u):
        line = u.to(wide)
        y = _within(line, kernel(tokens, log_a=log_a, b=b, c=c), None, segments)
        h = None if state is None else _complex(state)
        if segments is None:
            last = _summary(line, log_a=log_a, b=b)
            if h is not None:
                y, last = y + _readout(h, tokens, log_a=log_a, c=c), last + h * _exp(log_a, tokens)
        else:
            source, place, run, count = _together(segments)
            # the state sums the last run: its tokens are moved to the end, where token T - 1 - l has power l
            at = torch.arange(tokens, device=u.device) + (count - tokens)[:, None]
            mine = (at >= 0) & (run.gather(1, at.clamp(min=0)) == run[:, -1:])
            line = take(segments.hold(line), source.gather(1, at.clamp(min=0)))
            last = _summary(torch.where(mine[..., None], line, 0.0), log_a=log_a, b=b)
            if h is not None:
                read = torch.where((run == 0)[..., None], _readout(h, tokens, log_a=log_a, c=c), 0.0)
                y = y + segments.hold(take(read, place))
                goes_on = (run[:, -1] == 0)[:, None, None]
                last = last + torch.where(goes_on, h * _exp(log_a, count[:, None, None]), 0.0)
    return Mixed(y.to(u.dtype), torch.view_as_real(last))


def parallel_bidirectional(u: Float[Tensor, "b t d"], *, log_a: Tensor, b: Tensor, c: Complex[Tensor, "2 d n"],
                           state: None = None, segments: Segments | None = None) -> Mixed:
    """Both directions by one FFT, with the two kernels in one."""
    with _full_precision(u):
        k, back = (kernel(u.shape[1], log_a=log_a, b=b, c=side) for side in c)
    return Mixed(convolve(u, k, back=back, segments=segments))


def chunked(u: Float[Tensor, "b t d"], *, log_a: Tensor, b: Tensor, c: Tensor, state: Tensor | None = None,
            segments: Segments | None = None, chunk: int = CHUNK, delay: int = 0) -> Mixed:
    """By chunks: a Toeplitz product inside, one state per chunk between. Linear in T in time and memory.

    What enters and what leaves a chunk are matrix products with the powers up to `chunk`, and `core.scan.carry` joins
    the states over chunks. With `delay=1` a token reads the state before its own write (the second direction of a
    bidirectional pass). chunk: a power of two.
    """
    (batch, tokens, _), wide = u.shape, accumulator(u.dtype)
    size = min(chunk, 2 * _root(tokens))  # tables grow with the chunk, so short sequences take a shorter one
    extra = -tokens % size
    packed = None
    if segments is not None:
        packed = _pack(segments, extra, size)
        u = take(segments.hold(u), packed.source)
    with _full_precision(u):
        x = _chunks(F.pad(u.to(wide), (0, 0, 0, extra)), size)
        write = _writes(log_a, b, size)
        read = _reads(log_a, c if delay else c * _exp(log_a, 1), size)
        own = torch.zeros_like(b.real[:, :1]) if delay else 2 * (b * c).real.sum(-1, keepdim=True)
        k = torch.cat([own, (torch.view_as_real(b).flatten(-2)[:, None] * read[:, :-1]).sum(-1)], 1)
        leaving, decay = x, _exp(log_a, size)[:, None, None]
        if packed is not None:
            leaving = torch.where((packed.run == packed.last[..., None]).flatten(0, 1), x, 0.0)
            decay = torch.where((packed.last == packed.entering)[..., None], decay, 0.0)
        writes = _columns(leaving @ write).unflatten(1, (-1, batch))  # [d m b n]
        start = _nothing(u, log_a) if state is None else state
        before, _ = carry(decay.expand(-1, writes.shape[1], -1, -1), writes, _complex(start.transpose(0, 1)))
        y = torch.view_as_real(before).flatten(-2).flatten(1, 2) @ read.transpose(1, 2)
        if packed is None:
            y = torch.baddbmm(y, x, _triangle(k))
            h = _last(x, before, write, log_a, tokens)
        else:
            y = torch.where((packed.run == packed.entering[..., None]).flatten(0, 1), y, 0.0)
            y = y + _masked_toeplitz(x, k, packed.run.flatten(0, 1))
            h = torch.view_as_real(_last_packed(x, before, write, log_a, packed))
            h = torch.where((packed.number > 0)[:, None, None, None], h, start)
        y = _tokens(y, batch)[:, :tokens].to(u.dtype)
    if segments is None or packed is None:
        return Mixed(y, torch.view_as_real(h))
    return Mixed(segments.hold(take(y, packed.place)), h)


def chunked_bidirectional(u: Float[Tensor, "b t d"], *, log_a: Tensor, b: Tensor, c: Complex[Tensor, "2 d n"],
                          state: None = None, segments: Segments | None = None, chunk: int = CHUNK) -> Mixed:
    """Both directions by two chunked passes, the second over the flipped sequence and one token late."""
    wide = u.to(accumulator(u.dtype))
    ahead = chunked(wide, log_a=log_a, b=b, c=c[0], segments=segments, chunk=chunk)
    flipped = None if segments is None else flip(segments)
    behind = chunked(wide.flip(1), log_a=log_a, b=b, c=c[1], segments=flipped, chunk=chunk, delay=1)
    return Mixed((ahead.y + behind.y.flip(1)).to(u.dtype))


def kernel(tokens: int, *, log_a: Complex[Tensor, "d n"], b: Complex[Tensor, "d n"],
           c: Complex[Tensor, "d n"]) -> Float[Tensor, "d t"]:
    """k_l = 2 Re sum_n c_n b_n Abar_n^l for l < T: with l = q r + s, one product of [T / r, 2N] with [2N, r] a channel."""
    size, near, many = _grid(tokens)
    far = _powers(log_a * size, b, near, many)
    return (torch.view_as_real(far).flatten(-2) @ _reads(log_a, c, size).transpose(1, 2)).flatten(1)[:, :tokens]


# Pieces -----------------------------------------------------------------------------------------------------------

def _readout(h: Complex[Tensor, "b d n"], tokens: int, *, log_a: Tensor, c: Tensor) -> Float[Tensor, "b t d"]:
    """What a state gives to the T tokens after it, y_t = 2 Re(c' Abar^(t+1) h) for t = 0 .. T - 1."""
    size, near, many = _grid(tokens, h.shape[0])
    far = _powers(log_a * size, torch.ones_like(c), near, many)[:, :, None] * h.transpose(0, 1)[:, None]
    y = torch.view_as_real(far).flatten(-2).flatten(1, 2) @ _reads(log_a, c * _exp(log_a, 1), size).transpose(1, 2)
    return _tokens(y, h.shape[0])[:, :tokens]


def _summary(u: Float[Tensor, "b t d"], *, log_a: Tensor, b: Tensor) -> Complex[Tensor, "b d n"]:
    """The state after T tokens from nothing: sum_t Abar^(T-1-t) b u_t."""
    tokens = u.shape[1]
    size, near, many = _grid(tokens, u.shape[0])
    x = _chunks(F.pad(u, (0, 0, size * near * many - tokens, 0)), size)
    part = _columns(x @ _writes(log_a, b, size)).unflatten(1, (-1, u.shape[0]))
    if near * many == 1:
        return part[:, 0].transpose(0, 1)
    far = _powers(log_a * size, torch.ones_like(b), near, many, reverse=True)
    return (part * far[:, :, None]).sum(1).transpose(0, 1)


def _last(x: Float[Tensor, "d mb r"], before: Complex[Tensor, "d m b n"], write: Float[Tensor, "d r w"],
          log_a: Complex[Tensor, "d n"], tokens: int) -> Complex[Tensor, "b d n"]:
    """The state after the last token: the state that enters its chunk, and the chunk's writes."""
    size, (many, batch) = x.shape[-1], before.shape[1:3]
    left = tokens - (many - 1) * size  # tokens in the last chunk
    h = _columns(x[:, -batch:, :left] @ write[:, size - left :])
    return (h + _exp(log_a, left)[:, None] * before[:, -1]).transpose(0, 1)


class _Packed(NamedTuple):
    """Segments of rows whose real tokens were moved together, by chunks."""

    source: Tensor    # [b t], as `_together` gives them, and so is place
    place: Tensor     # [b t]
    number: Tensor    # [b], of real tokens
    run: Tensor       # [m b r]
    last: Tensor      # [m b], the run of each chunk's last token
    entering: Tensor  # [m b], that of the last token before it: the count of boundaries so far


def _pack(segments: Segments, extra: int, size: int) -> _Packed:
    source, place, run, count = _together(segments)
    run = rearrange(torch.cat([run, run[:, -1:].expand(-1, extra)], 1), "b (m r) -> m b r", r=size)
    last = run[..., -1]
    return _Packed(source, place, count, run, last, F.pad(last, (0, 0, 1, 0))[:-1])


def _last_packed(x: Float[Tensor, "d mb r"], before: Complex[Tensor, "d m b n"], write: Float[Tensor, "d r w"],
                 log_a: Complex[Tensor, "d n"], packed: _Packed) -> Complex[Tensor, "b d n"]:
    """As `_last`, after each row's last real token and of its run only. Anything where the row holds no token."""
    size, batch = x.shape[-1], before.shape[2]
    chunk = (packed.number - 1).clamp(min=0) // size
    left = packed.number - chunk * size  # 1 .. size; 0 where the row holds no token
    row = torch.arange(batch, device=left.device)
    last = packed.last[-1]
    # tokens of the chunk moved to its end, so that the last one has power 0
    at = torch.arange(size, device=left.device) - size + left[:, None]
    here = (at >= 0) & (packed.run[chunk, row].gather(1, at.clamp(min=0)) == last[:, None])
    line = x[:, chunk * batch + row].gather(-1, at.clamp(min=0).expand(x.shape[0], -1, -1))
    h = _columns(torch.where(here, line, 0.0) @ write).transpose(0, 1)
    entered = before[:, chunk, row].transpose(0, 1) * _exp(log_a, left[:, None, None])
    return h + torch.where((last == packed.entering[chunk, row])[:, None, None], entered, 0.0)


def _masked_toeplitz(x: Float[Tensor, "d m r"], k: Float[Tensor, "d r"], run: Int[Tensor, "m r"]) -> Float[Tensor, "d m r"]:
    """The causal product inside chunks, between tokens of one run only: blocks joined pairwise as in `_by_halves`."""
    channels, size = k.shape
    y = x * k[:, None, :1]
    half = 1
    while half < size:
        first = x.reshape(channels, -1, 2, half)[:, :, 0]
        run_1, run_2 = run.reshape(-1, 2, half).unbind(-2)
        middle = run_1[:, -1:]
        # token j of the first half and i of the second are half + i - j apart
        weight = k[:, 1 : 2 * half].unfold(-1, half, 1).flip(1)
        joined = torch.where(run_1 == middle, first, 0.0) @ weight
        joined = torch.where(run_2 == middle, joined, 0.0)
        y = y + torch.stack([torch.zeros_like(joined), joined], -2).reshape(x.shape)
        half *= 2
    return y


def _chunks(x: Float[Tensor, "b t d"], size: int) -> Float[Tensor, "d mb r"]:
    """Tokens by chunk, channels first: rows stand as "d (m b) r"."""
    if torch.compiler.is_compiling():
        return _to_chunks(x, size)
    return _Layout.apply(x, _to_chunks, size, _to_tokens, x.shape[0])


def _tokens(y: Float[Tensor, "d mb r"], batch: int) -> Float[Tensor, "b t d"]:
    """The inverse of `_chunks`."""
    if torch.compiler.is_compiling():
        return _to_tokens(y, batch)
    return _Layout.apply(y, _to_tokens, batch, _to_chunks, y.shape[-1])


def _to_chunks(x: Tensor, size: int) -> Tensor:
    return rearrange(x, "b (m r) d -> d (m b) r", r=size).contiguous()


def _to_tokens(y: Tensor, batch: int) -> Tensor:
    return rearrange(y, "d (m b) r -> b (m r) d", b=batch).contiguous()


class _Layout(torch.autograd.Function):
    """A permutation whose gradient is laid out anew as well.

    Autograd would hand back a strided view, and a batched product copies such a matrix by matrix.
    """

    @staticmethod
    def forward(x: Tensor, there: Callable, argument: int, back: Callable, inverse: int) -> Tensor:
        return there(x, argument)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        ctx.arguments = inputs[1:]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple:
        there, argument, back, inverse = ctx.arguments
        return _Layout.apply(gradient, back, inverse, there, argument), None, None, None, None


def _triangle(k: Float[Tensor, "d r"]) -> Float[Tensor, "d r r"]:
    """[j, i] = k_{i-j}, 0 where i < j."""
    return _square(k, None, k.shape[-1])


def _square(k: Float[Tensor, "d l"], back: Float[Tensor, "d l"] | None, size: int) -> Float[Tensor, "d r r"]:
    """[j, i] = k_{i-j}, and where i < j of `back`, if any, the entry j - i - 1: a window sliding over both in one row."""
    line = F.pad(k, (size - 1, size - k.shape[-1]))
    if back is not None:
        back = back[:, : size - 1].flip(1)
        line = line + F.pad(back, (size - 1 - back.shape[-1], size))
    return line.unfold(-1, size, 1).flip(1)


def _root(count: int) -> int:
    """The power of two from sqrt(count) on."""
    size = 1
    while size * size < count:
        size *= 2
    return size


def _exp(log_a: Complex[Tensor, "..."], times: int | Tensor) -> Complex[Tensor, "..."]:
    """Abar^times. By magnitude and angle, which vectorises where a complex exponential does not."""
    return torch.polar((log_a.real * times).exp(), log_a.imag * times)


def _grid(tokens: int, batch: int = 1) -> tuple[int, int, int]:
    """(size, near, many): T tokens as near * many chunks of `size`, about sqrt(T) each, the last ones partly empty.

    A table of powers has `size` rows, and every chunk of every sequence of the batch has states of its own: many short
    sequences are one chunk each.
    """
    if tokens <= CHUNK and batch >= 8:
        return 1 << (tokens - 1).bit_length(), 1, 1
    size = _root(tokens)
    near = _root(size)
    return size, near, -(-tokens // (size * near))


def _powers(log_a: Complex[Tensor, "d n"], scale: Complex[Tensor, "d n"], near: int, many: int,
            reverse: bool = False) -> Complex[Tensor, "d l n"]:
    """scale Abar^l for l < near * many, or in reverse order.

    Each is a product of two exponentials, so that only near + many are taken; longer products would lose digits.
    """
    index = torch.arange(max(near, many), device=log_a.device)[:, None]
    left = scale[:, None] * _exp((log_a * near)[:, None], index[:many])
    right = _exp(log_a[:, None], index[:near])
    if reverse:
        left, right = left.flip(1), right.flip(1)
    return (left[:, :, None] * right[:, None]).flatten(1, 2)


def _writes(log_a: Complex[Tensor, "d n"], b: Complex[Tensor, "d n"], size: int) -> Float[Tensor, "d r 2*n"]:
    """What each of `size` tokens adds to the state after the last: b Abar^(size-1-j), real and imaginary side by side."""
    near = _root(size)
    return torch.view_as_real(_powers(log_a, b, near, size // near, reverse=True)).flatten(-2)


def _reads(log_a: Complex[Tensor, "d n"], c: Complex[Tensor, "d n"], size: int) -> Float[Tensor, "d r 2*n"]:
    """What each of `size` tokens reads: 2 Re(c' Abar^i h) as a real product with h's parts side by side."""
    conjugate = lambda z: torch.complex(z.real, -z.imag)  # noqa: E731
    near = _root(size)
    return torch.view_as_real(_powers(conjugate(log_a), conjugate(2 * c), near, size // near)).flatten(-2)


def _together(segments: Segments) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(source, place, run [B, T], count [B]): real tokens moved to the front as by `Segments.order`, their runs and number.

    Holds behind them stand in the last run.
    """
    source, place = segments.order()
    count = segments.real.sum(1)
    front = torch.arange(source.shape[1], device=source.device) < count[:, None]
    return source, place, torch.where(front, segments.run.gather(1, source), segments.run[:, -1:]), count


def _nothing(u: Tensor, log_a: Tensor) -> Float[Tensor, "b d n 2"]:
    return torch.zeros(u.shape[0], *log_a.shape, 2, dtype=log_a.real.dtype, device=u.device)


def _complex(pairs: Float[Tensor, "... n 2"]) -> Complex[Tensor, "... n"]:
    return torch.view_as_complex(pairs.contiguous())


def _columns(x: Float[Tensor, "d r w"]) -> Complex[Tensor, "d r n"]:
    """Complex numbers of neighbouring columns, as products with `_writes` leave them."""
    return _complex(x.unflatten(-1, (-1, 2)))


def _full_precision(u: Tensor) -> torch.autocast:
    """Autocast is off inside: it would round the products of powers, and half-precision pairs are no complex numbers."""
    return torch.autocast(u.device.type, enabled=False)


__all__ = ["chunked", "chunked_bidirectional", "convolve", "kernel", "matrix", "parallel", "parallel_bidirectional",
           "recurrent", "step", "toeplitz"]
