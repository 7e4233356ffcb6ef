"""The difference of two Mambas: its limits, its schedule, its size."""

from __future__ import annotations

import torch

from seqloom.core import BuildContext, Spec
from seqloom.laws.exact import layer_of
from seqloom.mixers import DiffMamba, Mamba2
from seqloom.mixers.diff_mamba import initial_lambda

DIM = 32
TABLE = {0: 0.2, 1: 0.3555, 2: 0.4707, 11: 0.7779}


def tokens(count: int = 70) -> torch.Tensor:
    return torch.randn(2, count, DIM, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@torch.no_grad()
def first_alone(mixer: Spec) -> float:
    """Deviation from (1 - lambda_init) m_1(x) of the layer with lambda 0 and no norm ([diff-mamba] Works when 1)."""
    layer, x = layer_of(DiffMamba(mixer=mixer, weight=0.0, norm="none"), DIM), tokens()
    return float((layer(x).y - (1 - layer.lambda_init) * layer.mixer_1(x).y).abs().max())


@torch.no_grad()
def cancels(mixer: Spec, *, weight: float = 1.0) -> float:
    """Largest output, NaN counted as infinite, of two mixers with the same weights, with the norm and without: 0 at lambda
    1 ([diff-mamba] Works when 2)."""
    worst = 0.0
    for norm in ("none", "rms"):
        layer = layer_of(DiffMamba(mixer=mixer, weight=weight, norm=norm), DIM)
        layer.mixer_2.load_state_dict(layer.mixer_1.state_dict())
        worst = max(worst, float(layer(tokens()).y.nan_to_num(float("inf")).abs().max()))
    return worst


@torch.no_grad()
def is_two_mixers(mixer: Spec, *, cut: int = 33) -> float:
    """Deviation of the layer from two separate mixers with a state each, in two calls ([diff-mamba] Works when 3)."""
    layer, x, worst = layer_of(DiffMamba(mixer=mixer), DIM), tokens(), 0.0
    state = first = second = None
    for part in (x[:, :cut], x[:, cut : cut + 1], x[:, cut + 1 :]):
        y, state, _ = layer(part, state=state)
        a, first, _ = layer.mixer_1(part, state=first)
        b, second, _ = layer.mixer_2(part, state=second)
        want = (1 - layer.lambda_init) * layer.subln(a - layer.strength(x.dtype) * b)
        worst = max(worst, float((y - want).abs().max()))
    return worst


def schedule() -> float:
    """Largest deviation of lambda_init by layer from the sheet's table ([diff-mamba] Works when 4), by way of the context."""
    spec = DiffMamba(mixer=Mamba2(state=8, head_dim=16, expand=1))
    made = {layer: spec.build(BuildContext(dim=DIM, layer=layer, depth=12)).lambda_init for layer in TABLE}
    return max(abs(value - want) for layer, want in TABLE.items() for value in (made[layer], initial_lambda(layer)))


def size(*, dim: int = 1024) -> float:
    """Share by which it has more or fewer parameters than Mamba-2 of twice the inner width ([diff-mamba] Works when 5)."""
    with torch.device("meta"):
        one = Mamba2(state=64, head_dim=64).build(BuildContext(dim=dim))
        two = DiffMamba(mixer=Mamba2(state=64, head_dim=64, expand=1)).build(BuildContext(dim=dim))
    count = lambda layer: sum(p.numel() for p in layer.parameters())  # noqa: E731
    return abs(count(two) / count(one) - 1)


@torch.no_grad()
def halves() -> float:
    """Deviation of m_1 + m_2, made of the halves of a Mamba-2 with two groups, from that Mamba-2 ([diff-mamba] Method 8)."""
    source = layer_of(Mamba2(state=6, head_dim=8, groups=2), DIM)
    spec = DiffMamba(mixer=Mamba2(state=6, head_dim=8, expand=1), combine="sum", weight=1.0, lambda_init=0.0, norm="none")
    layer = layer_of(spec, DIM)
    layer.take_halves(source)
    return float((layer(tokens()).y - source(tokens()).y).abs().max())
