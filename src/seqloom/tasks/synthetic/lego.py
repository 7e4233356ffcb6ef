"""Chains of definitions: each variable is given by another one, and all that is asked is a value (LEGO)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

import torch

from seqloom.core import BadInput
from seqloom.tasks.base import IGNORE, Batch, Task, TokenTask


@dataclass(frozen=True, kw_only=True)
class Lego(TokenTask):
    """Clauses "variable, the one it is given by, step" form a chain; then variables are asked for, value = parent's + step.

        c b +1   a root +0   b a +1 | b -> 1   a -> 0   c -> 0        with values modulo 2

    With `values` 2 the steps are the signs of the original task. Ids: variables, root, steps. `order` of the clauses:
    "forward" from the root (a running sum suffices), "backward", or "random"; the questions stand at random. `asked` is the
    depth in the chain (1: given by the root) of the only question; None asks for all. A fit reports "at_depth_3" for each
    of `depths`, and longer chains as "at_chain_12".
    Chance: 1 / values. Optimum: 1.
    """

    chain: int = 6
    variables: int = 16
    values: int = 2
    order: Literal["forward", "backward", "random"] = "random"
    asked: int | None = None
    depths: tuple[int, ...] = ()
    test_chains: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        longest = max((self.chain, *self.test_chains))
        if longest > self.variables or self.chain < 1:
            raise BadInput(f"Lego: a chain of {longest} needs as many different variables, and there are {self.variables}")
        for depth in (*self.depths, *(() if self.asked is None else (self.asked,))):
            if not 1 <= depth <= self.chain:
                raise BadInput(f"Lego: depth {depth} is asked for in a chain of {self.chain}")

    @property
    def vocab(self) -> int:
        return self.variables + 1 + self.values

    @property
    def classes(self) -> int:
        return self.values

    def sample(self, batch: int, generator: torch.Generator) -> Batch:
        chain, root = self.chain, self.variables
        name = torch.rand(batch, self.variables, generator=generator).argsort(1)[:, :chain]
        parent = torch.cat([torch.full((batch, 1), root), name[:, :-1]], 1)
        step = torch.randint(self.values, (batch, chain), generator=generator)
        value = step.cumsum(1) % self.values
        clause = torch.stack([name, parent, root + 1 + step], -1)
        if self.order == "random":
            turn = torch.rand(batch, chain, generator=generator).argsort(1)
            clause = clause.gather(1, turn[..., None].expand_as(clause))
        elif self.order == "backward":
            clause = clause.flip(1)
        if self.asked is None:
            which = torch.rand(batch, chain, generator=generator).argsort(1)
        else:
            which = torch.full((batch, 1), self.asked - 1)
        told = clause.flatten(1)
        ids = torch.cat([told, name.gather(1, which)], 1)
        return Batch(ids, torch.cat([torch.full_like(told, IGNORE), value.gather(1, which)], 1))

    def tests(self) -> Mapping[str, Task]:
        bare = replace(self, depths=(), test_chains=())
        more = {f"at_depth_{depth}": replace(bare, asked=depth) for depth in self.depths}
        return {"score": bare, **more, **{f"at_chain_{n}": replace(bare, chain=n, asked=None) for n in self.test_chains}}
