"""The gated recurrence of HGRN: its bounds, its turning frame, and what it cannot exceed."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from seqloom.core import BuildContext
from seqloom.kernels import diagonal_scan
from seqloom.mixers import HGRN
from seqloom.mixers.hgrn import CAUSAL, HGRNLayer, LowerBounds, rotated


def _draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _layer(spec: HGRN, *, dim: int, index: int, depth: int) -> HGRNLayer:
    """Layer `index` of `depth` in float64, its bounds drawn at random."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        ctx = BuildContext(dim=dim, layer=index, depth=depth)
        layer = spec.build(ctx).double()
        for bounds in ctx.store.values():
            bounds.double().logits.copy_(_draw(depth, dim))
        for parameter in layer.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return layer


def frame_turns(*, tokens: int = 150, dim: int = 6) -> float:
    """Deviation of the complex recurrence from a real one in a turning frame, h_t = e^{i theta t} g_t, final states and
    gradients too, from a nonzero state. [hgrn] Works when 1."""
    outcomes = []
    for form in (CAUSAL["recurrent"], rotated(diagonal_scan.chunked)):
        decay, write, theta = _draw(2, tokens, dim).sigmoid(), _draw(2, tokens, 2 * dim, seed=1), 3 * _draw(dim, seed=2)
        inputs = [value.requires_grad_() for value in (decay, write, theta, _draw(2, 2 * dim, seed=3))]
        y, last, _ = form(inputs[0], inputs[1], theta=inputs[2], state=inputs[3])
        loss = (y * _draw(2, tokens, 2 * dim, seed=4)).sum() + (last * _draw(2, 2 * dim, seed=5)).sum()
        outcomes.append([y, last, *torch.autograd.grad(loss, inputs)])
    return max(float((a - b).detach().abs().max()) for a, b in zip(*outcomes, strict=True))


def bounds_hold(*, depth: int = 6, dim: int = 32, shift: int = 0) -> float:
    """The worst violation, at random logits, of: bounds of the first layer are 0; they do not fall with depth and stay below
    1; forget values lie in [bound, 1). [hgrn] Works when 2."""
    bounds = LowerBounds(depth, dim).double()
    with torch.no_grad():
        bounds.logits.copy_(3 * _draw(depth, dim))
        g = torch.stack([bounds(layer, torch.float64, shift) for layer in range(depth)])
        worst = max(float(g[0].abs().max()), float(-g.diff(dim=0).min()), float((g - 1).max()))
        for index in range(depth):
            layer = _layer(HGRN(lower_bounds="shifted" if shift else "rising"), dim=dim, index=index, depth=depth)
            f = layer.gates(_draw(2, 40, dim), torch.float64)[0]
            lowest = layer._bounds[0](index, torch.float64, shift)
            worst = max(worst, float((lowest - f).max()), float((f - 1).max()))
    return worst


def conventions_differ(*, depth: int = 6, dim: int = 32) -> float:
    """Largest difference between the two ways to sum the shares of the layers, at random logits: they are no two names of one
    thing, and parameters do not carry over. [hgrn] Method 4."""
    bounds = LowerBounds(depth, dim).double()
    with torch.no_grad():
        bounds.logits.copy_(_draw(depth, dim))
        return max(float((bounds(k, torch.float64) - bounds(k, torch.float64, 1)).abs().max()) for k in range(depth))


def exceeds_inputs(*, tokens: int = 200, dim: int = 16) -> float:
    """How far |h_t| exceeds the largest |c_s| so far, channel by channel: nowhere, since h mixes turned candidates convexly.
    [hgrn] Works when 3."""
    layer = _layer(HGRN(), dim=dim, index=2, depth=4)
    x = _draw(2, tokens, dim)
    with torch.no_grad():
        decay, write, _ = layer.gates(x, torch.float64)
        h = torch.complex(*layer.run(decay, write, theta=layer.theta, state=None, segments=None).y.chunk(2, -1)).abs()
        c = torch.complex(*F.silu(layer.i_proj(x)).chunk(2, -1)).abs()
    return float((h - c.cummax(1).values).max())


def real_is_complex(*, tokens: int = 60, dim: int = 16) -> float:
    """Deviation of the real recurrence from the complex one without turning and without imaginary input, before the output
    projection: equal real halves, zero imaginary ones. [hgrn] Works when 4."""
    decay, write = _draw(2, tokens, dim).sigmoid(), _draw(2, tokens, dim, seed=1)
    want = CAUSAL["chunked"](decay, write, theta=None, state=None).y
    both = torch.cat([write, torch.zeros_like(write)], -1)
    got = CAUSAL["chunked"](decay, both, theta=torch.zeros(dim, dtype=torch.float64), state=None).y
    return float((got - torch.cat([want, torch.zeros_like(want)], -1)).abs().max())


def log_space_bound() -> float:
    """Deviation of exp(logaddexp(log g, log(1 - g) + logsigmoid(s))) from g + (1 - g) sigmoid(s), and of the layer's own
    write share, a product, from one minus it; logits s to +-50 and g in [0, 1). Infinite if the layer's gates have a NaN.
    [hgrn] Works when 5."""
    s = torch.linspace(-50, 50, 401, dtype=torch.float64)[:, None]
    g = torch.cat([torch.logspace(-12, -0.01, 60, dtype=torch.float64), 1 - torch.logspace(-12, -1, 30, dtype=torch.float64)])
    direct = g + (1 - g) * s.sigmoid()
    by_log = torch.logaddexp(g.log(), torch.log1p(-g) + F.logsigmoid(s)).exp()
    product = (1 - g) * (-s).sigmoid()
    first = _layer(HGRN(), dim=8, index=0, depth=3)  # its bound is 0, whose logarithm is not finite
    with torch.no_grad():
        finite = all(bool(part.isfinite().all()) for part in first.gates(50 * _draw(1, 20, 8), torch.float64)[:2])
    worst = max(float((direct - by_log).abs().max()), float((1 - direct - product).abs().max()))
    return worst if finite else float("inf")


def impulse_below_bound(*, steps: int = 64, dim: int = 16) -> float:
    """How far the response to one write, after n steps, falls below bound^n, relative to it: never. [hgrn] Method 8."""
    layer = _layer(HGRN(recurrence="real"), dim=dim, index=2, depth=4)
    with torch.no_grad():
        decay, _, _ = layer.gates(_draw(2, steps, dim), torch.float64)
        lowest = layer._bounds[0](2, torch.float64)
        kept = decay.log().cumsum(1)
        floor = lowest.log() * torch.arange(1, steps + 1, dtype=torch.float64)[:, None]
    return float((floor - kept).max())
