"""The delta rule as a memory: what it keeps, and that it is stable."""

from __future__ import annotations

import torch

from seqloom.core import scan
from seqloom.kernels import decay_scan, delta_scan


def memory(*, erase: bool = True, dim: int = 16) -> float:
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


def spectral_norm(*, dim: int = 8, tokens: int = 10_000) -> float:
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
