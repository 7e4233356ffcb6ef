"""The fused short convolution and norms, by Triton's interpreter on the CPU: against their definitions in float64.

As in test_triton_scans.py the checks run once, in a process of their own, which prints what it found.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from interpreted import pattern, report_of, run_checks
from torch import Tensor

from seqloom.core import form_report, use_form
from seqloom.core.segments import Track, resolve
from seqloom.kernels import row_norm, short_conv
from seqloom.parts import GatedRMSNorm, RMSNorm, ShortConv, l2_normalise

EDGES = (3, 15, 16, 17, 30)  # at and beside those of chunks, tiles or programs

# width, tokens, channels, segments with NaN at pads, SiLU, bias and carried tail, x a slice of wider rows
CONV = {
    "plain": (4, 45, 33, False, True, True, False),
    "packed": (4, 45, 20, True, True, True, True),
    "wide": (8, 21, 20, True, False, True, False),
    "narrow": (2, 20, 20, True, True, False, False),
    "shorter_than_its_tail": (8, 3, 20, False, True, True, False),
    "one_token": (4, 1, 20, True, True, True, False),
    "one_tap": (1, 9, 20, True, False, False, False),
}
# channels, gate (0 none, 1 after, 2 first), L2, heads a slice of wider rows
NORM = {
    "rms": (20, 0, False, False), "gated": (128, 1, False, True), "gate_first": (20, 2, False, False),
    "l2": (40, 0, True, True), "l2_wide": (2100, 0, True, False), "gated_wide": (2100, 1, False, False),
}


def furthest(run: Callable, streams: list, forms: dict[str, Callable]) -> float:
    """The largest relative error of an output or gradient of the fused form in float32; not a number counts as 1e9."""
    seen = []
    for form, dtype in ((forms["fused"], torch.float32), (next(iter(forms.values())), torch.float64)):
        given = [None if x is None else x.to(dtype).requires_grad_() for x in streams]
        outputs = run(form, *given)
        draw = torch.Generator().manual_seed(1)
        total = sum((y * torch.randn(y.shape, generator=draw).to(y.dtype)).sum() for y in outputs)
        seen.append([*outputs, *torch.autograd.grad(total, [x for x in given if x is not None])])
    errors = [(x.detach().double() - y.detach()).norm() / y.detach().norm().clamp(min=1e-3) for x, y in zip(*seen, strict=True)]
    return max(torch.nan_to_num(error, nan=1e9).item() for error in errors)


def conv(width: int, tokens: int, channels: int, packed: bool, silu: bool, full: bool, wide: bool) -> float:
    segments = pattern(tokens, *EDGES) if packed else None
    x = torch.randn(2, tokens, channels + 5 * wide)
    x = x if segments is None else segments.hold(x, float("nan"))
    bias, state = (torch.randn(channels), torch.randn(2, width - 1, channels)) if full else (None, None)

    def run(form: Callable, x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor | None) -> list[Tensor]:
        y, state, _ = form(x[..., 3:-2] if wide else x, weight=weight, bias=bias, state=state, segments=segments,
                           activation="silu" if silu else None)
        return [y, state]

    return furthest(run, [x, torch.randn(channels, width), bias, state], short_conv.FORMS)


def norm(channels: int, gate: int, l2: bool, wide: bool) -> float:
    cut = lambda x: x[..., 2:-1].unflatten(-1, (3, -1)) if wide else x.unflatten(-1, (3, -1))  # noqa: E731
    rows = lambda: torch.randn(2, 5, 3 * channels + 3 * wide)  # noqa: E731
    if l2:
        return furthest(lambda form, x: [form(cut(x), eps=1e-6)], [rows()], row_norm.L2_FORMS)
    streams = [rows(), torch.randn(channels), rows() if gate else None]
    return furthest(lambda form, x, weight, gates: [
        form(cut(x), weight, None if gates is None else cut(gates), eps=1e-6, gate_first=gate == 2)
    ], streams, row_norm.RMS_FORMS)


def neighbour() -> float:
    """Another segment a million times larger: how far its neighbours' outputs move."""
    ids = torch.ones(1, 40, dtype=torch.int64)
    ids[:, 10:21], ids[:, 21:] = 2, 3
    segments, other = resolve(ids, Track.start(1))[0], (ids == 2)[..., None]
    x, weight = torch.randn(1, 40, 20), torch.randn(20, 4)
    one, two = (short_conv.fused(x, weight=weight, segments=segments) for x in (x, torch.where(other, 1e6 * x, x)))
    return max(float(torch.where(other, 0.0, one.y - two.y).abs().max()), float((one.state - two.state).abs().max()))


def layers() -> tuple[Callable, list[Tensor]]:
    conv, plain, gated = ShortConv(16, bias=True), RMSNorm(16), GatedRMSNorm(8)

    def run(x: Tensor, gate: Tensor) -> Tensor:
        y, tail, _ = conv(plain(x))
        heads = l2_normalise(y.unflatten(-1, (2, -1)))
        return gated(heads, gate.unflatten(-1, (2, -1))).flatten(-2) + tail.sum()

    return run, [torch.randn(2, 9, 16), torch.randn(2, 9, 16)]


def compiled() -> float:
    """All parts in one graph, without a break: the largest difference of a gradient."""
    run, given = layers()
    seen = []
    for form in (run, torch.compile(run, fullgraph=True, backend="aot_eager")):
        leaves = [x.clone().requires_grad_() for x in given]
        seen.append(torch.autograd.grad(form(*leaves).square().sum(), leaves))
    return max(float((x - y).abs().max()) for x, y in zip(*seen, strict=True))


def chosen() -> list[list[str]]:
    """The fused forms that run when a form is asked for, and when nothing is."""
    run, given = layers()
    found = []
    for ask in ({"form": "chunked"}, {"short_conv": "fused"}, {"rms_norm": "plain"}, {}):
        torch.manual_seed(0)
        form_report.__globals__["_seen"].clear()
        with use_form(ask.pop("form", None), **ask):
            run(*given)
        found.append(sorted(name for name, forms in form_report().items() if "fused" in forms))
    form_report.__globals__["_seen"].clear()
    l2_normalise(given[0].double())  # float64 takes no form that is narrower
    return [*found, sorted(form_report())]


if __name__ == "__main__":
    run_checks({
        **{f"conv {name}": partial(conv, *given) for name, given in CONV.items()},
        **{f"norm {name}": partial(norm, *given) for name, given in NORM.items()},
        **{check.__name__: check for check in (neighbour, compiled, chosen)},
    })


@pytest.fixture(scope="module")
def report() -> dict:
    return report_of(__file__)


@pytest.mark.parametrize("name", [*(f"conv {name}" for name in CONV), *(f"norm {name}" for name in NORM)])
def test_it_agrees_with_its_definition_in_float64(report, name):
    assert report[name] < 1e-6


def test_a_violent_neighbour_moves_nothing(report):
    assert report["neighbour"] == 0


def test_compilers_pass_through_them_without_a_break(report):
    assert report["compiled"] < 1e-5


def test_parts_follow_what_is_asked_of_mixers_and_of_themselves(report):
    everything = ["l2_norm", "rms_norm", "short_conv"]
    assert report["chosen"] == [[], everything, ["l2_norm", "short_conv"], everything, []]
