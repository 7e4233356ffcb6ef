"""Arms of a comparison: stacks that differ in their mixers and agree in their parameters."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch

from seqloom.core import BadInput, near
from seqloom.mixers import MIXERS
from seqloom.models.backbone import Block, Stack
from seqloom.models.presets import mixer_for
from seqloom.models.sequence import SequenceModel, language_model
from seqloom.parts import SwiGLU
from seqloom.study.fit import count_parameters

TOLERANCE = 0.02


def parameters_of(spec: SequenceModel) -> int:
    """Parameters of a model, counted without allocating it."""
    with torch.device("meta"):
        return count_parameters(spec.build())


def pattern_of(name: str) -> tuple[str, ...]:
    """The mixers of "a+b". Raises: BadInput for one that is not in the table."""
    pattern = tuple(part.strip() for part in name.split("+"))
    for part in pattern:
        if part not in MIXERS:
            raise BadInput(f"no mixer {part!r}; {near(part, MIXERS)}")
    return pattern


def causal_mixers() -> list[str]:
    """The mixers of the table whose default layer never looks ahead, in its order."""
    return [name for name in MIXERS if mixer_for(name, 32).causal]


def arm(name: str, *, dim: int, layers: int, heads: int | None = None, settings: Mapping[str, Any] | None = None) -> Stack:
    """`layers` blocks that repeat the pattern `name` ("a" or "a+b"), mixers at their defaults.

    `heads` goes to the mixers that must be told how many; None sizes them to the width. Each of `settings` goes to the
    mixers that have it, and whose default of it is not 0: a setting changes what is there and adds nothing.
    """
    blocks = []
    pattern = pattern_of(name)
    for i in range(layers):
        key = pattern[i % len(pattern)]
        fields = {field.name: field.default for field in dataclasses.fields(MIXERS[key])}
        given = {name: value for name, value in (settings or {}).items() if fields.get(name)}
        if heads is not None and fields.get("heads") is dataclasses.MISSING:
            given["heads"] = heads
        blocks.append(Block(mixer=mixer_for(key, dim, **given), mlp=SwiGLU()))
    return Stack(dim=dim, blocks=tuple(blocks))


def equalise(stacks: Mapping[str, Stack], *, vocab: int, among: Iterable[Stack] = ()) -> dict[str, SequenceModel]:
    """Language models over `stacks` whose parameter counts agree within 2 %: the hidden width of the channel mixers
    is raised in the smaller ones until they match the largest, of these and of `among`."""
    models = {name: language_model(vocab=vocab, stack=stack) for name, stack in stacks.items()}
    others = [language_model(vocab=vocab, stack=stack) for stack in among]
    target = max(parameters_of(model) for model in [*models.values(), *others])
    return {name: _widen(model, target, name) for name, model in models.items()}


def equal_stacks(stacks: Mapping[str, Stack], *, vocab: int, among: Iterable[Stack] = ()) -> dict[str, Stack]:
    """The stacks of `equalise`, for a task to wrap."""
    found = {name: model.stack for name, model in equalise(stacks, vocab=vocab, among=among).items()}
    return {name: stack for name, stack in found.items() if isinstance(stack, Stack)}


def _widen(model: SequenceModel, target: int, name: str) -> SequenceModel:
    stack = model.stack
    assert isinstance(stack, Stack)

    def at(extra: int) -> SequenceModel:
        blocks = tuple(
            replace(block, mlp=SwiGLU(hidden=(block.mlp.hidden or -(-stack.dim * 8 // 3 // 8) * 8) + extra))
            if isinstance(block.mlp, SwiGLU)
            else block
            for block in stack.blocks
        )
        return replace(model, stack=replace(stack, blocks=blocks))

    here, step = parameters_of(model), parameters_of(at(1)) - parameters_of(at(0))
    if step:
        model = at(round((target - here) / step))
    found = parameters_of(model)
    if abs(found - target) > TOLERANCE * target:
        raise BadInput(f"{name} cannot be brought within 2 % of {target:,} parameters (nearest {found:,}); give it a SwiGLU")
    return model
