"""Vocabulary ids [B, T] to vectors [B, T, D] by an embedding table."""

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

    def build(self, dim: int) -> TokenStemLayer:
        return TokenStemLayer(self, dim)


class TokenStemLayer(nn.Module):
    def __init__(self, spec: TokenStem, dim: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(spec.vocab, dim).normal_(0.0, spec.std))
        self.dropout = nn.Dropout(spec.dropout)

    def forward(self, ids: Tensor) -> Tensor:
        return self.dropout(nn.functional.embedding(ids, self.weight))
