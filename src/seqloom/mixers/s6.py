"""S6: a selective state space on its own, with one step per token and a matrix A of either sign.

    dt_t = softplus(p + q' u_t)      B_t = W_B u_t      C_t = W_C u_t
    h_t = exp(dt_t A) h_{t-1} + (dt_t u_t) B_t          y_t = h_t C_t

The layer that bounds on generalisation are stated for: no gate, no convolution, no projections in or out. A [D, N] is
diagonal and free, where Mamba's is -exp(A_log) < 0; its largest entry, the spectral abscissa s, decides whether the state
forgets (s < 0), sums (s = 0) or grows exponentially with the length (s > 0). A growing state may overflow, and then all
forms but the recurrent one pass what is no number on to the segments packed behind it: a boundary multiplies by 0.
Source: [selective-ssm-bounds] Method 1 and 8.  State: h, [B, D, N], constant in T.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from seqloom.core import BuildContext, Info, Mixer, Placement, Spec
from seqloom.core.marks import mark
from seqloom.core.mixer import accumulator
from seqloom.kernels import selective_scan

# not the compiled form of the kernel, which takes A <= 0 only
FORMS = {"recurrent": selective_scan.recurrent, "chunked": selective_scan.chunked, "parallel": selective_scan.parallel,
         "fused": selective_scan.fused}


@dataclass(frozen=True, kw_only=True)
class S6(Spec):
    state: int = 4                # N per channel
    abscissa: float = 0.0         # s, the largest entry of A at the start
    transition: Literal["learned", "fixed"] = "learned"  # fixed: every entry of A is s and stays so
    spread: float = 10.0          # learned: entries start uniform in [s - spread, s], one state of each channel at s
    std: float = 1.0              # of W_B, W_C, q and p at the start

    key: ClassVar[str] = "s6"
    forms: ClassVar[dict] = FORMS
    equation: ClassVar[str] = "h_t = exp(dt_t A) h_{t-1} + (dt_t u_t) B_t;  y_t = h_t C_t;  dt_t = softplus(p + q' u_t)"
    source: ClassVar[str] = "selective-ssm-bounds"
    examples: ClassVar[dict] = {
        "": dict(state=8, abscissa=-1.2, spread=0.2, std=0.05),
        "sum": dict(state=3, transition="fixed", std=0.1),
    }

    def __post_init__(self) -> None:
        if self.state < 1 or self.spread < 0 or self.std < 0:
            raise ValueError("S6: state is at least 1, spread and std are not negative")

    def build(self, ctx: BuildContext) -> S6Layer:
        return S6Layer(self, ctx)


class Cells(NamedTuple):
    hidden: Tensor  # [B, D, N]


class S6Layer(Mixer):
    def __init__(self, spec: S6, ctx: BuildContext):
        super().__init__(spec)
        self.dim = ctx.dim
        normal = lambda *shape: nn.Parameter(torch.randn(*shape) * spec.std)  # noqa: E731
        self.B_proj = nn.Linear(ctx.dim, spec.state, bias=False)
        self.C_proj = nn.Linear(ctx.dim, spec.state, bias=False)
        self.B_proj.weight, self.C_proj.weight = normal(spec.state, ctx.dim), normal(spec.state, ctx.dim)
        self.dt_proj = nn.Linear(ctx.dim, 1)
        self.dt_proj.weight, self.dt_proj.bias = normal(1, ctx.dim), mark(normal(1), no_decay=True)
        self.A: nn.Parameter | None = None
        if spec.transition == "learned":
            start = spec.abscissa - spec.spread * torch.rand(ctx.dim, spec.state)
            start[:, 0] = spec.abscissa
            self.A = mark(nn.Parameter(start), keep_float32=True)

    def rates(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """A [D, N], of either sign."""
        if self.A is not None:
            return self.A.to(dtype)
        return self.B_proj.weight.new_full((self.dim, self.spec.state), self.spec.abscissa, dtype=dtype)

    def maps(self, u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """dt [B, T, 1] in float32 or wider, B and C [B, T, N]."""
        return F.softplus(self.dt_proj(u).to(accumulator(u.dtype))), self.B_proj(u), self.C_proj(u)

    def mix(self, x: Tensor, cells: Cells | None, place: Placement, info: Info, donate: bool) -> tuple[Tensor, Any, dict]:
        dt, B, C = self.maps(x)
        y, hidden, _ = self.run(
            x, dt.expand(*x.shape), B, C, A=self.rates(dt.dtype), state=None if cells is None else cells.hidden,
            segments=place.segments,
        )
        return y, Cells(hidden), {}

    def empty(self, batch: int, capacity: int | None, dtype: torch.dtype, device: Any) -> Cells:
        return Cells(torch.zeros(batch, self.dim, self.spec.state, dtype=accumulator(dtype), device=device))
