"""Hydra's matrix: what it is, entry by entry, and what follows from its being quasiseparable."""

from __future__ import annotations

import torch
from torch import Tensor

from seqloom.core import Info, is_exact, use_form
from seqloom.laws.exact import layer_of
from seqloom.mixers import hydra

Streams = dict[str, Tensor]


def streams(*, tokens: int = 20, heads: int = 2, groups: int = 1, state: int = 3, value: int = 4) -> Streams:
    """Random streams of Hydra's kernel in float64."""
    make = torch.Generator().manual_seed(0)
    rand = lambda *shape: torch.randn(2, tokens, *shape, generator=make, dtype=torch.float64)  # noqa: E731
    dt = torch.nn.functional.softplus(rand(2, heads))
    return dict(C=rand(2, groups, state), B=rand(2, groups, state), x=rand(heads, value), dt=dt, log_a=-dt * 0.7,
                skip=rand(heads))


def _explicit(C: Tensor, B: Tensor, dt: Tensor, log_a: Tensor, skip: Tensor) -> Tensor:
    """The matrices [B, H, T, T], entry by entry from [hydra] Method 2 and 3."""
    batch, tokens, heads = skip.shape
    a, shared = log_a.exp(), heads // C.shape[3]
    m = torch.zeros(batch, heads, tokens, tokens, dtype=torch.float64)
    for h in range(heads):
        g = h // shared
        for i in range(tokens):
            m[:, h, i, i] = skip[:, i, h]
            for j in range(i):
                reach = a[:, j + 1 : i, 0, h].prod(1) * dt[:, j, 0, h]
                m[:, h, i, j] = (C[:, i - 1, 0, g] * B[:, j, 0, g]).sum(-1) * reach
            for j in range(i + 1, tokens):
                reach = a[:, i + 1 : j, 1, h].prod(1) * dt[:, j, 1, h]
                m[:, h, i, j] = (C[:, i + 1, 1, g] * B[:, j, 1, g]).sum(-1) * reach
    return m


def is_matrix(form: str, *, combine: hydra.Combine = "shift") -> float:
    """Deviation of a form's output from the matrix written entry by entry, times x ([hydra] Works when 1)."""
    parts = streams(groups=2)
    y = hydra.FORMS[form](**parts, combine=combine).y
    x = parts.pop("x")
    return float((y - torch.einsum("bhij,bjhp->bihp", _explicit(**parts), x)).abs().max())


def excess_rank(*, state: int = 3) -> float:
    """The largest singular value past the first N of blocks strictly below and above the diagonal, relative to the first
    ([hydra] Works when 2)."""
    parts = streams(state=state)
    del parts["x"]
    m, tokens = hydra.weights(**parts), parts["dt"].shape[1]
    worst = 0.0
    for cut in range(1, tokens):
        for block in (m[..., cut:, :cut], m[..., :cut, cut:]):
            values = torch.linalg.svdvals(block)
            if values.shape[-1] > state:
                worst = max(worst, float((values[..., state] / values[..., 0]).max()))
    return worst


def mirrored(*, swap: bool = True) -> float:
    """Deviation from the flipped output when the input is flipped and the directions swap parameters (or keep them)."""
    parts = streams()
    y = hydra.FORMS["chunked"](**parts).y
    flipped = {name: value.flip(1) for name, value in parts.items()}
    if swap:
        flipped |= {name: flipped[name].flip(2) for name in ("C", "B", "dt", "log_a")}
    return float((hydra.FORMS["chunked"](**flipped).y.flip(1) - y).abs().max())


def one_sided() -> float:
    """Without the backward B and with the diagonal C_t' B_t dt_t at the token before: a causal scan, read one token late,
    plus the diagonal ([hydra] Works when 5)."""
    parts = streams()
    parts["B"] = parts["B"] * torch.tensor([1.0, 0.0], dtype=torch.float64)[:, None, None]
    y = hydra.FORMS["chunked"](**parts).y
    state = torch.zeros(2, 2, 3, 4, dtype=torch.float64)
    want = []
    for t in range(y.shape[1]):  # the state before token t, read by the query before it
        before = parts["C"][:, t - 1, 0] if t else torch.zeros_like(parts["C"][:, 0, 0])
        want.append(torch.einsum("bgk,bhkv->bhv", before, state) + parts["skip"][:, t, :, None] * parts["x"][:, t])
        write = torch.einsum("bgk,bhv->bhkv", parts["B"][:, t, 0], parts["dt"][:, t, 0, :, None] * parts["x"][:, t])
        state = parts["log_a"][:, t, 0].exp()[..., None, None] * state + write
    return float((y - torch.stack(want, 1)).abs().max())


def diagonal_alone() -> float:
    """With B = 0 in both directions only skip_t x_t is left ([hydra] Works when 4)."""
    parts = streams()
    parts["B"] = torch.zeros_like(parts["B"])
    y = hydra.FORMS["chunked"](**parts).y
    return float((y - parts["skip"][..., None] * parts["x"]).abs().max())


def all_ones(*, combine: hydra.Combine = "shift", tokens: int = 12) -> float:
    """Deviation from the matrix of ones with a zero diagonal, for N = 1, a = b = c = 1 and a zero diagonal of its own:
    none for the shifted pair; the added pair is bound to have 2 there ([hydra] Works when 8)."""
    one = torch.ones(1, tokens, 2, 1, 1, dtype=torch.float64)
    flat = torch.zeros(1, tokens, 2, 1, dtype=torch.float64)
    m = hydra.weights(one, one, flat + 1, flat, flat[:, :, 0], combine=combine)[0, 0]
    return float((m - (1 - torch.eye(tokens, dtype=torch.float64))).abs().max())


def last_moves_first(spec: hydra.Hydra, *, dim: int = 32, tokens: int = 8) -> float:
    """Change of the first output when the last token changes."""
    layer = layer_of(spec, dim)
    x = torch.randn(1, tokens, dim, dtype=torch.float64)
    other = torch.cat([x[:, :-1], torch.randn(1, 1, dim, dtype=torch.float64)], 1)
    with torch.no_grad():
        y, moved = layer(x).y, layer(other).y
    return float((moved - y)[:, 0].norm() / y[:, 0].norm())


def across_boundary(spec: hydra.Hydra, *, dim: int = 32, tokens: int = 20) -> float:
    """Change of one sample's outputs when its neighbours in the row change, pads between them included, over all forms."""
    layer = layer_of(spec, dim)
    x = torch.randn(1, tokens, dim, dtype=torch.float64)
    ids = torch.tensor([[1] * 6 + [0] + [2] * 7 + [3] * (tokens - 14)])
    other = torch.where(ids[..., None] == 2, x, torch.randn_like(x))
    worst = 0.0
    for form in (name for name, function in spec.forms.items() if is_exact(function)):
        with use_form(form), torch.no_grad():
            y, moved = (layer(value, info=Info(segments=ids)).y for value in (x, other))
        worst = max(worst, float((moved - y)[:, 7:14].abs().max()))
    return worst
