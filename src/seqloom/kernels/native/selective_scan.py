"""Selective scan compiled by numba: one pass over the tokens per strip of channels, the states in the cache.

Strips of channels of every row are shared out to as many threads as PyTorch has. The forward pass keeps the states that
enter every `chunk` tokens; the backward pass makes those of one chunk anew, with their decays, and walks it from the end.
States are [N, W] with the channels innermost, so that every inner loop is one vector instruction after another.
`marks` [B, T], as `Segments.marks`: without bit 0 a token holds (nothing of it is read), at bit 1 the state is cleared.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from torch import Tensor

try:
    import numba
    from numba.extending import overload
except ImportError:  # the module can be imported and listed without it; only calling needs it
    numba = None  # type: ignore[assignment]

WIDEST, NARROWEST, LANES = 512, 64, 16  # channels of a strip: fewer waste loop overhead, more leave the cache
LEAST = 2**20  # states to start a thread for: about half a millisecond
LN2 = math.log(2.0)
# no "nnan" or "ninf": a NaN must come out as one
LOOPS = frozenset({"contract", "nsz", "arcp", "afn"})


def _compiled(fastmath: frozenset = LOOPS) -> Callable[[Callable], Callable]:
    """numba's njit, cached on disk where there is a place to write; the plain function without numba."""

    def wrap(function: Callable) -> Callable:
        if numba is None:
            return function
        function = inspect.unwrap(function)  # of run-time checks of annotations
        options: dict[str, Any] = dict(nogil=True, fastmath=set(fastmath), error_model="numpy")
        try:
            return numba.njit(cache=True, **options)(function)
        except RuntimeError:  # no writable place for a cache
            return numba.njit(**options)(function)

    return wrap


def _exp2(x):
    """2^x for x <= 0, in x's precision; at least 2^-126 in single."""
    return 2.0**x


if numba is not None:

    @overload(_exp2, jit_options=dict(fastmath=set(LOOPS), error_model="numpy"))
    def _exp2_of(x):
        def single(x):
            # 2^x = 2^(x - r) 2^r, r the nearest integer: a polynomial, and an exponent put together from bits. The
            # comparison lets NaN pass
            x = np.float32(-126.0) if x < np.float32(-126.0) else x
            r = (x + np.float32(12582912.0)) - np.float32(12582912.0)
            f = x - r
            p = np.float32(1.5403530e-4)
            p = p * f + np.float32(1.3333558e-3)
            p = p * f + np.float32(9.6181291e-3)
            p = p * f + np.float32(5.5504109e-2)
            p = p * f + np.float32(2.4022651e-1)
            p = p * f + np.float32(6.9314718e-1)
            p = p * f + np.float32(1.0)
            return p * np.int32((np.int32(r) + np.int32(127)) << np.int32(23)).view(np.float32)

        def double(x):
            return math.exp(x * LN2)

        return inspect.unwrap(single if x is numba.types.float32 else double)


@_compiled()
def _product(out, x, z):
    for e in range(out.shape[0]):
        out[e] = x[e] * z[e]


@_compiled()
def _add_product(out, x, z):
    for e in range(out.shape[0]):
        out[e] += x[e] * z[e]


@_compiled()
def _advance(h, dt, a, written, b):
    for n in range(h.shape[0]):
        for e in range(h.shape[1]):
            h[n, e] = _exp2(dt[e] * a[n, e]) * h[n, e] + written[e] * b[n]


@_compiled()
def _decays(out, dt, a):
    for n in range(out.shape[0]):
        for e in range(out.shape[1]):
            out[n, e] = _exp2(dt[e] * a[n, e])


@_compiled()
def _follow(new, decay, h, written, b):
    for n in range(new.shape[0]):
        for e in range(new.shape[1]):
            new[n, e] = decay[n, e] * h[n, e] + written[e] * b[n]


@_compiled()
def _read(y, h, c):
    for n in range(h.shape[0]):
        for e in range(h.shape[1]):
            y[e] += h[n, e] * c[n]


@_compiled()
def _write(h, x, c):
    for n in range(h.shape[0]):
        for e in range(h.shape[1]):
            h[n, e] += x[e] * c[n]


@_compiled(LOOPS | {"reassoc"})
def _dots(dc, h, dy, db, g, written):
    for n in range(h.shape[0]):
        c = dy[0] * 0
        b = dy[0] * 0
        for e in range(h.shape[1]):
            c += h[n, e] * dy[e]
            b += g[n, e] * written[e]
        dc[n] = c
        db[n] = b


@_compiled()
def _pass_back(g, dz, decay, before):
    for n in range(g.shape[0]):
        for e in range(g.shape[1]):
            v = g[n, e] * decay[n, e]
            g[n, e] = v
            dz[n, e] = v * before[n, e]


@_compiled()
def _split(ddt, da, dz, a, dt):
    for n in range(dz.shape[0]):
        for e in range(dz.shape[1]):
            ddt[e] += dz[n, e] * a[n, e]
            da[n, e] += dz[n, e] * dt[e]


@_compiled()
def _forward(x, dt, B, C, A2, D, start, marks, y, new, entering, strip, chunk, first, last):
    strips = (x.shape[2] + strip - 1) // strip
    for job in range(first, last):
        b = job // strips
        low = job % strips * strip
        high = min(low + strip, x.shape[2])
        a = A2[:, low:high].copy()
        h = start[b, :, low:high].copy()
        written = np.empty(high - low, x.dtype)
        for t in range(x.shape[1]):
            if t % chunk == 0:
                entering[t // chunk, b, :, low:high] = h
            if marks[b, t] & 2:
                h[:] = 0
            if not marks[b, t] & 1:
                y[b, t, low:high] = 0
                continue
            _product(written, dt[b, t, low:high], x[b, t, low:high])
            _advance(h, dt[b, t, low:high], a, written, B[b, t])
            _product(y[b, t, low:high], D[low:high], x[b, t, low:high])
            _read(y[b, t, low:high], h, C[b, t])
        new[b, :, low:high] = h


@_compiled()
def _backward(dy, dnew, x, dt, B, C, A, A2, D, entering, marks, dx, ddt, dB, dC, dA, dD, dstart, strip, chunk, first, last):
    tokens, states = x.shape[1], A.shape[0]
    strips = (x.shape[2] + strip - 1) // strip
    for job in range(first, last):
        b = job // strips
        piece = job % strips
        low = piece * strip
        high = min(low + strip, x.shape[2])
        width = high - low
        a, a2, d_skip = A[:, low:high].copy(), A2[:, low:high].copy(), D[low:high]
        g = dnew[b, :, low:high].copy()
        dz, da = np.empty_like(g), np.zeros_like(g)
        written, dwritten, dstep = np.empty(width, x.dtype), np.empty(width, x.dtype), np.empty(width, x.dtype)
        dskip = np.zeros(width, x.dtype)
        h = np.empty((chunk + 1, states, width), x.dtype)
        decay = np.empty((chunk, states, width), x.dtype)
        for c in range((tokens + chunk - 1) // chunk - 1, -1, -1):
            begin = c * chunk
            count = min(chunk, tokens - begin)
            h[0] = entering[c, b, :, low:high]
            for k in range(count):
                t = begin + k
                if not marks[b, t] & 1:
                    if marks[b, t] & 2:
                        h[k + 1] = 0
                    else:
                        h[k + 1] = h[k]
                    continue
                _product(written, dt[b, t, low:high], x[b, t, low:high])
                if marks[b, t] & 2:
                    decay[k] = 0
                else:
                    _decays(decay[k], dt[b, t, low:high], a2)
                _follow(h[k + 1], decay[k], h[k], written, B[b, t])
            for k in range(count - 1, -1, -1):
                t = begin + k
                if not marks[b, t] & 1:
                    if marks[b, t] & 2:
                        g[:] = 0
                    dx[b, t, low:high] = 0
                    ddt[b, t, low:high] = 0
                    dB[piece, b, t] = 0
                    dC[piece, b, t] = 0
                    continue
                step, x_in, dy_in = dt[b, t, low:high], x[b, t, low:high], dy[b, t, low:high]
                _product(written, step, x_in)
                _write(g, dy_in, C[b, t])
                dwritten[:] = 0
                _read(dwritten, g, B[b, t])
                _dots(dC[piece, b, t], h[k + 1], dy_in, dB[piece, b, t], g, written)
                _pass_back(g, dz, decay[k], h[k])
                _product(dstep, dwritten, x_in)
                _split(dstep, da, dz, a, step)
                ddt[b, t, low:high] = dstep
                _product(dx[b, t, low:high], dwritten, step)
                _add_product(dx[b, t, low:high], dy_in, d_skip)
                _add_product(dskip, dy_in, x_in)
        dA[b, :, low:high] = da
        dD[b, low:high] = dskip
        dstart[b, :, low:high] = g


def _share(kernel: Callable, jobs: int, work: int, *arguments: Any) -> None:
    """Run the jobs of a kernel in as many threads as PyTorch uses; compiled code holds no lock.

    `work` is the number of states that are computed: a thread is started for no fewer than LEAST of them.
    """
    workers = max(1, min(torch.get_num_threads(), jobs, work // LEAST))
    bounds = [jobs * i // workers for i in range(workers + 1)]
    if workers == 1:
        return kernel(*arguments, 0, jobs)
    with ThreadPoolExecutor(workers - 1) as pool:
        others = [pool.submit(kernel, *arguments, *bounds[i : i + 2]) for i in range(1, workers)]
        kernel(*arguments, *bounds[:2])
        for other in others:
            other.result()


def _strip(rows: int, channels: int) -> int:
    """Channels of a strip, so that every thread has one."""
    pieces = -(-torch.get_num_threads() // rows)
    return min(max(-(-channels // pieces // LANES) * LANES, NARROWEST), WIDEST)


def _arrays(dtype: torch.dtype, *tensors: Tensor) -> list[np.ndarray]:
    return [tensor.detach().to(dtype).contiguous().numpy() for tensor in tensors]


def _common(x: Tensor, A: Tensor, D: Tensor | None, marks: Tensor | None) -> tuple[Tensor, Tensor, np.ndarray]:
    marks = torch.ones(x.shape[:2], dtype=torch.int8) if marks is None else marks
    return A * (1 / LN2), A.new_zeros(A.shape[1]) if D is None else D, marks.contiguous().numpy()


def forward(x: Tensor, dt: Tensor, B: Tensor, C: Tensor, A: Tensor, D: Tensor | None, start: Tensor, marks: Tensor | None,
            chunk: int) -> tuple[Tensor, Tensor, Tensor]:
    """y [B, T, E], the last state [B, N, E] and those that enter each chunk [K, B, N, E]; A [N, E], start [B, N, E]."""
    rows, tokens, channels = x.shape
    wide = A.dtype
    A2, D, flags = _common(x, A, D, marks)
    y, new = torch.empty(x.shape, dtype=wide), torch.empty(start.shape, dtype=wide)
    entering = torch.empty(-(-tokens // chunk), *start.shape, dtype=wide)
    strip = _strip(rows, channels)
    _share(_forward, rows * -(-channels // strip), x.numel() * A.shape[0], *_arrays(wide, x, dt, B, C, A2, D, start), flags,
           *_arrays(wide, y, new, entering), strip, chunk)
    return y.to(x.dtype), new, entering


def backward(dy: Tensor, dnew: Tensor, x: Tensor, dt: Tensor, B: Tensor, C: Tensor, A: Tensor, D: Tensor | None,
             entering: Tensor, marks: Tensor | None, chunk: int) -> tuple[Tensor, ...]:
    """Gradients of x, dt, B, C in their dtypes, of A [N, E], D [E] and of the state at the start [B, N, E]."""
    rows, channels = x.shape[0], x.shape[2]
    wide = A.dtype
    A2, D, flags = _common(x, A, D, marks)
    strip = _strip(rows, channels)
    pieces = -(-channels // strip)
    dx, ddt = torch.empty(x.shape, dtype=wide), torch.empty(x.shape, dtype=wide)
    dB, dC = (torch.empty(pieces, *B.shape, dtype=wide) for _ in range(2))
    dA, dD, dstart = (torch.empty(rows, *shape, dtype=wide) for shape in (A.shape, A.shape[1:], A.shape))
    _share(_backward, rows * pieces, x.numel() * A.shape[0], *_arrays(wide, dy, dnew, x, dt, B, C, A, A2, D, entering), flags,
           *_arrays(wide, dx, ddt, dB, dC, dA, dD, dstart), strip, chunk)
    return dx.to(x.dtype), ddt.to(dt.dtype), dB.sum(0).to(B.dtype), dC.sum(0).to(C.dtype), dA.sum(0), dD.sum(0), dstart
