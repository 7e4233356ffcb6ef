"""Heads turn tokens [B, T, D] into an answer."""

from seqloom.models.heads.tokens import PooledHead, TokenHead

HEADS = {"token_head": TokenHead, "pooled_head": PooledHead}

__all__ = ["HEADS", "PooledHead", "TokenHead"]
