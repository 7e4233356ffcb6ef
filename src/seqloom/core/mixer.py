"""The layer contract: `layer(x, *, state=None, info=Info()) -> Mixed(y, state, aux)`, kept once for every mixer."""

from __future__ import annotations

from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from seqloom.core import segments as seg
from seqloom.core import state as st
from seqloom.core.forms import run
from seqloom.core.info import Info
from seqloom.core.marks import marks
from seqloom.core.segments import Segments, Track
from seqloom.core.state import Memory, Mixed, State


class Placement(NamedTuple):
    """Where the tokens of a call stand: resolved segments (None when no ids were given) and positions [B, T]."""

    segments: Segments | None
    positions: Tensor


class Mixer(nn.Module):
    """Base of every sequence mixer. A subclass writes `mix` and `empty`; this class keeps the contract around them.

    mix(x, cells, place, info, donate) -> (y, cells, aux): the computation; holds in x are already 0, and y is held
        after it. `cells` is the mixer's own state (a NamedTuple of tensors, batch on axis 0) or None for a fresh row.
    empty(batch, capacity, dtype, device) -> cells: the state before any token. `capacity` None means "grows".

    Without `donate=True` the input state is untouched; with it the state's tensors are overwritten in place.
    """

    uses: ClassVar[frozenset[str]] = frozenset({"segments"})
    form: str | None = None

    def __init__(self, spec: Any):
        super().__init__()
        self.spec = spec

    # -- what a subclass writes ---------------------------------------------------------------------------------
    def mix(self, x: Tensor, cells: Any, place: Placement, info: Info, donate: bool) -> tuple[Tensor, Any, dict]:
        raise NotImplementedError

    def empty(self, batch: int, capacity: int | None, dtype: torch.dtype, device: torch.device | str | None) -> Any:
        raise NotImplementedError(f"{type(self.spec).__name__} does not stream: it has no state")

    def read_in(self, source: Tensor, info: Info = Info()) -> Memory:
        """Read a source [B, S, D] once, for cross-mixing."""
        raise NotImplementedError(f"{type(self.spec).__name__} has no cross-mixing")

    def read_out(self, x: Tensor, memory: Memory, place: Placement) -> Tensor:
        """Answer the queries x [B, T, D] from a memory made by `read_in`."""
        raise NotImplementedError(f"{type(self.spec).__name__} has no cross-mixing")

    # -- what every caller sees ---------------------------------------------------------------------------------
    def forward(self, x: Tensor, *, state: State | Memory | None = None, info: Info = Info(),
                donate: bool = False) -> Mixed:
        batch, tokens, _ = x.shape
        info.check(type(self.spec).__name__, self.uses)
        if state is not None and not isinstance(state, Memory) and not self.spec.streams:
            raise ValueError(f"{type(self.spec).__name__} is not causal: it takes no state and sees whole sequences")
        track = state.track if isinstance(state, State) else Track.start(batch, x.device)
        if info.segments is None:
            positions, track = seg.advance(track, tokens)
            segments = None
        else:
            segments, positions, track = seg.resolve(info.segments, track)
            x = segments.hold(x)
        place = Placement(segments, positions if info.positions is None else info.positions)
        if isinstance(state, Memory):
            y = self.read_out(x, state, place)
            return Mixed(y if segments is None else segments.hold(y), state, {})
        y, cells, aux = self.mix(x, None if state is None else state.cells, place, info, donate)
        new = State(track, cells) if self.spec.streams else None
        if donate and state is not None:
            new = st.write_back(state, new)
        return Mixed(y if segments is None else segments.hold(y), new, aux)

    def run(self, *streams: Tensor, **options: Any) -> Any:
        """Compute by the form in force for this layer (`core.forms`)."""
        return run(self.spec.forms, *streams, name=self.spec.name(), layer_form=self.form,
                   prefer=self.spec.prefer, **options)

    def init_state(self, batch: int, capacity: int | None = None, dtype: torch.dtype | None = None,
                   device: torch.device | str | None = None) -> State:
        """The state before any token. With `capacity` it has room for that many tokens and may be donated.

        dtype is that of the activations (default: of the parameters); accumulators are float32 or wider anyway.
        """
        # a parameter that stays float32 in any cast does not tell what the activations are
        like = next((p for p in self.parameters() if not marks(p)["keep_float32"]), next(self.parameters()))
        dtype, device = dtype or like.dtype, device or like.device
        return State(Track.start(batch, device), self.empty(batch, capacity, dtype, device))

    def state_bytes(self, tokens: int, batch: int = 1, dtype: torch.dtype | None = None) -> int:
        """Bytes of the state after `tokens` tokens, counted from the tensors without allocating them."""
        return st.count_bytes(self.init_state(batch, tokens, dtype, device="meta"))


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """The dtype of states and sums for activations of `dtype`: float32 or wider."""
    return torch.promote_types(dtype, torch.float32)
