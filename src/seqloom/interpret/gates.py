"""The gates of a stack's layers, looked at while it runs."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from torch import Tensor, nn

from seqloom.core.mixer import accumulator


@contextlib.contextmanager
def forget_gates(stack: nn.Module) -> Iterator[list[Tensor]]:
    """The forget gates [B, T, D] of every layer that has them (`gates(x, dtype)`), in order, of the passes inside the block.

    Raises: ValueError if no layer has any.
    """
    found: list[Tensor] = []
    mixers = [block.mixer for block in stack.blocks if hasattr(block.mixer, "gates")]
    if not mixers:
        raise ValueError("no mixer of this stack has forget gates to look at; HGRN has")

    def look(mixer: nn.Module, args: tuple) -> None:
        found.append(mixer.gates(args[0], accumulator(args[0].dtype))[0])

    handles = [mixer.register_forward_pre_hook(look) for mixer in mixers]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()
