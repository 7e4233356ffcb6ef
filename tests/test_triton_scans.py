"""The fused diagonal and decay scans, by Triton's interpreter on the CPU: against the chunked forms in float64.

As in test_triton_delta.py the checks run once, in a process of their own, which prints what it found.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from interpreted import pattern, report_of, run_checks
from torch import Tensor

from seqloom.core.segments import Segments, Track, resolve
from seqloom.kernels import decay_scan, diagonal_scan

EDGES = (3, 30, 63, 64, 65, 128)  # at and beside those of chunks, tiles or programs

# gate (0 none, 1 per head, 2 per key channel, 3 per value channel), tokens, groups, heads, key, value, segments with NaN at
# pads, diagonal, and the largest log decay
DECAY = {
    "none": (0, 130, 1, 2, 20, 24, False, True, 0.0),
    "none_packed": (0, 130, 2, 2, 16, 40, True, True, 0.0),
    "head": (1, 70, 1, 2, 16, 16, False, True, 0.3),
    "head_packed": (1, 130, 2, 2, 20, 16, True, False, 0.3),
    "head_violent": (1, 70, 1, 1, 16, 16, True, True, 20.0),
    "channel": (2, 130, 2, 2, 16, 16, False, True, 0.3),
    "channel_packed": (2, 130, 1, 1, 16, 16, True, True, 0.3),
    "channel_violent": (2, 70, 1, 1, 16, 16, True, False, 20.0),
    "one_token": (2, 1, 1, 1, 16, 16, False, True, 0.3),
    "head_wide": (1, 40, 1, 2, 150, 16, True, True, 0.3),
    "channel_wide": (2, 40, 1, 2, 150, 16, True, True, 0.3),
    "value": (3, 100, 2, 2, 16, 40, False, True, 0.3),
    "value_packed": (3, 130, 1, 2, 20, 24, True, False, 0.3),
    "value_violent": (3, 40, 1, 1, 16, 16, True, True, 20.0),
    "value_wide": (3, 40, 1, 2, 16, 150, True, True, 0.3),
    "value_one_token": (3, 1, 1, 1, 16, 16, True, True, 0.3),
}
# T in parts that are walked side by side
PARTS = {"none": (0, 150, 1, 1, 16, 16, True, True, 0.0), "head": (1, 150, 1, 1, 16, 16, True, True, 0.3),
         "channel": (2, 150, 1, 1, 16, 16, False, True, 0.1), "value": (3, 150, 1, 1, 16, 16, True, True, 0.1)}
# tokens, channels, segments, parts of T at most
DIAGONAL = {"plain": (130, 70, False, 1), "parts": (200, 20, False, 3), "packed": (200, 20, True, 3), "one": (1, 5, True, 1)}


def everything(form: Callable, streams: list, state: Tensor, segments: Segments | None, dtype: torch.dtype,
               **options: bool) -> list[Tensor]:
    """y, the final state and all gradients, under fixed random cotangents."""
    given = [None if x is None else x.to(dtype).clone().requires_grad_() for x in streams]
    start = state.to(dtype).clone().requires_grad_()
    y, new, _ = form(*given, state=start, segments=segments, **options)
    draw = torch.Generator().manual_seed(1)
    total = sum((x * torch.randn(x.shape, generator=draw).to(x.dtype)).sum() for x in (y, new))
    return [y, new, *torch.autograd.grad(total, [x for x in (*given, start) if x is not None])]


def furthest(kernel: object, streams: list, state: Tensor, segments: Segments | None, **options: bool) -> float:
    """The largest relative error of the fused form in float32; one that is not a number counts as 1e9."""
    streams = [None if x is None else x.float().double() for x in streams]
    if segments is not None:
        streams = [None if x is None else segments.hold(x, float("nan")) for x in streams]
    found, want = (everything(form, streams, state, segments, dtype, **options)
                   for form, dtype in ((kernel.fused, torch.float32), (kernel.chunked, torch.float64)))
    errors = ((x.double() - y).norm() / y.norm().clamp(min=1e-3) for x, y in zip(found, want, strict=True))
    return max(torch.nan_to_num(error, nan=1e9).item() for error in errors)


def decay(gate: int, tokens: int, groups: int, heads: int, key: int, value: int, packed: bool, diagonal: bool,
          most: float, parts: bool = False) -> float:
    from seqloom.kernels.triton import decay_scan as launched

    launched.LEAST, launched.FILL = (1, 64) if parts else (8, 128)
    axis, channels = ("value", value) if gate == 3 else ("key", key)
    q, k = (torch.randn(2, tokens, groups, key) * key**-0.5 for _ in range(2))
    log_a = None if gate == 0 else -most * torch.rand(2, tokens, heads, *[channels] * (gate >= 2))
    if log_a is not None:
        log_a[:, ::3] *= 0.01
    streams = [q, k, torch.randn(2, tokens, heads, value), log_a]
    return furthest(decay_scan, streams, torch.randn(2, heads, key, value), pattern(tokens, *EDGES) if packed else None,
                    diagonal=diagonal, axis=axis)


def never() -> float:
    """Decays of exactly 0 among weak ones, a logarithm of -inf: they leave no rounding error, nor what is not a number."""
    worst = 0.0
    for axis, channels in (("key", ()), ("key", (16,)), ("value", (16,))):
        log_a = torch.where(torch.rand(1, 40, 1, *channels) < 0.1, -torch.inf, -1e-3)
        streams = [*(torch.randn(1, 40, 1, 16) for _ in range(3)), log_a]
        worst = max(worst, furthest(decay_scan, streams, torch.randn(1, 1, 16, 16), None, axis=axis))
    return worst


def half() -> float:
    """float16, in which exp of a chunk's decay would overflow."""
    log_a = -1.5 * torch.rand(2, 70, 1, 16)
    streams = [x.half() for x in (*(torch.randn(2, 70, 1, 16) / 4 for _ in range(3)), log_a)]
    state = torch.randn(2, 1, 16, 16)
    found = [decay_scan.fused(*streams, state=state, axis=axis).y for axis in ("key", "value")]
    want = [decay_scan.chunked(*(x.double() for x in streams), state=state.double(), axis=axis).y for axis in ("key", "value")]
    return max(float((x.double() - y).norm() / y.norm()) for x, y in zip(found, want, strict=True))


def diagonal(tokens: int, channels: int, packed: bool, parts: int) -> float:
    from seqloom.kernels.triton import diagonal_scan as launched

    launched.LEAST, launched.FILL = tokens // parts, 2 * parts * -(-channels // 64)
    streams = [torch.rand(2, tokens, channels), torch.randn(2, tokens, channels)]
    return furthest(diagonal_scan, streams, torch.randn(2, channels), pattern(tokens, *EDGES) if packed else None)


def turning() -> float:
    """Complex decays."""
    make = lambda *shape: torch.complex(*torch.randn(2, *shape, dtype=torch.float64))  # noqa: E731
    a, b, state, segments = make(2, 130, 6), make(2, 130, 6), make(2, 6), pattern(130)
    a = 0.9 * a / a.abs()
    found, want = (form(*(x.to(dtype) for x in (a, b)), state=state.to(dtype), segments=segments)
                   for form, dtype in ((diagonal_scan.fused, torch.complex64), (diagonal_scan.chunked, torch.complex128)))
    return max(float((x - y).abs().max() / y.abs().max()) for x, y in zip(found[:2], want[:2], strict=True))


def neighbour() -> float:
    """Another segment a million times larger: how far the results of its neighbours move, relative to the largest.

    Not by one bit where a head has one decay; with one per channel its chunk is computed pair by pair, and rounds otherwise.
    """
    ids = torch.ones(1, 90, dtype=torch.int64)
    ids[:, 30:65], ids[:, 65:] = 2, 3
    segments, other = resolve(ids, Track.start(1))[0], (ids == 2)[..., None, None]
    worst = 0.0
    for gate, allowed in ((1, 0.0), (2, 1e-5)):
        streams = [torch.randn(1, 90, 1, 16) for _ in range(3)] + [-torch.rand(1, 90, 1, *[16] * (gate == 2))]
        loud = [torch.where(other.reshape(1, 90, *(1,) * (x.ndim - 2)), 1e6 * x, x) for x in streams]
        runs = [decay_scan.fused(*given, state=torch.ones(1, 1, 16, 16), segments=segments) for given in (streams, loud)]
        for x, y in ([torch.where(other, 0.0, run.y) for run in runs], [run.state for run in runs]):
            moved = float((x - y).abs().max() / x.abs().max())
            worst = max(worst, moved if moved <= allowed else 1.0)
    return worst


def compiled() -> float:
    """Both kernels in one graph, without a break: the largest difference of a gradient."""

    def run(q: Tensor, k: Tensor, v: Tensor, log_a: Tensor) -> Tensor:
        y = decay_scan.fused(q, k, v, log_a).y + decay_scan.fused(q, k, v, log_a, axis="value").y
        return y + diagonal_scan.fused(log_a.exp(), v).y

    given = [*(torch.randn(1, 20, 1, 16) for _ in range(3)), -torch.rand(1, 20, 1, 16)]
    seen = []
    for form in (run, torch.compile(run, fullgraph=True, backend="aot_eager")):
        leaves = [x.clone().requires_grad_() for x in given]
        seen.append(torch.autograd.grad(form(*leaves).square().sum(), leaves))
    return max(float((x - y).abs().max()) for x, y in zip(*seen, strict=True))


CHECKS = (turning, neighbour, compiled, never, half)

if __name__ == "__main__":
    run_checks({
        **{f"decay {name}": partial(decay, *given) for name, given in DECAY.items()},
        **{f"parts {name}": partial(decay, *given, parts=True) for name, given in PARTS.items()},
        **{f"diagonal {name}": partial(diagonal, *given) for name, given in DIAGONAL.items()},
        **{check.__name__: check for check in CHECKS},
    })


@pytest.fixture(scope="module")
def report() -> dict[str, float]:
    return report_of(__file__)


@pytest.mark.parametrize("name", [*(f"decay {name}" for name in DECAY), *(f"parts {name}" for name in PARTS),
                                  *(f"diagonal {name}" for name in DIAGONAL)])
def test_it_agrees_with_the_chunked_form_in_float64(report, name):
    assert report[name] < 1e-5


def test_complex_decays_are_turned_away(report):
    assert report["turning"] < 1e-5


def test_a_violent_neighbour_leaves_no_rounding_error(report):
    assert report["neighbour"] < 1e-5


def test_decays_of_exactly_zero_are_exact(report):
    assert report["never"] < 1e-5


def test_strong_decays_fit_float16(report):
    assert report["half"] < 1e-3


def test_compilers_pass_through_them_without_a_break(report):
    assert report["compiled"] < 1e-5
