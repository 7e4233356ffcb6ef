"""Laws on what is computed: every form agrees with the definition, at every length, whatever came before."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from seqloom.core import Mixer
from seqloom.laws import observe
from seqloom.laws.cases import EXACT, WIDTH, Case, before, build, draw, ids_of, info, patterns
from seqloom.laws.law import Measure, Untested
from seqloom.laws.observe import compare, follow, opened, watch

LENGTHS = (1, 2, 63, 64, 65, 130)


def one_form(case: Case) -> str | None:
    return f"its only form is {case.definition}" if len(case.spec.forms) == 1 else None


def forms_agree(case: Case, device: str) -> Iterator[Measure]:
    """All forms agree with the definition: outputs, final state and gradients."""
    forms = case.forms(device)
    if len(forms) == 1:
        raise Untested(f"of its forms only {forms[0]} runs on {device}")
    layer, ids = build(case, device=device), patterns(70, device)
    x = draw(5, 70, WIDTH, name="forms", device=device)
    settings: list[tuple[str, Tensor | None, Any]] = [("plain", None, None), ("segments", ids, None)]
    if case.spec.streams:
        with observe.form(case.definition), torch.no_grad():
            settings.append(("state and segments", ids, history(layer, device)))
    for setting, given, state in settings:
        seen = {}
        for name in forms:
            with observe.form(name):
                seen[name] = watch_whole(layer, x, given, state)
        for name in forms[1:]:
            yield compare(f"{name}, {setting}", seen[name], seen[forms[0]], case.limit(name))


def history(layer: Mixer, device: str) -> Any:
    """The state of five rows after five tokens, standing differently in their segments."""
    ids = before(device)
    return layer(draw(*ids.shape, WIDTH, name="history", device=device), info=info(ids)).state


def watch_whole(layer: Mixer, x: Tensor, ids: Tensor | None, state: Any = None) -> dict[str, Tensor | None]:
    """Outputs, what follows and gradients (inputs, parameters, incoming state) of one call."""
    cells, close = ([], lambda: None) if state is None else opened(state)

    def play(x: Tensor, *cells: Tensor) -> dict[str, Tensor]:
        y, new, aux = layer(x, state=close(*cells), info=info(ids))
        return {"y": y, **follow(layer, new), **{f"aux {name}": value for name, value in aux.items()}}

    return watch(layer, play, x, *cells)


def any_length(case: Case, device: str) -> Iterator[Measure]:
    """T = 1, 2, 63, 64, 65 and 130 work in every form, and a prefix does not depend on what follows it."""
    layer, longest = build(case, device=device), max(LENGTHS)
    x, ids = draw(5, longest, WIDTH, name="length", device=device), patterns(longest, device)
    for setting, given in (("plain", None), ("segments", ids)):
        with torch.no_grad(), observe.form(case.definition):
            whole = layer(x, info=info(given)).y
        for tokens in LENGTHS:
            short, part = x[:, :tokens], None if given is None else given[:, :tokens]
            want = whole[:, :tokens]
            if not case.spec.causal:
                with torch.no_grad(), observe.form(case.definition):
                    want = layer(short, info=info(part)).y
            for name in case.forms(device):
                with torch.no_grad(), observe.form(name):
                    got = {"y": layer(short, info=info(part)).y}
                    yield compare(f"{name}, {setting}, T={tokens}", got, {"y": want}, case.limit(name))
    for tokens in (1, 2):
        seen = []
        for name in case.forms(device):
            with observe.form(name):
                seen.append(watch_whole(layer, x[:, :tokens], ids[:, :tokens]))
            yield compare(f"{name}, gradients, T={tokens}", seen[-1], seen[0], case.limit(name))


def long(case: Case, device: str) -> Iterator[Measure]:
    """All forms agree with the definition over 1,100 tokens: many chunks, groups of chunks and blocks of keys."""
    forms = case.forms(device)
    if len(forms) == 1:
        raise Untested(f"of its forms only {forms[0]} runs on {device}")
    layer, tokens = build(case, device=device), 1100
    x = draw(1, tokens, WIDTH, name="long", device=device)
    # one sample of 700 tokens, pads, and short ones
    ids = torch.tensor([ids_of(tokens, (1, 700), (0, 731), *((2 + i % 2, 731 + 40 * i) for i in range(1, 10)))], device=device)
    seen = {}
    for name in forms:
        with observe.form(name):
            seen[name] = watch_whole(layer, x, ids)
    for name in forms[1:]:
        yield compare(name, seen[name], seen[forms[0]], case.limit(name))


STEP = 1e-5  # of the central differences: their error is about its square


def gradient(case: Case, device: str) -> Iterator[Measure]:
    """Gradients are derivatives: for inputs, state and every parameter, in every form, equal to central differences.

    All forms may share a projection or a norm whose backward is written by hand; comparing forms would not see it.
    """
    layer, ids = build(case, device=device), patterns(20, device)
    x, cells, close = draw(5, 20, WIDTH, name="gradient", device=device), [], lambda: None
    if case.spec.streams:
        with torch.no_grad():
            cells, close = opened(history(layer, device))
    parameters = dict(layer.named_parameters())
    names = ["input", *(f"state {i}" for i in range(len(cells))), *parameters]
    leaves = [x.clone(), *(cell.clone() for cell in cells), *parameters.values()]
    for name in case.forms(device):
        if case.limit(name) > EXACT:  # differences of STEP drown in its rounding; `forms_agree` compares its gradients
            continue
        for leaf in leaves:
            leaf.requires_grad_()

        def loss(name: str = name) -> Tensor:
            with observe.form(name):
                y, state, _ = layer(leaves[0], state=close(*leaves[1 : 1 + len(cells)]), info=info(ids))
                out = {"y": y, **follow(layer, state)}
            weights = {key: draw(*value.shape, name=("difference", key), device=device) for key, value in out.items()}
            return sum((value * weights[key]).sum() for key, value in out.items())

        gradients = torch.autograd.grad(loss(), leaves, allow_unused=True)
        with torch.no_grad():
            for path, leaf, found in zip(names, leaves, gradients, strict=True):
                way = draw(*leaf.shape, name=("way", path), device=device, dtype=leaf.dtype)
                way = way / way.norm()
                slopes = []
                for sign in (1, -1):
                    leaf.add_(sign * STEP * way)
                    slopes.append(loss())
                    leaf.sub_(sign * STEP * way)
                want = (slopes[0] - slopes[1]) / (2 * STEP)
                got = torch.zeros_like(want) if found is None else (found * way).sum()
                scale = 1.0 if found is None else float(found.norm())
                yield Measure(f"{name}, {path}", float((got - want).abs()) / max(scale, 1e-3), 1e-6)
