"""The table of sequence mixers: key = file name = name on the command line."""

from seqloom.mixers.delta import DeltaNet
from seqloom.mixers.gated_delta import GatedDeltaNet
from seqloom.mixers.gated_linear import GatedLinearAttention
from seqloom.mixers.hgrn import HGRN
from seqloom.mixers.linear import LinearAttention
from seqloom.mixers.mamba import Mamba
from seqloom.mixers.mamba2 import Mamba2
from seqloom.mixers.retention import Retention
from seqloom.mixers.s4d import S4D
from seqloom.mixers.softmax import SoftmaxAttention

MIXERS = {
    "softmax": SoftmaxAttention,
    "linear": LinearAttention,
    "retention": Retention,
    "gated_linear": GatedLinearAttention,
    "delta": DeltaNet,
    "gated_delta": GatedDeltaNet,
    "mamba": Mamba,
    "mamba2": Mamba2,
    "s4d": S4D,
    "hgrn": HGRN,
}

__all__ = ["MIXERS", *(spec.__name__ for spec in MIXERS.values())]
