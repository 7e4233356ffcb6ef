"""Channel mixers: what a block applies to each token on its own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from seqloom.core.context import BuildContext
from seqloom.parts.init import linear

ACTIVATIONS = {"gelu": F.gelu, "relu": F.relu, "silu": F.silu, "gelu_tanh": lambda x: F.gelu(x, approximate="tanh")}


@dataclass(frozen=True, kw_only=True)
class SwiGLU:
    """y = W_o (SiLU(W_g x) * W_v x). `hidden` is the inner width; None means 8/3 of the model's, up to a multiple of 8."""

    hidden: int | None = None

    def build(self, ctx: BuildContext) -> nn.Module:
        return SwiGLULayer(ctx.dim, self.hidden or -(-ctx.dim * 8 // 3 // 8) * 8, ctx.depth)


class SwiGLULayer(nn.Module):
    def __init__(self, dim: int, hidden: int, depth: int):
        super().__init__()
        self.gate_up = linear(dim, 2 * hidden)
        self.down = linear(hidden, dim, depth=depth)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(x).chunk(2, -1)
        return self.down(F.silu(gate) * up)


@dataclass(frozen=True, kw_only=True)
class MLP:
    """y = W_o act(W_i x + b) + b. `hidden` None means 4 times the model's width."""

    hidden: int | None = None
    activation: Literal["gelu", "gelu_tanh", "relu", "silu"] = "gelu"
    bias: bool = True

    def build(self, ctx: BuildContext) -> nn.Module:
        return MLPLayer(ctx.dim, self.hidden or 4 * ctx.dim, self.activation, self.bias, ctx.depth)


class MLPLayer(nn.Module):
    def __init__(self, dim: int, hidden: int, activation: str, bias: bool, depth: int):
        super().__init__()
        self.up = linear(dim, hidden, bias=bias)
        self.down = linear(hidden, dim, bias=bias, depth=depth)
        self.activation = ACTIVATIONS[activation]

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.activation(self.up(x)))


MLPS = {"swiglu": SwiGLU, "mlp": MLP}
