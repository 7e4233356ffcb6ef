"""Watching a layer: outputs, what its final state does to tokens that follow, and gradients, by name and comparable."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from seqloom.core import Mixer, State, use_form
from seqloom.core.state import leaves
from seqloom.laws.cases import EXACT, SINGLE, WIDTH, draw
from seqloom.laws.law import Measure

# values below these are compared absolutely, all inputs and cotangents having unit scale: times their limits, the last
# digits of float64 and of float32, so that a gradient that is 0 may be what rounding leaves
FLOOR, SINGLE_FLOOR = 1e-6, 1e-3


def gap(got: Tensor | None, want: Tensor | None, floor: float = FLOOR) -> float:
    """Largest difference relative to the largest wanted value; infinite where shapes differ, NaN where got has NaN."""
    if got is None and want is None:
        return 0.0
    got = torch.zeros_like(want) if got is None else got
    want = torch.zeros_like(got) if want is None else want
    if got.shape != want.shape:
        return math.inf
    if not want.numel():
        return 0.0
    wide = torch.complex128 if want.is_complex() else torch.float64
    got, want = got.detach().to("cpu", wide), want.detach().to("cpu", wide)
    return float((got - want).abs().max() / want.abs().max().clamp(min=floor))


def compare(where: str, got: Mapping[str, Tensor | None], want: Mapping[str, Tensor | None], limit: float = EXACT) -> Measure:
    """The worst gap over all names, as one measure that says which name it is."""
    worst, name, floor = -1.0, "nothing", SINGLE_FLOOR if limit == SINGLE else FLOOR
    for key in want.keys() | got.keys():
        value = gap(got.get(key), want.get(key), floor) if key in want and key in got else math.inf
        if math.isnan(value) or value > worst:
            worst, name = value, key
        if math.isnan(value):
            break
    return Measure(f"{where}, {name}" if where else name, worst, limit)


def watch(layer: Mixer, play: Callable[..., Mapping[str, Tensor]], *inputs: Tensor) -> dict[str, Tensor | None]:
    """What `play(*inputs)` returns, and the gradients of its sum under fixed random weights.

    Gradients are named "d" and the number of the input or the name of the parameter; None where there is none.
    """
    inputs = tuple(value.detach().clone().requires_grad_() for value in inputs)
    parameters = dict(layer.named_parameters())
    out = dict(play(*inputs))
    loss = sum((_real(value) * _weights(name, value)).sum() for name, value in out.items() if value.requires_grad)
    gradients = torch.autograd.grad(loss, (*inputs, *parameters.values()), allow_unused=True)
    names = (*(f"d input {i}" for i in range(len(inputs))), *(f"d {name}" for name in parameters))
    return {**out, **dict(zip(names, gradients, strict=True))}


def _real(value: Tensor) -> Tensor:
    return torch.view_as_real(value) if value.is_complex() else value


def _weights(name: str, value: Tensor) -> Tensor:
    real = _real(value)
    return draw(*real.shape, name=("weights", name), dtype=real.dtype, device=str(real.device))


def follow(layer: Mixer, state: State | None) -> dict[str, Tensor]:
    """What a final state does: the outputs of three fixed tokens after it, and where its rows stand. {} without state.

    Two states are equal where nothing that follows can tell them apart; their tensors need not be laid out alike.
    """
    if state is None:
        return {}
    like = next(layer.parameters())
    batch = state.track.position.shape[0]
    probe = draw(1, 3, WIDTH, name="follow", dtype=like.dtype, device=str(like.device)).expand(batch, -1, -1)
    return {"after": layer(probe, state=state).y, "position": state.track.position.to(torch.float64)}


def tensors(state: State) -> dict[str, Tensor]:
    """The state's own tensors, by place."""
    return {f"state {i}": leaf for i, leaf in enumerate(leaves(state.cells))}


def opened(state: State) -> tuple[list[Tensor], Callable[..., State]]:
    """The floating tensors of a state, and how to put others in their place: to differentiate with respect to them."""
    flat, tree = pytree.tree_flatten(state)
    places = [i for i, leaf in enumerate(flat) if isinstance(leaf, Tensor) and (leaf.is_floating_point() or leaf.is_complex())]

    def close(*values: Tensor) -> State:
        new = list(flat)
        for i, value in zip(places, values, strict=True):
            new[i] = value
        return pytree.tree_unflatten(new, tree)

    return [flat[i].detach() for i in places], close


@contextlib.contextmanager
def form(name: str | None) -> Iterator[None]:
    """`use_form(name)`, or the automatic choice for None."""
    if name is None:
        yield
        return
    with use_form(name):
        yield


@contextlib.contextmanager
def intercepted(layer: Mixer, run: Callable[..., Any]) -> Iterator[list]:
    """Inside the block `layer.run(*streams, **options)` calls `run(original, *streams, **options)` instead.

    This reaches the streams between a layer's projections and its kernel. The list yielded grows by one a call.
    """
    calls: list[None] = []
    original = layer.run

    def replacement(*streams: Tensor, **options: Any) -> Any:
        calls.append(None)
        return run(original, *streams, **options)

    layer.run = replacement
    try:
        yield calls
    finally:
        del layer.run


# Arranging tokens among pads -------------------------------------------------------------------------------------

def places(*rows: list[tuple[int, int]]) -> tuple[Tensor, int]:
    """Where real tokens stand, from rows of (pads, tokens) pairs: index [B, n], and the length of the longest row.

    Every row must have the same number of tokens; a last pair of (pads, 0) ends it with pads.
    """
    index, longest = [], 0
    for row in rows:
        at, here = 0, []
        for pads, tokens in row:
            at += pads
            here += range(at, at + tokens)
            at += tokens
        index.append(here)
        longest = max(longest, at)
    return torch.tensor(index), longest


def spread(x: Tensor, index: Tensor, length: int, fill: float = 0.0) -> Tensor:
    """x [B, n, D] or ids [B, n] put at `index` among `fill`: [B, length, ...]."""
    place = index.to(x.device)
    place = place[..., None].expand_as(x) if x.ndim == 3 else place
    return x.new_full((x.shape[0], length, *x.shape[2:]), fill).scatter(1, place, x)


def gather(y: Tensor, index: Tensor) -> Tensor:
    """The inverse of `spread`: y [B, length, D] at `index`."""
    return y.gather(1, index.to(y.device)[..., None].expand(-1, -1, y.shape[-1]))
