"""The table of sequence mixers: key = file name = name on the command line."""

from seqloom.mixers.causal_relation import CausalRelation
from seqloom.mixers.delta import DeltaNet
from seqloom.mixers.delta_product import DeltaProduct
from seqloom.mixers.diff_mamba import DiffMamba
from seqloom.mixers.gated_delta import GatedDeltaNet
from seqloom.mixers.gated_linear import GatedLinearAttention
from seqloom.mixers.gated_slot import GatedSlotAttention
from seqloom.mixers.gru import GRU
from seqloom.mixers.hgrn import HGRN
from seqloom.mixers.hydra import Hydra
from seqloom.mixers.linear import LinearAttention
from seqloom.mixers.lion import Lion
from seqloom.mixers.longhorn import Longhorn
from seqloom.mixers.mamba import Mamba
from seqloom.mixers.mamba2 import Mamba2
from seqloom.mixers.memmamba import MemMamba
from seqloom.mixers.mom import MixtureOfMemories
from seqloom.mixers.native_hybrid import NativeHybridAttention
from seqloom.mixers.retention import Retention
from seqloom.mixers.s4d import S4D
from seqloom.mixers.s6 import S6
from seqloom.mixers.softmax import SoftmaxAttention

MIXERS = {
    "softmax": SoftmaxAttention,
    "linear": LinearAttention,
    "retention": Retention,
    "gated_linear": GatedLinearAttention,
    "delta": DeltaNet,
    "gated_delta": GatedDeltaNet,
    "delta_product": DeltaProduct,
    "mom": MixtureOfMemories,
    "mamba": Mamba,
    "mamba2": Mamba2,
    "diff_mamba": DiffMamba,
    "memmamba": MemMamba,
    "s4d": S4D,
    "hgrn": HGRN,
    "hydra": Hydra,
    "lion": Lion,
    "longhorn": Longhorn,
    "s6": S6,
    "gated_slot": GatedSlotAttention,
    "native_hybrid": NativeHybridAttention,
    "causal_relation": CausalRelation,
    "gru": GRU,
}

__all__ = ["MIXERS", *(spec.__name__ for spec in MIXERS.values())]
