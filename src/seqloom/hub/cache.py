"""The cache that transformers' `generate` carries: our state, and a ring of earlier ones for stepping back."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.cache_utils import Cache

from seqloom.core import state as st
from seqloom.generate import Piece, Ring, joined
from seqloom.generate.ring import first


class SeqloomCache(Cache):
    """A model's state between calls. Rows can be reordered, repeated and chosen; the last tokens can be undone.

    capacity: room for this many tokens, taken at the first call and written in place (`cache_implementation="static"`);
              None: a state that grows does so
    ring:     snapshots for `crop`; None keeps none until `activate_past_recording` is called, as assisted decoding does

    After `crop` the state is that of a snapshot, and the tokens from there are `pending`: the model reads them again
    at the start of its next call.
    """

    def __init__(self, capacity: int | None = None, ring: Ring | None = None):
        super().__init__(layers=[])
        self.capacity, self.ring = capacity, ring
        self.state: Any = None
        self.length = 0                 # tokens in the state
        self.pending: list[Piece] = []  # tokens that count, and that the state does not hold yet

    def __repr__(self) -> str:
        return f"SeqloomCache({self.get_seq_length()} tokens, {st.count_bytes(self.state)} bytes)"

    def __len__(self) -> int:
        return 0 if self.state is None else len(self.state)

    # -- what generate asks -------------------------------------------------------------------------------------
    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.length + sum(piece.length for piece in self.pending)

    def get_max_length(self, layer_idx: int | None = None) -> int:
        return -1 if self.capacity is None else self.capacity

    get_max_cache_shape = get_max_length

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    @property
    def batch_size(self) -> int:
        leaves = st.leaves(self.state)
        return leaves[0].shape[0] if leaves else -1

    is_compileable = False
    is_croppable = property(lambda self: bool(self.ring is not None and self.ring.snapshots.maxlen))
    is_initialized = property(lambda self: self.state is not None)

    def has_previous_state(self, layer_idx: int | None = None, state_idx: int | None = None) -> bool:
        return self.get_seq_length() > 0

    def update(self, *args: Any, **kwargs: Any) -> Any:
        raise TypeError("SeqloomCache holds a whole model's state, which only a Seqloom model updates")

    # -- rows ---------------------------------------------------------------------------------------------------
    def _map(self, function: Any) -> None:
        self.state = st.tree_map(function, self.state)
        self.pending = [piece.map(function) for piece in self.pending]
        if self.ring is not None:
            self.ring.map(function)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._map(lambda x: x.index_select(0, beam_idx.to(x.device)))

    batch_select_indices = reorder_cache

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._map(lambda x: x.repeat_interleave(repeats, 0))

    def reset(self) -> None:
        self.state, self.length, self.pending = None, 0, []
        if self.ring is not None:
            self.ring.clear()

    # -- stepping back ------------------------------------------------------------------------------------------
    def activate_past_recording(self) -> None:
        """Keep snapshots from here on, so that `crop` can step back."""
        if self.ring is None or not self.ring.snapshots.maxlen:
            self.ring = Ring()

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last -tokens_to_remove tokens; a positive number is a length to keep, as in older transformers.

        Raises: ValueError if they reach further back than the ring does, or nothing was recorded.
        """
        length = self.get_seq_length()
        remove = max(length - tokens_to_remove, 0) if tokens_to_remove > 0 else -tokens_to_remove
        if remove == 0:
            return
        if self.ring is None:
            raise ValueError(
                f"cannot step back {remove} tokens: no earlier state was kept; "
                f"call activate_past_recording() before reading, or pass past_key_values=SeqloomCache(ring=Ring())"
            )
        waiting = length - self.length
        if remove <= waiting:
            self.pending = first(self.pending, waiting - remove)
            return
        self.length, state, self.pending = self.ring.back(remove - waiting, self.length)
        self.state = state if self.capacity is None else st.write_back(self.state, state)

    # -- what the model asks ------------------------------------------------------------------------------------
    def pieces(self, piece: Piece) -> list[Piece]:
        """What a call with `piece` has to read: what was pending, and itself, cut so that a little of it can be undone."""
        parts, at = [], 0
        for length in [piece.length] if self.ring is None else self.ring.cut(piece.length):
            parts.append(piece.slice(at, at + length))
            at += length
        waiting, self.pending = self.pending, []
        return joined([*waiting, parts[0]]) + parts[1:]

    def before(self, piece: Piece) -> None:
        """Note that `piece` is read next."""
        if self.ring is not None and self.ring.push(self.length, self.state, piece) and self.capacity is not None:
            self.ring.renew(st.clone(self.state))  # the state's own tensors are about to be written over

    def after(self, piece: Piece, state: Any) -> None:
        self.state, self.length = state, self.length + piece.length
