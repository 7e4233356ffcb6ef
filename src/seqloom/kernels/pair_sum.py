"""Mean of a function of pairs: y_i = mean_j f(n(a_i + b_j)) over the tokens j that i sees, a relation network's layer.

n normalises each pair over its channels, n(w) = (w - mean w) / std w, or is the identity; f acts on every channel. With
f = exp the result is its logarithm, z_i = log mean_j exp(n(a_i + b_j)), which never overflows. Where n is the identity and
f = exp the sum factorises and kernels/log_sum.py has it in linear time; here every pair is visited.

Streams a [B, T, H] (the readers) and b [B, S, H] (what is read), S = T unless `queries` and `keys` say where each stands, as
in kernels/softmax.py; what i sees is a Pattern. Time O(T S H). `matrix` keeps all pairs, `chunked` a tile of them at a time,
in the backward pass too, so that its memory is linear in T.
A channel vector without variance normalises to 0, with gradient 0: there is no epsilon that scale invariance would break on.
Source: [causalrn] Method 2, 5 and 7.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from seqloom.core import Mixed, Segments
from seqloom.core.mixer import accumulator
from seqloom.kernels import softmax
from seqloom.kernels.softmax import Coords, Pattern

BLOCK = 64       # readers in a tile, and at most as many tokens that are read (one reader alone: as many as fit)
PAIRS = 1 << 22  # numbers in a tile

# f for `activation`, and its derivative; "exp" is computed as a logarithm of a sum instead
FUNCTIONS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "elu": (F.elu, lambda u: u.clamp(max=0).exp()),
    "relu": (F.relu, lambda u: (u > 0).to(u.dtype)),
    "gelu": (F.gelu, lambda u: 0.5 * (1 + torch.erf(u / math.sqrt(2))) + u * torch.exp(-0.5 * u * u) / math.sqrt(2 * math.pi)),
}


def standardise(x: Float[Tensor, "... h"]) -> Float[Tensor, "... h"]:
    """(x - mean) / std over the last axis, without parameters or epsilon; 0 where all channels are equal."""
    x = x - x.mean(-1, keepdim=True)
    return x * _inverse_std(x)


def _inverse_std(centred: Tensor) -> Tensor:
    variance = centred.square().mean(-1, keepdim=True)
    some = variance > 0
    return torch.where(some, torch.where(some, variance, 1.0).rsqrt(), 0.0)


def matrix(a: Float[Tensor, "b t h"], b: Float[Tensor, "b s h"], *, normalise: bool, activation: str, pattern: Pattern,
           segments: Segments | None = None, queries: Coords | None = None, keys: Coords | None = None) -> Mixed:
    """All pairs at once, as the paper writes it. This is the definition; O(T S H) memory."""
    dtype, a, b, queries, keys = _placed(a, b, segments, queries, keys)
    keep = pattern.sees(queries, keys)[..., None]
    pair = a[:, :, None] + b[:, None]
    value = standardise(pair) if normalise else pair
    count = keep.sum(2)
    if activation == "exp":
        # a reader that sees nothing gets a finite sum here, and 0 below
        y = torch.where(keep | (count == 0)[:, :, None], value, -torch.inf).logsumexp(2) - count.clamp(min=1).to(a.dtype).log()
        y = torch.where(count > 0, y, 0.0)
    else:
        y = torch.where(keep, FUNCTIONS[activation][0](value), 0.0).sum(2) / count.clamp(min=1)
    y = y.to(dtype)
    return Mixed(y if segments is None else segments.hold(y))


def chunked(a: Float[Tensor, "b t h"], b: Float[Tensor, "b s h"], *, normalise: bool, activation: str, pattern: Pattern,
            segments: Segments | None = None, queries: Coords | None = None, keys: Coords | None = None) -> Mixed:
    """Tile by tile, each made again in the backward pass. Memory O((T + S) H). First-order gradients by hand."""
    aligned = pattern.causal and b.shape[1] >= a.shape[1]
    dtype, a, b, queries, keys = _placed(a, b, segments, queries, keys)
    if normalise:  # a pair's mean is the sum of two: taken out before, none is left in the pairs
        a, b = a - a.mean(-1, keepdim=True), b - b.mean(-1, keepdim=True)
    y = _Tiles.apply(a, b, (normalise, activation, pattern, queries, keys, aligned)).to(dtype)
    return Mixed(y if segments is None else segments.hold(y))


FORMS = {"matrix": matrix, "chunked": chunked}


def _placed(a: Tensor, b: Tensor, segments: Segments | None, queries: Coords | None,
            keys: Coords | None) -> tuple[torch.dtype, Tensor, Tensor, Coords, Coords]:
    """The dtype of the result, the streams in the accumulator's with holds at 0, and where their tokens stand."""
    dtype = torch.promote_types(a.dtype, b.dtype)
    a, b = a.to(accumulator(dtype)), b.to(accumulator(dtype))
    if segments is not None:
        a = segments.hold(a)
        b = segments.hold(b) if keys is None else b  # what was stored was held when it was written
    if keys is None or queries is None:
        queries = keys = softmax.line(a.shape[1], a.device) if segments is None else softmax.packed(segments)
    return dtype, a, b, queries, keys


class _Tiles(torch.autograd.Function):
    """Streams in the accumulator dtype. With u = n(a_i + b_j): dL/du = f'(u) dy_i / count_i, or for the logarithm of the
    mean of exponentials e^{u - z_i} dz_i / count_i; and through n, dL/dw = (dL/du - u mean(u dL/du)) / std w."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, how: tuple) -> Tensor:
        normalise, activation, pattern, queries, keys, aligned = how
        log = activation == "exp"
        y = torch.full_like(a, -torch.inf if log else 0.0)
        count = torch.zeros(*a.shape[:2], 1, dtype=torch.int64, device=a.device)
        for rows, cols in _tiles(a, b, aligned):
            keep = pattern.sees(*_slices(queries, keys, rows, cols))[..., None]
            u = a[:, rows, None] + b[:, None, cols]
            if normalise:
                u = u.mul_(_inverse_std(u))
            if log:
                y[:, rows] = torch.logaddexp(y[:, rows], u.masked_fill_(~keep, -torch.inf).logsumexp(2))
            else:
                y[:, rows] += FUNCTIONS[activation][0](u).masked_fill_(~keep, 0.0).sum(2)
            count[:, rows] += keep.sum(2)
        least = count.clamp(min=1)
        y = torch.where(count > 0, y - least.to(y.dtype).log(), 0.0) if log else y / least
        ctx.save_for_backward(a, b, y, least)
        ctx.how = how
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple:
        a, b, y, count = ctx.saved_tensors
        normalise, activation, pattern, queries, keys, aligned = ctx.how
        da, db = torch.zeros_like(a), torch.zeros_like(b)
        dy = dy / count
        for rows, cols in _tiles(a, b, aligned):
            keep = pattern.sees(*_slices(queries, keys, rows, cols))[..., None]
            u = a[:, rows, None] + b[:, None, cols]
            if normalise:
                scale = _inverse_std(u)
                u = u.mul_(scale)
            g = (u - y[:, rows, None]).masked_fill_(~keep, -torch.inf).exp_() if activation == "exp" else (
                FUNCTIONS[activation][1](u).masked_fill_(~keep, 0.0))
            g = g.mul_(dy[:, rows, None])
            if normalise:
                g = g.sub_(u.mul_((u * g).mean(-1, keepdim=True))).mul_(scale)
            da[:, rows] += g.sum(2)
            db[:, cols] += g.sum(1)
        return da, db, None


def _slices(queries: Coords, keys: Coords, rows: slice, cols: slice) -> tuple[Coords, Coords]:
    return queries.slice(rows.start, rows.stop), keys.slice(cols.start, cols.stop)


def _tiles(a: Tensor, b: Tensor, aligned: bool) -> Iterator[tuple[slice, slice]]:
    """Slices of readers and of what is read. Aligned: the readers' own tokens are the last, and later ones are skipped.

    Loops over counts, and slices that may end beyond the tensor: a traced graph then holds for all lengths of a count.
    """
    tokens, stored = a.shape[1], b.shape[1]
    # small tiles stay in a processor's cache and skip more of what is not seen
    block = BLOCK
    if a.device.type == "cpu" and not torch.compiler.is_compiling():
        block = BLOCK // 4 if tokens <= 2 * BLOCK else BLOCK // 2
    width = max(PAIRS // (min(tokens, block) * a.shape[0] * a.shape[2]), 4)
    width = width if tokens == 1 else min(width, block)
    for i in range(-(-tokens // block)):
        end = stored - max(tokens - (i + 1) * block, 0) if aligned else stored
        for j in range(-(-end // width)):
            yield slice(i * block, (i + 1) * block), slice(j * width, (j + 1) * width)
