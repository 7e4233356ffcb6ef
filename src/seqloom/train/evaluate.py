"""Bits per byte on held-out documents, and what each mixer kind earns."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from seqloom.core import BadInput, Info
from seqloom.data import Corpus
from seqloom.models.sequence import SequenceModelLayer
from seqloom.objectives import NextToken


class Score(NamedTuple):
    """loss: nats per token. bits_per_byte: over all bytes of the documents. tokens: targets scored."""

    loss: float
    bits_per_byte: float
    tokens: int


@torch.no_grad()
def evaluate(model: SequenceModelLayer, corpus: Corpus, *, context: int = 512, strips: int = 8, carry: bool | None = None) -> Score:
    """Every held-out token once, given its document so far.

    With `carry` the state goes from window to window, so that a token sees all of its document that the mixers keep; without it each
    window begins anew. None: carry where the state is constant.
    """
    if len(corpus.held) < 2:
        raise BadInput("nothing is held out: there is one document, or --held-out is 0")
    stack = model.spec.stack
    if carry is None:
        carry = all(block.mixer.constant_state for block in stack.blocks)
    if not stack.causal:
        raise BadInput("bits per byte need a causal model; this one sees the future")
    device = next(model.parameters()).device
    objective = NextToken(model)
    training = model.training
    model.eval()
    nats, count, state = 0.0, 0, None
    for batch in corpus.held_strips(strips=strips, context=context):
        ids, targets, segments = (part.to(device) for part in batch)
        loss = objective(ids, targets, segments, state=state)
        nats += float(loss.nats)
        count += int(loss.count)
        state = loss.state if carry else None
    model.train(training)
    return Score(nats / max(count, 1), nats / math.log(2) / max(corpus.held.size, 1), count)


@contextlib.contextmanager
def without(model: SequenceModelLayer, kind: str) -> Iterator[None]:
    """The model with every mixer called `kind` giving 0: what it earns is what is lost."""
    def silence(layer: nn.Module, args: Any, output: Any) -> Any:
        return output._replace(y=torch.zeros_like(output.y))

    handles = [block.mixer.register_forward_hook(silence) for block in model.stack.blocks if block.mixer.spec.name() == kind]
    if not handles:
        raise BadInput(f"the model has no mixer {kind!r}")
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def first_bad_layer(model: SequenceModelLayer, ids: Tensor, segments: Tensor | None) -> str:
    """The first part of the model whose output is not finite on this batch."""
    found: list[str] = []

    def look(name: str) -> Any:
        def hook(layer: nn.Module, args: Any, output: Any) -> None:
            y = output[0] if isinstance(output, tuple) else output
            if not found and not torch.isfinite(y).all():
                found.append(name)

        return hook

    parts = [("stem", model.stem)]
    for i, block in enumerate(model.stack.blocks):
        parts += [(f"layer {i} ({block.mixer.spec.name()})", block.mixer), (f"layer {i} (channel mixer)", block)]
    handles = [part.register_forward_hook(look(name)) for name, part in parts]
    try:
        with torch.no_grad():
            model.encode(ids, info=Info(segments=segments))
    finally:
        for handle in handles:
            handle.remove()
    return found[0] if found else "the loss or its gradient"
