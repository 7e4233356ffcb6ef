"""The two ways to run a recurrence: token by token (the definition), and by a prefix over composable transitions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from seqloom.core.segments import Segments
from seqloom.core.state import Mixed
from seqloom.core.state import tree_map as _map


def scan(step: Callable[..., tuple[Any, Tensor]], *streams: Tensor, state: Any, segments: Segments | None = None,
         empty: Any = None) -> Mixed:
    """Run `state, y = step(state, *tokens)` over axis 1 of the streams: what every other form must agree with.

    Shapes: streams [B, T, ...], state a pytree of [B, ...]; returns y [B, T, ...] and the state after the last token.
    At a boundary the state becomes `empty` (zeros when None); at a hold the state stays and y is 0.
    """
    if segments is not None:
        streams = tuple(segments.hold(stream) for stream in streams)
        starts = segments.starts()
        empty = _map(torch.zeros_like, state) if empty is None else empty
    outputs = []
    for t in range(streams[0].shape[1]):
        before = state if segments is None else _where(starts[:, t], empty, state)
        state, y = step(before, *(stream[:, t] for stream in streams))
        if segments is not None:
            state = _where(segments.real[:, t], state, before)
        outputs.append(y)
    y = torch.stack(outputs, 1)
    return Mixed(y if segments is None else segments.hold(y), state)


def _where(condition: Tensor, yes: Any, no: Any) -> Any:
    """Choose a whole state per row: condition [B]."""
    pick = lambda a, b: torch.where(condition.reshape(-1, *(1,) * (b.ndim - 1)), a, b)  # noqa: E731
    return pytree.tree_map(pick, yes, no)


def carry(a: Tensor, b: Tensor, h: Tensor, *, act: Callable[[Tensor, Tensor], Tensor] = torch.mul,
          compose: Callable[[Tensor, Tensor], Tensor] = torch.mul, group: int = 16) -> tuple[Tensor, Tensor]:
    """All states of h_i = a_i . h_{i-1} + b_i along axis 1, without a loop whose length grows with it.

    Groups of `group` elements are run side by side, each from nothing, together with the products of their
    transitions; the group totals form the same problem, `group` times shorter; one correction per element joins them.

    Shapes: a [B, n, ...], b [B, n, *H], h [B, *H]. Returns (before, last): the state entering each element
    [B, n, *H], and the one after the last [B, *H]. `act(a, h)` applies a transition, `compose(later, earlier)`
    joins two; both work on whole batches of them. The defaults are elementwise (diagonal) transitions.
    """
    n = a.shape[1]
    if n <= group:
        entering = []
        for a_i, b_i in zip(a.unbind(1), b.unbind(1), strict=True):
            entering.append(h)
            h = act(a_i, h) + b_i
        return torch.stack(entering, 1), h
    groups = n // group
    whole = groups * group
    # unbind, not an index each: autograd would fill a tensor of the whole size for every one of them
    a_in = a[:, :whole].unflatten(1, (groups, group)).unbind(2)
    b_in = b[:, :whole].unflatten(1, (groups, group)).unbind(2)
    product, total = a_in[0], b_in[0]
    products, totals = [product], [total]
    for a_i, b_i in zip(a_in[1:], b_in[1:], strict=True):
        total = act(a_i, total) + b_i
        product = compose(a_i, product)
        products.append(product)
        totals.append(total)
    start, h = carry(product, total, h, act=act, compose=compose, group=group)
    inside = act(torch.stack(products[:-1], 2), start[:, :, None]) + torch.stack(totals[:-1], 2)
    before = torch.cat([start[:, :, None], inside], 2).flatten(1, 2)
    if whole == n:
        return before, h
    tail, h = carry(a[:, whole:], b[:, whole:], h, act=act, compose=compose, group=group)
    return torch.cat([before, tail], 1), h
