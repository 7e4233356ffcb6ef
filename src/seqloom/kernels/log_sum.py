"""Running log-sum-exp: z_t = log(e^{z_{t-1}} + e^{b_t}) for every channel on its own, and every z is returned.

The cumulative sum of exponentials where those overflow. Streams b: [B, T, ...], the state `Total`. The fast forms run the
diagonal scan on what is left after the running maximum m_t is taken out, h_t = e^{m_{t-1} - m_t} h_{t-1} + e^{b_t - m_t} and
z_t = m_t + log h_t, in which every number lies in [0, T] and h_t >= 1. m is constant to the gradient: z does not depend on it.
Source: [causalrn] Method 5.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from seqloom.core import Mixed, Segments
from seqloom.core.mixer import accumulator
from seqloom.kernels import diagonal_scan


class Total(NamedTuple):
    """log: z after the last token, 0 before any. tokens: how many, [B]. Zeros are the empty state; no -inf occurs."""

    log: Tensor
    tokens: Tensor


def empty(b: Float[Tensor, "b t ..."]) -> Total:
    """The state before any token of the stream `b`."""
    log = torch.zeros(b.shape[0], *b.shape[2:], dtype=accumulator(b.dtype), device=b.device)
    return Total(log, torch.zeros(b.shape[0], dtype=torch.int64, device=b.device))


def step(state: Total, b: Float[Tensor, "b ..."]) -> tuple[Total, Tensor]:
    """One token. This is the definition; every other form must agree with it."""
    wide = b.to(state.log.dtype)
    log = torch.where(_like(state.tokens == 0, wide), wide, torch.logaddexp(state.log, wide))
    return Total(log, state.tokens + 1), log.to(b.dtype)


def _by_scan(form: Callable[..., Mixed], b: Float[Tensor, "b t ..."], *, state: Total | None = None,
             segments: Segments | None = None) -> Mixed:
    """`form` of the diagonal scan on the sums relative to their running maximum."""
    dtype, state = b.dtype, empty(b) if state is None else state
    b = b.to(state.log.dtype) if segments is None else segments.hold(b.to(state.log.dtype))
    begun, reference = _like(state.tokens > 0, state.log), state.log.detach()
    top = _running_max(b.detach(), begun, reference, segments)
    before = torch.cat([torch.where(begun, reference, top[:, 0])[:, None], top[:, :-1]], 1)
    start = torch.where(begun, (state.log - reference).exp(), 0.0)  # 1, with the gradient of the incoming sum
    # across a boundary the maximum may fall; the scan selects there, and the clamp keeps the unused number finite
    h, last, _ = form((before - top).clamp(max=0).exp(), (b - top).exp(), state=start, segments=segments)
    some = torch.ones_like(top, dtype=torch.bool) if segments is None else _summed(state.tokens, segments, top)
    z = top + torch.where(some, h, 1.0).log()
    ends = some[:, -1]
    total = torch.where(ends, top[:, -1] + torch.where(ends, last, 1.0).log(), 0.0)
    z = z.to(dtype) if segments is None else segments.hold(z.to(dtype))
    return Mixed(z, Total(total, _count(state.tokens, segments, b.shape[1])))



chunked = partial(_by_scan, diagonal_scan.chunked)
parallel = partial(_by_scan, diagonal_scan.parallel)


def matrix(b: Float[Tensor, "b t h"], *, segments: Segments | None = None) -> Mixed:
    """Over the whole segment, the future too, as the mask of pairs has it: the definition where nothing is causal."""
    wide = b.to(accumulator(b.dtype))
    if segments is None:
        return Mixed(wide.logsumexp(1, keepdim=True).expand_as(b).to(b.dtype))
    wide = segments.hold(wide)
    keep = (segments.run[:, :, None] == segments.run[:, None, :]) & segments.real[:, None, :]
    keep = (keep | ~segments.real[:, :, None])[..., None]  # what holds sees all: finite, and held below
    z = torch.where(keep, wide[:, None], -torch.inf).logsumexp(2)
    return Mixed(segments.hold(z.to(b.dtype)))


def whole(b: Float[Tensor, "b t h"], *, segments: Segments | None = None) -> Mixed:
    """The same from the causal sum: every token reads it at the last real token of its segment. Linear in T."""
    z, _, _ = chunked(b, segments=segments)
    if segments is None:
        return Mixed(z[:, -1:].expand_as(z))
    run, index = segments.run.contiguous(), torch.arange(b.shape[1], device=b.device)
    end = torch.searchsorted(run, run, right=True) - 1
    last = torch.where(segments.real, index, 0).cummax(1).values.gather(1, end)
    return Mixed(segments.hold(z.gather(1, last[..., None].expand_as(z))))


@torch.no_grad()
def _running_max(b: Tensor, begun: Tensor, reference: Tensor, segments: Segments | None) -> Tensor:
    """The largest b so far in the segment, the incoming sum counted as one; where nothing came yet, the lowest number."""
    lowest = torch.finfo(b.dtype).min
    first = torch.where(begun, reference, lowest)[:, None]
    if segments is None:
        return torch.maximum(b.cummax(1).values, first)
    run, span = segments.run, 1
    b = segments.hold(b, lowest)
    while span < b.shape[1]:  # by doubling: after k rounds each token has seen 2^k of its segment
        near = _like(run[:, span:] == run[:, :-span], b)
        b = torch.cat([b[:, :span], torch.where(near, torch.maximum(b[:, span:], b[:, :-span]), b[:, span:])], 1)
        span *= 2
    return torch.where(_like(run == 0, b), torch.maximum(b, first), b)


def _summed(count: Tensor, segments: Segments, like: Tensor) -> Tensor:
    """True where z is a sum of at least one token, broadcast over channels: not at pads before the first token. At other
    pads z stays finite and is held."""
    return _like((segments.real.cumsum(1) > 0) | (count > 0)[:, None], like).expand(like.shape)


def _count(count: Tensor, segments: Segments | None, tokens: int) -> Tensor:
    if segments is None:
        return count + tokens
    last = segments.run[:, -1:]
    mine = (segments.real & (segments.run == last)).sum(1)
    return torch.where(last[:, 0] > 0, mine, count + mine)


def _like(flag: Tensor, x: Tensor) -> Tensor:
    """A flag with as many axes as x."""
    return flag.reshape(*flag.shape, *(1,) * (x.ndim - flag.ndim))
