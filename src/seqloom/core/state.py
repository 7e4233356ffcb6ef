"""States are pytree values: what they are, and what may be done to any of them.

A state is a NamedTuple (possibly nested) of tensors with the batch on axis 0. It is passed in and returned, never
hidden in a module. Because every mixer keeps to that, reordering (beam search), repeating, detaching, moving, saving
and restoring are written here once.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from seqloom.core.segments import Track


class Mixed(NamedTuple):
    """What a layer returns: the output [B, T, D], the state after the last token, named losses and statistics."""

    y: Tensor
    state: Any = None
    aux: dict[str, Tensor] = {}


class State(NamedTuple):
    """A layer's state: where each row stands in its segment, and the mixer's own cells (a pytree of tensors)."""

    track: Track
    cells: Any


class Memory(NamedTuple):
    """A source that was read in once (`layer.read_in`), to be queried by `layer(x, state=memory)`, unchanged."""

    cells: Any
    real: Tensor | None = None  # [B, S]: which tokens of the source are real, for mixers that keep them all


def leaves(state: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(state) if isinstance(leaf, Tensor)]


def tree_map(function: Callable[[Tensor], Tensor], state: Any) -> Any:
    return pytree.tree_map(lambda leaf: function(leaf) if isinstance(leaf, Tensor) else leaf, state)


def select(state: Any, index: Tensor) -> Any:
    """Rows `index` of the batch: reorder for beam search, drop finished rows, fork a prompt."""
    return tree_map(lambda leaf: leaf.index_select(0, index.to(leaf.device)), state)


def repeat(state: Any, times: int) -> Any:
    """Each row `times` times, neighbours together: [a, b] -> [a, a, b, b]."""
    return tree_map(lambda leaf: leaf.repeat_interleave(times, 0), state)


def detach(state: Any) -> Any:
    """The same values, cut from the autograd graph (truncated backpropagation through time)."""
    return tree_map(Tensor.detach, state)


def clone(state: Any) -> Any:
    return tree_map(Tensor.clone, state)


def to(state: Any, *, device: torch.device | str | None = None) -> Any:
    """Move a state (offload, restore). Dtypes are part of the contract and stay."""
    return tree_map(lambda leaf: leaf.to(device=device), state)


def count_bytes(state: Any) -> int:
    """Bytes held, counted from the tensors."""
    return sum(leaf.numel() * leaf.element_size() for leaf in leaves(state))


def write_back(old: Any, new: Any) -> Any:
    """Copy `new` into the tensors of `old`, at their addresses (donated states, CUDA graphs), and return `old`."""
    old_leaves, tree = pytree.tree_flatten(old)
    new_leaves = pytree.tree_leaves(new)
    for target, value in zip(old_leaves, new_leaves, strict=True):
        if isinstance(target, Tensor) and target is not value:
            if target.shape != value.shape:
                raise ValueError(
                    f"a donated state keeps its addresses, but this call needs {tuple(value.shape)} where the state "
                    f"has {tuple(target.shape)}; make it with init_state(batch, capacity=...) of the full length"
                )
            target.copy_(value)
    return pytree.tree_unflatten(old_leaves, tree)


def save(state: Any, path: str | Path) -> None:
    """Write a state's tensors to a safetensors file, named by their place in the tree."""
    from safetensors.torch import save_file

    named, _ = pytree.tree_flatten_with_path(state)
    # copies: safetensors refuses tensors that share memory
    save_file({_name(key): leaf.contiguous().clone() for key, leaf in named if isinstance(leaf, Tensor)}, str(path))


def load(like: Any, path: str | Path) -> Any:
    """Read a state written by `save` into the structure of `like` (for example `model.init_state(...)`)."""
    from safetensors.torch import load_file

    stored = load_file(str(path))
    named, tree = pytree.tree_flatten_with_path(like)
    wanted = [_name(key) for key, leaf in named if isinstance(leaf, Tensor)]
    missing = [name for name in wanted if name not in stored]
    if missing or len(stored) != len(wanted):
        raise ValueError(f"{path} does not hold this model's state: {len(missing)} of {len(wanted)} tensors are missing")
    return pytree.tree_unflatten([stored[_name(key)] if isinstance(leaf, Tensor) else leaf for key, leaf in named], tree)


def _name(key: Any) -> str:
    return pytree.keystr(key) or "state"
