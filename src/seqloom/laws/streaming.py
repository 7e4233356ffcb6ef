"""Laws on the state: a value that carries all of the past, and nothing but the past."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from seqloom.core import Mixer
from seqloom.core import state as st
from seqloom.laws import observe
from seqloom.laws.cases import WIDTH, Case, build, draw, info, patterns
from seqloom.laws.equal import history, watch_whole
from seqloom.laws.law import Measure
from seqloom.laws.observe import compare, follow, gap, places, spread, tensors, watch

TOKENS = 70
CUTS = ((1,), (64,), (5, 6, 40, 69))


def in_pieces(layer: Mixer, x: Tensor, ids: Tensor | None, cuts: Sequence[int], state: Any = None) -> tuple[Tensor, Any]:
    """Outputs and final state of x run piece by piece, the state passed on."""
    outputs = []
    for start, stop in zip((0, *cuts), (*cuts, x.shape[1]), strict=True):
        y, state, _ = layer(x[:, start:stop], state=state, info=info(ids).slice(start, stop))
        outputs.append(y)
    return torch.cat(outputs, 1), state


def watch_pieces(layer: Mixer, x: Tensor, ids: Tensor | None, cuts: Sequence[int], state: Any = None) -> dict[str, Any]:
    cells, close = ([], lambda: None) if state is None else observe.opened(state)

    def play(x: Tensor, *cells: Tensor) -> dict[str, Tensor]:
        y, new = in_pieces(layer, x, ids, cuts, close(*cells))
        return {"y": y, **follow(layer, new)}

    return watch(layer, play, x, *cells)


def resume(case: Case, device: str) -> Iterator[Measure]:
    """Cut anywhere and resume from the state: outputs, final state and gradients are those of the whole."""
    layer, x = build(case, device=device), draw(5, TOKENS, WIDTH, name="resume", device=device)
    for setting, ids in (("plain", None), ("segments", patterns(TOKENS, device))):
        for name in case.forms(device):
            with observe.form(name):
                whole = watch_pieces(layer, x, ids, ())
                for cuts in CUTS:
                    yield compare(f"{name}, {setting}, cut at {cuts}", watch_pieces(layer, x, ids, cuts), whole,
                                  case.limit(name))


def step_by_step(case: Case, device: str) -> Iterator[Measure]:
    """Token by token from init_state equals the whole at once: outputs, final state and gradients."""
    layer, x, ids = build(case, device=device), draw(5, TOKENS, WIDTH, name="steps", device=device), patterns(TOKENS, device)
    start = layer.init_state(5)
    for setting, given in (("plain", None), ("segments", ids)):
        with torch.no_grad():
            y, state, _ = layer(x, info=info(given))
            whole = {"y": y, **follow(layer, state)}
            y, state = in_pieces(layer, x, given, range(1, TOKENS), start)
            yield compare(f"auto, {setting}", {"y": y, **follow(layer, state)}, whole)
    short, ids = x[:, :12], ids[:, :12]
    for name in case.forms(device):
        with observe.form(name):
            whole, steps = (watch_pieces(layer, short, ids, cuts) for cuts in ((), range(1, 12)))
            yield compare(f"{name}, gradients", steps, whole, case.limit(name))


def canonical_state(case: Case, device: str) -> Iterator[Measure]:
    """One past gives one state: forms, cuts and pads that led to it leave the same tensors."""
    layer, ids = build(case, device=device), patterns(TOKENS, device)
    x = draw(5, TOKENS, WIDTH, name="canonical", device=device)
    index, length = places(*[[(2, 30), (3, 34), (1, 6), (4, 0)]] * 5)
    with torch.no_grad():
        with observe.form(case.definition):
            entering = history(layer, device)
            want = tensors(layer(x, state=entering, info=info(ids)).state)
        for name in case.forms(device):
            with observe.form(name):
                yield compare(f"{name}, whole", tensors(layer(x, state=entering, info=info(ids)).state), want, case.limit(name))
                yield compare(f"{name}, cut", tensors(in_pieces(layer, x, ids, (7, 64, 65), entering)[1]), want,
                              case.limit(name))
                padded = layer(spread(x, index, length), state=entering, info=info(spread(ids, index, length))).state
                yield compare(f"{name}, padded", tensors(padded), want, case.limit(name))


def state_bytes(case: Case, device: str) -> Iterator[Measure]:
    """`state_bytes` is what the tensors hold and keep alive after T tokens, equal at 512 and 8,192 where it is constant."""
    for dtype in (torch.float32, torch.bfloat16):
        layer = build(case, dtype=dtype, device=device)
        for tokens in (1, 70, 512):
            with torch.no_grad():
                state = layer(draw(2, tokens, WIDTH, name="bytes", dtype=dtype, device=device)).state
            said, held = layer.state_bytes(tokens, batch=2), st.count_bytes(state)
            yield Measure(f"bytes after {tokens} tokens in {dtype}: {held} held, {said} said", abs(said - held), 0)
            # a view keeps all of what it is a part of alive
            kept = {leaf.untyped_storage().data_ptr(): leaf.untyped_storage().nbytes() for leaf in st.leaves(state)}
            yield Measure(f"bytes kept alive after {tokens} tokens in {dtype}, over {held} held", sum(kept.values()) - held, 0)
        short, long = layer.state_bytes(512), layer.state_bytes(8192)
        if case.spec.constant_state:
            yield Measure(f"bytes at 8192 ({long}) less those at 512 ({short})", abs(long - short), 0)
        else:
            yield Measure(f"bytes at 8192 over those at 512 ({short}), growth", long / short, 1.01, at_least=True)


def donate(case: Case, device: str) -> Iterator[Measure]:
    """Without `donate` the input state is untouched; with it, it is written in place at fixed addresses, same values."""
    layer, ids = build(case, device=device), patterns(TOKENS, device)
    x = draw(5, TOKENS, WIDTH, name="donate", device=device)
    bounds = (0, 40, 64, 65, 66, TOKENS)
    with torch.no_grad():
        for setting, given in (("plain", None), ("segments", ids)):
            for name in (None, *case.forms(device)):
                with observe.form(name):
                    state, donated = layer.init_state(5, capacity=TOKENS), layer.init_state(5, capacity=TOKENS)
                    addresses = [leaf.data_ptr() for leaf in st.leaves(donated)]
                    for start, stop in itertools.pairwise(bounds):
                        where = f"{name or 'auto'}, {setting}, tokens {start} to {stop}"
                        part, part_info = x[:, start:stop], info(given).slice(start, stop)
                        kept = st.clone(state)
                        y, after, _ = layer(part, state=state, info=part_info)
                        yield compare(f"{where}, untouched", _bits(state), _bits(kept), 0.0)
                        mine, donated, _ = layer(part, state=donated, info=part_info, donate=True)
                        yield compare(f"{where}, donated", {"y": mine, **_bits(donated)}, {"y": y, **_bits(after)}, 1e-12)
                        moved = sum(a != leaf.data_ptr() for a, leaf in zip(addresses, st.leaves(donated), strict=True))
                        yield Measure(f"{where}, tensors that moved", moved, 0)
                        state = after
        # a fork: the state that `donate` overwrites must share no memory with the one it was made from
        state = layer(x[:, :9], state=layer.init_state(5, capacity=TOKENS)).state
        kept, fork = st.clone(state), layer(x[:, 9:10], state=state).state
        layer(x[:, 10:11], state=fork, donate=True)
        yield compare("fork", _bits(state), _bits(kept), 0.0)


def _bits(state: Any) -> dict[str, Tensor]:
    return {f"leaf {i}": leaf for i, leaf in enumerate(st.leaves(state))}


def beam(case: Case, device: str) -> Iterator[Measure]:
    """States reordered, repeated or detached go on like reordered inputs (beam search, forks)."""
    layer, ids = build(case, device=device), patterns(TOKENS, device)
    x = draw(5, TOKENS, WIDTH, name="beam", device=device)
    order = torch.tensor([3, 0, 0, 4], device=device)
    for name in case.forms(device):
        with observe.form(name), torch.no_grad():
            state = layer(x[:, :40], info=info(ids[:, :40])).state
            rest, rest_ids = x[order, 40:], ids[order, 40:]
            y, after, _ = layer(rest, state=st.select(state, order), info=info(rest_ids))
            want = layer(x[order], info=info(ids[order]))
            yield compare(f"{name}, select", {"y": y, **follow(layer, after)},
                          {"y": want.y[:, 40:], **follow(layer, want.state)}, case.limit(name))
            twice = torch.arange(5, device=device).repeat_interleave(2)
            y, after, _ = layer(x[twice, 40:], state=st.repeat(state, 2), info=info(ids[twice, 40:]))
            want = layer(x[:, 40:], state=st.detach(state), info=info(ids[:, 40:]))
            yield Measure(f"{name}, repeat", gap(y, want.y[twice]), case.limit(name))


__all__ = ["beam", "canonical_state", "donate", "in_pieces", "resume", "state_bytes", "step_by_step", "watch_pieces",
           "watch_whole"]
