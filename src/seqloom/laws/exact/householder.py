"""Products of Householder steps: what transitions of n steps a token can and cannot be."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from seqloom.core import use_form
from seqloom.kernels import delta_scan
from seqloom.laws.exact import layer_of
from seqloom.mixers import DeltaNet, DeltaProduct, GatedDeltaNet
from seqloom.tasks.synthetic.state_tracking import elements, running_product


def transition_norm(*, steps: int = 3, dim: int = 8, tokens: int = 1000) -> float:
    """Largest spectral norm of a token's transition with random unit keys and beta in [0, 2] ([deltaproduct] Works when 2):
    the kernel run for one token on the identity, without writes."""
    make = torch.Generator().manual_seed(0)
    k = F.normalize(torch.randn(tokens, 1, steps, 1, dim, generator=make, dtype=torch.float64), dim=-1)
    beta = 2 * torch.rand(k.shape[:4], generator=make, dtype=torch.float64)
    eye = torch.eye(dim, dtype=torch.float64).expand(tokens, 1, dim, dim)
    _, state, _ = delta_scan.chunked(k[:, :, 0], k, torch.zeros_like(k), beta, state=eye)
    return float(torch.linalg.matrix_norm(state, 2).max())


def reflections(group: str) -> tuple[Tensor, Tensor]:
    """For each element of a permutation group on n points, n - 1 keys [G, n - 1, n] and betas [G, n - 1] whose product of
    Householder steps, first step first, is its matrix: a swap of a and b is beta = 2, k = (e_a - e_b) / sqrt(2)."""
    rows = elements(group)
    size, points = rows.shape
    keys, beta = torch.zeros(size, points - 1, points, dtype=torch.float64), torch.zeros(size, points - 1, dtype=torch.float64)
    for g, row in enumerate(rows.tolist()):
        now = list(range(points))
        for i in range(points - 1):
            a, b = now[i], row[i]  # exchanging these two values puts place i right and moves none before it
            if a != b:
                keys[g, i, a], keys[g, i, b], beta[g, i] = 0.5**0.5, -(0.5**0.5), 2.0
                now = [b if value == a else a if value == b else value for value in now]
    return keys, beta


def group_products(*, group: str = "S5", steps: int | None = None, tokens: int = 4096, last_first: bool = False) -> float:
    """Largest error, at any of `tokens` tokens, of the running product of a word in a permutation group that the kernel
    keeps with hand-set keys: the state starts as the identity, and the query (0, 1, ...) reads the permutation itself
    ([deltaproduct] Works when 3). `steps` None takes n - 1; fewer leave swaps out, `last_first` reverses their order."""
    keys, beta = reflections(group)
    keys, beta = keys[:, :steps], beta[:, :steps]
    if last_first:
        keys, beta = keys.flip(1), beta.flip(1)
    word = torch.randint(len(keys), (1, tokens), generator=torch.Generator().manual_seed(0))
    points = keys.shape[-1]
    k, b = keys[word][:, :, :, None], beta[word][..., None]
    q = torch.arange(points, dtype=torch.float64).expand(1, tokens, 1, points)
    start = torch.eye(points, dtype=torch.float64)[None, None]
    y, _, _ = delta_scan.chunked(q, k, torch.zeros_like(k), b, state=start)
    return float((y[:, :, 0] - elements(group)[running_product(word, group)]).abs().max())


def cycle_distance(steps: int, *, starts: int = 32, rounds: int = 400) -> float:
    """Least spectral norm of P - prod_j (I - b_j k_j k_j') found from random starts, P a cycle of three points: no less than
    sqrt(3), the second singular value of I - P, with one step, and 0 with two ([deltaproduct] Works when 4)."""
    make = torch.Generator().manual_seed(0)
    cycle = torch.eye(3, dtype=torch.float64).roll(1, 0)
    keys = torch.randn(starts, steps, 3, generator=make, dtype=torch.float64).requires_grad_()
    beta = (2 * torch.rand(starts, steps, generator=make, dtype=torch.float64)).requires_grad_()
    optimiser, least = torch.optim.Adam([keys, beta], lr=0.05), math.inf
    for i in range(rounds):
        for group in optimiser.param_groups:
            group["lr"] = 0.05 * (1 - i / rounds)
        unit, product = F.normalize(keys, dim=-1), torch.eye(3, dtype=torch.float64)
        for j in range(steps):
            product = product - beta[:, j, None, None] * unit[:, j, :, None] * (unit[:, j, None, :] @ product)
        norms = torch.linalg.matrix_norm(cycle - product, 2)
        least = min(least, float(norms.detach().min()))
        optimiser.zero_grad()
        norms.sum().backward()
        optimiser.step()
    return least


def one_step_is_delta_net(*, decay: bool, dim: int = 24) -> float:
    """Difference of outputs between DeltaProduct of one step and (gated) DeltaNet with its parameters, in every form
    ([deltaproduct] Works when 1)."""
    one = layer_of(DeltaProduct(heads=2, steps=1, decay=decay), dim)
    plain = layer_of((GatedDeltaNet if decay else DeltaNet)(heads=2, gate="silu", neg_eigval=True), dim)
    plain.load_state_dict(one.state_dict())
    x, worst = torch.randn(2, 70, dim, dtype=torch.float64), 0.0
    with torch.no_grad():
        for form in ("recurrent", "chunked", "parallel"):
            with use_form(form):
                got = one(x).y
            with use_form("recurrent"):
                worst = max(worst, float((got - plain(x).y).abs().max()))
    return worst


def still_token(*, steps: int = 3) -> float:
    """Change of the state by tokens whose betas are all 0 ([deltaproduct] Works when 5)."""
    make = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 9, *shape, 5, generator=make, dtype=torch.float64) for shape in ((2,), (steps, 2), (steps, 2)))
    state = torch.randn(2, 2, 5, 5, generator=make, dtype=torch.float64)
    zero = torch.zeros(2, 9, steps, 2, dtype=torch.float64)
    return max(float((form(q, k, v, zero, state=state).state - state).abs().max())
               for form in (delta_scan.chunked, delta_scan.parallel))
