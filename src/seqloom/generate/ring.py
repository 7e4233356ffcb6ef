"""Stepping back in a recurrence: a ring of snapshots, and the tokens read since each.

A recurrent state cannot be shortened the way a cache of keys can: what the last tokens wrote is mixed into it. So the
states before some of the calls are kept, and stepping back to a place between two of them means the earlier snapshot
and the tokens from there, to be read again. A snapshot is a reference to a value, and costs what is not also in the
present state.
"""

from __future__ import annotations

from collections import deque
from typing import Any, NamedTuple

import torch
from torch import Tensor

from seqloom.core import Info
from seqloom.core.state import tree_map


class Piece(NamedTuple):
    """Tokens that were read in one call: ids [B, T] or, in their place, vectors [B, T, D]; segments [B, T] or None."""

    tokens: Tensor
    segments: Tensor | None = None

    @property
    def length(self) -> int:
        return self.tokens.shape[1]

    def slice(self, start: int, stop: int) -> Piece:
        return Piece(self.tokens[:, start:stop], None if self.segments is None else self.segments[:, start:stop])

    def map(self, function: Any) -> Piece:
        return Piece(function(self.tokens), None if self.segments is None else function(self.segments))

    @property
    def info(self) -> Info:
        return Info(segments=self.segments)


def joined(pieces: list[Piece]) -> list[Piece]:
    """The same tokens in as few pieces as can be: neighbours of one kind become one.

    Those with segments and those without stay apart: without means that whatever segment the state is in goes on.
    """
    result: list[Piece] = []
    for piece in pieces:
        last = result[-1] if result else None
        if last is None or last.tokens.ndim != piece.tokens.ndim or (last.segments is None) != (piece.segments is None):
            result.append(piece)
            continue
        segments = None if piece.segments is None else torch.cat([last.segments, piece.segments], 1)
        result[-1] = Piece(torch.cat([last.tokens, piece.tokens], 1), segments)
    return result


def first(pieces: list[Piece], tokens: int) -> list[Piece]:
    """The first `tokens` tokens of some pieces."""
    result = []
    for piece in pieces:
        if tokens <= 0:
            break
        result.append(piece if piece.length <= tokens else piece.slice(0, tokens))
        tokens -= piece.length
    return result


class Snapshot(NamedTuple):
    length: int          # tokens read before it
    state: Any
    since: list[Piece]   # what was read from here up to the next snapshot


class Ring:
    """The last `keep` snapshots, at least `every` tokens apart: any of the last (keep - 1) * every tokens can be undone.

    Stepping back n tokens costs one call over fewer than every + n tokens. keep = 0 keeps nothing.
    """

    def __init__(self, keep: int = 3, every: int = 16):
        self.every = every
        self.snapshots: deque[Snapshot] = deque(maxlen=keep)

    @property
    def reach(self) -> int:
        """Tokens that can be undone now."""
        return sum(piece.length for shot in self.snapshots for piece in shot.since)

    def cut(self, tokens: int) -> list[int]:
        """How to split a call of `tokens` tokens, so that stepping back a little need not read all of it again."""
        if not self.snapshots.maxlen or tokens <= 2 * self.every:
            return [tokens]
        return [tokens - self.every, self.every]

    def push(self, length: int, state: Any, piece: Piece) -> bool:
        """Note that `piece` is about to be read in `state`, after `length` tokens. True if the state was kept."""
        if not self.snapshots.maxlen:
            return False
        keep = not self.snapshots or length - self.snapshots[-1].length >= self.every
        if keep:
            self.snapshots.append(Snapshot(length, state, []))
        self.snapshots[-1].since.append(piece)
        return keep

    def renew(self, state: Any) -> None:
        """Put `state` in the place of the newest snapshot's: a copy, where the original will be written over."""
        self.snapshots[-1] = self.snapshots[-1]._replace(state=state)

    def back(self, tokens: int, length: int) -> tuple[int, Any, list[Piece]]:
        """(length, state, pieces): the snapshot to go back to, and what to read from there to stand at length - tokens.

        Raises: ValueError if that is before the oldest snapshot.
        """
        goal = length - tokens
        if not self.snapshots or goal < self.snapshots[0].length:
            raise ValueError(
                f"cannot step back {tokens} tokens: of the {length} read, the last {self.reach} can be undone; "
                f"a ring with more snapshots, or further apart, reaches further back"
            )
        since: list[Piece] = []
        while True:
            shot = self.snapshots.pop()
            since = shot.since + since
            if shot.length <= goal:
                return shot.length, shot.state, joined(first(since, goal - shot.length))

    def map(self, function: Any) -> None:
        """Apply `function` to every tensor kept: choose or repeat rows of the batch."""
        for i, shot in enumerate(self.snapshots):
            since = [piece.map(function) for piece in shot.since]
            self.snapshots[i] = Snapshot(shot.length, tree_map(function, shot.state), since)

    def clear(self) -> None:
        self.snapshots.clear()
