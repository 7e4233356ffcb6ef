"""The gated recurrent unit: h_t = (1 - z_t) n_t + z_t h_{t-1}, gates and candidate each reading h_{t-1} through a matrix.

    r = sigmoid(x_r + U_r h + c_r)    z = sigmoid(x_z + U_z h + c_z)    n = tanh(x_n + r (U_n h + c_n))

Nonlinear in its state, so it has no parallel form: time is a loop, one product with U [3 H, H] a token. Streams gates
[B, T, 3 H]: x_r, x_z, x_n, the inputs' part, made for all tokens at once outside; the state h [B, H].
`looped` is the same loop without a graph of autograd nodes: gradients by a second loop from the end, the one of U as a single
product over all tokens. Memory linear in T.
Source: [tool-use-ssm] Method 8 (the paper's GRU baseline); the order of gates and the two biases are torch.nn.GRU's.
"""

from __future__ import annotations

from collections.abc import Container
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from seqloom.core import Mixed, Segments
from seqloom.core.mixer import accumulator


def step(state: Float[Tensor, "b h"], gates: Float[Tensor, "b g"], *, weight: Float[Tensor, "g h"],
         bias: Float[Tensor, " g"]) -> tuple[Tensor, Tensor]:
    """One token. This is the definition; every other form must agree with it."""
    wide = state.dtype
    with torch.autocast(state.device.type, enabled=False):
        x_r, x_z, x_n = gates.to(wide).chunk(3, -1)
        h_r, h_z, h_n = F.linear(state, weight.to(wide), bias.to(wide)).chunk(3, -1)
    r, z = (x_r + h_r).sigmoid(), (x_z + h_z).sigmoid()
    n = (x_n + r * h_n).tanh()
    state = n + z * (state - n)
    return state, state.to(gates.dtype)


def looped(gates: Float[Tensor, "b t g"], *, weight: Float[Tensor, "g h"], bias: Float[Tensor, " g"],
           state: Float[Tensor, "b h"] | None = None, segments: Segments | None = None) -> Mixed:
    """Token by token, in one operator. First-order gradients by hand."""
    dtype = gates.dtype
    wide = accumulator(dtype)
    batch, tokens, width = gates.shape
    if segments is None:
        real = torch.ones(batch, tokens, dtype=torch.bool, device=gates.device)
        first = torch.zeros_like(real)
    else:
        gates, real, first = segments.hold(gates), segments.real, segments.starts()
    start = torch.zeros(batch, width // 3, dtype=wide, device=gates.device) if state is None else state.to(wide)
    h, *_ = _loop(gates.to(wide), weight.to(wide), bias.to(wide), start, real, first)
    last, y = h[:, -1].clone(), h.to(dtype)
    return Mixed(y if segments is None else segments.hold(y), last)


# One operator, so that a compiler does not unroll the loop ------------------------------------------------------------

@torch.library.custom_op("seqloom::gru", mutates_args=(),
                         schema="(Tensor gates, Tensor weight, Tensor bias, Tensor start, Tensor real, Tensor first) "
                                "-> (Tensor, Tensor)")
def _loop(gates: Tensor, weight: Tensor, bias: Tensor, start: Tensor, real: Tensor, first: Tensor) -> tuple[Tensor, Tensor]:
    """h after every token [B, T, H], and r, z, n and U_n h + c_n of every token [B, T, 4 H] for the backward pass."""
    with torch.autocast(gates.device.type, enabled=False):
        batch, tokens, width = gates.shape
        size = width // 3
        out, kept = gates.new_empty(tokens, batch, size), gates.new_empty(tokens, batch, 4 * size)
        h, across = start, weight.t()
        selects = _Selects(real, first)
        for t, x in enumerate(gates.unbind(1)):
            if t in selects.first:
                h = torch.where(first[:, t, None], 0.0, h)
            u = torch.addmm(bias, h, across)
            r, z, n, u_n = kept[t].split(size, 1)
            kept[t, :, : 2 * size] = torch.add(x[:, : 2 * size], u[:, : 2 * size]).sigmoid_()
            u_n.copy_(u[:, 2 * size :])
            n.copy_(torch.addcmul(x[:, 2 * size :], r, u_n).tanh_())
            new = torch.addcmul(n, z, h - n)
            h = torch.where(real[:, t, None], new, h) if t in selects.held else new
            out[t] = h
        return out.transpose(0, 1).contiguous(), kept.transpose(0, 1).contiguous()


@torch.library.custom_op("seqloom::gru_backward", mutates_args=(),
                         schema="(Tensor dh, Tensor weight, Tensor start, Tensor real, Tensor first, Tensor h, Tensor kept) "
                                "-> (Tensor, Tensor, Tensor, Tensor)")
def _loop_back(dh: Tensor, weight: Tensor, start: Tensor, real: Tensor, first: Tensor, h: Tensor,
               kept: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of gates, weight, bias and start. With e = dL/dh_t: dz = e (h - n) z (1 - z), dn = e (1 - z) (1 - n^2),
    dr = dn (U_n h + c_n) r (1 - r); U_n's part of dn is r dn; and e z + U'(all three) goes on to h_{t-1}."""
    with torch.autocast(dh.device.type, enabled=False):
        batch, tokens, size = h.shape
        before = torch.cat([start[:, None], h[:, :-1]], 1)
        before = torch.where(first[..., None], 0.0, before)
        r, z, n, u_n = kept.split(size, -1)
        # what does not depend on e, for all tokens at once
        by_z, by_n = (before - n) * z * (1 - z), (1 - z) * (1 - n * n)
        by_r = by_n * u_n * r * (1 - r)
        factors = torch.cat([by_r, by_z, by_n * r], -1).transpose(0, 1).contiguous()
        z = z.transpose(0, 1)
        slopes, flows = torch.empty_like(factors), z.new_empty(z.shape)
        flow, selects = torch.zeros_like(start), _Selects(real, first)
        for t in range(tokens - 1, -1, -1):
            flow = flow + dh[:, t]
            mine = flow.masked_fill(~real[:, t, None], 0.0) if t in selects.held else flow
            flows[t] = mine
            torch.mul(factors[t].view(batch, 3, size), mine[:, None], out=slopes[t].view(batch, 3, size))
            earlier = torch.addmm(mine * z[t], slopes[t], weight)
            flow = torch.where(real[:, t, None], earlier, flow) if t in selects.held else earlier
            if t in selects.first:
                flow = flow.masked_fill(first[:, t, None], 0.0)
        slopes, d_n = slopes.transpose(0, 1), flows.transpose(0, 1) * by_n
        d_gates = torch.cat([slopes[..., : 2 * size], d_n], -1)  # the candidate's input is not behind the reset gate
        d_weight = slopes.reshape(-1, 3 * size).t() @ before.reshape(-1, size)
        return d_gates, d_weight, slopes.sum((0, 1)), flow


class _Selects:
    """Which steps of a loop have a boundary or a hold in any row: all of them where looking would wait for a device."""

    def __init__(self, real: Tensor, first: Tensor):
        self.first: Container[int] = range(real.shape[1])
        self.held: Container[int] = self.first
        if real.device.type == "cpu":
            self.first = set(first.any(0).nonzero()[:, 0].tolist())
            self.held = set((~real).any(0).nonzero()[:, 0].tolist())


@_loop.register_fake
def _(gates: Tensor, weight: Tensor, bias: Tensor, start: Tensor, real: Tensor, first: Tensor) -> tuple[Tensor, Tensor]:
    batch, tokens, width = gates.shape
    return gates.new_empty(batch, tokens, width // 3), gates.new_empty(batch, tokens, width // 3 * 4)


@_loop_back.register_fake
def _(dh: Tensor, weight: Tensor, start: Tensor, real: Tensor, first: Tensor, h: Tensor,
      kept: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return (h.new_empty(*h.shape[:2], 3 * h.shape[2]), weight.new_empty(weight.shape), weight.new_empty(weight.shape[0]),
            start.new_empty(start.shape))


def _keep(ctx: Any, inputs: tuple, output: tuple) -> None:
    _, weight, _, start, real, first = inputs
    ctx.save_for_backward(weight, start, real, first, *output)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, dh: Tensor | None, dkept: Tensor | None) -> tuple[Tensor | None, ...]:
    if dh is None:
        return (None,) * 6
    weight, start, real, first, h, kept = ctx.saved_tensors
    return (*_loop_back(dh.contiguous(), weight, start, real, first, h, kept), None, None)


_loop.register_autograd(_backward, setup_context=_keep)

__all__ = ["looped", "step"]
