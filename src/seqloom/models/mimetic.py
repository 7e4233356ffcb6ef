"""Mimetic initialisation: some layers start as linear attention in which like tokens attend to each other.

    y = (L * C B') (dt * x) with L_ij the decay from token j to i: A ~ 0 and dt ~ 1 make L a triangle of ones, and
    W_C = mix W_C' + (1 - mix) W_B makes C_i . B_j large where x_i is like x_j

A default state space layer learns to copy and to recall late or never, because its decay and its unrelated maps hide the
solution; such a layer in one of two begins beside it. Nothing but initial values changes.
Source: [mimetic-init] Method 1 to 6. It stands here and not in parts/, since it sets parameters of several mixers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn

from seqloom.mixers.gated_linear import GatedLinearAttentionLayer
from seqloom.mixers.mamba import MambaLayer
from seqloom.mixers.mamba2 import Mamba2Layer
from seqloom.parts import ShortConv

if TYPE_CHECKING:
    from seqloom.models.backbone import StackLayer

UNIT_STEP = math.log(math.e - 1)  # softplus of it is 1


@dataclass(frozen=True, kw_only=True)
class MimeticInit:
    """Which layers start so, and which of the four ingredients they get. Touches Mamba, Mamba-2 and gated linear attention.

    layers: "alternate" is every second of the layers that can be set, from the second on, so that an ordinary one stands
            before each (its convolution brings the previous token); or indices of blocks from 0.
    decay:  A = -exp(-c): exp(A) over 1,000 steps is 0.71 at c = 8.
    step:   dt = 1 at the start, for every token, by a bias. Writes are then 10 to 1,000 times the default's: keep a norm.
    maps:   W_C (a query's map) is mix times a fresh draw plus 1 - mix times W_B (the key's).
    conv:   the short convolution passes each token through.
    In gated linear attention the gate is both decay and step: `decay` sets its bias, and clears its map of the token.
    """

    layers: Literal["alternate"] | tuple[int, ...] = "alternate"
    decay: bool = True
    step: bool = True
    maps: bool = True
    conv: bool = True
    c: float = 8.0
    mix: float = 0.5

    def __post_init__(self) -> None:
        if not 0 <= self.mix <= 1:
            raise ValueError(f"MimeticInit: mix is the share of the fresh draw in W_C, in [0, 1], found {self.mix:g}")

    @torch.no_grad()
    def apply(self, model: StackLayer | nn.Module) -> list[str]:
        """Set the parameters of a stack, or of a model that has one; returns the names of those that were touched.

        The same generator state gives the same values, also when it is applied again: what is drawn is drawn anew.
        Raises: ValueError where a layer asked for has nothing to set, or none is found.
        """
        stack = getattr(model, "stack", model)
        prefix = "" if stack is model else "stack."
        able = [i for i, block in enumerate(stack.blocks) if any(_settable(block.mixer))]  # type: ignore[arg-type]
        chosen = able[1::2] if self.layers == "alternate" else self.layers
        if not chosen:
            raise ValueError(f"MimeticInit: every second layer of {', '.join(HOW_NAMES)} is set, and of {len(stack.blocks)} "
                             f"blocks {len(able)} hold one; name the blocks by layers=(1, ..)")
        touched = []
        for i in chosen:
            if i not in able:
                raise ValueError(f"MimeticInit: block {i} has nothing to set; blocks that have: {', '.join(map(str, able))}")
            for path, layer in _settable(stack.blocks[i].mixer):  # type: ignore[index, arg-type]
                place = f"{prefix}blocks.{i}.mixer.{path + '.' if path else ''}"
                touched += [place + name for name in _how(layer)(layer, self)]  # type: ignore[misc]
        return touched


def mimetic_init_(model: nn.Module, **settings: object) -> list[str]:
    """`MimeticInit(**settings).apply(model)`: for a model that is there already."""
    return MimeticInit(**settings).apply(model)  # type: ignore[arg-type]


def _settable(mixer: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The layers inside a mixer (itself, or those it is made of) that can be set, with their paths."""
    return ((path, layer) for path, layer in mixer.named_modules() if _how(layer) is not None)


def _how(layer: nn.Module) -> Callable[..., list[str]] | None:
    return next((HOW[kind] for kind in type(layer).__mro__ if kind in HOW), None)


def _mamba2(layer: Mamba2Layer, init: MimeticInit) -> list[str]:
    spec, names = layer.spec, []
    shared = spec.groups * spec.state
    rows = layer.in_proj.weight.split((layer.widths[0], layer.widths[1] - 2 * shared, shared, shared, layer.heads))
    if init.decay:
        names += [_fill(layer, "A_log", -init.c)]
    if init.step:
        low, high = spec.dt_limit
        if low >= 1 or (high is not None and high <= 1):
            raise ValueError(f"MimeticInit: dt starts at 1, which dt_limit {spec.dt_limit} clamps; use step=False, or a range "
                             "around 1")
        rows[4].zero_()
        names += [_fill(layer, "dt_bias", UNIT_STEP), "in_proj.weight"]
    if init.maps:
        _relate(rows[3], rows[2], init.mix)
        names += ["in_proj.weight"]
    if init.conv:
        names += _pass_through(layer.conv1d, "conv1d")
    return list(dict.fromkeys(names))


def _mamba(layer: MambaLayer, init: MimeticInit) -> list[str]:
    names = [_fill(layer, "A_log", -init.c)] if init.decay else []
    if init.step:  # of the two factors of the map to dt one is cleared: with both, neither would have a gradient
        layer.dt_proj.weight.zero_()
        layer.dt_proj.bias.fill_(UNIT_STEP)
        names += ["dt_proj.weight", "dt_proj.bias"]
    if init.maps:
        _, B, C = layer.x_proj.weight.split(layer.widths)
        _relate(C, B, init.mix)
        names += ["x_proj.weight"]
    # of a block whose scan alone is doubled, the second half has no convolution
    return names + (_pass_through(layer.conv1d, "conv1d") if init.conv and hasattr(layer, "conv1d") else [])


def _gated_linear(layer: GatedLinearAttentionLayer, init: MimeticInit) -> list[str]:
    names = []
    if init.decay:
        last = layer.a_proj if isinstance(layer.a_proj, nn.Linear) else layer.a_proj[-1]
        last.weight.zero_()
        # logsigmoid(bias) / tau = -exp(-c)
        last.bias.fill_(-math.log(math.expm1(layer.spec.tau * math.exp(-init.c))))
        path = "a_proj" if last is layer.a_proj else "a_proj.1"
        names += [f"{path}.weight", f"{path}.bias"]
    if init.maps:
        query, key, _ = layer.qkv.weight.split(layer.widths)
        _relate(query, key, init.mix)
        names += ["qkv.weight"]
    return names + (_pass_through(layer.conv, "conv") if init.conv and layer.conv is not None else [])


HOW: dict[type[nn.Module], Callable[..., list[str]]] = {
    Mamba2Layer: _mamba2, MambaLayer: _mamba, GatedLinearAttentionLayer: _gated_linear,
}
HOW_NAMES = ("Mamba", "Mamba-2", "gated linear attention")
INITS = {"mimetic_init": MimeticInit}


def _fill(layer: nn.Module, name: str, value: float) -> str:
    layer.get_parameter(name).fill_(value)
    return name


def _relate(query: Tensor, key: Tensor, mix: float) -> None:
    """query = mix * a draw as large as the key's map + (1 - mix) * the key's map, both [rows, D] views of a weight."""
    query.copy_(mix * key.std() * torch.randn_like(key) + (1 - mix) * key)


def _pass_through(conv: ShortConv, path: str) -> list[str]:
    conv.weight.zero_()
    conv.weight[:, -1] = 1.0
    if conv.bias is None:
        return [f"{path}.weight"]
    conv.bias.zero_()
    return [f"{path}.weight", f"{path}.bias"]


__all__ = ["INITS", "MimeticInit", "mimetic_init_"]
