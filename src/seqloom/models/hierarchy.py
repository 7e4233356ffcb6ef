"""Two rates: a stack reads samples inside chunks, what it says of each chunk is one token of a second, slower stack.

    x_1 .. x_k | x_{k+1} .. x_{2k} | ...   --low, from nothing in each chunk-->   z_1, z_2, ...   --high-->   y_1, y_2, ...

y_j is known when the last sample of chunk j is; samples of chunk j move no earlier output. Source: [hiss] Method 1 and 2.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from einops import rearrange
from torch import Tensor, nn

from seqloom.core import Info, Mixed, Segments, Track
from seqloom.core import segments as seg
from seqloom.core import state as st
from seqloom.kernels.rows import take
from seqloom.models.backbone import Block, BlockLayer, Stack
from seqloom.parts import linear


@dataclass(frozen=True, kw_only=True)
class Hierarchy:
    """`low` over samples, then `high` over chunks of `chunk` samples. It stands where a `Stack` does; its outputs are chunks.

    pool:   what is kept of a chunk: low's last output, the mean of its outputs, or all of them side by side
    memory: low forgets at the start of every chunk ("chunk"), or runs on through the sequence ("sequence")
    A linear map leads from what is kept to high's width. Either stack may have no blocks: with `memory="sequence"` and none in
    `high` this is one stack whose outputs are read once a chunk.
    """

    low: Stack
    high: Stack
    chunk: int = 10
    pool: Literal["last", "mean", "all"] = "last"
    memory: Literal["chunk", "sequence"] = "chunk"

    def __post_init__(self) -> None:
        if self.chunk < 1:
            raise ValueError(f"Hierarchy: a chunk has at least 1 sample, found {self.chunk}")

    @property
    def dim(self) -> int:
        """The width that enters."""
        return self.low.dim

    @property
    def width(self) -> int:
        """The width that leaves."""
        return self.high.dim

    @property
    def blocks(self) -> tuple[Block, ...]:
        return (*self.low.blocks, *self.high.blocks)

    @property
    def causal(self) -> bool:
        """At the granularity of chunks: inside one, `low` may look both ways."""
        return self.high.causal and (self.memory == "chunk" or self.low.causal)

    @property
    def streams(self) -> bool:
        return all(block.mixer.streams for block in self.blocks)

    def build(self) -> HierarchyLayer:
        return HierarchyLayer(self)


class Clock(NamedTuple):
    """Where rows stand in time. From it follow the segment ids that make low and high begin anew.

    track:  the segment, and how many of its samples were read
    runs:   [B] boundaries of segments so far
    chunks: [B] chunks begun so far
    """

    track: Track
    runs: Tensor
    chunks: Tensor


class Levels(NamedTuple):
    """tail: the last chunk - 1 outputs of low [B, chunk - 1, D], for the pools that read more than the last one."""

    clock: Clock
    low: Any
    high: Any
    tail: Tensor | None


class _Plan(NamedTuple):
    """What a call completes: slot r of a row [B, S] is for the r-th chunk whose last sample is in this call."""

    segments: Segments
    serial: Tensor  # [B, T] the chunk that a sample belongs to, counted from 1
    source: Tensor  # [B, S] the sample that completes a slot's chunk
    filled: Tensor  # [B, S] whether there is one
    before: Tensor  # [B] boundaries of segments before this call
    clock: Clock    # after it

    def ids(self, memory: str) -> Info:
        """Segments of the samples: a new one for every chunk, or for every segment only."""
        run = 1 + self.before[:, None] + self.segments.run
        return Info(segments=torch.where(self.segments.real, self.serial if memory == "chunk" else run, 0))

    def slots(self) -> Info:
        """Segments of the slots: 0 where nothing was completed."""
        return Info(segments=torch.where(self.filled, 1 + self.before[:, None] + self.segments.run.gather(1, self.source), 0))


class HierarchyLayer(nn.Module):
    """The layer of a `Hierarchy`, with the face of a `StackLayer`: x [B, T, D] becomes y [B, S, W].

    Without a state S = T / chunk, and T must be a multiple of the chunk. With one (`init_state` makes the first) T is anything,
    S is T / chunk rounded up, and slots past the last chunk that the call completed are 0; `answered` tells which are not.
    The end of a segment drops its unfinished chunk.
    """

    def __init__(self, spec: Hierarchy):
        super().__init__()
        self.spec = spec
        self.low = spec.low.build()
        kept = spec.low.dim * (spec.chunk if spec.pool == "all" else 1)
        self.join = linear(kept, spec.high.dim, bias=True, std=kept**-0.5)
        self.high = spec.high.build()

    # -- the face of a stack --------------------------------------------------------------------------------------
    @property
    def blocks(self) -> list[BlockLayer]:
        return [*self.low.blocks, *self.high.blocks]

    @property
    def norm(self) -> nn.Module:
        return self.high.norm

    @property
    def checkpointing(self) -> bool:
        return self.low.checkpointing

    @checkpointing.setter
    def checkpointing(self, value: bool) -> None:
        self.low.checkpointing = self.high.checkpointing = value

    def init_state(self, batch: int, capacity: int | None = None, dtype: torch.dtype | None = None,
                   device: torch.device | str | None = None) -> Levels:
        """The state before any sample. `capacity` counts samples. Raises: ValueError if a mixer does not stream."""
        spec = self.spec
        if not spec.streams:
            raise ValueError("this Hierarchy does not stream: a mixer in it is not causal")
        dtype, device = dtype or self.join.weight.dtype, device or self.join.weight.device
        zero = torch.zeros(batch, dtype=torch.int64, device=device)
        tail = None if spec.pool == "last" else torch.zeros(batch, spec.chunk - 1, spec.dim, dtype=dtype, device=device)
        slots = None if capacity is None else -(-capacity // spec.chunk)
        return Levels(
            Clock(Track.start(batch, device), zero, zero.clone()),
            self.low.init_state(batch, capacity, dtype, device),
            self.high.init_state(batch, slots, dtype, device),
            tail,
        )

    def state_bytes(self, tokens: int, batch: int = 1, dtype: torch.dtype | None = None) -> int:
        """Bytes of the whole state after `tokens` samples."""
        return st.count_bytes(self.init_state(batch, tokens, dtype, device="meta"))

    def answered(self, tokens: int, info: Info = Info(), state: Levels | None = None) -> Tensor | None:
        """[B, S]: which outputs of a call with these arguments are answers; None where all are. To be asked before the call
        where that spends the state."""
        if info.segments is None and state is None:
            return None
        batch = len(state.clock.runs) if state is not None else info.segments.shape[0]
        return self._plan(batch, tokens, info, state).filled

    # -- the computation ------------------------------------------------------------------------------------------
    def forward(self, x: Tensor, *, state: Levels | None = None, info: Info = Info(), donate: bool = False,
                collect: list[Tensor] | None = None) -> Mixed:
        """`collect` is given what enters each block of `high`, and the output.

        Raises: ValueError without a state where T is no multiple of the chunk; for facts about samples other than segments.
        """
        info.check("Hierarchy", frozenset({"segments"}))
        tokens, chunk = x.shape[1], self.spec.chunk
        if state is None and tokens % chunk:
            raise ValueError(
                f"Hierarchy: {tokens} samples do not fill chunks of {chunk}; cut to {tokens // chunk * chunk}, pad to "
                f"{-(-tokens // chunk) * chunk} with segment 0, or stream from state=init_state(batch)"
            )
        if state is None and info.segments is None:
            return self._whole(x, collect)
        return self._planned(x, state, info, donate, collect)

    def _whole(self, x: Tensor, collect: list[Tensor] | None) -> Mixed:
        """From the start and without padding every chunk is a row of its own."""
        spec, (batch, tokens, _) = self.spec, x.shape
        forgets = spec.memory == "chunk"
        said, low, aux = self.low(rearrange(x, "b (n k) d -> (b n) k d", k=spec.chunk) if forgets else x)
        said = rearrange(said, "(b n) k d -> b n k d" if forgets else "b (n k) d -> b n k d", b=batch, k=spec.chunk)
        y, high, more = self.high(self.join(self._pool(said)), collect=collect)
        state = None
        if spec.streams:
            fresh = self.init_state(batch, None, x.dtype, x.device)
            _, track = seg.advance(fresh.clock.track, tokens)
            clock = Clock(track, fresh.clock.runs, fresh.clock.chunks + tokens // spec.chunk)
            tail = None if fresh.tail is None else said[:, -1, 1:]  # what it holds is not read again
            state = Levels(clock, fresh.low if forgets else low, high, tail)
        return Mixed(y, state, _named(aux, more))

    def _planned(self, x: Tensor, state: Levels | None, info: Info, donate: bool, collect: list[Tensor] | None) -> Mixed:
        """Any length after any state, with segments."""
        spec = self.spec
        plan = self._plan(x.shape[0], x.shape[1], info, state)
        said, low, aux = self.low(plan.segments.hold(x), state=None if state is None else state.low,
                                  info=plan.ids(spec.memory), donate=donate)
        kept, tail = self._kept(said, plan, None if state is None else state.tail)
        z = torch.where(plan.filled[..., None], self.join(kept), 0.0)
        y, high, more = self.high(z, state=None if state is None else state.high, info=plan.slots(), donate=donate,
                                  collect=collect)
        y = torch.where(plan.filled[..., None], y, 0.0)  # a norm with a bias says something of nothing
        new = Levels(plan.clock, low, high, tail) if spec.streams else None
        if donate and state is not None:
            new = st.write_back(state, new)
        return Mixed(y, new, _named(aux, more))

    def _plan(self, batch: int, tokens: int, info: Info, state: Levels | None) -> _Plan:
        chunk = self.spec.chunk
        if state is None:
            device = info.segments.device
            zero = torch.zeros(batch, dtype=torch.int64, device=device)
            clock, slots = Clock(Track.start(batch, device), zero, zero), tokens // chunk
        else:
            clock, slots = state.clock, -(-tokens // chunk)
        if info.segments is None:
            at, track = seg.advance(clock.track, tokens)
            segments = Segments(torch.ones_like(at, dtype=torch.bool), torch.zeros_like(at))
        else:
            segments, at, track = seg.resolve(info.segments, clock.track)
        serial = clock.chunks[:, None] + (segments.real & (at % chunk == 0)).cumsum(1)
        ends = segments.real & (at % chunk == chunk - 1)
        source = torch.argsort((~ends).to(torch.int8), dim=1, stable=True)[:, :slots]
        filled = torch.arange(slots, device=ends.device) < ends.sum(1, keepdim=True)
        after = Clock(track, clock.runs + segments.run[:, -1], serial[:, -1])
        return _Plan(segments, serial, source, filled, clock.runs, after)

    def _pool(self, said: Tensor) -> Tensor:
        """Low's outputs of chunks [B, S, chunk, D] to what is kept of each [B, S, ...]."""
        if self.spec.pool == "last":
            return said[:, :, -1]
        return said.mean(2) if self.spec.pool == "mean" else said.flatten(2)

    def _kept(self, said: Tensor, plan: _Plan, tail: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """What is kept of the chunk of each slot, and the new tail. A chunk is `chunk` real samples in a row, some of them
        perhaps of earlier calls."""
        spec, real = self.spec, plan.segments.real
        if spec.pool == "last":
            return take(said, plan.source), None
        short = spec.chunk - 1
        if tail is None:
            tail = said.new_zeros(said.shape[0], short, said.shape[2])
        line = torch.cat([tail.to(said.dtype), take(said, plan.segments.order()[0])], 1)  # real samples first
        rank = (real.cumsum(1) - 1).gather(1, plan.source).clamp(min=0)
        window = torch.arange(spec.chunk, device=rank.device)
        chunks = take(line, (rank[..., None] + window).flatten(1)).unflatten(1, (-1, spec.chunk))
        return self._pool(chunks), take(line, real.sum(1, keepdim=True) + window[:short])


def _named(low: dict[str, Tensor], high: dict[str, Tensor]) -> dict[str, Tensor]:
    """What both stacks report, by level."""
    return {f"{level}.{name}": value for level, aux in (("low", low), ("high", high)) for name, value in aux.items()}
