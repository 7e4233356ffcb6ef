"""The fused selective scan, by Triton's interpreter on the CPU: against the chunked form in float64.

The checks run once, in a process of their own (tests/interpreted.py). Tiles are smaller than on
a card: 8 tokens of 4 channels.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from interpreted import pattern, report_of, run_checks
from torch import Tensor

from seqloom.core.segments import Track, resolve
from seqloom.kernels import selective_scan

EDGES = (3, 7, 8, 9, 16)  # at and beside those of chunks, tiles or programs

# tokens, channels, states, rule, segments with NaN at pads, parts of T at most, D, and the largest step
CASES = {
    "plain": (14, 6, 3, "euler", False, 1, True, 0.5),
    "parts": (24, 3, 2, "euler", False, 3, False, 0.5),
    "packed": (25, 3, 4, "euler", True, 3, True, 0.5),
    "groups": (9, 3, 5, "euler", False, 1, True, 0.5),
    "violent": (14, 3, 2, "euler", True, 1, True, 40.0),
    "slow": (14, 3, 2, "euler", False, 2, True, 1e-3),
    "erase": (14, 3, 3, "erase", True, 2, True, 0.4),
    "exact": (14, 3, 3, "exact", True, 2, True, 1.0),
    "one_token": (1, 3, 2, "euler", False, 1, True, 0.5),
}


def small() -> Any:
    """The module of the kernels, with small tiles."""
    from seqloom.kernels.triton import selective_scan as launched

    launched.TILE, launched.LANES = 8, 4
    return launched


def streams(tokens: int, channels: int, states: int, most: float) -> list[Tensor]:
    """x, dt, B and C in float64, exact in float32."""
    x, dt = torch.randn(2, tokens, channels), most * torch.rand(2, tokens, channels)
    B, C = torch.randn(2, 2, tokens, states)
    return [value.double() for value in (x, dt, B, C)]


def everything(form: Callable, given: list, A: Tensor | None, D: Tensor | None, state: Tensor, dtype: torch.dtype,
               **options: Any) -> list[Tensor]:
    """y, the final state and all gradients, under fixed random cotangents."""
    leaves = [None if x is None else x.to(dtype).clone().requires_grad_() for x in (*given, A, D, state)]
    y, new, _ = form(*leaves[:4], A=leaves[4], D=leaves[5], state=leaves[6], **options)
    draw = torch.Generator().manual_seed(1)
    total = sum((x * torch.randn(x.shape, generator=draw).to(x.dtype)).sum() for x in (y, new))
    return [y.detach(), new.detach(), *torch.autograd.grad(total, [x for x in leaves if x is not None])]


def furthest(found: list[Tensor], want: list[Tensor]) -> float:
    """The largest relative error; one that is not a number counts as 1e9."""
    errors = ((x.double() - y.double()).norm() / y.double().norm().clamp(min=1e-3) for x, y in zip(found, want, strict=True))
    return max(torch.nan_to_num(error, nan=1e9).item() for error in errors)


def case(tokens: int, channels: int, states: int, rule: str, packed: bool, parts: int, skip: bool, most: float) -> float:
    launched = small()
    launched.LEAST, launched.FILL = max(tokens // parts, 1), 2 * parts
    given = streams(tokens, channels, states, most)
    segments = pattern(tokens, *EDGES) if packed else None
    if segments is not None:
        given = [segments.hold(x, float("nan")) for x in given]
    A = None if rule == "erase" else -torch.rand(channels, states).double() * 2
    D = torch.randn(channels).double() if skip else None
    state = torch.randn(2, channels, states).double()
    options = dict(segments=segments, discretise="zoh" if rule == "exact" else "euler")
    return furthest(*(everything(form, given, A, D, state, dtype, **options)
                      for form, dtype in ((selective_scan.fused, torch.float32), (selective_scan.chunked, torch.float64))))


def neighbour() -> float:
    """Another segment's inputs a million times larger: the number of results of its neighbours that move by one bit."""
    small()
    quiet = [x.float() for x in streams(18, 3, 2, 0.5)]
    ids = torch.ones(2, 18, dtype=torch.int64)
    ids[:, 7:15], ids[:, 15:] = 2, 3
    other = (ids == 2)[..., None]
    loud = [torch.where(other, 1e6 * x, x) if i != 1 else x for i, x in enumerate(quiet)]
    A, state, segments = -torch.ones(3, 2), torch.ones(2, 3, 2), resolve(ids, Track.start(2))[0]
    moved = 0
    runs = [everything(selective_scan.fused, given, A, None, state, torch.float32, segments=segments)
            for given in (quiet, loud)]
    del runs[0][6], runs[1][6]  # the gradient of A is a sum over all segments
    for x, y in zip(*runs, strict=True):
        if x.shape[1] == 18:
            x, y = torch.where(other, 0.0, x), torch.where(other, 0.0, y)
        moved += not torch.equal(x, y)
    return moved


def again() -> float:
    """A second run, strided B and C as a layer splits them, and a run without gradients: results that are not the same bits."""
    small()
    x, dt, B, C = (value.float() for value in streams(10, 3, 2, 0.5))
    A, state = -torch.ones(3, 2), torch.ones(2, 3, 2)
    split = torch.cat([B, C], -1).split(2, -1)
    runs = [everything(selective_scan.fused, (x, dt, *maps), A, None, state, torch.float32) for maps in ((B, C), split)]
    bare = selective_scan.fused(x, dt, *split, A=A, state=state)
    return sum(not torch.equal(a, b) for a, b in zip(*runs, strict=True)) + sum(
        not torch.equal(a, b) for a, b in zip(bare[:2], runs[0], strict=False))


def low() -> float:
    """float16 streams (the interpreter has no bfloat16), steps in float32 as layers pass them: an error of their rounding."""
    small()
    given = streams(10, 3, 2, 0.5)
    given = [given[0].half().double(), given[1], *(x.half().double() for x in given[2:])]
    A, D, state = -torch.rand(3, 2).double(), torch.ones(3).double(), torch.ones(2, 3, 2).double()

    def form(x: Tensor, dt: Tensor, B: Tensor, C: Tensor, **options: Any) -> tuple[Tensor, Tensor, None]:
        y, new, _ = selective_scan.fused(x.half(), dt, B.half(), C.half(), **options)
        return y.float(), new, None

    return furthest(everything(form, given, A, D, state, torch.float32),
                    everything(selective_scan.chunked, given, A, D, state, torch.float64))


def compiled() -> float:
    """In one graph, without a break: the largest difference of a gradient."""
    small()

    def run(x: Tensor, dt: Tensor, B: Tensor, C: Tensor, A: Tensor, D: Tensor) -> Tensor:
        return selective_scan.fused(x, dt, B, C, A=A, D=D).y

    given = [*(x.float() for x in streams(10, 3, 2, 0.5)), -torch.rand(3, 2), torch.ones(3)]
    seen = []
    for form in (run, torch.compile(run, fullgraph=True, backend="aot_eager")):
        leaves = [x.clone().requires_grad_() for x in given]
        seen.append(torch.autograd.grad(form(*leaves).square().sum(), leaves))
    return furthest(*seen)


CHECKS = (neighbour, again, low, compiled)

if __name__ == "__main__":
    run_checks({**{name: partial(case, *given) for name, given in CASES.items()}, **{each.__name__: each for each in CHECKS}})


@pytest.fixture(scope="module")
def report() -> dict[str, float]:
    return report_of(__file__)


@pytest.mark.parametrize("name", CASES)
def test_it_agrees_with_the_chunked_form_in_float64(report, name):
    assert report[name] < 2e-6


def test_a_violent_neighbour_moves_not_one_bit(report):
    assert report["neighbour"] == 0


def test_it_is_deterministic_takes_strided_maps_and_needs_no_gradients(report):
    assert report["again"] == 0


def test_half_precision_streams_leave_their_rounding_error(report):
    assert report["low"] < 1e-3


def test_compilers_pass_through_it_without_a_break(report):
    assert report["compiled"] < 1e-6
