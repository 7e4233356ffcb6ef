"""A stack of residual blocks: x + mixer(norm(x)), then x + mlp(norm(x)). Any mixer at any depth."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from seqloom.core import BuildContext, Info, Mixed, Spec
from seqloom.core import state as st
from seqloom.core.mixer import Mixer
from seqloom.parts import MLP, RMSNorm, SwiGLU

NORMS = {"rms": RMSNorm, "layer": nn.LayerNorm}


def make_norm(kind: str, dim: int, eps: float | None) -> nn.Module:
    """The norm called `kind`; eps None is that norm's own default (1e-6 for rms, 1e-5 for layer)."""
    if kind == "none":
        return nn.Identity()
    return NORMS[kind](dim) if eps is None else NORMS[kind](dim, eps=eps)


@dataclass(frozen=True, kw_only=True)
class Block:
    """One sequence mixer and, unless `mlp` is None, one channel mixer, each behind a norm and a residual sum."""

    mixer: Spec
    mlp: SwiGLU | MLP | None = SwiGLU()
    norm: Literal["rms", "layer"] = "rms"
    norm_eps: float | None = None
    dropout: float = 0.0

    def build(self, ctx: BuildContext) -> BlockLayer:
        return BlockLayer(self, ctx)


@runtime_checkable
class Init(Protocol):
    """A spec of initial values that layers cannot choose alone: it sees the whole stack once its layers have begun."""

    def apply(self, model: StackLayer) -> list[str]:
        """Set parameters in place; returns the names of those that were touched."""
        ...


@dataclass(frozen=True, kw_only=True)
class Stack:
    """`blocks` over width `dim`, then a final norm. A hybrid is a tuple of different blocks.

    `init` is applied once, when the layers have initialised themselves (`models/mimetic.py`).
    """

    dim: int
    blocks: tuple[Block, ...]
    norm: Literal["rms", "layer", "none"] = "rms"
    norm_eps: float | None = None
    init: Init | None = None

    @property
    def width(self) -> int:
        """The width that leaves; `dim` is that which enters."""
        return self.dim

    @property
    def causal(self) -> bool:
        return all(block.mixer.causal for block in self.blocks)

    def build(self) -> StackLayer:
        return StackLayer(self)


class BlockLayer(nn.Module):
    def __init__(self, spec: Block, ctx: BuildContext):
        super().__init__()
        self.mixer_norm = make_norm(spec.norm, ctx.dim, spec.norm_eps)
        self.mixer: Mixer = spec.mixer.build(ctx)
        self.mlp_norm = make_norm(spec.norm, ctx.dim, spec.norm_eps) if spec.mlp is not None else None
        self.mlp = spec.mlp.build(ctx) if spec.mlp is not None else None
        self.dropout = nn.Dropout(spec.dropout)

    def forward(self, x: Tensor, state: Any = None, info: Info = Info(), donate: bool = False) -> Mixed:
        y, state, aux = self.mixer(self.mixer_norm(x), state=state, info=info.only(self.mixer.uses), donate=donate)
        x = x + self.dropout(y)
        if self.mlp is not None:
            x = x + self.dropout(self.mlp(self.mlp_norm(x)))
        return Mixed(x, state, aux)


class StackLayer(nn.Module):
    """Blocks in order. The state is the tuple of the blocks' states."""

    def __init__(self, spec: Stack):
        super().__init__()
        self.spec = spec
        ctx = BuildContext(dim=spec.dim, depth=len(spec.blocks), stack_owns=True)
        self.blocks = nn.ModuleList(block.build(ctx.at(i)) for i, block in enumerate(spec.blocks))
        self.shared = ctx.store
        self.norm = make_norm(spec.norm, spec.dim, spec.norm_eps)
        self.checkpointing = False  # recompute each block in the backward pass
        if spec.init is not None:
            spec.init.apply(self)

    def forward(self, x: Tensor, *, state: tuple | None = None, info: Info = Info(), donate: bool = False,
                collect: list[Tensor] | None = None) -> Mixed:
        """`collect`: a list that is given what enters each block, and the output at the end."""
        states, losses = [], {}
        for i, block in enumerate(self.blocks):
            before = None if state is None else state[i]
            if collect is not None:
                collect.append(x)
            if self.checkpointing and self.training and before is None:
                x, after, aux = torch.utils.checkpoint.checkpoint(block, x, None, info, use_reentrant=False)
            else:
                x, after, aux = block(x, before, info, donate)
            states.append(after)
            losses.update({f"{i}.{name}": value for name, value in aux.items()})
        y = self.norm(x)
        if collect is not None:
            collect.append(y)
        return Mixed(y, tuple(states), losses)

    def answered(self, tokens: int, info: Info = Info(), state: tuple | None = None) -> Tensor | None:
        """[B, T]: which outputs of a call with these arguments are answers (those of real tokens); None where all are."""
        return None if info.segments is None else info.segments != 0

    def init_state(self, batch: int, capacity: int | None = None, dtype: torch.dtype | None = None,
                   device: torch.device | str | None = None) -> tuple:
        return tuple(block.mixer.init_state(batch, capacity, dtype, device) for block in self.blocks)

    def state_bytes(self, tokens: int, batch: int = 1, dtype: torch.dtype | None = None) -> int:
        """Bytes of the whole state after `tokens` tokens."""
        return st.count_bytes(self.init_state(batch, tokens, dtype, device="meta"))
