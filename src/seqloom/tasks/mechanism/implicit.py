"""Tests of the implicit step on its own: a memory that solves for each write, with keys of any length."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from seqloom.mixers import longhorn
from seqloom.tasks.mechanism.overwriting import OverwriteRecall


@dataclass(frozen=True, kw_only=True)
class ImplicitRule:
    """How a memory takes a write of step beta / (1 + beta |k|^2): the exact solution, its diagonal, or by addition."""

    update: Literal["exact", "diagonal", "additive"]
    beta: float = 1.0


@dataclass(frozen=True, kw_only=True)
class ImplicitOverwriteRecall(OverwriteRecall):
    """A memory of random keys of length `norm`; each key's value is read back by the nearest of 64 codewords.

        write k1 v7, k2 v3, ..., then k1 v2, k2 v9, ...; read k1 -> v2

    As `OverwriteRecall`, with an implicit step: a write corrects the share beta |k|^2 / (1 + beta |k|^2) of the error, so
    that it takes a long key to overwrite (16/17 at norm 4; a third at norm 1 with beta 1/2). Chance: 1 / 64. Optimum: 1.
    Source: [longhorn] Works when 6.
    """

    norm: float = 4.0

    def _written(self, rule: ImplicitRule, k: Tensor, v: Tensor) -> Tensor:  # type: ignore[override]
        k, x = self.norm * k[:, :, 0], v[:, :, 0]
        step = longhorn.step_size(torch.full_like(k[..., :1], rule.beta), k)
        if rule.update != "exact":
            step = step.expand_as(x)
        skip = torch.zeros(x.shape[-1], dtype=x.dtype)
        state = longhorn.FORMS[rule.update]["recurrent"](x, step, k, k, A=None, D=skip).state
        return state[:, 0] if rule.update == "exact" else state.mT
