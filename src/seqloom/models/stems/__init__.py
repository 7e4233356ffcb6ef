"""Stems turn a modality into tokens [B, T, D]."""

from seqloom.models.stems.tokens import TokenStem

STEMS = {"tokens": TokenStem}

__all__ = ["STEMS", "TokenStem"]
