"""The implicit step of an online regression: what it minimises, that it is stable, and where its diagonal is exact."""

from __future__ import annotations

import torch
from torch import Tensor

from seqloom.core import scan
from seqloom.kernels import delta_scan, selective_scan
from seqloom.mixers.longhorn import FORMS, step_size

CHANNELS, STATE = 5, 4


def _streams(tokens: int, *, heads: int = CHANNELS, norm: float = 1.0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x [1, T, E], beta [1, T, H], keys and queries [1, T, N] in float64."""
    make = torch.Generator().manual_seed(0)
    randn = lambda *shape: torch.randn(1, tokens, *shape, generator=make, dtype=torch.float64)  # noqa: E731
    return randn(CHANNELS), randn(heads).sigmoid(), norm * randn(STATE), randn(STATE)


def _update(update: str, x: Tensor, beta: Tensor, k: Tensor, q: Tensor, form: str = "recurrent") -> tuple[Tensor, Tensor]:
    """Outputs [1, T, E] and the last state [1, E, N]."""
    skip = torch.zeros(CHANNELS, dtype=torch.float64)
    y, state, _ = FORMS[update][form](x, step_size(beta, k), k, q, A=None, D=skip)
    return y, state.transpose(-1, -2).flatten(1, 2) if update == "exact" else state


def is_argmin(*, tokens: int = 6) -> float:
    """Deviation of the exact state after every token from a numerical minimum of |S - S'|^2 + sum_i beta_i (S_i k - x_i)^2,
    S' the minimum of the token before ([longhorn] Works when 1)."""
    x, beta, k, q = _streams(tokens)
    before, worst = torch.zeros(CHANNELS, STATE, dtype=torch.float64), 0.0
    for t in range(tokens):

        def objective(S: Tensor, before: Tensor = before, t: int = t) -> Tensor:
            return (S - before).square().sum() + (beta[0, t] * (S @ k[0, t] - x[0, t]).square()).sum()

        # a quadratic: one step of Newton's method, with derivatives by autograd
        slope = torch.autograd.functional.jacobian(objective, before).flatten()
        curvature = torch.autograd.functional.hessian(objective, before).reshape(len(slope), -1)
        before = before - torch.linalg.solve(curvature, slope).view_as(before)
        upto = slice(0, t + 1)
        _, state = _update("exact", x[:, upto], beta[:, upto], k[:, upto], q[:, upto])
        worst = max(worst, float((state[0] - before).abs().max()))
    return worst


def is_delta_rule(*, tokens: int = 70) -> float:
    """Deviation of the solution of (I + beta k k') S' = S' + beta k x', token by token, from the delta rule in chunks with
    beta / (1 + beta |k|^2), one beta for all channels ([longhorn] Works when 5)."""
    x, beta, k, q = _streams(tokens, heads=1)
    y, state, _ = delta_scan.chunked(q[:, :, None], k[:, :, None], x[:, :, None], step_size(beta, k))
    S, worst = torch.zeros(STATE, CHANNELS, dtype=torch.float64), 0.0
    for t in range(tokens):
        key, strength = k[0, t, :, None], beta[0, t]
        S = torch.linalg.solve(torch.eye(STATE, dtype=torch.float64) + strength * key @ key.mT, S + strength * key * x[0, t])
        worst = max(worst, float((q[0, t] @ S - y[0, t, 0]).abs().max()))
    return max(worst, float((S - state[0, 0]).abs().max()))


def diagonal_differs(*, one_hot: bool = True, tokens: int = 40) -> float:
    """Deviation of the diagonal update from the exact one: none for one-hot keys, where k k' is diagonal
    ([longhorn] Works when 4)."""
    x, beta, k, q = _streams(tokens)
    if one_hot:
        k = torch.nn.functional.one_hot(k.abs().argmax(-1), STATE) * k
    return max(float((a - b).abs().max())
               for a, b in zip(_update("exact", x, beta, k, q), _update("diagonal", x, beta, k, q), strict=True))


def forgets_too_much(*, tokens: int = 1000) -> float:
    """How far the elementwise forget factor 1 - D k^2 leaves (0, 1], for keys of length 1e-3 to 1e3: 0 if nowhere
    ([longhorn] Works when 3)."""
    _, beta, k, _ = _streams(tokens)
    k = torch.nn.functional.normalize(k, dim=-1) * torch.logspace(-3, 3, tokens, dtype=torch.float64)[:, None]
    factor = 1 - step_size(beta, k)[..., None] * k[:, :, None].square()
    return float(torch.maximum(factor - 1, -factor).amax().clamp(min=0)) + float((factor == 0).sum())


def grows(*, explicit: bool = False, tokens: int = 100, norm: float = 10.0) -> float:
    """Largest state, times min|k| / max|x|, under a constant input and keys of any direction and length about `norm`.

    The diagonal update moves every entry towards x / k_n by a share in [0, 1), so that this is at most 1; `explicit` is
    the delta rule with the same keys and beta, an explicit step, which is unstable ([longhorn] Works when 3).
    """
    x, beta, k, _ = _streams(tokens, norm=norm)
    k = torch.where(k.abs() < 0.1 * norm, 0.1 * norm, k)
    x = x[:, :1].expand_as(x)
    if explicit:
        repeated = k[:, :, None].expand(-1, -1, CHANNELS, -1)
        states = scan(delta_scan.step, repeated, repeated, x[..., None], beta,
                      state=torch.zeros(1, CHANNELS, STATE, 1, dtype=torch.float64)).state
    else:
        # a query reads one entry of the state at every token
        reads = [torch.eye(STATE, dtype=torch.float64)[n].expand_as(k) for n in range(STATE)]
        states = torch.stack([selective_scan.recurrent(x, step_size(beta, k), k, q, A=None).y for q in reads])
    return float(states.abs().amax() * k.abs().amin() / x.abs().amax())
