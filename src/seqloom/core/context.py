"""What a spec may know of its surroundings when it builds its layer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

from torch import nn


@dataclass(frozen=True)
class BuildContext:
    """dim: model width D. layer: index from 0. depth: number of layers. `shared` is the only way to share parameters.

    `shared(key, make, layer)` returns the same module to every layer that asks for `key`, built by the first that does.
    A stack owns what was made (`stack_owns`, `store`), so that it is saved, moved and optimised once; a layer built
    outside of one owns it itself.
    """

    dim: int
    layer: int = 0
    depth: int = 1
    store: nn.ModuleDict = field(default_factory=nn.ModuleDict)
    stack_owns: bool = False

    def shared(self, key: str, make: Callable[[], nn.Module], layer: nn.Module) -> nn.Module:
        if key not in self.store:
            self.store[key] = make()
        if not self.stack_owns:
            layer.add_module(key, self.store[key])
        return self.store[key]

    def at(self, layer: int) -> BuildContext:
        return replace(self, layer=layer)


def split(dim: int, heads: int, owner: str) -> int:
    """Width per head, or an error that names a width that works."""
    if heads < 1 or dim % heads:
        nearest = max(dim // max(heads, 1), 1) * heads
        raise ValueError(f"{owner}: dim {dim} does not split over {heads} heads; nearest is {nearest}")
    return dim // heads
