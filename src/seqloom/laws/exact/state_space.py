"""Linear state spaces: the convolution and its recurrence, HiPPO and its diagonal, and what sampling rate means."""

from __future__ import annotations

import math
from typing import get_args

import numpy as np
import torch
from torch import Tensor

from seqloom.core import BuildContext
from seqloom.kernels import long_conv
from seqloom.mixers import S4D
from seqloom.parts.ssm import Poles, discretise, hippo_legs, initial_poles, nplr_legs


def convolution_is_recurrence(method: str, *, channels: int = 3, state: int = 16, tokens: int = 150) -> float:
    """Deviation of y_t = sum_s K_{t-s} u_s + 2 Re C' Abar^(t+1) h_0, K summed term by term, from the recurrence.

    For every init of the poles and a nonzero h_0, relative to the largest |y|; `method` is a discretisation.
    [s4d] Works when 1.
    """
    make = torch.Generator().manual_seed(0)
    rand = lambda *shape: torch.randn(*shape, generator=make, dtype=torch.float64)  # noqa: E731
    lag, worst = torch.arange(tokens, dtype=torch.float64), 0.0
    for init in get_args(Poles):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            poles = torch.complex(*initial_poles(init, state, channels))
        dt = torch.exp(math.log(1e-3) + torch.rand(channels, generator=make, dtype=torch.float64) * math.log(100))
        log_a, b = discretise(poles, dt, method, tokens if method == "dss" else None)
        c, h = torch.view_as_complex(rand(channels, state // 2, 2)), rand(2, channels, state // 2, 2)
        u = rand(2, tokens, channels)
        y = long_conv.recurrent(u, log_a=log_a, b=b, c=c, state=h).y
        power = torch.exp(log_a[..., None] * lag)
        kernel = 2 * torch.einsum("dn,dn,dnl->dl", c, b, power).real
        want = torch.stack([torch.einsum("ds,bsd->bd", kernel[:, : t + 1].flip(1), u[:, : t + 1]) for t in range(tokens)], 1)
        start = torch.view_as_complex(h) * log_a.exp()
        want = want + 2 * torch.einsum("dn,bdn,dnl->bld", c, start, power).real
        worst = max(worst, float((y - want).abs().max() / want.abs().max()))
    return worst


def wraps_around(*, padded: bool = True, tokens: int = 96, place: int = 60) -> float:
    """Largest change of outputs before `place` when the input there changes, by a transform of twice the length (as the
    library's forms use) or, with `padded=False`, of the length itself, which wraps around. [s4d] Works when 2."""
    make = torch.Generator().manual_seed(0)
    u = torch.randn(2, tokens, 4, generator=make, dtype=torch.float64)
    k = torch.randn(4, tokens, generator=make, dtype=torch.float64)
    other = u.clone()
    other[:, place:] += 1

    def apply(u: Tensor) -> Tensor:
        if padded:
            return long_conv.convolve(u, k)
        return torch.fft.irfft(torch.fft.rfft(u.mT) * torch.fft.rfft(k), n=tokens).mT

    return float((apply(u) - apply(other))[:, :place].abs().max())


def legs_is_normal(state: int = 64) -> float:
    """Deviation of A_N + A_N' from -I, A_N = A + p p' with A of HiPPO-LegS. [s4d] Works when 3."""
    A, _ = hippo_legs(state)
    p = np.sqrt(np.arange(state) + 0.5)
    normal = A + np.outer(p, p)
    return float(np.abs(normal + normal.T + np.eye(state)).max())


def legs_rebuilt(state: int = 64) -> float:
    """Deviation of V (diag(poles) - P P*) V* from HiPPO-LegS itself. [s4d] Works when 3."""
    poles, P, _, V = nplr_legs(state)
    return float(np.abs(V @ (np.diag(poles) - np.outer(P, P.conj())) @ V.conj().T - hippo_legs(state)[0]).max())


def legs_limit(state: int, *, rows: int = 4, half: bool = True) -> float:
    """Deviation of what the diagonal system (A_N, B / 2) makes of a step from what HiPPO-LegS (A, B) does, in its first
    `rows` states, over t in [0.1, 3]: falls as N grows. `half=False` keeps B whole, and then it does not.

    [s4d] Theorem 3. It holds for responses: the basis e^{t A_N} B / 2 itself goes on oscillating about its limit at every N.
    """
    A, B = (part[..., : 3 * rows] for part in hippo_legs(state))  # triangular: the first states do not see later ones
    A = A[: 3 * rows]
    poles, _, b, V = nplr_legs(state)
    worst = 0.0
    for t in np.linspace(0.1, 3, 20):
        grown = torch.linalg.matrix_exp(torch.from_numpy(t * A)).numpy() - np.eye(len(A))
        diagonal = (V[:rows] @ (np.expm1(t * poles) / poles * b)).real * (0.5 if half else 1.0)
        worst = max(worst, float(np.abs(diagonal - np.linalg.solve(A, grown @ B)[:rows]).max()))
    return worst


def highest_frequency(init: str, *, state: int = 64) -> float:
    """Largest imaginary part of an init over its rule of thumb, N^2 / pi for "inv" and pi N / 2 for "lin", less 1.
    [s4d] Works when 5."""
    rule = {"inv": state**2 / math.pi, "lin": math.pi * state / 2}[init]
    return float(abs(initial_poles(init, state, 1)[1].max() / rule - 1))


def resampled(init: str = "lin", *, tokens: int = 512, cycles: int = 4, scaled: bool = True) -> float:
    """Relative change of the outputs of an S4D layer at rate 2 that reads every second sample of a smooth signal, from every
    second output of the same layer at rate 1. `scaled=False` leaves the rate at 1. [s4d] Works when 4."""
    layers = []
    for rate in (1.0, 2.0 if scaled else 1.0):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            layers.append(S4D(init=init, output="none", rate=rate).build(BuildContext(dim=8)).double())
    time = torch.arange(tokens, dtype=torch.float64) / tokens
    wave = torch.stack([torch.sin(2 * math.pi * (j + 1) / 2 * time + j) for j in range(2 * cycles)], -1)[None]
    with torch.no_grad():
        want, got = layers[0](wave).y[:, ::2], layers[1](wave[:, ::2]).y
    return float((got - want).norm() / want.norm())
