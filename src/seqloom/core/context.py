"""What a spec may know of its surroundings when it builds its layer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

from torch import nn


@dataclass(frozen=True)
class BuildContext:
    """dim: model width D. layer: index from 0. depth: number of layers. `shared` is the only way to share parameters.

    `shared(key, make)` returns the same module to every layer that asks for `key`, built by the first that does.
    The stack owns what was made (`ctx.store`), so that it is saved, moved and optimised once.
    """

    dim: int
    layer: int = 0
    depth: int = 1
    store: nn.ModuleDict = field(default_factory=nn.ModuleDict)

    def shared(self, key: str, make: Callable[[], nn.Module]) -> nn.Module:
        if key not in self.store:
            self.store[key] = make()
        return self.store[key]

    def at(self, layer: int) -> BuildContext:
        return replace(self, layer=layer)


def split(dim: int, heads: int, owner: str) -> int:
    """Width per head, or an error that names a width that works."""
    if heads < 1 or dim % heads:
        nearest = max(dim // max(heads, 1), 1) * heads
        raise ValueError(f"{owner}: dim {dim} does not split over {heads} heads; nearest is {nearest}")
    return dim // heads
