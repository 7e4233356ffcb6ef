"""Vocabulary ids [B, T] to vectors [B, T, D] by an embedding table, with or without learned positions."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from seqloom.parts.init import STD


@dataclass(frozen=True, kw_only=True)
class TokenStem:
    vocab: int
    dropout: float = 0.0
    std: float = STD  # of the table at the start: where it is tied to a head, small; alone, 1 leaves room for large rates
    positions: int = 0  # places in a segment that have a learned vector, added to the token's; 0: none, and no limit

    def build(self, dim: int) -> TokenStemLayer:
        return TokenStemLayer(self, dim)


class TokenStemLayer(nn.Module):
    def __init__(self, spec: TokenStem, dim: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(spec.vocab, dim).normal_(0.0, spec.std))
        self.places = nn.Parameter(torch.empty(spec.positions, dim).normal_(0.0, spec.std)) if spec.positions else None
        self.dropout = nn.Dropout(spec.dropout)

    def forward(self, ids: Tensor, positions: Tensor | None = None) -> Tensor:
        """`positions` [B, T] in the segment, wanted where they are learned; None counts from 0.

        Raises: ValueError for a position that has no vector (on the CPU; elsewhere the look-up itself fails).
        """
        x = nn.functional.embedding(ids, self.weight)
        if self.places is not None:
            positions = torch.arange(ids.shape[1], device=ids.device) if positions is None else positions
            if positions.device.type == "cpu" and not torch.compiler.is_compiling() and positions.numel():
                last, length = int(positions.max()), self.places.shape[0]
                if last >= length:
                    raise ValueError(f"TokenStem: position {last} has no learned vector, there are {length}; "
                                     f"use positions={last + 1} or more, or a model that needs none")
            x = x + nn.functional.embedding(positions, self.places)
        return self.dropout(x)
