"""What the tests of memories share: random unit keys, codewords as values, and the share of them that is read back right."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor


def units(*shape: int, generator: torch.Generator) -> Tensor:
    """Random unit vectors in float64."""
    return F.normalize(torch.randn(*shape, generator=generator, dtype=torch.float64), dim=-1)


def share_right(read: Tensor, book: Tensor, wanted: Tensor) -> float:
    """The share of what is read [..., D] whose nearest codeword, by the product with those of `book` [N, D], is the `wanted`
    one [...]."""
    return float(((read @ book.mT).argmax(-1) == wanted).double().mean())


def by_size(share: Callable[[int], float], sizes: Iterable[int], name: str) -> Mapping[str, float]:
    """One score a size, called `name` ("at_{}_keys"), and "score", their mean."""
    scores = {name.format(size): share(size) for size in sizes}
    return {"score": sum(scores.values()) / len(scores), **scores}
