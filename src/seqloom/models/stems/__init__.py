"""Stems turn a modality into tokens [B, T, D]."""

from seqloom.models.stems.series import SeriesStem
from seqloom.models.stems.tokens import TokenStem

STEMS = {"tokens": TokenStem, "series": SeriesStem}

__all__ = ["STEMS", "SeriesStem", "TokenStem"]
