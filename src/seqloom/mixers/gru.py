"""GRU: the gated recurrent unit, a recurrence that is nonlinear in its state.

    r_t = sigmoid(W_r x_t + b_r + U_r h_{t-1} + c_r)      z_t = sigmoid(W_z x_t + b_z + U_z h_{t-1} + c_z)
    n_t = tanh(W_n x_t + b_n + r_t (U_n h_{t-1} + c_n))    h_t = (1 - z_t) n_t + z_t h_{t-1}      y_t = h_t, or W_o h_t

It reads its own state through a matrix before it writes, which no linear recurrence does, and pays with a loop over tokens:
there is no parallel form, and time and the number of sequential steps grow with T alike. Parameters, their order and their
uniform start in +-H^-1/2 are torch.nn.GRU's.
Source: [tool-use-ssm] Method 8.  State: h [B, H], constant in T.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from seqloom.core import BuildContext, Info, Mixed, Mixer, Placement, Segments, Spec, scan
from seqloom.core.marks import mark
from seqloom.core.mixer import accumulator
from seqloom.kernels import gru
from seqloom.parts import linear


def _recurrent(gates: Tensor, *, weight: Tensor, bias: Tensor, state: Tensor, segments: Segments | None) -> Mixed:
    return scan(partial(gru.step, weight=weight, bias=bias), gates, state=state, segments=segments)


FORMS = {"recurrent": _recurrent, "fused": gru.looped}


@dataclass(frozen=True, kw_only=True)
class GRU(Spec):
    hidden: int | None = None  # H; None: dim, and h itself is the output, else a projection of it

    key: ClassVar[str] = "gru"
    forms: ClassVar[dict] = FORMS
    equation: ClassVar[str] = "h_t = (1 - z_t) tanh(W x_t + r_t U h_{t-1}) + z_t h_{t-1};  r_t, z_t = sigmoid(W x_t + U h)"
    source: ClassVar[str] = "tool-use-ssm"
    examples: ClassVar[dict] = {"": dict(), "hidden": dict(hidden=24)}

    def build(self, ctx: BuildContext) -> GRULayer:
        return GRULayer(self, ctx)


class Cells(NamedTuple):
    hidden: Tensor  # [B, H]


class GRULayer(Mixer):
    def __init__(self, spec: GRU, ctx: BuildContext):
        super().__init__(spec)
        self.hidden = spec.hidden or ctx.dim
        bound = self.hidden**-0.5
        draw = lambda *shape: nn.Parameter(torch.empty(*shape).uniform_(-bound, bound))  # noqa: E731
        self.weight_ih, self.weight_hh = draw(3 * self.hidden, ctx.dim), draw(3 * self.hidden, self.hidden)
        self.bias_ih, self.bias_hh = (mark(draw(3 * self.hidden), no_decay=True) for _ in range(2))
        self.o_proj = None if spec.hidden is None else linear(self.hidden, ctx.dim, depth=ctx.depth)

    def mix(self, x: Tensor, cells: Cells | None, place: Placement, info: Info, donate: bool) -> tuple[Tensor, Any, dict]:
        gates = F.linear(x, self.weight_ih, self.bias_ih)
        start = self.empty(x.shape[0], None, x.dtype, x.device) if cells is None else cells
        y, hidden, _ = self.run(gates, weight=self.weight_hh, bias=self.bias_hh, state=start.hidden, segments=place.segments)
        return y if self.o_proj is None else self.o_proj(y), Cells(hidden), {}

    def empty(self, batch: int, capacity: int | None, dtype: torch.dtype, device: Any) -> Cells:
        return Cells(torch.zeros(batch, self.hidden, dtype=accumulator(dtype), device=device))
