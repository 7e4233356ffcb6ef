"""stem -> stack -> head: the layout of every one-tower model. The stack may work at two rates (`hierarchy.py`)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from seqloom.core import Info, Mixed
from seqloom.core import segments as seg
from seqloom.models.backbone import Stack
from seqloom.models.heads import PooledHead, TokenHead
from seqloom.models.hierarchy import Hierarchy
from seqloom.models.stems import SeriesStem, TokenStem


class Output(NamedTuple):
    """logits of the head, the hidden vectors [B, T, D] it read, the state after the last token, named losses."""

    logits: Tensor
    hidden: Tensor
    state: Any = None
    aux: dict[str, Tensor] = {}


@dataclass(frozen=True, kw_only=True)
class SequenceModel:
    stem: TokenStem | SeriesStem
    stack: Stack | Hierarchy
    head: TokenHead | PooledHead

    def build(self) -> SequenceModelLayer:
        return SequenceModelLayer(self)


def language_model(*, vocab: int, stack: Stack, tie: bool = True) -> SequenceModel:
    """The spec of a language model over `vocab` tokens."""
    return SequenceModel(stem=TokenStem(vocab=vocab), stack=stack, head=TokenHead(classes=vocab, tie=tie))


class SequenceModelLayer(nn.Module):
    def __init__(self, spec: SequenceModel):
        super().__init__()
        self.spec = spec
        self.stem = spec.stem.build(spec.stack.dim)
        self.stack = spec.stack.build()
        self.head = spec.head.build(spec.stack.width, self.stem)

    def encode(self, ids: Tensor, *, state: Any = None, info: Info = Info(), donate: bool = False,
               embedded: Tensor | None = None) -> Mixed:
        """The hidden vectors [B, T, D] that the head reads; `embedded` replaces the stem."""
        if embedded is not None:
            x = embedded
        elif getattr(self.stem, "places", None) is not None:  # learned positions go on from the state
            x = self.stem(ids, self._positions(ids, state, info))
        else:
            x = self.stem(ids)
        return self.stack(x, state=state, info=info, donate=donate)

    def _positions(self, ids: Tensor, state: Any, info: Info) -> Tensor:
        """[B, T]: where each token stands in its segment, after what `state` has read."""
        if info.positions is not None:
            return info.positions
        track = state[0].track if state is not None else seg.Track.start(ids.shape[0], ids.device)
        if info.segments is None:
            return seg.advance(track, ids.shape[1])[0]
        return seg.resolve(info.segments, track)[1]

    def forward(self, ids: Tensor, *, state: Any = None, info: Info = Info(), donate: bool = False,
                keep: int | Tensor = 0, embedded: Tensor | None = None) -> Output:
        """`keep`: score only the last `keep` tokens (0: all) or the given positions; `embedded` replaces the stem."""
        real = self.stack.answered((ids if embedded is None else embedded).shape[1], info, state)
        hidden, state, aux = self.encode(ids, state=state, info=info, donate=donate, embedded=embedded)
        kept = hidden
        if not isinstance(keep, int):
            kept = hidden[:, keep]
        elif keep:
            kept = hidden[:, -keep:]
        return Output(self.head(kept, real), hidden, state, aux)

    def init_state(self, batch: int, capacity: int | None = None, dtype: torch.dtype | None = None,
                   device: torch.device | str | None = None) -> Any:
        return self.stack.init_state(batch, capacity, dtype, device)

    def state_bytes(self, tokens: int, batch: int = 1, dtype: torch.dtype | None = None) -> int:
        return self.stack.state_bytes(tokens, batch, dtype)
