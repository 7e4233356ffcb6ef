"""Mimetic initialisation: what the layer it makes is before any training."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import einsum
from torch import Tensor

from seqloom.core import Spec
from seqloom.laws.precision import captured
from seqloom.mixers import GatedLinearAttention, Mamba, Mamba2
from seqloom.models import Block, MimeticInit, Stack

MIXER = Mamba2(state=64, head_dim=64)


def stack(init: MimeticInit | None, mixer: Spec = MIXER, dim: int = 64, seed: int = 0) -> torch.nn.Module:
    """Two blocks, the second of which `init` sets, in float64."""
    torch.manual_seed(seed)
    model = Stack(dim=dim, blocks=(Block(mixer=mixer),) * 2).build().double()
    if init is not None:  # in float64, where a step of 1 is 1 to all digits
        init.apply(model)
    return model


def streams(init: MimeticInit | None, x: Tensor) -> tuple[Tensor, ...]:
    """What the second block's scan is given for inputs x [B, T, D]: C, B [B, T, G, N], x [B, T, H, P], dt, log a [B, T, H]."""
    found = captured(stack(init).blocks[1].mixer, x, torch.ones(x.shape[:2], dtype=torch.int64))
    if found is None:
        raise AssertionError("the layer does not compute through Mixer.run")
    return tuple(found[0])


def draws(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def least_weight(*, tokens: int = 256) -> float:
    """The least entry of the decay mask L: exp(-T e^-c) if all steps are 1 ([mimetic-init] Works when 1)."""
    *_, log_a = streams(MimeticInit(), draws(2, tokens, 64))
    return float(log_a[:, 1:].sum(1).exp().min())


def forgetting_heads(*, tokens: int = 257) -> float:
    """Of the default's heads with dt |A| > 0.03, the share whose mask is below 1e-3 at a lag of 256; over 16 seeds."""
    found, faded = 0, 0
    for seed in range(16):
        layer = stack(None, seed=seed).blocks[1].mixer
        rate = F.softplus(layer.dt_bias) * layer.A_log.exp()
        found += int((rate > 0.03).sum())
        faded += int(((rate > 0.03) & ((-rate * (tokens - 1)).exp() < 1e-3)).sum())
    return faded / found


def is_linear_attention(*, c: float = 1000.0, tokens: int = 100) -> float:
    """Deviation of the set layer's core from causal linear attention, y = tril(C B') x: 0 where A = 0 (a large c)."""
    C, B, x, dt, log_a = streams(MimeticInit(c=c), draws(2, tokens, 64))
    y = MIXER.forms["chunked"](C, B, x, dt, log_a).y
    weights = einsum(C, B, "b i g n, b j g n -> b i j").tril()
    return float((y - einsum(weights, x, "b i j, b j h p -> b i h p")).abs().max())


def likeness(*, init: MimeticInit | None = MimeticInit(), symbols: int = 26, tokens: int = 200, seeds: int = 8) -> float:
    """Mean of C_i . B_j over pairs of equal tokens, over the mean of |C_i . B_j| over unequal ones ([mimetic-init] Works
    when 2), embeddings N(0, 1); mean over `seeds`."""
    ratios = []
    for seed in range(seeds):
        make = torch.Generator().manual_seed(seed)
        ids = torch.randint(symbols, (1, tokens), generator=make)
        table = torch.randn(symbols, 64, generator=make, dtype=torch.float64)
        C, B, *_ = streams(init, table[ids])
        score = einsum(C, B, "b i g n, b j g n -> b i j")[0]
        equal = ids[0, :, None] == ids[0, None, :]
        ratios.append(float(score[equal].mean() / score[~equal].abs().mean()))
    return sum(ratios) / seeds


def sees_previous(*, conv: bool = True) -> float:
    """Change of what the scan is given at a token when the token before it changes: 0 where the convolution passes through."""
    x, other = draws(1, 9, 64), draws(1, 9, 64, seed=2)
    other[:, 5:] = x[:, 5:]
    pair = (streams(MimeticInit(conv=conv), x), streams(MimeticInit(conv=conv), other))
    return max(float((a[:, 5] - b[:, 5]).abs().max()) for a, b in zip(*pair, strict=True))


def disturbs(mixers: tuple[Spec, ...] = (MIXER, Mamba(state=4), GatedLinearAttention(heads=2, conv=4))) -> float:
    """How many names or shapes of parameters change, plus by how much values do when the same seed sets them twice, plus
    by how much parameters change that are not reported as touched: 0."""
    wrong = 0.0
    for mixer in mixers:
        plain, made = stack(None, mixer), stack(MimeticInit(), mixer)
        before = {name: value.detach().clone() for name, value in plain.named_parameters()}
        wrong += len({(n, p.shape) for n, p in plain.named_parameters()} ^ {(n, p.shape) for n, p in made.named_parameters()})
        seen = []
        for _ in range(2):
            torch.manual_seed(3)
            touched = MimeticInit().apply(plain)
            seen.append({name: value.detach().clone() for name, value in plain.named_parameters()})
        for name, value in seen[0].items():
            wrong += float((value - seen[1][name]).abs().max())
            wrong += 0.0 if name in touched else float((value - before[name]).abs().max())
    return wrong


def step_gradient(mixer: Spec = MIXER) -> float:
    """Least gradient of what makes the steps of the set layer, relative to the largest gradient in it: they can be learnt."""
    model = stack(MimeticInit(), mixer)
    (model(draws(2, 30, 64)).y * draws(2, 30, 64, seed=2)).sum().backward()
    layer = model.blocks[1].mixer
    most = max(float(p.grad.abs().max()) for p in layer.parameters())
    if isinstance(mixer, Mamba):
        parts = (layer.dt_proj.weight.grad, layer.dt_proj.bias.grad, layer.A_log.grad)
    else:
        parts = (layer.in_proj.weight.grad[-layer.heads :], layer.dt_bias.grad, layer.A_log.grad)
    return min(float(part.abs().max()) for part in parts) / most
