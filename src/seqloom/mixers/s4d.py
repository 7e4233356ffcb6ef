"""S4D: a diagonal state space per channel, the same at every token. A long convolution in training, a recurrence in use.

    h_t = Abar h_{t-1} + Bbar x_t      y_t = 2 Re(C' h_t) + D x_t      out_t = GLU(W_o GELU(y_t))

Abar and Bbar are A and B made discrete over steps of dt (zero-order hold, bilinear, or as a kernel normalised over a
length, as DSS has it), A diagonal and complex with a negative real part. Both directions: a second C reads the same
system run from the end, y_t += 2 Re(C_2' g_{t+1}).
Source: [s4d] Method.  State: h [B, D, N/2, 2] (real, imaginary), constant in T.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from seqloom.core import BuildContext, Info, Mixer, Placement, Spec
from seqloom.core.marks import mark
from seqloom.core.mixer import accumulator
from seqloom.kernels import long_conv
from seqloom.parts import linear
from seqloom.parts.ssm import (
    Discretisation,
    Poles,
    RealPart,
    discretise,
    even,
    initial_poles,
    nplr_legs,
    raw_real_part,
    real_part,
)

CAUSAL = {"recurrent": long_conv.recurrent, "chunked": long_conv.chunked, "parallel": long_conv.parallel}
BIDIRECTIONAL = {
    "matrix": long_conv.matrix,
    "chunked": long_conv.chunked_bidirectional,
    "parallel": long_conv.parallel_bidirectional,
}


@dataclass(frozen=True, kw_only=True)
class S4D(Spec):
    state: int = 64                # N per channel, kept as N/2 conjugate pairs
    init: Poles = "lin"            # where the poles of A start ([s4d] Method 6)
    imaginary: Literal["trained", "zero"] | None = None  # of A; None: zero for init "real", else trained
    real: RealPart = "exp"         # the map from a parameter to the real part of -A
    B: Literal["one", "trained"] = "one"  # only B C matters to the output
    discretise: Discretisation = "zoh"
    length: int | None = None      # of what "dss" normalises over; no other rule takes one
    dt_min: float = 1e-3           # dt starts log-uniform between the two
    dt_max: float = 1e-1
    rate: float = 1.0              # scales dt: 2 reads a signal of which every second sample is left
    output: Literal["glu", "linear", "none"] = "glu"  # of GELU(y); "none" gives y itself
    lr_scale: float = 1.0          # learning rate of dt, A and B, relative to the run's
    direction: Literal["causal", "bidirectional"] = "causal"

    key: ClassVar[str] = "s4d"
    equation: ClassVar[str] = "h_t = Abar h_{t-1} + Bbar x_t;  y_t = 2 Re(C' h_t) + D x_t"
    source: ClassVar[str] = "s4d"
    prefer: ClassVar[tuple[str, ...]] = ("fused", "parallel", "chunked")  # measured: FFT wins or ties from 16 to 16,384 tokens
    examples: ClassVar[dict] = {
        "": dict(state=16),
        "bilinear": dict(state=8, init="inv", discretise="bilinear", B="trained", output="linear", rate=2.0),
        "legs": dict(state=8, init="legs", B="trained", output="none"),
        "real": dict(state=8, init="real", discretise="bilinear", real="softplus"),
        "dss": dict(state=8, discretise="dss", length=64, real="sigmoid"),
        "relu": dict(state=8, init="quad", real="relu", imaginary="zero"),
        "bidirectional": dict(state=8, init="rand", direction="bidirectional"),
        "bidirectional_free": dict(state=8, init="inv2", B="trained", real="none", direction="bidirectional"),
    }

    @property
    def forms(self) -> dict:
        return CAUSAL if self.causal else BIDIRECTIONAL

    def __post_init__(self) -> None:
        even(self.state, "S4D")
        if not 0 < self.dt_min <= self.dt_max:
            raise ValueError(f"S4D: dt starts in [dt_min, dt_max], and {self.dt_min:g}, {self.dt_max:g} is no range above 0; "
                             "use for example 0.001, 0.1")
        if (self.discretise == "dss") != (self.length is not None) or (self.length is not None and self.length < 1):
            raise ValueError(f"S4D: discretise='dss' needs the length of its normalisation and other rules take none, found "
                             f"discretise={self.discretise!r} with length={self.length}; use for example 'dss' with 1024")
        if self.rate <= 0:
            raise ValueError(f"S4D: rate {self.rate:g} must be above 0; 1 leaves the steps as trained")

    def build(self, ctx: BuildContext) -> S4DLayer:
        return S4DLayer(self, ctx)


class Cells(NamedTuple):
    hidden: Tensor  # [B, D, N/2, 2]


class S4DLayer(Mixer):
    def __init__(self, spec: S4D, ctx: BuildContext):
        super().__init__(spec)
        dim, pairs = ctx.dim, spec.state // 2
        own = dict(no_decay=True, keep_float32=True, lr_scale=spec.lr_scale)
        low, high = math.log(spec.dt_min), math.log(spec.dt_max)
        self.log_dt = mark(nn.Parameter(torch.empty(dim).uniform_(low, high)), **own)
        real, imaginary = initial_poles(spec.init, spec.state, dim)
        raw = mark(nn.Parameter(raw_real_part(real, spec.real).to(self.log_dt.dtype)), **own)
        self.register_parameter("log_A_real" if spec.real == "exp" else "inv_A_real", raw)
        zero = spec.imaginary == "zero" or (spec.imaginary is None and spec.init == "real")
        self.A_imag = None if zero else mark(nn.Parameter(imaginary.to(self.log_dt.dtype)), **own)
        C = torch.randn(*(() if spec.causal else (2,)), dim, pairs, 2) * math.sqrt(0.5)  # |C|^2 has mean 1
        B = torch.zeros(dim, pairs, 2)
        B[..., 0] = torch.tensor(nplr_legs(spec.state).b[:pairs].tolist()) if spec.init == "legs" else 1.0
        if spec.B == "trained":
            self.B = mark(nn.Parameter(B), **own)
        else:  # B is real here, and only B C matters
            self.B, C = None, C * B[..., :1]
        self.C = mark(nn.Parameter(C), keep_float32=True)
        self.D = mark(nn.Parameter(torch.randn(dim)), no_decay=True)
        self.out = None
        if spec.output != "none":
            self.out = linear(dim, 2 * dim if spec.output == "glu" else dim, bias=True, depth=ctx.depth)

    def mix(self, x: Tensor, cells: Cells | None, place: Placement, info: Info, donate: bool) -> tuple[Tensor, Any, dict]:
        state = None if cells is None else cells.hidden
        y, hidden, _ = self.run(x, **self.system(x.dtype), state=state, segments=place.segments)
        y = y + self.D.to(y.dtype) * x
        if self.out is not None:
            y = self.out(F.gelu(y))
        if self.spec.output == "glu":
            y = F.glu(y)
        return y, Cells(hidden), {}

    def system(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """The discrete system in complex float32 (float64 for float64 activations): log_a, b [D, N/2], c [(2,) D, N/2]."""
        wide = accumulator(dtype)
        raw = self.log_A_real if self.spec.real == "exp" else self.inv_A_real
        real = real_part(raw.to(wide), self.spec.real)
        poles = torch.complex(real, torch.zeros_like(real) if self.A_imag is None else self.A_imag.to(wide))
        log_a, b = discretise(poles, self.log_dt.to(wide).exp() * self.spec.rate, self.spec.discretise, self.spec.length)
        if self.B is not None:
            b = b * torch.view_as_complex(self.B.to(wide))
        return dict(log_a=log_a, b=b, c=torch.view_as_complex(self.C.to(wide)))

    def empty(self, batch: int, capacity: int | None, dtype: torch.dtype, device: Any) -> Cells:
        return Cells(torch.zeros(batch, self.D.shape[0], self.spec.state // 2, 2, dtype=accumulator(dtype), device=device))
