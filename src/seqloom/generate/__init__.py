"""Decoding with a state: `generate` and `stream` for whole continuations, `Decoder` for one's own loop."""

from seqloom.generate.decoder import Decoder, Step, generate, left_pad, stream
from seqloom.generate.ring import Piece, Ring, joined
from seqloom.generate.sampler import Sampler

__all__ = ["Decoder", "Piece", "Ring", "Sampler", "Step", "generate", "joined", "left_pad", "stream"]
