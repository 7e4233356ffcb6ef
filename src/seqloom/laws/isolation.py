"""Laws on what may not reach what: the future the past, a pad anything, a sample its neighbour, a row another row."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from seqloom.core import Mixer, Segments
from seqloom.laws import observe
from seqloom.laws.cases import WIDTH, Case, build, draw, ids_of, info, patterns
from seqloom.laws.law import Measure, Untested
from seqloom.laws.observe import compare, follow, gap, gather, intercepted, places, spread, watch

TOKENS = 70


def future(case: Case, device: str) -> Iterator[Measure]:
    """The future never moves the past: other tokens and ids after t leave outputs up to t, and no gradient flows back."""
    layer, ids = build(case, device=device), patterns(TOKENS, device)
    x = draw(5, TOKENS, WIDTH, name="past", device=device)
    other, shifted = draw(5, TOKENS, WIDTH, name="future", device=device), patterns(TOKENS + 9, device)[:, 9:]
    for t in (1, 33, 64):
        late = torch.arange(TOKENS, device=device) >= t
        changed, changed_ids = torch.where(late[:, None], other, x), torch.where(late, shifted, ids)
        for name in case.forms(device):
            with observe.form(name):
                leaf = x.clone().requires_grad_()
                for setting, given, changed_given in (("plain", None, None), ("segments", ids, changed_ids)):
                    y = layer(leaf, info=info(given)).y
                    with torch.no_grad():
                        moved = layer(changed, info=info(changed_given)).y
                    yield Measure(f"{name}, {setting}, t={t}", gap(moved[:, :t], y[:, :t]), case.limit(name))
                    (back,) = torch.autograd.grad((y[:, :t] * other[:, :t]).sum(), leaf)
                    scale = back[:, :t].abs().max().clamp(min=observe.FLOOR)
                    share = float(back[:, t:].abs().max() / scale)
                    yield Measure(f"{name}, {setting}, gradient, t={t}", share, case.limit(name))


# Ways to put 66 tokens among 8 pads; every row has its own.
PADS = (
    [(8, 66), (0, 0)],
    [(0, 66), (8, 0)],
    [(0, 30), (8, 36)],
    [(2, 10), (3, 51), (2, 5), (1, 0)],
    [(1, 8)] * 7 + [(1, 10)],
)


def padding(case: Case, device: str) -> Iterator[Measure]:
    """Padding left, right or inside changes nothing: outputs, final state and gradients; pads themselves give 0."""
    yield from _padded(case, device, fill=0.0)


def poison(case: Case, device: str) -> Iterator[Measure]:
    """NaN at pads, in the input and in every stream of the kernel, moves neither values nor any gradient."""
    yield from _padded(case, device, fill=float("nan"))


def _padded(case: Case, device: str, fill: float) -> Iterator[Measure]:
    layer, x = build(case, device=device), draw(5, 66, WIDTH, name="padding", device=device)
    index, length = places(*PADS)
    one = torch.ones(5, 66, dtype=torch.int64, device=device)
    two = torch.tensor([ids_of(66, (1, 20), (2, 40), (3, 99))] * 5, device=device)

    def bare(ids: Tensor | None, x: Tensor) -> dict[str, Tensor]:
        y, state, _ = layer(x, info=info(ids))
        return {"y": y, **follow(layer, state)}

    def padded(ids: Tensor, x: Tensor) -> dict[str, Tensor]:
        given = spread(ids, index, length)
        with intercepted(layer, _poisoned if fill != 0 else _as_they_are):
            y, state, _ = layer(spread(x, index, length, fill), info=info(given))
        at_pads = torch.where(given[..., None] == 0, y, 0.0)
        return {"y": gather(y, index), "y at pads": at_pads, **follow(layer, state)}

    for name in case.forms(device):
        with observe.form(name):
            for setting, given, ids in (("one sample", None, one), ("three samples", two, two)):
                want = watch(layer, lambda x, ids=given: bare(ids, x), x)
                got = watch(layer, lambda x, ids=ids: padded(ids, x), x)
                want["y at pads"] = torch.zeros(5, length, WIDTH, dtype=x.dtype, device=device)
                yield compare(f"{name}, {setting}", got, want, case.limit(name))


def _as_they_are(original: Any, *streams: Tensor, **options: Any) -> Any:
    return original(*streams, **options)


def _poisoned(original: Any, *streams: Tensor, **options: Any) -> Any:
    """Call the kernel with NaN at every pad of every stream [B, T, ...]: it must select, not multiply by zero."""
    segments: Segments | None = options.get("segments")
    if segments is None:
        return original(*streams, **options)
    shape = segments.real.shape
    spoil = lambda value: (  # noqa: E731
        segments.hold(value, float("nan"))
        if isinstance(value, Tensor) and value.shape[:2] == shape and value.is_floating_point() else value
    )
    return original(*map(spoil, streams), **{name: spoil(value) for name, value in options.items() if name != "segments"},
                    segments=segments)


# Three rows of four samples each: (pads before it, its length, its id). Ids come again, one sample has one token, and
# boundaries fall inside, at and beside the edges of chunks of 16, 32 and 64.
ROWS = (
    ((2, 5, 1), (0, 59, 2), (0, 1, 3), (0, 7, 4)),
    ((0, 1, 7), (1, 31, 3), (0, 33, 7), (2, 7, 8)),
    ((0, 64, 2), (0, 1, 1), (1, 1, 2), (0, 6, 5)),
)


def packing(case: Case, device: str) -> Iterator[Measure]:
    """Packed equals separate: samples in one row give the outputs, gradients and last state they give alone."""
    layer, x = build(case, device=device), draw(len(ROWS), 72, WIDTH, name="packing", device=device)
    index, length = places(*[[(pads, size) for pads, size, _ in row] for row in ROWS])
    names = torch.tensor([[name for _, size, name in row for _ in range(size)] for row in ROWS], device=device)
    ids = spread(names, index, length)

    def packed(x: Tensor) -> dict[str, Tensor]:
        y, state, _ = layer(spread(x, index, length), info=info(ids))
        return {"y": gather(y, index), **follow(layer, state)}

    def separate(x: Tensor) -> dict[str, Tensor]:
        rows, last = [], []
        for row, samples in zip(x, ROWS, strict=True):
            parts = [layer(sample[None]) for sample in row.split([size for _, size, _ in samples])]
            rows.append(torch.cat([part.y for part in parts], 1))
            last.append(follow(layer, parts[-1].state))
        # the probe after a row alone must be the one after that row of the batch
        return {"y": torch.cat(rows), **{name: torch.cat([one[name] for one in last]) for name in last[0]}}

    for name in case.forms(device):
        with observe.form(name):
            yield compare(name, watch(layer, packed, x), watch(layer, separate, x), case.limit(name))


def batch_slot(case: Case, device: str) -> Iterator[Measure]:
    """The slot in the batch does not matter: rows permuted, or alone, give what they gave."""
    layer, ids = build(case, device=device), patterns(TOKENS, device)
    x, order = draw(5, TOKENS, WIDTH, name="slots", device=device), torch.tensor([4, 2, 0, 1, 3], device=device)
    for name in case.forms(device):
        with observe.form(name):
            for setting, given in (("plain", None), ("segments", ids)):
                leaf = x.clone().requires_grad_()
                y = layer(leaf, info=info(given)).y
                (gradient,) = torch.autograd.grad((y * x).sum(), leaf)
                again = layer(x[order], info=info(None if given is None else given[order]))
                with torch.no_grad():
                    yield Measure(f"{name}, {setting}, permuted", gap(again.y, y[order]), case.limit(name))
                    for row in range(5):
                        alone = layer(x[row : row + 1], info=info(None if given is None else given[row : row + 1]))
                        yield Measure(f"{name}, {setting}, row {row} alone", gap(alone.y, y[row : row + 1]), case.limit(name))
                # rows may not reach each other's gradient either
                (own,) = torch.autograd.grad((layer(leaf, info=info(given)).y[2] * x[2]).sum(), leaf)
                yield Measure(f"{name}, {setting}, gradient of one row", gap(own[2], gradient[2]), case.limit(name))
                others = torch.cat([own[:2], own[3:]])
                yield Measure(f"{name}, {setting}, gradient in other rows", float(others.abs().max()), 0.0)


# Segments in float32 ----------------------------------------------------------------------------------------------

BOUNDARIES = (5, 15, 16, 17, 32, 63, 64, 65, 80)  # inside, at and beside the edges of chunks of 16, 32 and 64
SAMPLE = 40


def float32_segments(case: Case, device: str) -> Iterator[Measure]:
    """In float32 other segments scaled by 1e6 do not move a segment, decays near 1 and boundaries at chunk edges included.

    The allowed error is measured: that of the segment alone in float32 against float64, ten times over, and 1e-5.
    Gradients are taken with the others scaled by 1e3, where float32 still holds a norm's squares.
    """
    with_noise = ((True, "perturbed"), (False, "as built"))
    if torch.device(device).type == "mps":
        raise Untested("MPS has no float64 to compare with")
    for noise, setting in with_noise:
        exact = build(case, device=device, noise=noise)
        layer = build(case, dtype=torch.float32, device=device, noise=noise)
        rows, total = len(BOUNDARIES), max(BOUNDARIES) + SAMPLE + 10
        x = draw(rows, total, WIDTH, name="float32", device=device).float()
        start = torch.tensor(BOUNDARIES, device=device)[:, None]
        at = torch.arange(total, device=device)
        inside = (at >= start) & (at < start + SAMPLE)
        ids = torch.where(at < start, 1, torch.where(inside, 2, 3))
        mine = start + torch.arange(SAMPLE, device=device)
        own = gather(x, mine)
        for name in case.forms(device):
            with observe.form(name):
                with observe.form(case.definition):
                    ideal = _values(exact, own.double())
                alone = _values(layer, own)
                allowed = {key: 10 * gap(alone[key], ideal[key]) + 1e-5 for key in ideal}
                for scale in (1e6, 1.0):
                    loud = torch.where(inside[..., None], x, x * scale)
                    got = _values(layer, loud, ids, mine)
                    yield Measure(f"{name}, {setting}, scale {scale:g}", gap(got["y"], ideal["y"]), allowed["y"])
                if case.spec.streams:
                    yield from _last_segment(layer, name, setting, x, ids, ideal, allowed)
                yield from _gradients(layer, exact, case, name, setting, x, ids, mine, inside)


def _values(layer: Mixer, x: Tensor, ids: Tensor | None = None, index: Tensor | None = None) -> dict[str, Tensor]:
    with torch.no_grad():
        y, state, _ = layer(x, info=info(ids))
        return {"y": y if index is None else gather(y, index), **follow(layer, state)}


def _last_segment(layer: Mixer, name: str, setting: str, x: Tensor, ids: Tensor, ideal: dict,
                  allowed: dict) -> Iterator[Measure]:
    """The state left by a segment after loud ones, in the same call and in a call of its own."""
    quiet = torch.where((ids == 2)[..., None], x, x * 1e6)
    ids = torch.where(ids == 3, 0, ids)
    with torch.no_grad():
        _, state, _ = layer(quiet, info=info(ids))
        after = follow(layer, state)["after"]
        yield Measure(f"{name}, {setting}, state", gap(after, ideal["after"]), allowed["after"])
        _, state, _ = layer(quiet[:, :5], info=info(ids[:, :5]))
        _, state, _ = layer(quiet[:, 5:], state=state, info=info(ids[:, 5:]))
        after = follow(layer, state)["after"]
        yield Measure(f"{name}, {setting}, state across calls", gap(after, ideal["after"]), allowed["after"])


def _gradients(layer: Mixer, exact: Mixer, case: Case, name: str, setting: str, x: Tensor, ids: Tensor, mine: Tensor,
               inside: Tensor) -> Iterator[Measure]:
    own = gather(x, mine)
    with observe.form(case.definition):
        ideal = watch(exact, lambda x: {"y": exact(x).y}, own.double())
    alone = watch(layer, lambda x: {"y": layer(x).y}, own)
    loud = torch.where(inside[..., None], x, x * 1e3)
    got = watch(layer, lambda x: {"y": gather(layer(x, info=info(ids)).y, mine)}, loud)
    leak = torch.where(inside[..., None], 0.0, got["d input 0"]).abs().max()
    yield Measure(f"{name}, {setting}, gradient that reaches other segments", float(leak), 0.0)
    got["d input 0"] = gather(got["d input 0"], mine)
    for key, want in ideal.items():
        if key.startswith("d ") and want is not None:
            limit = 10 * gap(alone[key], want) + 3e-5
            yield Measure(f"{name}, {setting}, {key}", gap(got[key], want), limit)
