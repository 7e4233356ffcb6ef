"""How far a selective state space may generalise, by covering numbers: a bound whose shape in the length T is what counts.

The layer is `mixers/s6.py` under a linear readout w of the last output, inputs |u_t| <= B_u. What decides is the spectral
abscissa s of A: below 0 the bound forgets the length, above 0 it grows exponentially, as does a lower bound. Absolute values
are astronomically loose. Source: [selective-ssm-bounds] Method 3 to 6; the constants and logarithms that its theorems
leave open are 1 here.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from seqloom.mixers.s6 import S6Layer

DIRECT = 1e-2  # |1 - rho| below which the closed form of the length factor cancels


@dataclass(frozen=True, kw_only=True)
class NormBudgets:
    """What the parameters and inputs are held to: spectral norms (`B`, `C`, `A`), entrywise 1-norms (`*_sum`), the 2-norm of
    the readout's rows summed (`w`), |q| (`q`), the bias p of the step, and the inputs' norm (`u`)."""

    abscissa: float
    p: float
    q: float
    u: float
    w: float
    B: float
    C: float
    A: float
    B_sum: float
    C_sum: float
    q_sum: float
    A_sum: float

    @property
    def reach(self) -> float:
        """q u: how far the argument of the step moves from p at most."""
        return self.q * self.u

    @property
    def longest_step(self) -> float:
        """log(1 + e^(p + q u)), the largest dt."""
        return _softplus(self.p + self.reach)


def spectral_abscissa(layer: nn.Module) -> float:
    """The largest entry of a layer's diagonal A: of S6, where it may be of either sign, and of Mamba's -exp(A_log).

    Raises: ValueError for a layer without one.
    """
    if isinstance(layer, S6Layer):
        return float(layer.rates().detach().max())
    rates = getattr(layer, "A_log", None)
    if not isinstance(rates, Tensor):
        raise ValueError(f"{type(layer).__name__} has no state matrix A; S6, Mamba and Mamba-2 layers have one")
    return float(-rates.detach().min().exp())


def warn_if_unstable(model: nn.Module) -> list[str]:
    """Names of the S6 layers in `model` whose abscissa is above 0, with a warning for each."""
    found = [name for name, layer in model.named_modules() if isinstance(layer, S6Layer) and spectral_abscissa(layer) > 0]
    for name in found:
        warnings.warn(f"the spectral abscissa of {name or 'the layer'} is above 0: its state grows exponentially with the "
                      "length", stacklevel=2)
    return found


def norm_budgets(layer: S6Layer, readout: Tensor, *, u: float) -> NormBudgets:
    """The norms that a layer and its readout [classes, D] have now, for inputs of norm at most `u`."""
    double = lambda value: value.detach().double()  # noqa: E731
    B, C, A = double(layer.B_proj.weight), double(layer.C_proj.weight), layer.rates(torch.float64).detach()
    q = double(layer.dt_proj.weight)
    norm = lambda value: float(torch.linalg.matrix_norm(value, 2))  # noqa: E731
    return NormBudgets(
        abscissa=spectral_abscissa(layer), p=float(layer.dt_proj.bias.detach()), q=float(q.norm()), u=u,
        w=float(double(readout).abs().sum()), B=norm(B), C=norm(C), A=float(A.abs().max()), B_sum=float(B.abs().sum()),
        C_sum=float(C.abs().sum()), q_sum=float(q.abs().sum()), A_sum=float(A.abs().sum()),
    )


def growth_rate(abscissa: float, p: float, reach: float) -> float:
    """rho, by which a token multiplies the state at most: e^(s dt) = (1 + e^z)^s, z = p - reach for s < 0 (the least step)
    and p + reach otherwise ([selective-ssm-bounds] Method 3; A is diagonal, so no margin eta is needed)."""
    return math.exp(abscissa * _softplus(p - reach if abscissa < 0 else p + reach))


def length_factor(rho: float, tokens: int) -> float:
    """S_2 = sum over t < T of t rho^t, the factor of the bound that depends on the length:

    rho (1 - rho^T) / (1 - rho)^2 - T rho^T / (1 - rho); T (T - 1) / 2 at rho = 1; inf where it overflows.
    """
    if rho == 1:
        return tokens * (tokens - 1) / 2
    if abs(1 - rho) < DIRECT and tokens < 100 / DIRECT:
        return math.fsum(t * rho**t for t in range(tokens))
    try:
        last = rho**tokens
    except OverflowError:
        return math.inf
    return rho * (1 - last) / (1 - rho) ** 2 - tokens * last / (1 - rho)


def capacity(norms: NormBudgets, *, tokens: int) -> float:
    """C_F: dt_max w u^3 |B| |C| |A| S_2 (sum of cover terms)^(3/2), one term a parameter: (entrywise norm / norm)^(2/3).

    The exact bracket is not known to us; it does not depend on the length ([selective-ssm-bounds] Theorem 3.3). A norm of A
    below 1 counts as 1: a state that only sums still writes.
    """
    terms = ((norms.B_sum, norms.B), (norms.C_sum, norms.C), (norms.q_sum, norms.q), (norms.A_sum, norms.A))
    cover = 1 + sum((total / norm) ** (2 / 3) for total, norm in terms if norm > 0)
    scale = norms.longest_step * norms.w * norms.u**3 * norms.B * norms.C * max(norms.A, 1.0)
    rho = growth_rate(norms.abscissa, norms.p, norms.reach)
    return scale * length_factor(rho, tokens) * cover**1.5


def generalization_bound(norms: NormBudgets, *, samples: int, tokens: int, delta: float = 0.05, lipschitz: float = 1.0,
                         most: float = 1.0) -> float:
    """Gap of expected and empirical loss, with probability 1 - delta over `samples` sequences of `tokens` tokens:

    L C_F log(m) / sqrt(m) + 3 c sqrt(log(2 / delta) / (2 m)), for an L-Lipschitz loss of at most c (`most`).
    """
    if samples < 2 or not 0 < delta < 1:
        raise ValueError(f"a bound takes at least 2 samples and delta in (0, 1), not samples={samples}, delta={delta}")
    chance = 3 * most * math.sqrt(math.log(2 / delta) / (2 * samples))
    return lipschitz * capacity(norms, tokens=tokens) * math.log(samples) / math.sqrt(samples) + chance


def complexity_floor(abscissa: float, *, tokens: int, w: float, samples: int) -> float:
    """Lower bound of the Rademacher complexity for s > 0: w ((1 + s)^T - 1) / s sqrt(2 / (pi m)).

    It takes steps of at least log(1 + s) / s, which is below 1: p + q u >= log(e - 1), about 0.54, is enough
    ([selective-ssm-bounds] Theorem 4.1). Raises: ValueError for s <= 0.
    """
    if abscissa <= 0:
        raise ValueError(f"the lower bound is for a spectral abscissa above 0, not {abscissa:g}")
    return w * math.expm1(tokens * math.log1p(abscissa)) / abscissa * math.sqrt(2 / (math.pi * samples))


def _softplus(z: float) -> float:
    return max(z, 0.0) + math.log1p(math.exp(-abs(z)))
