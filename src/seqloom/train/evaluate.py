"""Bits per byte on held-out documents, and what each mixer kind earns."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from seqloom.core import BadInput, Info
from seqloom.data import Corpus
from seqloom.models.sequence import SequenceModelLayer
from seqloom.objectives import NextToken


class Score(NamedTuple):
    """loss: nats per token. bits_per_byte: over all bytes of the documents, their ends included. tokens: targets scored."""

    loss: float
    bits_per_byte: float
    tokens: int


@torch.no_grad()
def evaluate(model: SequenceModelLayer, corpus: Corpus, *, context: int = 512, rows: int = 8, carry: bool | None = None,
             overlap: int = 0, objective: Callable[..., Any] | None = None) -> Score:
    """Every token of the held-out documents, and where each ends, once; exact, whatever the batching.

    With `carry` the state goes from window to window, so that a token sees all of its document that the mixers keep. Without
    it each window of `context` tokens begins anew, after `overlap` tokens of the one before that are read again. None: carry
    where the state is constant and no overlap is asked for. bits per byte = nats / ln 2 / UTF-8 bytes of what was scored.
    Raises: BadInput if nothing is held out, the model sees the future, or it cannot carry a state.
    """
    if len(corpus.held) < 2:
        raise BadInput("nothing is held out: there is one document, or --held-out is 0")
    stack = model.spec.stack
    if not stack.causal:
        raise BadInput("bits per byte need a causal model; this one sees the future")
    if carry is None:
        carry = not overlap and all(block.mixer.constant_state for block in stack.blocks)
    if carry and not all(block.mixer.streams for block in stack.blocks):
        raise BadInput("carry needs mixers that stream")
    device = next(model.parameters()).device
    score = NextToken(model) if objective is None else objective
    nats, count, state = 0.0, 0, None
    strips = corpus.held_strips(rows=rows, context=context)
    with evaluating(model):
        for batch in strips if carry else corpus.held_windows(rows=rows, context=context, overlap=overlap):
            ids, targets, segments = (None if part is None else part.to(device) for part in batch)
            loss = score(ids, targets, segments, state=state)
            nats += float(loss.nats)
            count += int(loss.count)
            state = loss.state if carry else None
    return Score(nats / max(count, 1), nats / math.log(2) / max(corpus.held.size, 1), count)


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside the block, and each part's own mode after it."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


@contextlib.contextmanager
def without(model: SequenceModelLayer, kind: str) -> Iterator[None]:
    """The model with every mixer called `kind` giving 0, not trained again: what it earns is what is lost.

    Raises: BadInput if the model has no such mixer.
    """
    def silence(layer: nn.Module, args: Any, output: Any) -> Any:
        return output._replace(y=torch.zeros_like(output.y))

    mixers = [block.mixer for block in model.stack.blocks]
    chosen = [mixer for mixer in mixers if mixer.spec.name() == kind]
    if not chosen:
        known = ", ".join(dict.fromkeys(mixer.spec.name() for mixer in mixers))
        raise BadInput(f"the model has no mixer {kind!r}; it has {known}")
    handles = [mixer.register_forward_hook(silence) for mixer in chosen]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def first_bad_layer(model: SequenceModelLayer, ids: Tensor, segments: Tensor | None) -> str | None:
    """The first part of the model whose output is not finite on this batch; None if all are finite."""
    found: list[str] = []

    def look(name: str) -> Any:
        def hook(layer: nn.Module, args: Any, output: Any) -> None:
            y = output[0] if isinstance(output, tuple) else output
            if not found and not torch.isfinite(y).all():
                found.append(name)

        return hook

    parts: list[tuple[str, nn.Module]] = [("the stem", model.stem)]
    for i, block in enumerate(model.stack.blocks):
        parts += [(f"layer {i} ({block.mixer.spec.name()})", block.mixer), (f"layer {i} (channel mixer)", block)]
    parts.append(("the last norm", model.stack.norm))
    handles = [part.register_forward_hook(look(name)) for name, part in parts]
    try:
        with torch.no_grad():
            model.encode(ids, info=Info(segments=segments))
    finally:
        for handle in handles:
            handle.remove()
    return found[0] if found else None


def last_bad_gradient(model: SequenceModelLayer) -> str | None:
    """The parameter nearest to the output whose gradient is not finite: where the backward pass broke first."""
    names = [name for name, p in model.named_parameters() if p.grad is not None and not torch.isfinite(p.grad).all()]
    inside = [name for name in names if name.startswith("stack.")]
    return (inside or names or [None])[-1]
