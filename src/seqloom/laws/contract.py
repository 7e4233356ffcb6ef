"""Laws on the layer's contract: it is alive, refuses what it does not use, and reads a source once for cross-mixing."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from seqloom.core import Info, Mixer, State, Track
from seqloom.core import state as st
from seqloom.laws import observe
from seqloom.laws.cases import WIDTH, Case, build, draw, info
from seqloom.laws.law import Measure
from seqloom.laws.observe import compare, gap, gather, opened, places, spread, watch

ALIVE = 1e-3


def liveness(case: Case, device: str) -> Iterator[Measure]:
    """The past reaches the present: dy_T/dx_1, dy/dstate and the effect of a dropped boundary exceed 1e-3 at T = 8.

    dy_T/dx_1 is relative to dy_T/dx_T, the others to y. Every parameter has a gradient. A mixer that is not causal is
    also alive towards the past: dy_1/dx_T.
    """
    layer, tokens = build(case, device=device), 8
    x = draw(4, tokens, WIDTH, name="alive", device=device)
    for name in case.forms(device):
        with observe.form(name):
            leaf = x.clone().requires_grad_()
            y = layer(leaf).y
            for end, start, what in ((-1, 0, "dy_T/dx_1"), (0, -1, "dy_1/dx_T")):
                if what == "dy_1/dx_T" and case.spec.causal:
                    continue
                (back,) = torch.autograd.grad((y[:, end] * x[:, end]).sum(), leaf, retain_graph=True)
                ratio = back[:, start].norm() / back[:, end].norm()
                yield Measure(f"{name}, {what}", float(ratio), ALIVE, at_least=True)
            halves = torch.tensor([[1] * 4 + [2] * 4] * 4, device=device)
            with torch.no_grad():
                moved = (layer(x, info=info(halves)).y - y)[:, 4:].norm() / y[:, 4:].norm()
            yield Measure(f"{name}, a dropped boundary", float(moved), ALIVE, at_least=True)
            seen = watch(layer, lambda x: {"y": layer(x).y}, x)
            for key in (f"d {path}" for path, _ in layer.named_parameters()):
                size = 0.0 if seen[key] is None else float(seen[key].abs().max())
                yield Measure(f"{name}, {key}", size, 1e-9, at_least=True)
            if case.spec.streams:
                yield from _state_is_read(layer, name, x)


def _state_is_read(layer: Mixer, name: str, x: torch.Tensor) -> Iterator[Measure]:
    """Each floating tensor of the state moves what follows, by gradient and when zeroed."""
    with torch.no_grad():
        state = layer(x).state
        rest = draw(4, 4, WIDTH, name="rest", device=str(x.device))
        y = layer(rest, state=state).y
    cells, close = opened(state)
    seen = watch(layer, lambda *cells: {"y": layer(rest, state=close(*cells)).y}, *cells)
    for i, cell in enumerate(cells):
        gradient = seen[f"d input {i}"]
        size = 0.0 if gradient is None else float(gradient.norm() * cell.norm() / y.norm())
        yield Measure(f"{name}, dy/dstate, tensor {i}", size, ALIVE, at_least=True)
    with torch.no_grad():
        fresh = gap(layer(rest, state=State(state.track, layer.init_state(4).cells)).y, y)
    yield Measure(f"{name}, the state replaced by an empty one", fresh, ALIVE, at_least=True)


def undeclared_info(case: Case, device: str) -> Iterator[Measure]:
    """A field of Info that the mixer does not declare, an unknown form, and a state it cannot take are errors."""
    layer, x = build(case, device=device), draw(2, 6, WIDTH, name="info", device=device)
    every = dict(segments=torch.ones(2, 6, dtype=torch.int64), positions=torch.arange(6).expand(2, 6),
                 weight=torch.ones(2, 6), dt=torch.ones(2, 6), ids=torch.ones(2, 6, dtype=torch.int64),
                 role=torch.ones(2, 6, dtype=torch.int64))
    fields = {name: value.to(device) if not value.is_floating_point() else value.to(x) for name, value in every.items()}
    with torch.no_grad():
        plain = layer(x).y
        for name, value in fields.items():
            if name in layer.uses:
                # these are the values that hold when nothing is given
                given = layer(x, info=Info(**{name: value})).y
                if name in ("segments", "positions", "weight", "dt"):
                    yield compare(f"info.{name} at its default", {"y": given}, {"y": plain})
            else:
                refused = _refuses(lambda name=name, value=value: layer(x, info=Info(**{name: value})), f"info.{name}")
                yield Measure(f"info.{name} accepted, or refused without naming it", 1 - refused, 0)
        with observe.form("no such form"):
            yield Measure("an unknown form accepted", 1 - _refuses(lambda: layer(x), "no such form"), 0)
        if not case.spec.streams:
            state = State(Track.start(2, device), ())
            yield Measure("a state accepted without streaming", 1 - _refuses(lambda: layer(x, state=state), "state"), 0)
            yield Measure("a state returned without streaming", float(layer(x).state is not None), 0)


def _refuses(call: object, named: str) -> int:
    """1 if the call raises a ValueError whose message names what was asked for."""
    try:
        call()
    except ValueError as error:
        return int(named in str(error))
    return 0


def mixes_across(case: Case) -> str | None:
    layer = build(case)
    if type(layer).read_in is Mixer.read_in:
        return "it has no cross-mixing"
    try:
        with torch.no_grad():
            layer.read_in(torch.zeros(1, 2, WIDTH, dtype=torch.float64))
    except NotImplementedError as reason:
        return f"it has no cross-mixing: {reason}"
    return None


def cross_mixing(case: Case, device: str) -> Iterator[Measure]:
    """A source read in once answers queries unchanged: pads of the source, other rows and the order of queries are nothing."""
    layer = build(case, device=device)
    source, x = draw(3, 20, WIDTH, name="source", device=device), draw(3, 9, WIDTH, name="queries", device=device)
    index, length = places([(5, 20)], [(0, 20), (5, 0)], [(0, 7), (5, 13)])
    real = spread(torch.ones(3, 20, dtype=torch.int64, device=device), index, length)

    def read(source: torch.Tensor, x: torch.Tensor) -> dict:
        return {"y": layer(x, state=layer.read_in(source)).y}

    def padded(source: torch.Tensor, x: torch.Tensor) -> dict:
        memory = layer.read_in(spread(source, index, length, float("nan")), info(real))
        return {"y": layer(x, state=memory).y}

    want = watch(layer, read, source, x)
    yield compare("pads in the source", watch(layer, padded, source, x), want)
    alive = want["d input 0"].norm(dim=(0, 2)).min() / want["d input 1"].norm()
    yield Measure("the least gradient of a source token", float(alive), 1e-6, at_least=True)
    with torch.no_grad():
        memory = layer.read_in(source)
        kept = st.clone(memory)
        mixed = layer(x, state=memory)
        yield Measure("memory returned anew", float(mixed.state is not memory), 0)
        changed = max(gap(a, b) for a, b in zip(st.leaves(memory), st.leaves(kept), strict=True))
        yield Measure("memory changed", changed, 0)
        order = torch.tensor([2, 0, 1], device=device)
        yield compare("rows reordered", {"y": layer(x[order], state=st.select(memory, order)).y}, {"y": mixed.y[order]})
        moved = float((layer(x, state=layer.read_in(source.flip(0))).y - mixed.y).abs().max())
        yield Measure("another source", moved, ALIVE, at_least=True)
        index, length = places([(2, 9)], [(0, 9), (2, 0)], [(0, 4), (2, 5)])
        held = spread(torch.ones(3, 9, dtype=torch.int64, device=device), index, length)
        y = layer(spread(x, index, length, float("nan")), state=memory, info=info(held)).y
        yield compare("pads among the queries", {"y": gather(y, index)}, {"y": mixed.y})


__all__ = ["cross_mixing", "liveness", "mixes_across", "undeclared_info"]
