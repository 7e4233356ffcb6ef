"""What a block needs besides a sequence mixer: norms, channel mixers, positions, short convolutions, inits."""

from seqloom.parts.conv import ShortConv
from seqloom.parts.init import linear
from seqloom.parts.mlp import MLP, MLPS, SwiGLU
from seqloom.parts.norm import GatedRMSNorm, RMSNorm, l2_normalise

__all__ = ["MLP", "MLPS", "GatedRMSNorm", "RMSNorm", "ShortConv", "SwiGLU", "l2_normalise", "linear"]
