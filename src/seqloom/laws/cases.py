"""What the laws run on: every example of every mixer in the table, built small with perturbed parameters."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from seqloom.core import BadInput, BuildContext, Info, Mixer, Spec, is_exact, near, runnable
from seqloom.core.marks import cast
from seqloom.mixers import MIXERS

WIDTH = 32
# what float64 and float32 leave between two ways of computing one thing, relative to its largest value
EXACT, SINGLE = 1e-10, 2e-4


class Case(NamedTuple):
    """One row of the table: a mixer's key, the name of one of its examples, and the spec that example gives."""

    mixer: str
    example: str
    spec: Spec

    @property
    def name(self) -> str:
        return f"{self.mixer}-{self.example}" if self.example else self.mixer

    @property
    def definition(self) -> str:
        return next(iter(self.spec.forms))

    def forms(self, device: str) -> list[str]:
        """Names of the forms that run on `device`, the definition first."""
        return runnable(self.spec.forms, device)

    def limit(self, form: str) -> float:
        """How far apart two ways of computing one thing may be in float64, relative to its largest value: where `form`
        computes in float32, what that leaves."""
        return EXACT if is_exact(self.spec.forms[form]) else SINGLE


def cases(mixers: Iterable[str] | None = None, table: Mapping[str, type[Spec]] = MIXERS) -> list[Case]:
    """Every (mixer, example) of the table, or of the named mixers only.

    Raises: BadInput for a name that is not in the table, with the nearest one.
    """
    names = list(table) if mixers is None else list(mixers)
    for name in names:
        if name not in table:
            raise BadInput(f"no mixer {name!r} to check; {near(name, table)}")
    return [
        Case(name, example, table[name](**settings)) for name in names for example, settings in table[name].examples.items()
    ]


def generator(*name: object) -> torch.Generator:
    """Random numbers that depend on `name` alone, on the CPU, so that every device sees the same values."""
    return torch.Generator().manual_seed(zlib.crc32(repr(name).encode()))


def draw(*shape: int, name: object, dtype: torch.dtype = torch.float64, device: str = "cpu") -> Tensor:
    """N(0, 1) values of `shape`, the same for the same `name`."""
    return torch.randn(*shape, generator=generator(name, shape), dtype=torch.float64).to(dtype).to(device)


def build(case: Case, *, dtype: torch.dtype = torch.float64, device: str = "cpu", noise: bool = True, seed: int = 0) -> Mixer:
    """The case's layer at width 32, second of two so that what depends on depth is not at its neutral end.

    With `noise` every parameter is perturbed, matrices by N(0, 1 / fan_in) and the rest by N(0, 0.1^2): zero and one
    inits then hide nothing, and activations have unit scale. Without it the layer is as built, where decays are near 1.
    Parameters marked keep_float32 stay float32 when `dtype` is narrower.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(zlib.crc32(f"{case.name} {seed}".encode()))
        layer = case.spec.build(BuildContext(dim=WIDTH, layer=1, depth=2))
    layer = layer.to(torch.float64).eval()
    if noise:
        perturb(layer, case.name)
    return cast(layer, dtype).to(device)


@torch.no_grad()
def perturb(module: nn.Module, name: str) -> None:
    for path, parameter in module.named_parameters():
        std = parameter.shape[-1] ** -0.5 if parameter.ndim > 1 else 0.1
        values = torch.randn(parameter.shape, generator=generator(name, path), dtype=torch.float64)
        parameter.add_(std * values.to(parameter.dtype))


# Segment patterns -------------------------------------------------------------------------------------------------

def ids_of(tokens: int, *runs: tuple[int, int]) -> list[int]:
    """Ids of `tokens` tokens from (id, stop) pairs: the id holds up to `stop`; the last one to the end."""
    ids: list[int] = []
    for value, stop in runs:
        ids += [value] * (min(stop, tokens) - len(ids))
    return ids + [runs[-1][0]] * (tokens - len(ids))


def patterns(tokens: int, device: str = "cpu") -> Tensor:
    """Five rows of ids [5, T]: one sample; left pads with a boundary at a chunk's edge; pads inside and at the right,
    one-token samples, a reused id and boundaries beside edges; nothing but pads; a change at almost every token."""
    far = tokens + 1
    rows = [
        ids_of(tokens, (1, far)),
        ids_of(tokens, (0, 3), (1, 31), (2, 64), (3, far)),
        ids_of(tokens, (1, 10), (0, 14), (1, 32), (2, 33), (3, 63), (1, 65), (4, max(tokens - 2, 66)), (0, far)),
        ids_of(tokens, (0, far)),
        [5 + t % 2 for t in range(min(8, tokens))] + ids_of(max(tokens - 8, 0), (7, 7), (8, 8), (9, 9), (2, 24), (7, far)),
    ]
    return torch.tensor([row[:tokens] for row in rows], device=device)


def before(device: str = "cpu") -> Tensor:
    """Ids [5, 5] of a call before `patterns`: it goes on, is reset, ends fresh after pads, is held, was never begun."""
    return torch.tensor([[1] * 5, [9] * 5, [0, 0, 1, 1, 1], [2] * 4 + [0], [0] * 5], device=device)


def info(ids: Tensor | None) -> Info:
    return Info(segments=ids)

