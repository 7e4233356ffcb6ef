"""What a constant state can hold at most: its bits, and the longest string it could copy.

To reproduce any of K^n strings a state needs K^n values: n <= bits / log2 K ([can-mamba-copy], the pigeonhole bound). It is
a bound from above, far from what training reaches.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from seqloom.core.state import leaves
from seqloom.models.backbone import Stack


class Capacity(NamedTuple):
    """A layer's share: its mixer, the numbers in its state, their bits, and the strings over the alphabet these could hold."""

    layer: int
    mixer: str
    numbers: int
    bits: int
    longest: int


def capacity_report(stack: Stack, *, alphabet: int = 26, bits: int | None = None) -> list[Capacity]:
    """One row a layer with a state of constant size, counted from its tensors; None of those that grow with the sequence.

    `bits` per number: None takes the width of its dtype, a smaller figure what is known to survive (say 8). `longest` is
    in characters of an alphabet of `alphabet`. The bits of a stack are the sum over its rows.
    """
    layer, rows = stack.build(), []
    for i, block in enumerate(layer.blocks):
        spec = block.mixer.spec
        if not spec.constant_state:
            continue
        held = [leaf for leaf in leaves(block.mixer.init_state(1, device="meta").cells) if leaf.is_floating_point()]
        numbers = sum(leaf.numel() for leaf in held)
        total = sum(leaf.numel() * (8 * leaf.element_size() if bits is None else bits) for leaf in held)
        rows.append(Capacity(i, spec.name(), numbers, total, longest_copy(total, alphabet)))
    return rows


def longest_copy(bits: int, alphabet: int) -> int:
    """The length n of the longest strings over `alphabet` symbols that `bits` bits can tell apart: alphabet^n <= 2^bits.

    Raises: ValueError for an alphabet of fewer than two symbols, of which there is nothing to tell apart.
    """
    if alphabet < 2:
        raise ValueError(f"an alphabet of {alphabet} symbols tells no strings apart; use at least 2")
    n = int(bits / math.log2(alphabet)) + 1  # the quotient is rounded, powers of integers are not
    while alphabet**n > 2**bits:
        n -= 1
    return n


def distinct(states: torch.Tensor) -> int:
    """How many different rows [R, ...] there are."""
    return len(states.flatten(1).unique(dim=0))
