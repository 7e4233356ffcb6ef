"""How widths are shared out over heads, and heads over groups."""

from __future__ import annotations

import math
from typing import Any

from seqloom.core.context import split


def head_widths(dim: int, spec: Any) -> tuple[int, int]:
    """Widths of a key and of a value per head: what `spec` says (`key_dim`, `value_dim`), or dim / heads.

    Raises: ValueError if a width is left to `dim` and it does not split over the heads.
    """
    head = 0 if spec.key_dim and spec.value_dim else split(dim, spec.heads, type(spec).__name__)
    return spec.key_dim or head, spec.value_dim or head


def grouped_heads(inner: int, spec: Any) -> int:
    """The number of heads of width `spec.head_dim` in an inner width, which `spec.groups` share B and C.

    Raises: ValueError if the width is not made of whole heads, or these do not split into the groups.
    """
    owner = type(spec).__name__
    if inner % spec.head_dim:
        nearest = math.gcd(inner, spec.head_dim)
        raise ValueError(f"{owner}: inner width {inner} is not made of heads of {spec.head_dim}; head_dim={nearest} fits")
    heads = inner // spec.head_dim
    if heads % spec.groups:
        nearest = math.gcd(heads, spec.groups)
        raise ValueError(f"{owner}: {heads} heads do not split into {spec.groups} groups; groups={nearest} fits")
    return heads
