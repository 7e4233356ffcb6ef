"""Diagonal scan: h_t = a_t h_{t-1} + b_t elementwise, with the decay real, or real times a fixed rotation per channel.

    h_t = a_t R(theta) h_{t-1} + b_t       a [B, T, D] in [0, 1], b and h [B, T, D, 2] (real, imaginary), R the rotation by theta [D]

Without `theta` the last axis is one (real) or several independent parts. Carries HGRN, LRU, S5.
At a boundary the decay is a = 0, a selection. Source: [hgrn] Method 2 and Forms, [s4-survey] 12.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from seqloom.core.mixer import accumulator
from seqloom.core.scan import carry
from seqloom.core.segments import Segments
from seqloom.core.state import Mixed


def step(state: Float[Tensor, "b d r"], a: Float[Tensor, "b d"], b: Float[Tensor, "b d r"], *,
         theta: Float[Tensor, " d"] | None = None) -> tuple[Tensor, Tensor]:
    """One token, as the paper writes it. This is the definition; every other form must agree with it."""
    wide = state.dtype
    if theta is not None:
        state = turn(state, theta.to(wide).cos(), theta.to(wide).sin())
    state = a.to(wide)[..., None] * state + b.to(wide)
    return state, state


def turn(x: Float[Tensor, "*shape d 2"], cos: Tensor, sin: Tensor) -> Float[Tensor, "*shape d 2"]:
    """The complex numbers x times cos + i sin."""
    real, imaginary = x.unbind(-1)
    return torch.stack([cos * real - sin * imaginary, sin * real + cos * imaginary], -1)


def chunked(a: Float[Tensor, "b t d"], b: Float[Tensor, "b t d r"], *, state: Float[Tensor, "b d r"],
            theta: Float[Tensor, " d"] | None = None, segments: Segments | None = None) -> Mixed:
    """Groups of tokens side by side, joined by a prefix (`core.scan.carry`); memory [B, T, D, R], gradients by the reverse scan.

    The rotation is taken out of the recurrence: with n_t the number of real tokens so far, h_t = R(n_t theta) h'_t where
    h'_t = a_t h'_{t-1} + R(-n_t theta) b_t has a real decay.
    """
    wide = accumulator(b.dtype)
    a, b = _prepare(a.to(wide), b.to(wide), segments)
    if theta is None:
        h, last = _Scan.apply(a, b, state.to(wide))
        return Mixed(h if segments is None else segments.hold(h), last)
    count = torch.arange(1, b.shape[1] + 1, device=b.device)[None] if segments is None else segments.real.cumsum(1)
    # in double, and taken modulo a turn, before it is rounded: n theta is large where T is
    angle = torch.remainder(count[..., None].double() * theta.double(), 2 * torch.pi).to(wide)
    cos, sin = angle.cos(), angle.sin()
    h, last = _Scan.apply(a, turn(b, cos, -sin), state.to(wide))
    y = turn(h, cos, sin)
    return Mixed(y if segments is None else segments.hold(y), turn(last, cos[:, -1], sin[:, -1]))


def parallel(a: Float[Tensor, "b t d"], b: Float[Tensor, "b t d r"], *, state: Float[Tensor, "b d r"],
             theta: Float[Tensor, " d"] | None = None, segments: Segments | None = None) -> Mixed:
    """By doubling: log2(T) rounds, each joining every token with the stretch before it. O(T log T), in complex numbers."""
    wide = accumulator(b.dtype)
    a, b = _prepare(a.to(wide), b.to(wide), segments)
    state = state.to(wide)
    decay = a[..., None]
    if theta is not None:
        spin = torch.polar(torch.ones_like(theta, dtype=wide), theta.to(wide))
        # a hold turns nothing
        turns = spin if segments is None else torch.where(segments.real[..., None], spin, torch.ones_like(spin))
        decay = (a * turns)[..., None]
        b, state = torch.view_as_complex(b.contiguous())[..., None], torch.view_as_complex(state.contiguous())[..., None]
    span, h = 1, b
    while span < b.shape[1]:
        h = torch.cat([h[:, :span], h[:, span:] + decay[:, span:] * h[:, :-span]], 1)
        decay = torch.cat([decay[:, :span], decay[:, span:] * decay[:, :-span]], 1)
        span *= 2
    h = h + decay * state[:, None]
    if theta is not None:
        h = torch.view_as_real(h[..., 0])
    return Mixed(h if segments is None else segments.hold(h), h[:, -1])


def _prepare(a: Tensor, b: Tensor, segments: Segments | None) -> tuple[Tensor, Tensor]:
    """Holds keep the state (a = 1, b = 0), boundaries drop it (a = 0)."""
    if segments is not None:
        a = torch.where(segments.starts()[..., None], 0.0, segments.hold(a, 1.0))
        b = segments.hold(b)
    return a, b


class _Scan(torch.autograd.Function):
    """All states of h_t = a_t h_{t-1} + b_t. The gradient g_t of h_t is the same scan from the end: g_t = dy_t + a_{t+1} g_{t+1}."""

    @staticmethod
    def forward(ctx, a: Tensor, b: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:  # noqa: ANN001
        before, last = carry(a[..., None], b, state)
        ctx.save_for_backward(a, before)
        return torch.addcmul(b, a[..., None], before), last

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor, dlast: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # noqa: ANN001
        a, before = ctx.saved_tensors
        dy = torch.cat([dy[:, :-1], dy[:, -1:] + dlast[:, None]], 1)
        # entering position t from the right is a_{t+1} g_{t+1}: a scan over transitions a and writes a dy, reversed
        decay = a.flip(1)[..., None]
        after, dstate = carry(decay, decay * dy.flip(1), torch.zeros_like(dlast))
        g = dy + after.flip(1)
        return (g * before).sum(-1), g, dstate
