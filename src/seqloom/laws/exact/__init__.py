"""Exactness checks that recipes quote: each returns the largest deviation, to be compared with a limit.

The laws run over the whole table; here are the same facts for one spec, and beside this file, one file per subject, those
of particular papers.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from seqloom.core import BuildContext, Mixer, Spec, runnable, use_form
from seqloom.core.state import leaves


def layer_of(spec: Spec, dim: int) -> Mixer:
    torch.manual_seed(0)
    layer = spec.build(BuildContext(dim=dim)).double()
    with torch.no_grad():  # no parameter at a value that hides it
        for parameter in layer.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return layer


def worst_of(pairs: Iterator[tuple[Tensor, Tensor]]) -> float:
    return max(float((got - want).abs().max()) for got, want in pairs if got.numel())


def forms_agree(spec: Spec, *, dim: int = 48, lengths: tuple[int, ...] = (1, 3, 70, 130)) -> float:
    """Largest difference of outputs, final state and input gradients between any form and the definition, float64."""
    layer, worst = layer_of(spec, dim), 0.0
    for tokens in lengths:
        x = torch.randn(2, tokens, dim, dtype=torch.float64)
        results = {}
        for form in runnable(layer.spec.forms, "cpu"):
            given = x.clone().requires_grad_()
            with use_form(form):
                y, state, _ = layer(given)
            (y * torch.linspace(0.5, 1.5, tokens, dtype=torch.float64)[:, None]).sum().backward()
            results[form] = [y.detach(), given.grad, *(leaf.detach() for leaf in leaves(state))]
        want, *others = results.values()
        worst = max(worst, *(worst_of(zip(got, want, strict=True)) for got in others))
    return worst


def resumes(spec: Spec, *, dim: int = 48, tokens: int = 70) -> float:
    """Largest difference between one pass and two passes with the state handed over, at several cuts and token by token."""
    layer = layer_of(spec, dim)
    x = torch.randn(2, tokens, dim, dtype=torch.float64)
    with torch.no_grad():
        whole = layer(x)
        worst = 0.0
        for cuts in ([1], [2], [tokens // 2], [tokens - 1], list(range(1, tokens))):
            state, parts = None, []
            for start, stop in zip([0, *cuts], [*cuts, tokens], strict=True):
                part = layer(x[:, start:stop], state=state)
                parts.append(part.y)
                state = part.state
            pairs = [(torch.cat(parts, 1), whole.y), *zip(leaves(state), leaves(whole.state), strict=True)]
            worst = max(worst, worst_of(iter(pairs)))
    return worst


def looks_ahead(spec: Spec, *, dim: int = 48, tokens: int = 70, place: int = 40) -> float:
    """Largest change of outputs before `place` when the token there is changed, over all forms: 0 for a causal mixer."""
    layer, worst = layer_of(spec, dim), 0.0
    x = torch.randn(2, tokens, dim, dtype=torch.float64)
    other = x.clone()
    other[:, place:] = torch.randn_like(other[:, place:])
    for form in runnable(layer.spec.forms, "cpu"):
        with use_form(form), torch.no_grad():
            a, b = layer(x).y, layer(other).y
        worst = max(worst, float((a[:, :place] - b[:, :place]).abs().max()))
    return worst
