"""Cosine attention: what it sums, what it does not depend on, and how large it can get."""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from seqloom.core import Info, Mixer, is_exact, use_form
from seqloom.laws.exact import layer_of
from seqloom.mixers import LinearAttention

DIM, HEADS = 12, 2


def spec(**settings: str) -> LinearAttention:
    """Cosine attention with two heads of 3 key and 4 value channels."""
    return replace(LinearAttention(heads=HEADS, key_dim=3, value_dim=4, feature="cosine", normaliser="count"), **settings)


def _inputs(tokens: int) -> Tensor:
    return torch.randn(2, tokens, DIM, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def _heads(layer: Mixer, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v [B, T, H, .] of the layer's projection."""
    parts = layer.qkv(x).split(layer.widths, -1)
    q, k, v = (part.unflatten(-1, (HEADS, -1)) for part in parts)
    return F.normalize(q, dim=-1), F.normalize(k, dim=-1), v


def is_sum(**settings: str) -> float:
    """Worst deviation of any form from the sums written term by term ([cottention] Works when 1)."""
    layer, x, tokens = layer_of(spec(**settings), DIM), _inputs(21), 21
    with torch.no_grad():
        q, k, v = _heads(layer, x)
        power = torch.full((HEADS,), float(layer.spec.normaliser == "mean")) if layer.m is None else layer.m.sigmoid()
        want = torch.zeros(2, tokens, HEADS, 4, dtype=torch.float64)
        for t in range(tokens):
            last = t if layer.spec.causal else tokens - 1
            for j in range(last + 1):
                count = (j if layer.spec.norm_side == "key" else last) + 1.0
                want[:, t] += (q[:, t] * k[:, j]).sum(-1, keepdim=True) * v[:, j] / count ** power[:, None]
        want = layer.out(want.flatten(2))
        worst = 0.0
        for form in (name for name, function in layer.spec.forms.items() if is_exact(function)):
            with use_form(form):
                worst = max(worst, float((layer(x).y - want).abs().max()))
    return worst


def rescaled(*, queries: float = 7.0, keys: float = 0.01, **settings: str) -> float:
    """Change of the output, relative to it, when queries and keys are scaled ([cottention] Works when 2)."""
    layer, x = layer_of(spec(**settings), DIM), _inputs(21)
    with torch.no_grad():
        y = layer(x).y
        layer.qkv.weight[: layer.widths[0]] *= queries
        layer.qkv.weight[layer.widths[0] : sum(layer.widths[:2])] *= keys
        want = y if queries > 0 else -y
        return float((layer(x).y - want).abs().max() / y.abs().max())


def largest(normaliser: str = "count") -> float:
    """The largest norm of a head's output over its bound: sum |v| / n^e, or with "mean" the largest |v|
    ([cottention] Works when 3 and 4)."""
    layer, x = layer_of(spec(normaliser=normaliser), DIM), _inputs(200)
    with torch.no_grad():
        _, _, v = _heads(layer, x)
        layer.out = torch.nn.Identity()
        found = layer(x).y.unflatten(-1, (HEADS, -1)).norm(dim=-1)
        size, count = v.norm(dim=-1), torch.arange(1.0, 201.0, dtype=torch.float64)[:, None]
        bound = size.cummax(1).values if normaliser == "mean" else size.cumsum(1) / count ** layer.m.sigmoid()
    return float((found / bound).max())


def trains_power() -> float:
    """Size of the gradient that reaches m ([cottention] Works when 4)."""
    layer = layer_of(spec(), DIM)
    y = layer(_inputs(21)).y
    (gradient,) = torch.autograd.grad(y.square().sum(), layer.m)
    return float(gradient.abs().min())


def padded(*, tell: bool = True) -> float:
    """Change of real outputs, bidirectional, when pads follow: n counts real tokens. With tell=False nobody says that they
    are pads, and they are zeros that count ([cottention] Works when 5)."""
    layer, x = layer_of(spec(direction="bidirectional"), DIM), _inputs(21)
    longer = F.pad(x, (0, 0, 0, 9), value=float("nan") if tell else 0.0)
    ids = (torch.arange(30) < 21).long().expand(2, -1) if tell else None
    with torch.no_grad():
        return float((layer(longer, info=Info(segments=ids)).y[:, :21] - layer(x).y).abs().max())


def looks_ahead(*, tokens: int = 21, place: int = 12) -> float:
    """Largest change of outputs before `place` when the tokens from there are changed, over all forms."""
    layer, x = layer_of(spec(), DIM), _inputs(tokens)
    other = torch.cat([x[:, :place], -2 * x[:, place:]], 1)
    worst = 0.0
    for form in (name for name, function in layer.spec.forms.items() if is_exact(function)):
        with use_form(form), torch.no_grad():
            worst = max(worst, float((layer(x).y - layer(other).y)[:, :place].abs().max()))
    return worst


class _Sizes(TorchDispatchMode):
    """Remembers the most elements that any tensor made inside had."""

    most = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for value in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(value, Tensor):
                self.most = max(self.most, value.numel())
        return out


def growth(*, tokens: int = 2048, form: str = "chunked") -> float:
    """The largest tensor of a training step at twice `tokens`, over that at `tokens`: 2 if linear, 4 if T x T
    ([cottention] Works when 6)."""
    layer, sizes = layer_of(spec(), DIM).float(), []
    for count in (tokens, 2 * tokens):
        with _Sizes() as seen, use_form(form):
            layer(torch.zeros(1, count, DIM).requires_grad_()).y.sum().backward()
        sizes.append(seen.most)
    return sizes[1] / sizes[0]
