"""The selective scan at its two limits: a convolution, and a gated recurrence."""

from __future__ import annotations

from functools import partial

import torch

from seqloom.core import scan
from seqloom.kernels import selective_scan


def is_convolution(*, tokens: int = 50, channels: int = 6, state: int = 4) -> float:
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


def is_gate(*, zoh: bool = True, tokens: int = 50) -> float:
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
