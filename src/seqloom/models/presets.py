"""Model sizes by name, and how a mixer is sized for a width when only its name is given."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch

from seqloom.core import BadInput, Spec, from_dict, load_yaml, near, to_dict
from seqloom.mixers import MIXERS
from seqloom.models import KINDS
from seqloom.models.backbone import Block, Stack
from seqloom.models.sequence import SequenceModel, language_model
from seqloom.parts import SwiGLU

HEAD_DIM = 64


def mixer_for(name: str, dim: int, **settings: Any) -> Spec:
    """The mixer called `name` at its defaults, with heads of about 64 channels where it has heads."""
    if name not in MIXERS:
        raise BadInput(f"no mixer {name!r}; {near(name, MIXERS)}")
    cls = MIXERS[name]
    fields = {field.name: field for field in dataclasses.fields(cls)}
    if "heads" in fields and fields["heads"].default is dataclasses.MISSING and "heads" not in settings:
        heads = max(dim // HEAD_DIM, 1)
        while dim % heads:
            heads -= 1
        settings["heads"] = heads
    return cls(**settings)


def stack_of(mixers: tuple[str, ...], *, dim: int, layers: int, hidden: int | None = None) -> Stack:
    """`layers` blocks that repeat the pattern `mixers`, for example ("gated_delta", "gated_delta", "softmax")."""
    blocks = tuple(
        Block(mixer=mixer_for(mixers[i % len(mixers)], dim), mlp=SwiGLU(hidden=hidden)) for i in range(layers)
    )
    return Stack(dim=dim, blocks=blocks)


# name: (pattern of mixers, width, layers)
SIZES: dict[str, tuple[tuple[str, ...], int, int]] = {
    "hybrid-tiny": (("gated_delta", "gated_delta", "softmax"), 128, 3),
    "hybrid-small": (("gated_delta", "gated_delta", "gated_delta", "softmax"), 256, 8),
    "hybrid-base": (("gated_delta", "gated_delta", "gated_delta", "softmax"), 768, 12),
    "transformer-tiny": (("softmax",), 128, 3),
    "transformer-small": (("softmax",), 256, 8),
    "transformer-base": (("softmax",), 768, 12),
    "mamba-tiny": (("mamba",), 128, 3),
    "mamba-small": (("mamba",), 256, 8),
    "mamba-base": (("mamba",), 768, 12),
}


def demo(vocab: int) -> SequenceModel:
    """What the demo trains: gated delta blocks around one of windowed attention, narrow enough for minutes on a CPU."""
    dim = 128
    delta = Block(mixer=mixer_for("gated_delta", dim), mlp=SwiGLU(hidden=344))
    window = Block(mixer=mixer_for("softmax", dim, window=256), mlp=SwiGLU(hidden=344))
    return language_model(vocab=vocab, stack=Stack(dim=dim, blocks=(delta, window, delta)))


def preset(name: str, *, vocab: int, dim: int | None = None, layers: int | None = None) -> SequenceModel:
    """A language model by name. `<mixer>-tiny|small|base` works for every mixer, `hybrid-*` for the default mix."""
    kind, _, size = name.rpartition("-")
    if name == "demo":
        return demo(vocab)
    if name in SIZES:
        pattern, width, depth = SIZES[name]
    elif kind in MIXERS and f"transformer-{size}" in SIZES:
        _, width, depth = SIZES[f"transformer-{size}"]
        pattern = (kind,)
    else:
        known = ["demo", *SIZES, *(f"{key}-{s}" for key in MIXERS for s in ("tiny", "small", "base"))]
        raise BadInput(f"no model {name!r}; {near(name, known)}")
    return language_model(vocab=vocab, stack=stack_of(pattern, dim=dim or width, layers=layers or depth))


def resolve(model: str, *, vocab: int, changes: tuple[str, ...] = ()) -> SequenceModel:
    """A model from a preset's name or a YAML file (of a stack or a whole model), with changes like "stack.dim=192" applied."""
    path = Path(model)
    lines: dict[str, int] | None = None
    if path.suffix in (".yaml", ".yml"):
        if not path.is_file():
            raise BadInput(f"no model file {path}")
        data, lines = load_yaml(path.read_text(), str(path))
        if not isinstance(data, dict):
            raise BadInput(f"{path}: expected a model with a 'kind', found {type(data).__name__}")
    else:
        data = to_dict(preset(model, vocab=vocab), KINDS)
    if data.get("kind") == "stack":
        data = {"kind": "sequence_model", "stack": data, "stem": {"kind": "tokens", "vocab": vocab},
                "head": {"kind": "token_head", "classes": vocab}}
        lines = {f"stack.{place}": line for place, line in (lines or {}).items()} or None
    for change in changes:
        _change(data, change)
    spec = from_dict(data, KINDS, lines=lines)
    if not isinstance(spec, SequenceModel):
        raise BadInput(f"{model} describes a {data.get('kind')}, not a stack or a sequence_model")
    with torch.device("meta"):
        try:
            spec.build()
        except BadInput:
            raise
        except ValueError as error:
            raise BadInput(str(error)) from error
    return spec


def _change(data: Any, change: str) -> None:
    """Set a dotted path of nested data: "stack.blocks.0.mixer.heads=8", or "stack.blocks.*.mlp=null" for all blocks."""
    path, equals, text = change.partition("=")
    if not equals:
        raise BadInput(f"a change has the form path=value, not {change!r}")
    value, _ = load_yaml(text, f"the value of {path}")
    *parents, last = path.split(".")
    places = [data]
    for step in parents:
        places = [inner for place in places for inner in _step(place, step, path)]
    for place in places:
        _step(place, last, path)
        if isinstance(place, list):
            place[int(last)] = value
        else:
            place[last] = value


def _step(place: Any, step: str, path: str) -> list:
    if isinstance(place, list):
        if step == "*":
            return place
        if step.isdigit() and int(step) < len(place):
            return [place[int(step)]]
        raise BadInput(f"{path}: {step!r} is not one of 0..{len(place) - 1} or *")
    if not isinstance(place, dict) or step not in place:
        known = sorted(place) if isinstance(place, dict) else []
        raise BadInput(f"{path}: there is no {step!r}; {near(step, known)}")
    return [place[step]]
