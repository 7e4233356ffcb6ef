"""Exactness checks that recipes quote: each returns the largest deviation, to be compared with a limit.

The laws run over the whole table; these are the same facts, and a few more, for one spec of one paper.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from seqloom.core import BuildContext, Mixer, Spec, scan, use_form
from seqloom.core.state import leaves
from seqloom.kernels import decay_scan, delta_scan, selective_scan


def _layer(spec: Spec, dim: int) -> Mixer:
    torch.manual_seed(0)
    layer = spec.build(BuildContext(dim=dim)).double()
    with torch.no_grad():  # no parameter at a value that hides it
        for parameter in layer.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return layer


def _worst(pairs: Iterator[tuple[Tensor, Tensor]]) -> float:
    return max(float((got - want).abs().max()) for got, want in pairs if got.numel())


def forms_agree(spec: Spec, *, dim: int = 48, lengths: tuple[int, ...] = (1, 3, 70, 130)) -> float:
    """Largest difference of outputs, final state and input gradients between any form and the definition, float64."""
    layer, worst = _layer(spec, dim), 0.0
    for tokens in lengths:
        x = torch.randn(2, tokens, dim, dtype=torch.float64)
        results = {}
        for form in layer.spec.forms:
            given = x.clone().requires_grad_()
            with use_form(form):
                y, state, _ = layer(given)
            (y * torch.linspace(0.5, 1.5, tokens, dtype=torch.float64)[:, None]).sum().backward()
            results[form] = [y.detach(), given.grad, *(leaf.detach() for leaf in leaves(state))]
        want, *others = results.values()
        worst = max(worst, *(_worst(zip(got, want, strict=True)) for got in others))
    return worst


def resumes(spec: Spec, *, dim: int = 48, tokens: int = 70) -> float:
    """Largest difference between one pass and two passes with the state handed over, at several cuts and token by token."""
    layer = _layer(spec, dim)
    x = torch.randn(2, tokens, dim, dtype=torch.float64)
    with torch.no_grad():
        whole = layer(x)
        worst = 0.0
        for cuts in ([1], [2], [tokens // 2], [tokens - 1], list(range(1, tokens))):
            state, parts = None, []
            for start, stop in zip([0, *cuts], [*cuts, tokens], strict=True):
                part = layer(x[:, start:stop], state=state)
                parts.append(part.y)
                state = part.state
            pairs = [(torch.cat(parts, 1), whole.y), *zip(leaves(state), leaves(whole.state), strict=True)]
            worst = max(worst, _worst(iter(pairs)))
    return worst


def looks_ahead(spec: Spec, *, dim: int = 48, tokens: int = 70, place: int = 40) -> float:
    """Largest change of outputs before `place` when the token there is changed, over all forms: 0 for a causal mixer."""
    layer, worst = _layer(spec, dim), 0.0
    x = torch.randn(2, tokens, dim, dtype=torch.float64)
    other = x.clone()
    other[:, place:] = torch.randn_like(other[:, place:])
    for form in layer.spec.forms:
        with use_form(form), torch.no_grad():
            a, b = layer(x).y, layer(other).y
        worst = max(worst, float((a[:, :place] - b[:, :place]).abs().max()))
    return worst


def delta_memory(*, erase: bool = True, dim: int = 16) -> float:
    """Deviation of a memory with orthonormal keys and beta 1: dim pairs are read back exactly, and a key written again
    returns its new value while the others keep theirs ([deltanet] Works when 3)."""
    make = torch.Generator().manual_seed(0)
    keys = torch.linalg.qr(torch.randn(dim, dim, generator=make, dtype=torch.float64)).Q
    values = torch.randn(dim + 1, dim, generator=make, dtype=torch.float64)
    k = torch.cat([keys, keys[:1]])[None, :, None]
    v = values[None, :, None]
    state = torch.zeros(1, 1, dim, dim, dtype=torch.float64)
    step = (delta_scan.step, torch.ones(1, dim + 1, 1, dtype=torch.float64)) if erase else (decay_scan.step,)
    _, state, _ = scan(step[0], k, k, v, *step[1:], state=state)
    want = torch.cat([values[-1:], values[1:dim]])
    return float((keys @ state[0, 0] - want).abs().max())


def delta_spectral_norm(*, dim: int = 8, tokens: int = 10_000) -> float:
    """Spectral norm of the product of transitions (I - b k k') with unit keys and b in [0, 2], the largest along the way:
    the kernel run on the identity without writes ([deltanet] Works when 4)."""
    make = torch.Generator().manual_seed(0)
    shape = (1, tokens, 1, dim)
    keys = torch.nn.functional.normalize(torch.randn(shape, generator=make, dtype=torch.float64), dim=-1)
    beta = 2 * torch.rand(shape[:3], generator=make, dtype=torch.float64)
    state, worst = torch.eye(dim, dtype=torch.float64)[None, None], 0.0
    for start in range(0, tokens, 100):
        part = slice(start, start + 100)
        k = keys[:, part]
        _, state, _ = delta_scan.chunked(k, k, torch.zeros_like(k), beta[:, part], state=state)
        worst = max(worst, float(torch.linalg.matrix_norm(state[0, 0], 2)))
    return worst


def selective_is_convolution(*, tokens: int = 50, channels: int = 6, state: int = 4) -> float:
    """Deviation of the selective scan, its step and maps held constant, from the convolution with K_l = C exp(dt A)^l B dt
    ([mamba] Works when 3)."""
    make = torch.Generator().manual_seed(0)
    rand = lambda *shape: torch.rand(*shape, generator=make, dtype=torch.float64)  # noqa: E731
    x, dt, A = rand(2, tokens, channels), rand(channels), -4 * rand(channels, state)
    B, C = rand(state) - 0.5, rand(state) - 0.5
    spread = lambda value: value.expand(2, tokens, -1).contiguous()  # noqa: E731
    start = torch.zeros(2, channels, state, dtype=torch.float64)
    y = selective_scan.chunked(x, spread(dt), spread(B), spread(C), A=A, state=start).y
    lag = torch.arange(tokens, dtype=torch.float64)
    kernel = torch.einsum("n,ent,n,e->te", C, torch.exp((dt[:, None] * A)[..., None] * lag), B, dt)
    want = torch.stack([torch.einsum("se,bse->be", kernel[: t + 1].flip(0), x[:, : t + 1]) for t in range(tokens)], 1)
    return float((y - want).abs().max())


def selective_is_gate(*, zoh: bool = True, tokens: int = 50) -> float:
    """Deviation of the scan with N = 1, A = -1, B = C = 1, dt = softplus(s) from h_t = (1 - g_t) h_{t-1} + g_t x_t with
    g = sigmoid(s): holds for the exact hold (zoh), not for Euler's input map ([mamba] Theorem 1)."""
    make = torch.Generator().manual_seed(0)
    x, score = (torch.randn(2, tokens, 3, generator=make, dtype=torch.float64) for _ in range(2))
    one = torch.ones(2, tokens, 1, dtype=torch.float64)
    start = torch.zeros(2, 3, 1, dtype=torch.float64)
    step = partial(selective_scan.step, A=-torch.ones(3, 1, dtype=torch.float64), discretise="zoh" if zoh else "euler")
    y = scan(step, x, torch.nn.functional.softplus(score), one, one, state=start).y
    gate, h, want = score.sigmoid(), torch.zeros(2, 3, dtype=torch.float64), []
    for t in range(tokens):
        h = (1 - gate[:, t]) * h + gate[:, t] * x[:, t]
        want.append(h)
    return float((y - torch.stack(want, 1)).abs().max())
