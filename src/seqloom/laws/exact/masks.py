"""LION's masks: what they are, entry by entry, and their symmetries."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from seqloom.core import is_exact
from seqloom.mixers import lion

FORMS = [name for name, form in lion.FORMS.items() if is_exact(form)]
Kind = Literal["none", "fixed", "selective"]


def streams(kind: Kind, *, tokens: int = 21, heads: int = 2) -> dict[str, Tensor]:
    """Positive queries and keys, values, and the log decays of a kind of mask, in float64."""
    make = torch.Generator().manual_seed(0)
    rand = lambda *shape: torch.rand(2, tokens, heads, *shape, generator=make, dtype=torch.float64)  # noqa: E731
    parts = dict(q=rand(3), k=rand(3), v=rand(4) - 0.5)
    if kind != "none":
        decay = (0.3 + 0.7 * rand()).log()
        parts["log_a"] = decay[:, :1].expand(-1, tokens, -1) if kind == "fixed" else decay
    return parts


def explicit(log_a: Tensor, side: lion.Side, *, diagonal: float = 1.0) -> Tensor:
    """M [B, H, T, T], entry by entry from [lion] Method 2; `diagonal` 2 is M^F + M^B without the correction."""
    batch, tokens, heads = log_a.shape
    m = torch.empty(batch, heads, tokens, tokens, dtype=log_a.dtype)
    for i in range(tokens):
        for j in range(tokens):
            low, high = (j, i) if side == "key" else (j + 1, i + 1)
            if i < j:
                low, high = (i + 1, j + 1) if side == "key" else (i, j)
            m[:, :, i, j] = log_a[:, low:high].exp().prod(1) if i != j else diagonal
    return m


def _weighted(parts: dict[str, Tensor], m: Tensor) -> Tensor:
    """Row-normalised masked attention."""
    a = torch.einsum("bihk,bjhk->bhij", parts["q"], parts["k"]) * m
    top = torch.einsum("bhij,bjhv->bihv", a, parts["v"])
    return top / (a.sum(-1).transpose(1, 2)[..., None] + lion.EPS)


def _form(form: str, parts: dict[str, Tensor], side: lion.Side = "key", **options: Tensor) -> Tensor:
    return lion.FORMS[form](*parts.values(), side=side, normalise=True, **options).y


def is_masked(kind: Kind, side: lion.Side = "key", *, diagonal: float = 1.0) -> float:
    """Worst deviation of any form from masked attention with M written entry by entry ([lion] Works when 1)."""
    parts = streams(kind)
    want = _weighted(parts, explicit(parts.get("log_a", torch.zeros_like(parts["q"][..., 0])), side, diagonal=diagonal))
    return max(float((_form(form, parts, side) - want).abs().max()) for form in FORMS)


def sides_differ() -> float:
    """Difference between the two conventions, and 0 only if they were one."""
    parts = streams("selective")
    return float((_form("chunked", parts, "key") - _form("chunked", parts, "query")).abs().max())


def sides_mirror() -> float:
    """Deviation of one convention's mask from the transpose of the other's, both entry by entry."""
    log_a = streams("selective")["log_a"]
    m = lion.mask(log_a, side="query")
    return max(float((m - explicit(log_a, "query")).abs().max()), float((m - explicit(log_a, "key").mT).abs().max()))


def limits() -> float:
    """Decays of 1 give LION-LIT, and equal decays give M_ij = l^|i-j| ([lion] Works when 3)."""
    parts = streams("fixed")
    still = parts | {"log_a": torch.zeros_like(parts["log_a"])}
    bare = {name: value for name, value in parts.items() if name != "log_a"}
    place = torch.arange(parts["q"].shape[1], dtype=torch.float64)
    power = torch.exp(parts["log_a"][:, 0, :, None, None] * (place[:, None] - place).abs())
    worst = 0.0
    for form in FORMS:
        worst = max(worst, float((_form(form, still) - _form(form, bare)).abs().max()))
        worst = max(worst, float((_form(form, parts) - _weighted(parts, power)).abs().max()))
    return worst


def mirrored(kind: Kind, side: lion.Side = "key") -> float:
    """Deviation from the flipped output when every stream is flipped ([lion] Works when 4)."""
    parts = streams(kind)
    flipped = {name: value.flip(1) for name, value in parts.items()}
    return max(float((_form(form, flipped, side).flip(1) - _form(form, parts, side)).abs().max()) for form in FORMS)


def permuted(kind: Kind) -> float:
    """Deviation from the permuted output when the tokens are permuted: none without a mask ([lion] Works when 5)."""
    parts = streams(kind)
    order = torch.randperm(parts["q"].shape[1], generator=torch.Generator().manual_seed(1))
    moved = {name: value[:, order] for name, value in parts.items()}
    return float((_form("chunked", moved) - _form("chunked", parts)[:, order]).abs().max())


def row_sums(kind: Kind) -> float:
    """Deviation of the output from 1 where all values are 1: weights of a row sum to 1, up to eps ([lion] Works when 6)."""
    parts = streams(kind)
    parts["v"] = torch.ones_like(parts["v"])
    return float((_form("chunked", parts) - 1).abs().max())


def serpentine(*, rows: int = 5, columns: int = 4) -> float:
    """Deviation of the serpentine order from the mean of two masks, each laid along its curve patch by patch."""
    parts = streams("selective", tokens=rows * columns)
    other = parts["log_a"].flip(0, 2) * 0.7
    at = torch.arange(rows * columns).reshape(rows, columns)
    curves = []
    for grid in (at, at.T):
        curves.append(torch.cat([line.flip(0) if i % 2 else line for i, line in enumerate(grid)]))
    m = torch.zeros(2, 2, rows * columns, rows * columns, dtype=torch.float64)
    for curve, log_a in zip(curves, (parts["log_a"], other), strict=True):
        m[:, :, curve[:, None], curve[None]] += explicit(log_a[:, curve], "key") / 2
    orders = lion.serpentine(torch.arange(rows * columns).expand(2, -1), columns)
    want = _weighted(parts, m)
    parts["log_a"] = torch.cat([parts["log_a"], other], -1)
    return max(float((_form(form, parts, orders=orders) - want).abs().max()) for form in FORMS)
