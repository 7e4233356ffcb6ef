"""Differential Mamba: a second Mamba's output, scaled, is taken from a first's, and the difference is normed.

    y = (1 - lambda_init) RMSNorm(m_1(x) - lambda m_2(x))      lambda = sigmoid(sum_d lambda_q[d]) + lambda_init
    lambda_init = 0.8 - 0.6 exp(-0.3 l) for layer l from 0: 0.2, 0.356, 0.471, .., 0.8

What both read alike (a state that holds too much) cancels; lambda lies in (lambda_init, 1 + lambda_init), so it is no convex
weight. m_1 and m_2 are whole mixers of half the width (expand 1 where a plain one has 2), so that parameters are about equal.
Two Mamba-2 run as one scan with twice the heads and groups. With `double="scan"` only the scan of one Mamba block is doubled
(Diff-S6: its step, maps, A and D), which the paper finds not to be enough: the plain difference there is `weight=1.0`,
`lambda_init=0.0`, `norm="none"`.
Source: [diff-mamba] Method 1 to 5, 7 and 8. lambda_q ~ N(0, 1), as the authors have it, makes its sum over D channels large
and lambda about lambda_init or lambda_init + 1 at the start; `lambda_std` is smaller where that is not wanted.
State: that of both mixers side by side, each in its own slots, constant in T.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn

from seqloom.core import BuildContext, Info, Mixer, Placement, Segments, Spec
from seqloom.core.marks import mark
from seqloom.core.mixer import accumulator
from seqloom.mixers.mamba import Mamba
from seqloom.mixers.mamba2 import Mamba2, Mamba2Layer
from seqloom.parts import RMSNorm


@dataclass(frozen=True, kw_only=True)
class DiffMamba(Spec):
    mixer: Mamba2 | Mamba = Mamba2(state=64, head_dim=32, expand=1)  # each of the two
    double: Literal["mixer", "scan"] = "mixer"         # what there are two of; "scan" for Mamba only
    combine: Literal["difference", "sum"] = "difference"
    weight: Literal["learned"] | float = "learned"     # lambda, or a fixed value in its place
    lambda_init: float | None = None                   # None: by the layer's index
    lambda_std: float = 1.0                            # of lambda_q at the start
    norm: Literal["rms", "none"] = "rms"               # after the difference
    norm_eps: float = 1e-5

    key: ClassVar[str] = "diff_mamba"
    equation: ClassVar[str] = "y = (1 - lambda_0) RMSNorm(m_1(x) - lambda m_2(x));  lambda = sigmoid(sum lambda_q) + lambda_0"
    source: ClassVar[str] = "diff-mamba"
    examples: ClassVar[dict] = {
        "": dict(mixer=Mamba2(state=8, head_dim=16, expand=1)),
        "fixed": dict(mixer=Mamba2(state=6, head_dim=8, expand=1, groups=2, conv=2), combine="sum", weight=0.5, lambda_init=0.3,
                      norm="none"),
        "mamba": dict(mixer=Mamba(state=4, expand=1), lambda_std=0.1),
        "scan": dict(mixer=Mamba(state=4, expand=1), double="scan"),
    }

    def __post_init__(self) -> None:
        if self.double == "scan" and not isinstance(self.mixer, Mamba):
            raise ValueError("DiffMamba: double='scan' doubles the scan of a Mamba; use mixer=Mamba(..), or double='mixer'")

    @property
    def forms(self) -> dict:
        return self.mixer.forms

    @property
    def prefer(self) -> tuple[str, ...]:  # type: ignore[override]
        return self.mixer.prefer

    def build(self, ctx: BuildContext) -> DiffMambaLayer:
        return DiffMambaLayer(self, ctx)


def initial_lambda(layer: int) -> float:
    """0.8 - 0.6 exp(-0.3 layer), the layer from 0. Source: [diff-mamba] Method 1."""
    return 0.8 - 0.6 * math.exp(-0.3 * layer)


class Cells(NamedTuple):
    memory: Tensor  # of both: [B, 2 H, N, P], or [B, 2 E, N] for Mamba
    tail: Tensor    # of both convolutions [B, conv - 1, ..]; of the one there is with double="scan"


class DiffMambaLayer(Mixer):
    def __init__(self, spec: DiffMamba, ctx: BuildContext):
        super().__init__(spec)
        self.lambda_init = initial_lambda(ctx.layer) if spec.lambda_init is None else spec.lambda_init  # a number: no device
        self.mixer_1, self.mixer_2 = (spec.mixer.build(ctx) for _ in range(2))
        if spec.double == "scan":
            del self.mixer_2.in_proj, self.mixer_2.conv1d, self.mixer_2.out_proj
        self.lambda_q1 = None
        if spec.weight == "learned":
            start = torch.empty(ctx.dim).normal_(0.0, spec.lambda_std)
            self.lambda_q1 = mark(nn.Parameter(start), no_decay=True, keep_float32=True)
        self.subln = RMSNorm(ctx.dim, spec.norm_eps) if spec.norm == "rms" else None

    def mix(self, x: Tensor, cells: Cells | None, place: Placement, info: Info, donate: bool) -> tuple[Tensor, Any, dict]:
        segments, dtype = place.segments, x.dtype
        if self.spec.double == "scan":
            y, memory, tail = self._two_scans(x, cells, segments)
        elif isinstance(self.mixer_1, Mamba2Layer):
            first, second, memory, tail = self._one_scan(x, cells, segments)
            y = self._join(first, second)
        else:
            first, second, memory, tail = self._two_mixers(x, cells, segments)
            y = self._join(first, second)
        if self.subln is not None:
            y = self.subln(y)
        return ((1 - self.lambda_init) * y).to(dtype), Cells(memory, tail), {}

    def strength(self, dtype: torch.dtype) -> Tensor | float:
        """lambda, below 0 where outputs are added."""
        value = self.spec.weight
        if self.lambda_q1 is not None:
            value = self.lambda_q1.to(accumulator(dtype)).sum().sigmoid() + self.lambda_init
        return value if self.spec.combine == "difference" else -value

    def _join(self, first: Tensor, second: Tensor) -> Tensor:
        """first - lambda second, in float32 or wider."""
        wide = accumulator(first.dtype)
        return first.to(wide) - self.strength(wide) * second.to(wide)

    def _one_scan(self, x: Tensor, cells: Cells | None, segments: Segments | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Two Mamba-2 with their heads, and groups of heads, side by side."""
        mixers, (memory, *tails) = (self.mixer_1, self.mixer_2), self._opened(cells)
        opened = [mixer.open(x, tail, segments) for mixer, tail in zip(mixers, tails, strict=True)]
        streams = [torch.cat(pair, 2) for pair in zip(*(streams for streams, _, _ in opened), strict=True)]
        memory = self._memory(x.shape[0], x.dtype, x.device) if memory is None else memory
        y, memory, _ = self.run(*streams, state=memory, segments=segments)
        first, second = (
            mixer.close(part, streams[2], z) for mixer, part, (streams, z, _) in zip(mixers, y.chunk(2, 2), opened, strict=True)
        )
        return first, second, memory, torch.cat([tail for _, _, tail in opened], -1)

    def _two_mixers(self, x: Tensor, cells: Cells | None, segments: Segments | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Two Mamba: channels of one scan share B and C, so that there are two scans."""
        memory, *tails = self._opened(cells)
        memories = (None, None) if memory is None else memory.chunk(2, 1)
        ys, after, ends = [], [], []
        for mixer, before, tail in zip((self.mixer_1, self.mixer_2), memories, tails, strict=True):
            inner, z, tail = mixer.open(x, tail, segments)
            y, hidden = mixer.scan(self.run, inner, before, segments)
            ys.append(mixer.close(y, z))
            after.append(hidden)
            ends.append(tail)
        return ys[0], ys[1], torch.cat(after, 1), torch.cat(ends, -1)

    def _two_scans(self, x: Tensor, cells: Cells | None, segments: Segments | None) -> tuple[Tensor, Tensor, Tensor]:
        """Diff-S6: one projection, convolution, gate and way out; two scans of the same tokens between them."""
        inner, z, tail = self.mixer_1.open(x, None if cells is None else cells.tail, segments)
        memories = (None, None) if cells is None else cells.memory.chunk(2, 1)
        mixers = zip((self.mixer_1, self.mixer_2), memories, strict=True)
        (first, a), (second, b) = (mixer.scan(self.run, inner, before, segments) for mixer, before in mixers)
        y = self._join(first, second).to(z.dtype)
        return self.mixer_1.close(y, z), torch.cat([a, b], 1), tail

    def _opened(self, cells: Cells | None) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """The memory of both, and the two tails."""
        return (None, None, None) if cells is None else (cells.memory, *cells.tail.chunk(2, -1))

    def _memory(self, batch: int, dtype: torch.dtype, device: Any) -> Tensor:
        spec, wide = self.spec.mixer, accumulator(dtype)
        if isinstance(spec, Mamba):
            return torch.zeros(batch, 2 * self.mixer_1.A_log.shape[0], spec.state, dtype=wide, device=device)
        return torch.zeros(batch, 2 * self.mixer_1.heads, spec.state, spec.head_dim, dtype=wide, device=device)

    def empty(self, batch: int, capacity: int | None, dtype: torch.dtype, device: Any) -> Cells:
        tail = self.mixer_1.conv1d.empty(batch, dtype, device)
        return Cells(self._memory(batch, dtype, device), tail if self.spec.double == "scan" else torch.cat([tail, tail], -1))

    @torch.no_grad()
    def take_halves(self, source: Mamba2Layer) -> None:
        """Start from a trained Mamba-2 of twice the width inside: m_1 gets the first half of its channels and heads, m_2 the
        second. Groups of B and C are halved too, and one group is given to both. Train on: only with an even number of
        groups, which have a norm each, is m_1 + m_2 the source.

        Source: [diff-mamba] Method 8.
        Raises: ValueError if the sizes do not fit.
        """
        here, theirs = self.spec.mixer, source.spec
        groups = theirs.groups // 2 if theirs.groups % 2 == 0 else theirs.groups
        fits = isinstance(here, Mamba2) and (here.groups, here.state, here.head_dim, here.conv, 2 * here.expand) == (
            groups, theirs.state, theirs.head_dim, theirs.conv, theirs.expand) and theirs.groups in (1, 2 * groups)
        if not fits or theirs.bias or self.spec.double != "mixer":
            raise ValueError(f"DiffMamba: two {here} are not the halves of {theirs}; use a Mamba2 without bias of half "
                             "its expand, and of half its groups where there are several")
        inner = theirs.expand * source.out_proj.out_features
        for half, mixer in enumerate((self.mixer_1, self.mixer_2)):
            cut = lambda x, axis=0, half=half: x.chunk(2, axis)[half]  # noqa: E731
            maps = (lambda x: x) if theirs.groups == 1 else cut
            shared = theirs.groups * theirs.state
            parts = dict(zip("zxBCd", source.in_proj.weight.split((inner, inner, shared, shared, source.heads)), strict=True))
            own = [maps(part) if name in "BC" else cut(part) for name, part in parts.items()]
            mixer.in_proj.weight.copy_(torch.cat(own))
            for name, taps in source.conv1d.named_parameters():
                x, B, C = taps.split((inner, shared, shared))
                mixer.conv1d.get_parameter(name).copy_(torch.cat([cut(x), maps(B), maps(C)]))
            for name in ("dt_bias", "A_log", "D", "norm.weight"):
                mixer.get_parameter(name).copy_(cut(source.get_parameter(name)))
            mixer.out_proj.weight.copy_(cut(source.out_proj.weight, 1))
