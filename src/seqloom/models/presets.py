"""Model sizes by name, and how a mixer is sized for a width when only its name is given."""

from __future__ import annotations

import dataclasses
from typing import Any

from seqloom.core import BadInput, Spec, near
from seqloom.mixers import MIXERS
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


def preset(name: str, *, vocab: int, dim: int | None = None, layers: int | None = None) -> SequenceModel:
    """A language model by name. `<mixer>-tiny|small|base` works for every mixer, `hybrid-*` for the default mix."""
    kind, _, size = name.rpartition("-")
    if name in SIZES:
        pattern, width, depth = SIZES[name]
    elif kind in MIXERS and f"transformer-{size}" in SIZES:
        _, width, depth = SIZES[f"transformer-{size}"]
        pattern = (kind,)
    else:
        known = [*SIZES, *(f"{key}-{s}" for key in MIXERS for s in ("tiny", "small", "base"))]
        raise BadInput(f"no model {name!r}; {near(name, known)}")
    return language_model(vocab=vocab, stack=stack_of(pattern, dim=dim or width, layers=layers or depth))
