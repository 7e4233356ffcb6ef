"""The causal relation network: its sums against pairs written out, its stable evaluation, what makes it more than linear."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from seqloom.kernels import pair_sum, softmax
from seqloom.laws.exact import layer_of
from seqloom.mixers import CausalRelation


def norm(x: Tensor) -> Tensor:
    """(x - mean) / std over the last axis, as the paper writes it."""
    return (x - x.mean(-1, keepdim=True)) / x.var(-1, correction=0, keepdim=True).sqrt()


def _setting(tokens: int, dim: int, **settings: Any) -> tuple[Any, Tensor, Tensor, Tensor]:
    """A layer, inputs [2, T, D], and what its two projections make of them."""
    layer = layer_of(CausalRelation(**settings), dim)
    x = torch.randn(2, tokens, dim, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    with torch.no_grad():
        return layer, x, layer.a_proj(x), layer.b_proj(x)


def sums_pairs(*, tokens: int = 30, dim: int = 16) -> float:
    """Deviation of the linear layer's running sum from the pairs exp(LN a_i + LN b_j), one by one ([causalrn] Method 3)."""
    layer, x, a, b = _setting(tokens, dim, pre_norm="approx", post_norm=False)
    with torch.no_grad():
        pairs = (norm(a)[:, :, None] + norm(b)[:, None]).exp()
        y = torch.stack([pairs[:, i, : i + 1].mean(1) for i in range(tokens)], 1)
        return float((layer(x).y - layer.o_proj(y)).abs().max())


def _naive(scale: float, tokens: int, dim: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """LN(e^a cumsum(e^b) / i) as it stands, and what the layer computes, with |a| and |b| brought up to `scale`."""
    layer, x, a, b = _setting(tokens, dim, pre_norm="none")
    with torch.no_grad():
        for projection, value in ((layer.a_proj, a), (layer.b_proj, b)):
            for parameter in projection.parameters():
                parameter.mul_(scale / value.abs().max())
        layer, x = layer.to(dtype), x.to(dtype)
        a, b = layer.a_proj(x), layer.b_proj(x)
        count = torch.arange(1, tokens + 1, dtype=dtype)[:, None]
        return layer.o_proj(norm(a.exp() * b.exp().cumsum(1) / count)), layer(x).y


def stable_is_naive(*, scale: float = 20.0, tokens: int = 30, dim: int = 16) -> float:
    """Deviation after the output norm of the stable evaluation from the naive one where that does not overflow."""
    naive, stable = _naive(scale, tokens, dim, torch.float64)
    return float((naive - stable).abs().max())


def overflows(which: str, *, scale: float = 800.0, tokens: int = 30, dim: int = 16) -> float:
    """The share of outputs that are not finite at |a|, |b| up to `scale`: of the "naive" evaluation or the "stable" one."""
    naive, stable = _naive(scale, tokens, dim, torch.float64)
    return float((~(naive if which == "naive" else stable).isfinite()).double().mean())


def more_than_a_product(pre_norm: str, *, tokens: int = 12, dim: int = 16) -> float:
    """Second singular value over the first of the matrix of what token j contributes to y_i, the largest over channels:
    0 where contributions are a product of a reader's and a read token's factor ([causalrn] Method 6)."""
    _, _, a, b = _setting(tokens, dim)
    exact = pre_norm == "exact"
    if pre_norm == "approx":
        a, b = norm(a), norm(b)
    line, one = softmax.line(tokens, a.device), softmax.line(1, a.device)
    columns = [
        pair_sum.matrix(a, b[:, j : j + 1], normalise=exact, activation="exp", pattern=softmax.Pattern(order="dense"),
                        queries=line, keys=one).y.exp()
        for j in range(tokens)
    ]
    size = torch.linalg.svdvals(torch.stack(columns, 2).movedim(-1, 1))  # [B, H, T, T]
    return float((size[..., 1] / size[..., 0]).max())


def first_token(*, dim: int = 16) -> float:
    """Deviation of the first output from W_3 exp(LN(a_1 + b_1)) + b_3, without the output norm."""
    layer, x, a, b = _setting(5, dim, post_norm=False)
    with torch.no_grad():
        return float((layer(x).y[:, 0] - layer.o_proj(norm(a + b).exp()[:, 0])).abs().max())
