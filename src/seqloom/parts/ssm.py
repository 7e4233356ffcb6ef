"""Linear state spaces x' = A x + B u with diagonal A: where the poles of A start, and how they are made discrete.

HiPPO-LegS and its split into a normal matrix and one of rank one are plain NumPy in float64: constants of N, computed
when a layer is made. Sources: [s4d] Method 2, 3, 6 and 7; [s4-survey] Method 1, 2 and 12.
"""

from __future__ import annotations

import functools
import math
from typing import Literal, NamedTuple, get_args

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Complex, Float
from torch import Tensor

Poles = Literal["lin", "inv", "legs", "real", "rand", "inv2", "quad"]
Discretisation = Literal["zoh", "bilinear", "dss"]
RealPart = Literal["exp", "softplus", "sigmoid", "relu", "none"]

RELU_FLOOR = 1e-4  # how far a real part through a relu stays below 0


class NormalPlusLowRank(NamedTuple):
    """A = V (diag(poles) - P P*) V*, B = V b: a state matrix in the basis where its normal part is diagonal.

    Poles come in conjugate pairs: the first N/2 have a positive imaginary part, ascending, the others are their
    conjugates in the same order (so are the columns of V). P = V* p and b = V* B in that basis, b real and positive.
    """

    poles: np.ndarray  # [N] complex
    P: np.ndarray      # [N] complex
    b: np.ndarray      # [N] real
    V: np.ndarray      # [N, N] unitary


def hippo_legs(state: int) -> tuple[np.ndarray, np.ndarray]:
    """HiPPO-LegS: A [N, N], B [N] in float64, the projection of all of the past on Legendre polynomials.

    A_nk = -sqrt((2n+1)(2k+1)) for n > k, -(n+1) for n = k, 0 above; B_n = sqrt(2n+1). Source: [s4d] Method 7.
    """
    root = np.sqrt(2 * np.arange(state) + 1.0)
    A = -np.tril(np.outer(root, root), -1) - np.diag(np.arange(state) + 1.0)
    return A, root


@functools.lru_cache(maxsize=16)
def nplr_legs(state: int) -> NormalPlusLowRank:
    """HiPPO-LegS as normal plus low rank: A + p p' with p_n = sqrt(n + 1/2) is -1/2 plus a skew matrix ([s4d] Method 7).

    Raises: ValueError if `state` is odd (a skew matrix of odd size has a pole without a partner).
    """
    even(state, "nplr_legs")
    A, B = hippo_legs(state)
    p = np.sqrt(np.arange(state) + 0.5)
    skew = A + np.outer(p, p) + 0.5 * np.eye(state)
    imaginary, V = np.linalg.eigh(-1j * skew)  # ascending, and symmetric about 0
    V, imaginary = V[:, state // 2 :], imaginary[state // 2 :]
    # a column is known up to a phase; the one that makes b real and positive is the same on every machine
    phase = V.conj().T @ B
    V = V * (phase / np.abs(phase))
    V = np.concatenate([V, V.conj()], 1)
    poles = -0.5 + 1j * np.concatenate([imaginary, -imaginary])
    return NormalPlusLowRank(poles, V.conj().T @ p, (V.conj().T @ B).real, V)


def initial_poles(init: str, state: int, channels: int) -> tuple[Float[Tensor, "d n"], Float[Tensor, "d n"]]:
    """Real and imaginary parts of the N/2 poles that stand for N, per channel, in float64: [D, N/2] each.

    With n = 0 .. N/2 - 1 and real part -1/2 except for `real`:
    lin   i pi n                            the Fourier modes of a window
    inv   i (N/pi)(N/(2n+1) - 1)            the law that LegS' own poles follow
    legs  poles of the normal part of HiPPO-LegS
    inv2  i (N/pi)(N/(n+1) - 1)
    quad  i (1+2n)^2 / pi
    rand  i exp(N(0, 1)), drawn per channel
    real  -(n+1), imaginary part 0
    Source: [s4d] Method 6.
    Raises: ValueError if `state` is odd or `init` unknown.
    """
    even(state, "initial_poles")
    if init not in get_args(Poles):
        raise ValueError(f"no init {init!r} of the poles; known: {', '.join(get_args(Poles))}")
    if init == "rand":
        imaginary = torch.randn(channels, state // 2, dtype=torch.float64).exp()
        return torch.full_like(imaginary, -0.5), imaginary
    n = np.arange(state // 2)
    real = -(n + 1.0) if init == "real" else np.full(state // 2, -0.5)
    imaginary = {
        "lin": lambda: math.pi * n,
        "inv": lambda: state / math.pi * (state / (2 * n + 1) - 1),
        "inv2": lambda: state / math.pi * (state / (n + 1) - 1),
        "quad": lambda: (1 + 2 * n) ** 2 / math.pi,
        "legs": lambda: nplr_legs(state).poles[: state // 2].imag,
        "real": lambda: 0.0 * n,
    }[init]()
    repeat = lambda row: torch.tensor(row.tolist(), dtype=torch.float64).repeat(channels, 1)  # noqa: E731
    return repeat(real), repeat(imaginary)


def discretise(poles: Complex[Tensor, "d n"], dt: Float[Tensor, " d"], method: str,
               length: int | None = None) -> tuple[Complex[Tensor, "d n"], Complex[Tensor, "d n"]]:
    """(log Abar, gain), both [D, N]: x_t = Abar x_{t-1} + gain B u_t over steps of dt.

    zoh       Abar = exp(dt A)                          gain = (Abar - 1) / A
    bilinear  Abar = (1 + dt A / 2) / (1 - dt A / 2)    gain = dt / (1 - dt A / 2)
    dss       Abar = exp(dt A)                          gain = (Abar - 1) / (A (Abar^L - 1)), L = `length`:
              a pole's kernel is a softmax over L taps, exp(l dt A) / sum_{r < L} exp(r dt A), divided by A
    The logarithm (of any branch) is what powers are made of: Abar^l = exp(l log Abar), never a repeated product.
    Source: [s4d] Method 3. Poles must not be 0; those with a negative real part give |Abar| < 1.
    Raises: ValueError if `method` is unknown, or "dss" without a `length` of at least 1.
    """
    step = dt[:, None] * poles
    if method == "zoh":
        return step, torch.expm1(step) / poles  # expm1: 1 - Abar loses all digits where dt A is small
    if method == "dss":
        if length is None or length < 1:
            raise ValueError(f"discretisation 'dss' is normalised over a length of at least 1 token, found {length}")
        return step, torch.expm1(step) / (poles * torch.expm1(length * step))
    if method != "bilinear":
        raise ValueError(f"no discretisation {method!r}; known: {', '.join(get_args(Discretisation))}")
    below = 1 - step / 2
    above = 1 + step / 2
    # a real pole at -2 / dt has Abar = 0, whose powers are 0 and whose logarithm is not finite
    above = torch.where(above == 0, torch.finfo(above.real.dtype).tiny ** 0.5, above)
    return torch.log(above / below), dt[:, None] / below


def real_part(raw: Float[Tensor, "d n"], form: str) -> Float[Tensor, "d n"]:
    """Re A from its trained parameter r: -exp(r), -softplus(r), -sigmoid(r), -(relu(r) + 1e-4), or -r for "none".

    Only the first three cannot leave the negative half line; "relu" keeps poles off 0, and "none" lets them become unstable.
    Source: [s4d] Method 2.
    """
    if form == "relu":
        return -(F.relu(raw) + RELU_FLOOR)
    return -{"exp": torch.exp, "softplus": F.softplus, "sigmoid": torch.sigmoid, "none": lambda r: r}[form](raw)


def raw_real_part(real: Float[Tensor, "d n"], form: str) -> Float[Tensor, "d n"]:
    """The parameter whose `real_part` is `real` < 0.

    Raises: ValueError if `form` cannot reach it (sigmoid: -1 and below).
    """
    if form == "sigmoid" and bool((real <= -1).any()):
        raise ValueError(f"a sigmoid gives real parts in (-1, 0), and the poles start at {float(real.min()):g}; use 'exp'")
    rate = -real
    return {"exp": torch.log, "softplus": lambda r: r + torch.log(-torch.expm1(-r)), "sigmoid": torch.logit,
            "relu": lambda r: r - RELU_FLOOR, "none": lambda r: r}[form](rate)


def even(state: int, owner: str) -> int:
    """N/2, or an error that names a state size that works: poles are kept as conjugate pairs."""
    if state < 2 or state % 2:
        raise ValueError(f"{owner}: state {state} does not split into conjugate pairs; it must be an even number, such as "
                         f"{max(state // 2 * 2, 2)}")
    return state // 2


__all__ = ["Discretisation", "NormalPlusLowRank", "Poles", "RealPart", "discretise", "even", "hippo_legs", "initial_poles",
           "nplr_legs", "raw_real_part", "real_part"]
