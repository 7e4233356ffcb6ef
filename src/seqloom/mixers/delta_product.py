"""DeltaProduct: DeltaNet that takes n steps a token, with a key, a value and a step size each.

    S = a_t S_{t-1};   n times S <- (I - b_{t,j} k_{t,j} k_{t,j}') S + b_{t,j} k_{t,j} v_{t,j}';   S_t = S
    y_t = W_o (RMSNorm(S_t' q_t) * SiLU(W_g x_t))      b = 2 sigmoid(W_b x), or sigmoid without negative eigenvalues

A token's transition is a product of n generalised Householder matrices, the last step's leftmost. With b up to 2 each may
reflect; two reflections turn, and n of them permute n + 1 points. Its norm is at most 1 for any n. The decay, where there is
one, comes once a token, before the first step. The convolution runs over tokens, on each step's channels.
Source: [deltaproduct] Method. Its code calls the steps num_householder.  State: as DeltaNet's, whatever n, constant in T.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from seqloom.core import BuildContext
from seqloom.mixers.delta import DeltaNetLayer
from seqloom.mixers.gated_delta import GatedDeltaNet, GatedDeltaNetLayer


@dataclass(frozen=True, kw_only=True)
class DeltaProduct(GatedDeltaNet):
    steps: int = 2           # n, Householder steps a token; 1 is DeltaNet
    neg_eigval: bool = True
    decay: bool = True       # False: a_t = 1, no parameters for it

    key: ClassVar[str] = "delta_product"
    equation: ClassVar[str] = "S_t = a_t (prod_j I - b_tj k_tj k_tj') S_{t-1} + ...;  y_t = S_t' q_t"
    source: ClassVar[str] = "deltaproduct"
    examples: ClassVar[dict] = {
        "": dict(heads=2),
        "three": dict(heads=2, steps=3, key_dim=6, value_dim=10, decay=False, gate="none", conv=0),
        "positive": dict(heads=2, neg_eigval=False, decay=False),
        "one": dict(heads=2, steps=1),
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.steps < 1:
            raise ValueError(f"DeltaProduct: a token takes at least 1 step, found steps={self.steps}")
        if not self.erase:
            raise ValueError("DeltaProduct: without erasing a token has no product of transitions; DeltaNet has erase=False")

    def build(self, ctx: BuildContext) -> DeltaNetLayer:
        return (GatedDeltaNetLayer if self.decay else DeltaNetLayer)(self, ctx, self.steps)
