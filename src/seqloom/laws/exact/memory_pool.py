"""A pool of notes beside a state: what it holds, what it costs, and what the state alone keeps."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from seqloom.core import state as st
from seqloom.core import use_form
from seqloom.interpret.fidelity import etmf
from seqloom.kernels import selective_scan
from seqloom.laws.exact import layer_of
from seqloom.mixers import Mamba, MemMamba
from seqloom.parts import notes

MIXER = Mamba(state=4, expand=1)
DIM = 32


def draws(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@torch.no_grad()
def reduces(*, threshold: float = 1.0) -> float:
    """Deviation from the mixer alone of a layer that takes no notes, by threshold 1 and by a pool of none ([memmamba] Works
    when 1)."""
    x, worst = draws(2, 70, DIM), 0.0
    for spec in (MemMamba(mixer=MIXER, block=4, threshold=threshold), MemMamba(mixer=MIXER, pool=0)):
        layer = layer_of(spec, DIM)
        worst = max(worst, float((layer(x).y - layer.mixer(x).y).abs().max()))
    return worst


def wrong_slots(keep: Literal["priority", "fifo"], *, pool: int = 7, tokens: int = 60) -> float:
    """Slots of the pool that differ from a list sorted in plain Python, after every prefix, for blocks of 1, 4 and 20 tokens
    and both forms; what stays is at most P notes of ended blocks, and all of the unfinished one ([memmamba] Works when 3)."""
    wrong = 0
    q, note, score = draws(1, tokens, 3), draws(1, tokens, 3, seed=2), draws(1, tokens, seed=3)
    place = torch.arange(tokens)[None]
    for block in (1, 4, 20):
        rule = dict(pool=pool, block=block, keep=keep, threshold=0.0, salt=0)
        start = notes.empty(1, 3, pool=pool, block=block, dtype=q.dtype, device="cpu")
        for form in notes.FORMS.values():
            for stop in range(1, tokens + 1, 7):
                part = [x[:, :stop] for x in (q, note, score, place)]
                state = form(*part, state=start, **rule).state
                ended = stop // block * block
                rank = (lambda t: float(score[0, t])) if keep == "priority" else (lambda t: t)
                want = sorted(sorted(range(ended), key=rank)[-pool:]) + list(range(ended, stop))
                held = [int(age) - 1 for age in state.age[0] if age > 0]
                wrong += held != want
                wrong += int((state.note[0, -len(want):] != note[0, want]).sum()) if held == want else 0
    return float(wrong)


def grows(*, tokens: int = 100_000) -> float:
    """Bytes by which the state is larger after 100,000 tokens than after 1,000, said and held ([memmamba] Works when 4)."""
    layer = layer_of(MemMamba(mixer=MIXER, pool=8, note_dim=4, block=16), 8).float()
    said = layer.state_bytes(tokens) - layer.state_bytes(1000)
    with torch.no_grad():
        state, held = None, []
        for _ in range(tokens // 10_000):
            state = layer(torch.randn(1, 10_000, 8), state=state).state
            held.append(st.count_bytes(state))
    return float(abs(said) + max(held) - min(held))


def score_gradient() -> float:
    """Least gradient of the score's parameters over the largest of any parameter ([memmamba] Works when 6)."""
    layer = layer_of(MemMamba(mixer=MIXER, pool=4, note_dim=6, block=3), DIM)
    with use_form("chunked"):
        (layer(draws(2, 40, DIM)).y * draws(2, 40, DIM, seed=2)).sum().backward()
    most = max(float(p.grad.abs().max()) for p in layer.parameters())
    return min(float(p.grad.abs().max()) for p in (layer.score, layer.score_bias)) / most


def impulse(*, tokens: int = 60, channels: int = 6, state: int = 4, shrink: float = 1.0) -> float:
    """Largest ratio of what one token moves the state k >= 1 tokens later to its bound, max_n exp(A_n (dt_{t-k+1} + .. + dt_t))
    |dt B x|, for every channel: at most 1. With `shrink` below 1 the bound is made smaller ([memmamba] Works when 5)."""
    dt, A = torch.nn.functional.softplus(draws(1, tokens, channels)), -draws(channels, state, seed=2).exp()
    x, B = draws(1, tokens, channels, seed=3), draws(1, tokens, state, seed=4)
    moved = x.clone()
    moved[:, 5] += 1.0
    worst = 0.0
    for stop in range(7, tokens + 1):
        a, b = (selective_scan.recurrent(u[:, :stop], dt[:, :stop], B[:, :stop], B[:, :stop], A=A).state for u in (x, moved))
        since = dt[0, 6:stop].sum(0)
        bound = shrink * (A * since[:, None]).exp().amax(1) * dt[0, 5] * B[0, 5].norm()
        worst = max(worst, float(((b - a)[0].norm(dim=1) / bound).max()))
    return worst


def register_fidelity(*, size: int = 6, tokens: int = 6, rows: int = 400, dim: int = 3) -> float:
    """ETMF of a shift register that holds the last `size` tokens: 1 if that is all of them ([memmamba] Works when 5)."""
    read = draws(rows, tokens, dim)
    return etmf(read[:, -size:].flatten(1), read, ridge=1e-9)
