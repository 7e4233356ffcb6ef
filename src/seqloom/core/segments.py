"""Segments: the one mechanism for padding and packing.

Each token has an integer id. Id 0 holds: the token writes nothing, decays nothing, moves neither convolution tail nor
position, and its output is 0. A change between two non-zero ids (holds between them do not matter) resets, also
across calls. A boundary is a selection, never a number in log space: the log decay at a boundary is 0, and pairs of
tokens are kept where their run (the count of boundaries so far) is equal.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Track(NamedTuple):
    """Where each row stands after its last real token: its segment id (0 = none yet), its next position. Both [B]."""

    segment: Tensor
    position: Tensor

    @classmethod
    def start(cls, batch: int, device: torch.device | str | None = None) -> Track:
        zero = torch.zeros(batch, dtype=torch.int64, device=device)
        return cls(zero, zero.clone())


class Segments(NamedTuple):
    """Ids resolved against the carried ones: all a kernel needs. Every field is [B, T].

    real:  False where the token holds
    run:   number of boundaries at or before the token, within this call; 0 continues the incoming state. A boundary may
           stand at a hold: read from the end, or where the first token of a sample goes to another memory
    """

    real: Tensor
    run: Tensor

    def hold(self, x: Tensor, fill: float = 0.0) -> Tensor:
        """x where the token is real, `fill` elsewhere; a selection, so that NaN at pads moves no value or gradient."""
        real = self.real.reshape(*self.real.shape, *(1,) * (x.ndim - 2))
        return torch.where(real, x, torch.full((), fill, dtype=x.dtype, device=x.device))  # no copy from the host

    def starts(self) -> Tensor:
        """[B, T] True at the first token of each new run: the place of a reset."""
        return torch.diff(self.run, dim=1, prepend=torch.zeros_like(self.run[:, :1])) > 0

    def code(self) -> Tensor:
        """2 run + real, [B, T] int32 and dense: all of it, for a kernel that compares runs."""
        return (2 * self.run + self.real).to(torch.int32).contiguous()

    def marks(self) -> Tensor:
        """real + 2 starts, [B, T] int8 and dense, for a kernel that walks: bit 0, the token is read; bit 1, the state is
        cleared before it."""
        return (self.real + 2 * self.starts()).to(torch.int8).contiguous()

    def pad(self, extra: int) -> Segments:
        """`extra` holds at the end, in the last run, so that T becomes a multiple of a chunk."""
        if not extra:
            return self
        run = torch.cat([self.run, self.run[:, -1:].expand(-1, extra)], 1)
        return Segments(F.pad(self.real, (0, extra), value=False), run)

    def order(self) -> tuple[Tensor, Tensor]:
        """(source, place): `source[b, r]` is where the r-th real token of row b stands, `place[b, t]` its rank r.

        Real tokens first, holds after them, both in their order: a pad inside a row becomes a pad at its end.
        """
        source = torch.argsort((~self.real).to(torch.int8), dim=1, stable=True)
        place = torch.empty_like(source).scatter_(
            1, source, torch.arange(source.shape[1], device=source.device).expand_as(source)
        )
        return source, place


def resolve(ids: Tensor, track: Track) -> tuple[Segments, Tensor, Track]:
    """Segments, positions [B, T] and the new track for ids [B, T] after the rows described by `track`."""
    batch, tokens = ids.shape
    ids = ids.to(torch.int64)
    real = ids != 0
    index = torch.arange(tokens, device=ids.device).expand(batch, tokens)
    # the last real token strictly before each token: -1 where there is none in this call
    latest = torch.where(real, index, -1).cummax(1).values
    before = F.pad(latest, (1, 0), value=-1)[:, :tokens]
    previous = torch.where(before >= 0, ids.gather(1, before.clamp(min=0)), track.segment[:, None])
    reset = real & (previous != 0) & (ids != previous)
    run = reset.cumsum(1)
    # position: real tokens since the last reset, on top of the carried position while no reset has happened
    count = real.cumsum(1)
    base = torch.where(reset, count - 1, -1).cummax(1).values
    positions = torch.where(run > 0, count - 1 - base, track.position[:, None] + count - 1)
    last = latest[:, -1:]
    seen = last[:, 0] >= 0
    new = Track(
        torch.where(seen, ids.gather(1, last.clamp(min=0))[:, 0], track.segment),
        torch.where(seen, positions.gather(1, last.clamp(min=0))[:, 0] + 1, track.position),
    )
    return Segments(real, run), positions.clamp(min=0), new


def advance(track: Track, tokens: int) -> tuple[Tensor, Track]:
    """Positions [B, T] and the new track when no ids are given: all tokens real, the carried segment goes on."""
    positions = track.position[:, None] + torch.arange(tokens, device=track.position.device)
    return positions, Track(track.segment.clamp(min=1), track.position + tokens)
