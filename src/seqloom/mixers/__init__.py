"""The table of sequence mixers: key = file name = name on the command line."""

from seqloom.mixers.delta import DeltaNet
from seqloom.mixers.gated_delta import GatedDeltaNet
from seqloom.mixers.linear import LinearAttention
from seqloom.mixers.s4d import S4D
from seqloom.mixers.softmax import SoftmaxAttention

MIXERS = {
    "softmax": SoftmaxAttention,
    "linear": LinearAttention,
    "delta": DeltaNet,
    "gated_delta": GatedDeltaNet,
    "s4d": S4D,
}

__all__ = ["MIXERS", *(spec.__name__ for spec in MIXERS.values())]
