"""MemMamba: a Mamba block that takes notes of its tokens, keeps the best of them, and reads them again before it mixes.

    n_t = sigmoid(s_t) W_down x_t      s_t = w_s . x_t + b      the pool of t: of earlier blocks' notes the P of highest s
    c_t = attention of W_q x_t to the pool, or to nothing      x'_t = x_t + sigmoid(W_g [x_t; c_t]) * W_o c_t      y = Mamba(x')

A state forgets what it read long ago; a note that stays in the pool does not fade. Keys and values are the notes themselves:
maps from the note's width up to the model's are absorbed in W_q and W_o. The score weighs what is read, so that it learns
though the choice has no gradient; a block's notes are read from the next block on (parts/notes.py).
Source: [memmamba] Method 3, 4, 6 and 9. Departures: whether the state is forgetful (tau_2) is not asked, since that question
makes every token wait for the one before; attention may go to nothing instead. Each layer reads its own pool only: pools of
earlier layers (Method 5) need a state that layers share, which a mixer cannot have yet.
State: Mamba's, and P + block - 1 notes of S numbers with a score and an age each, constant in T.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn

from seqloom.core import BuildContext, Info, Mixer, Placement, Spec
from seqloom.core.marks import mark
from seqloom.core.mixer import accumulator
from seqloom.mixers.mamba import Mamba
from seqloom.mixers.mamba2 import Mamba2
from seqloom.parts import linear, notes


@dataclass(frozen=True, kw_only=True)
class MemMamba(Spec):
    mixer: Mamba | Mamba2 = Mamba()
    pool: int = 50                # P: notes kept; 0 is the mixer alone
    note_dim: int = 64            # S
    block: int = 64               # tokens; 1 is the rule token by token
    keep: notes.Keep = "priority" # the P of highest score stay, or the newest (fifo), or any (random)
    threshold: float = 0.0        # tau_1: a token is noted if sigmoid(score) exceeds it; 0 notes all, 1 none
    fusion: Literal["gated", "residual"] = "gated"  # "residual" without sigmoid(W_g [x; c])

    forms: ClassVar[dict] = notes.FORMS
    key: ClassVar[str] = "memmamba"
    equation: ClassVar[str] = "y = Mamba(x + sigmoid(W_g [x; c]) * W_o c);  c_t = attention of W_q x_t to the P best notes"
    source: ClassVar[str] = "memmamba"
    # blocks of 3 and 5 tokens: a law that looks at the state after 8 tokens finds an unfinished block
    examples: ClassVar[dict] = {
        "": dict(mixer=Mamba(state=4, expand=1), pool=4, note_dim=6, block=3),
        "token": dict(mixer=Mamba(state=3, expand=1), pool=3, note_dim=8, block=1, fusion="residual"),
        "fifo": dict(mixer=Mamba2(state=6, head_dim=8, expand=1), pool=6, note_dim=5, block=5, keep="fifo"),
        "random": dict(mixer=Mamba(state=3, expand=1), pool=2, note_dim=6, block=3, keep="random", threshold=0.4),
    }

    def __post_init__(self) -> None:
        if self.pool < 0 or min(self.note_dim, self.block) < 1:
            raise ValueError(f"MemMamba: {self.pool} notes of {self.note_dim} numbers from blocks of {self.block} tokens "
                             "cannot be; use pool >= 0, note_dim >= 1 and block >= 1")
        if not 0 <= self.threshold <= 1:
            raise ValueError(f"MemMamba: threshold is compared with a sigmoid, so it lies in [0, 1], found {self.threshold:g}")

    def build(self, ctx: BuildContext) -> MemMambaLayer:
        return MemMambaLayer(self, ctx)


class Cells(NamedTuple):
    mixer: Any
    notes: notes.Notes | None


class MemMambaLayer(Mixer):
    def __init__(self, spec: MemMamba, ctx: BuildContext):
        super().__init__(spec)
        dim, width = ctx.dim, spec.note_dim
        self.mixer = spec.mixer.build(ctx)
        self.rule = dict(pool=spec.pool, block=spec.block, keep=spec.keep, threshold=spec.threshold, salt=ctx.layer)
        if spec.pool:
            # float32 in any cast: rounded scores choose other notes
            self.score = mark(nn.Parameter(torch.empty(dim).normal_(0.0, dim**-0.5)), keep_float32=True)
            self.score_bias = mark(nn.Parameter(torch.zeros(1)), no_decay=True, keep_float32=True)
            self.down = linear(dim, width, std=dim**-0.5)
            self.q_proj = linear(dim, width, std=dim**-0.5)
            self.o_proj = linear(width, dim, std=width**-0.5)
            self.g_proj = linear(dim + width, dim, bias=True) if spec.fusion == "gated" else None

    def mix(self, x: Tensor, cells: Cells | None, place: Placement, info: Info, donate: bool) -> tuple[Tensor, Any, dict]:
        inner, pool = (None, None) if cells is None else cells
        if self.spec.pool:
            read, pool = self._read(x, pool, place)
            x = x + read
        y, inner, aux = self.mixer.mix(x, inner, place, info, False)
        return y, Cells(inner, pool), aux

    def _read(self, x: Tensor, pool: notes.Notes | None, place: Placement) -> tuple[Tensor, notes.Notes]:
        """What the notes add to each token [B, T, D], and the pool after the last."""
        wide, note = accumulator(x.dtype), self.down(x)
        score = (x.to(wide) * self.score.to(wide)).sum(-1) + self.score_bias.to(wide)
        pool = self._notes(x.shape[0], x.dtype, x.device) if pool is None else pool
        c, pool = self.run(self.q_proj(x), note, score, place.positions, state=pool, segments=place.segments, **self.rule)[:2]
        out = self.o_proj(c)
        return out if self.g_proj is None else self.g_proj(torch.cat([x, c], -1)).sigmoid() * out, pool

    def _notes(self, batch: int, dtype: torch.dtype, device: Any) -> notes.Notes:
        spec = self.spec
        return notes.empty(batch, spec.note_dim, pool=spec.pool, block=spec.block, dtype=dtype, device=device)

    def empty(self, batch: int, capacity: int | None, dtype: torch.dtype, device: Any) -> Cells:
        pool = self._notes(batch, dtype, device) if self.spec.pool else None
        return Cells(self.mixer.empty(batch, capacity, dtype, device), pool)
