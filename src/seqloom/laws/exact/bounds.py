"""The selective state space of generalisation bounds: its attention form, its growth, and the shape of the bound in T.

Source: [selective-ssm-bounds]; its sheet's Works when 1 to 5.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch

from seqloom.core import BuildContext
from seqloom.mixers.s6 import S6, S6Layer
from seqloom.study.bounds import NormBudgets, capacity, complexity_floor, growth_rate, length_factor, norm_budgets

EXAMPLE = NormBudgets(abscissa=0.0, p=1.0, q=1.0, u=1.0, w=1.0, B=1.0, C=1.0, A=1.0, B_sum=4.0, C_sum=4.0, q_sum=4.0, A_sum=4.0)


def _layer(abscissa: float, seed: int = 0, dim: int = 4) -> S6Layer:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return S6(abscissa=abscissa).build(BuildContext(dim=dim)).double()


def _inputs(tokens: int, *, seed: int = 0, rows: int = 8, dim: int = 4, norm: float = 1.0) -> torch.Tensor:
    make = torch.Generator().manual_seed(seed)
    u = torch.randn(rows, tokens, dim, generator=make, dtype=torch.float64)
    return norm * torch.nn.functional.normalize(u, dim=-1) * torch.rand(rows, tokens, 1, generator=make, dtype=torch.float64)


@torch.no_grad()
def is_attention(*, tokens: int = 30) -> float:
    """Deviation of w' y_T from the unrolled sum over tokens, query W_C u_T, key W_B u_s, value u_s, and the product of the
    decays between them, written out (Works when 1)."""
    worst = 0.0
    for abscissa in (-0.5, 0.1):
        layer, u = _layer(abscissa), _inputs(tokens)
        w = torch.linspace(-1, 1, u.shape[-1], dtype=u.dtype)
        got = layer(u).y[:, -1] @ w
        dt = torch.log1p(torch.exp(u @ layer.dt_proj.weight[0] + layer.dt_proj.bias))
        want = torch.zeros_like(got)
        for s in range(tokens):
            decay = torch.exp(dt[:, s + 1 :].sum(1)[:, None, None] * layer.rates(u.dtype))
            key, query = u[:, s] @ layer.B_proj.weight.T, u[:, -1] @ layer.C_proj.weight.T
            want += torch.einsum("d,bn,bdn,bn,bd,b->b", w, query, decay, key, u[:, s], dt[:, s])
        worst = max(worst, float((got - want).abs().max()))
    return worst


@torch.no_grad()
def outgrows(*, tokens: int = 200) -> float:
    """By how much, in natural logarithms, the norm of a product of transitions exceeds rho^t on random inputs of norm at most
    1: at most 0 (Works when 4)."""
    worst = -math.inf
    for seed in range(5):
        for abscissa in (-1.0, -0.1, 0.1, 0.5):
            layer, u = _layer(abscissa, seed), _inputs(tokens, seed=seed)
            norms = norm_budgets(layer, torch.ones(1, 4), u=1.0)
            # diagonal: the norm of the product is e^(s (dt_1 + .. + dt_t))
            grown = layer.maps(u)[0][..., 0].cumsum(1) * layer.rates(u.dtype).amax()
            rate = math.log(growth_rate(norms.abscissa, norms.p, norms.reach))
            worst = max(worst, float((grown - rate * torch.arange(1, tokens + 1)).max()))
    return worst


def length_factor_errs() -> float:
    """Largest relative deviation of the closed form of the length factor from the sum (Works when 2)."""
    worst = 0.0
    for rho in (0.5, 0.9, 0.98, 0.999, 1.0, 1.001, 1.02, 1.05):
        for tokens in (2, 10, 100, 500):
            want = math.fsum(t * rho**t for t in range(tokens))
            worst = max(worst, abs(length_factor(rho, tokens) / want - 1))
    return worst


def stable_bound_grows(*, abscissa: float = -0.1) -> float:
    """Relative change of the capacity from 200 to 2,000 tokens, for an abscissa below 0 (Works when 3)."""
    norms = replace(EXAMPLE, abscissa=abscissa)
    return capacity(norms, tokens=2000) / capacity(norms, tokens=200) - 1


def unstable_bound_slope(*, abscissa: float = 0.1) -> float:
    """Relative deviation of the growth of log(S_2 / T) a token from log rho, for an abscissa above 0 (Works when 3)."""
    rho = growth_rate(abscissa, EXAMPLE.p, EXAMPLE.reach)
    first, last = (math.log(length_factor(rho, tokens) / tokens) for tokens in (500, 1000))
    return abs((last - first) / 500 / math.log(rho) - 1)


def floor_over_ceiling(*, long_steps: bool = True, samples: int = 1000) -> float:
    """Largest ratio of the lower bound to the upper one's length factor, same w and m, over a grid of abscissas above 0 and
    lengths: at most 1 (Works when 5). Steps have to be able to reach 1, p + q u >= 0.54; without `long_steps` they cannot."""
    worst = 0.0
    p, reach = (0.0, 1.0) if long_steps else (-2.0, 1.0)
    for abscissa in (0.01, 0.05, 0.1, 0.3, 0.5):
        for tokens in (10, 50, 200, 500):
            floor = complexity_floor(abscissa, tokens=tokens, w=1.0, samples=samples)
            ceiling = capacity(replace(EXAMPLE, abscissa=abscissa, p=p, q=reach), tokens=tokens) / math.sqrt(samples)
            worst = max(worst, floor / ceiling)
    return worst
