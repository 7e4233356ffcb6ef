"""The table of sequence mixers: key = file name = name on the command line."""

from seqloom.mixers.linear import LinearAttention

MIXERS = {
    "linear": LinearAttention,
}

__all__ = ["MIXERS", *(spec.__name__ for spec in MIXERS.values())]
