"""Copying by a recurrence and by softmax attention: what scores it takes, how many slots, how many bits.

Sources: [can-mamba-copy] Theorems 1 to 5; its sheet's Works when 1 to 6.
"""

from __future__ import annotations

import itertools
import math

import torch
import torch.nn.functional as F
from torch import Tensor

from seqloom.core.segments import Track, resolve
from seqloom.kernels import selective_scan, short_conv, softmax
from seqloom.study.capacity import distinct, longest_copy

DOUBLE = torch.float64


def is_attention(*, tokens: int = 50, channels: int = 4, state: int = 3) -> float:
    """Deviation of the selective scan from weights alpha_ij (c_i b_j) on the values dt_j x_j, alpha_ij the product of the
    decays from j + 1 to i, over packed sequences (Works when 1)."""
    make = torch.Generator().manual_seed(0)
    randn = lambda *shape: torch.randn(2, tokens, *shape, generator=make, dtype=DOUBLE)  # noqa: E731
    x, dt, B, C = randn(channels), F.softplus(randn(channels)), randn(state), randn(state)
    A = -torch.rand(channels, state, generator=make, dtype=DOUBLE)
    ids = torch.tensor([[1] * tokens, [1] * (tokens // 3) + [2] * (tokens - tokens // 3)])
    segments, _, _ = resolve(ids, Track.start(2))
    weights = selective_scan.matrix(dt, B, C, A=A, segments=segments)
    y = selective_scan.chunked(x, dt, B, C, A=A, segments=segments).y
    return float((torch.einsum("bets,bse->bte", weights, x) - y).abs().max())


def slots_miss(*, tokens: int = 256, slots: int = 256) -> float:
    """Largest error of a selective scan that copies `tokens` numbers with one-hot maps, A = 0 and `slots` states: position t
    goes to state t mod slots. 0 with as many slots as tokens (Theorem 3)."""
    make = torch.Generator().manual_seed(0)
    text = torch.randint(1, 27, (1, tokens, 1), generator=make).to(DOUBLE)
    address = F.one_hot(torch.arange(tokens) % slots, slots).to(DOUBLE)[None]
    nothing = torch.zeros_like(address)
    x = torch.cat([text, torch.zeros_like(text)], 1)
    B, C = torch.cat([address, nothing], 1), torch.cat([nothing, address], 1)
    y = selective_scan.chunked(x, torch.ones_like(x), B, C, A=torch.zeros(1, slots, dtype=DOUBLE)).y
    return float((y[:, tokens:] - text).abs().max())


def slots_confuse(*, tokens: int = 4, slots: int = 3, symbols: int = 2) -> float:
    """How many of all symbols^tokens strings cannot be told from another by the state, under the best of all slots^tokens
    ways to address one slot a position, whatever reads it. 0 where slots = tokens, else at least 1 (Theorem 3, exhaustive)."""
    texts = torch.tensor(list(itertools.product(range(symbols), repeat=tokens)), dtype=DOUBLE)[..., None]
    A, least = torch.zeros(1, slots, dtype=DOUBLE), math.inf
    for places in itertools.product(range(slots), repeat=tokens):
        B = F.one_hot(torch.tensor(places), slots).to(DOUBLE).expand(len(texts), -1, -1)
        state = selective_scan.chunked(texts, torch.ones_like(texts), B, B, A=A).state
        least = min(least, len(texts) - distinct(state))
    return float(least)


def _weights_back(decay: float, distance: int) -> tuple[float, float]:
    """By the selective scan's weights under unit scores: of the value `distance` tokens back, and of all later ones."""
    one = torch.ones(1, distance + 1, 1, dtype=DOUBLE)
    weights = selective_scan.matrix(one, one, one, A=torch.full((1, 1), math.log(decay), dtype=DOUBLE))[0, 0, -1]
    return float(weights[0]), float(weights[1:].sum())


def score_growth(*, decays: tuple[float, ...] = (0.9, 0.95, 0.99), corrected: bool = True) -> float:
    """Relative deviation from -log a of the rate at which the least score grows with the distance: the score that makes a
    value's weight 10 times that of all later ones with unit scores, from 20 to 200 tokens (Theorem 1).

    The later ones weigh more with distance, too; without `corrected` that is taken for growth of the score.
    """
    distances, worst = torch.arange(20, 201, 20), 0.0
    for decay in decays:
        own, later = torch.tensor([_weights_back(decay, int(distance)) for distance in distances], dtype=DOUBLE).T
        least = 10 * later / own
        growth = _slope(distances.to(DOUBLE), least.log() - (later.log() if corrected else 0.0))
        worst = max(worst, abs(growth / -math.log(decay) - 1))
    return worst


def softmax_gap_growth(*, error: float = 0.05) -> float:
    """Deviation from 1 of the slope, against log(distance), of the least gap between a score and all others at which
    softmax attention gives the others at most `error`, from 8 to 1,024 tokens (Theorem 2)."""
    distances = [8, 32, 128, 512, 1024]
    gaps = []
    for distance in distances:
        low, high = 0.0, 100.0
        for _ in range(60):
            gap = (low + high) / 2
            keys = torch.zeros(1, distance + 1, 1, 1, dtype=DOUBLE)
            keys[:, 0] = gap
            one = torch.ones(1, 1, 1, 1, dtype=DOUBLE)
            weight, _ = softmax.weights(one, keys, pattern=softmax.Pattern(order="causal"), scale=1.0)
            low, high = (low, gap) if 1 - float(weight[0, 0, 0, 0]) <= error else (gap, high)
        gaps.append(high)
    return abs(_slope(torch.tensor(distances, dtype=DOUBLE).log(), torch.tensor(gaps, dtype=DOUBLE)) - 1)


def _slope(x: Tensor, y: Tensor) -> float:
    x = x - x.mean()
    return float((x * (y - y.mean())).sum() / x.square().sum())


def states_beyond_bits(*, symbols: int = 2, bits: int = 2, states: int = 2, tokens: int = 8) -> float:
    """Strings a quantised recurrence can tell apart, over 2^(bits states): above 1 would break the pigeonhole bound.

    Every string of `tokens` symbols runs through a selective scan whose state is rounded to 2^bits levels a number after
    every token; the distinct states are counted (Works when 5).
    """
    make = torch.Generator().manual_seed(0)
    inputs = torch.randn(symbols, 1, generator=make, dtype=DOUBLE)
    B = torch.randn(symbols, states, generator=make, dtype=DOUBLE)
    A = -torch.rand(1, states, generator=make, dtype=DOUBLE)
    texts = torch.tensor(list(itertools.product(range(symbols), repeat=tokens)))
    state, top = torch.zeros(len(texts), 1, states, dtype=DOUBLE), 2**bits - 1
    for t in range(tokens):
        x, b = inputs[texts[:, t]], B[texts[:, t]]
        state, _ = selective_scan.step(state, x, torch.ones_like(x), b, b, A=A)
        state = ((state.clamp(-1, 1) + 1) / 2 * top).round() / top * 2 - 1
    return distinct(state) / 2 ** (bits * states)


def slots_beyond_bits(*, symbols: int = 4, tokens: int = 4) -> float:
    """Strings that slots of exactly log2(symbols) bits cannot tell apart: 0, the bound is reached by one slot a token.

    The same counts as `longest_copy` has it: one bit fewer, and the last character is lost.
    """
    bits = tokens * int(math.log2(symbols))
    texts = torch.tensor(list(itertools.product(range(symbols), repeat=tokens)), dtype=DOUBLE)[..., None]
    address = torch.eye(tokens, dtype=DOUBLE).expand(len(texts), -1, -1)
    A = torch.zeros(1, tokens, dtype=DOUBLE)
    state = selective_scan.chunked(texts, torch.ones_like(texts), address, address, A=A).state
    lost = len(texts) - distinct(state.round().clamp(0, symbols - 1))
    return float(lost + abs(longest_copy(bits, symbols) - tokens) + abs(longest_copy(bits - 1, symbols) - tokens + 1))


def window_program_errs(*, window: int = 7, tokens: int = 1000) -> float:
    """Largest error of the running maximum and sum of the last `window` numbers from a short convolution with one-hot taps, a
    shift register of `window` coordinates, run token by token (Theorem 5: m-local programs need a state of size m)."""
    numbers = torch.randint(-50, 50, (1, tokens), generator=torch.Generator().manual_seed(0)).to(DOUBLE)
    taps, tail = torch.eye(window, dtype=DOUBLE), torch.full((1, window - 1, window), -1e9, dtype=DOUBLE)
    worst = 0.0
    for t in range(tokens):
        tail, seen = short_conv.step(tail, numbers[:, t, None].expand(-1, window), weight=taps)
        last = numbers[0, max(0, t + 1 - window) : t + 1]
        total = torch.where(seen > -1e9, seen, 0.0).sum()
        worst = max(worst, float((seen.max() - last.max()).abs()), float((total - last.sum()).abs()))
    return worst
