"""How near a class of structured matrices comes to a given one: no model, only the class's own parameters are fitted."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from seqloom.kernels import decay_scan
from seqloom.mixers.hydra import weights


@dataclass(frozen=True, kw_only=True)
class MatrixClass:
    """Which matrices a mixer may be, T x T: its `kind`, and the order (state size, rank) of its parts.

    quasiseparable: two scans read one token late and a free diagonal (Hydra). added: two plain scans, whose diagonals add.
    semiseparable: one scan, lower triangular. low_rank: Q K'.
    """

    kind: Literal["quasiseparable", "added", "semiseparable", "low_rank"] = "quasiseparable"
    order: int = 2

    def draw(self, batch: int, length: int, generator: torch.Generator) -> dict[str, Tensor]:
        """Parameters of `batch` matrices, N(0, 1)."""
        ways = 1 if self.kind in ("semiseparable", "low_rank") else 2
        shapes = {"c": (ways, 1, self.order), "b": (ways, 1, self.order)}
        if self.kind != "low_rank":
            shapes["a"] = (ways, 1)
        if self.kind == "quasiseparable":
            shapes["d"] = (1,)
        rand = lambda *shape: torch.randn(batch, length, *shape, generator=generator, dtype=torch.float64)  # noqa: E731
        return {name: rand(*shape) for name, shape in shapes.items()}

    def matrices(self, c: Tensor, b: Tensor, a: Tensor | None = None, d: Tensor | None = None) -> Tensor:
        """[B, T, T]. The decays are sigmoid(a)."""
        if a is None:
            return torch.einsum("bin,bjn->bij", c[:, :, 0, 0], b[:, :, 0, 0])
        log_a = F.logsigmoid(a)
        if self.kind == "semiseparable":
            return decay_scan.matrix(c[:, :, 0], b[:, :, 0], log_a[:, :, 0])[:, 0]
        combine = "shift" if self.kind == "quasiseparable" else "add"
        skip = torch.zeros_like(a[:, :, 0]) if d is None else d
        return weights(c, b, torch.ones_like(a), log_a, skip, combine=combine)[:, 0]


@dataclass(frozen=True, kw_only=True)
class MatrixFit:
    """Fit a random quasiseparable matrix of order 2 with a free diagonal by matrices of another class.

        12 x 12, m_ij = c_i' (a_{j+1} .. a_{i-1}) b_j below the diagonal, its mirror image above, free on it

    Score: 1 - the squared error relative to the matrix's own squares, by Adam at the best of `rates`, the same for every
    class. Chance (the zero matrix): 0. Optimum: 1. Source: [hydra] Works when 8.
    """

    length: int = 12
    order: int = 2
    steps: int = 1500
    rates: tuple[float, ...] = (0.01, 0.03, 0.1)

    def measure(self, arm: MatrixClass, seed: int) -> Mapping[str, float]:
        make = torch.Generator().manual_seed(seed)
        source = MatrixClass(order=self.order)
        target = source.matrices(**source.draw(1, self.length, make))
        start = arm.draw(1, self.length, make)
        # one copy a rate, side by side in the batch
        copies = [{name: value.clone().requires_grad_() for name, value in start.items()} for _ in self.rates]
        groups = [{"params": list(copy.values()), "lr": rate} for copy, rate in zip(copies, self.rates, strict=True)]
        optimiser = torch.optim.Adam(groups)
        for step in range(self.steps):
            error = self._errors(arm, copies, target)
            optimiser.zero_grad(set_to_none=True)
            error.sum().backward()
            for group, rate in zip(optimiser.param_groups, self.rates, strict=True):
                group["lr"] = rate * (1 - step / self.steps)
            optimiser.step()
        with torch.no_grad():
            return {"score": 1 - float(self._errors(arm, copies, target).min())}

    def _errors(self, arm: MatrixClass, copies: list[dict[str, Tensor]], target: Tensor) -> Tensor:
        """Relative squared errors, one a copy."""
        found = arm.matrices(**{name: torch.cat([copy[name] for copy in copies]) for name in copies[0]})
        return (found - target).square().sum((1, 2)) / target.square().sum()
