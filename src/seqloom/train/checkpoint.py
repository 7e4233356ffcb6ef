"""Checkpoints that appear whole or not at all, without pickles.

A checkpoint is a folder `step-<n>`: model.safetensors, optimiser.safetensors, state.json, written beside its place, brought to
the disk, and renamed. The manifest, written last, lists sizes and digests; a checkpoint whose files do not match it is passed
over. Tensors that processes hold in parts (FSDP2) are stored whole, so that a run may go on with another number of them.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from seqloom.core import BadInput, FailedRun

KEEP = 2
MANIFEST = "manifest.json"
MODEL, OPTIMISER, STATE = "model.safetensors", "optimiser.safetensors", "state.json"


class Checkpoint(NamedTuple):
    """facts: what the run stored beside the tensors."""

    folder: Path
    step: int
    facts: dict[str, Any]


def save(folder: Path, step: int, module: nn.Module, optimiser: torch.optim.Optimizer, facts: dict[str, Any], *,
         main: bool = True) -> Path:
    """Write `folder/step-<step>` and drop all but the last two. Every process calls it; only `main` writes.

    Raises: FailedRun if it cannot be written (a full disk, a folder that became read-only); earlier ones stay as they are.
    """
    model = tensors_of(module)
    moments, numbers = _optimiser_tensors(module, optimiser)
    place = folder / f"step-{step}"
    if not main:
        return place
    draft = folder / f".step-{step}.draft-{os.getpid()}"
    state = json.dumps({"step": step, "numbers": numbers, "facts": facts})
    try:
        draft.mkdir(parents=True)
        _write(draft / MODEL, lambda path: save_file(model, path))
        _write(draft / OPTIMISER, lambda path: save_file(moments, path))
        _write(draft / STATE, lambda path: path.write_text(state))
        manifest = {path.name: {"bytes": path.stat().st_size, "sha256": _sha(path)} for path in sorted(draft.iterdir())}
        _write(draft / MANIFEST, lambda path: path.write_text(json.dumps(manifest)))
        _sync(draft)
        if place.exists():
            shutil.rmtree(place)
        draft.rename(place)
        _sync(folder)
    except (OSError, SafetensorError) as error:  # safetensors reports a full disk as its own error
        shutil.rmtree(draft, ignore_errors=True)
        last = latest(folder)
        kept = f"the last good checkpoint is {last.folder}" if last else "there is no earlier checkpoint"
        why = getattr(error, "strerror", None) or error
        raise FailedRun(f"step {step} could not be saved in {folder}: {why}; {kept}") from error
    for _, old in sorted(_all(folder))[:-KEEP]:
        shutil.rmtree(old, ignore_errors=True)
    for stale in folder.glob(".step-*.draft-*"):
        shutil.rmtree(stale, ignore_errors=True)
    return place


def latest(folder: Path) -> Checkpoint | None:
    """The newest complete checkpoint of a run."""
    for step, place in sorted(_all(folder), reverse=True):
        if complete(place):
            return Checkpoint(place, step, json.loads((place / STATE).read_text())["facts"])
    return None


def complete(place: Path) -> bool:
    """Whether every file that the manifest lists is there, as it was written."""
    try:
        listed = json.loads((place / MANIFEST).read_text())
        fits = ((place / name).stat().st_size == want["bytes"] and _sha(place / name) == want["sha256"]
                for name, want in listed.items())
        return {MODEL, OPTIMISER, STATE} <= listed.keys() and all(fits)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def restore(checkpoint: Checkpoint, module: nn.Module, optimiser: torch.optim.Optimizer) -> int:
    """Load model and optimiser in place; returns the number of steps done. Raises: BadInput if they are another model's."""
    try:
        model, moments = load_file(checkpoint.folder / MODEL), load_file(checkpoint.folder / OPTIMISER)
    except (SafetensorError, OSError) as error:
        raise BadInput(f"{checkpoint.folder} is damaged: {error}") from error
    state = json.loads((checkpoint.folder / STATE).read_text())
    wanted = _named(module)
    if model.keys() != wanted.keys() or any(model[name].shape != value.shape for name, value in wanted.items()):
        raise BadInput(f"{checkpoint.folder} holds another model than the run's settings describe")
    with torch.no_grad():
        for name, value in wanted.items():
            value.copy_(_placed(model[name], value))
    slots: dict[str, dict[str, Any]] = {name: dict(numbers) for name, numbers in state["numbers"].items()}
    for key, value in moments.items():
        name, _, slot = key.rpartition("|")
        slots.setdefault(name, {})[slot] = value
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    for group in optimiser.param_groups:
        on_device = group.get("fused") or group.get("capturable")
        for parameter in group["params"]:
            stored = slots.get(names[id(parameter)], {})
            for slot, value in stored.items():
                if isinstance(value, Tensor) and slot != "step":
                    stored[slot] = _placed(value, parameter)
                elif isinstance(value, Tensor) and on_device:
                    stored[slot] = value.to(parameter.device)
            if stored:
                optimiser.state[parameter] = stored
    return state["step"]


def tensors_of(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and saved buffers by name, whole and on the CPU; tied ones once, as safetensors wants them."""
    return {name: _whole(value) for name, value in _named(module).items()}


def _named(module: nn.Module) -> dict[str, Tensor]:
    kept = module.state_dict(keep_vars=True).keys()
    return {**dict(module.named_parameters()), **{name: buffer for name, buffer in module.named_buffers() if name in kept}}


def _optimiser_tensors(module: nn.Module, optimiser: torch.optim.Optimizer) -> tuple[dict[str, Tensor], dict[str, dict]]:
    """Optimiser state by parameter name as tensors "name|slot", and what is no tensor for JSON."""
    tensors: dict[str, Tensor] = {}
    numbers: dict[str, dict[str, Any]] = {}
    for name, parameter in module.named_parameters():
        for slot, value in optimiser.state.get(parameter, {}).items():
            if isinstance(value, Tensor):
                tensors[f"{name}|{slot}"] = _whole(value)
            else:
                numbers.setdefault(name, {})[slot] = value
    return tensors, numbers


def _whole(value: Tensor) -> Tensor:
    """All of a tensor, on the CPU: what processes hold in parts is put together (all of them must call)."""
    value = value.detach()
    full = getattr(value, "full_tensor", None)
    return (value if full is None else full()).cpu().contiguous()


def _placed(value: Tensor, like: Tensor) -> Tensor:
    """A whole tensor laid out as `like` is: on its device, or in parts over its processes."""
    mesh = getattr(like, "device_mesh", None)
    if mesh is None:
        return value.to(like.device)
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(value.to(like.device), mesh, like.placements)


def _write(path: Path, how: Callable[[Path], Any]) -> None:
    how(path)
    _sync(path)


def _sync(path: Path) -> None:
    """Reach the disk before the rename that makes it count."""
    if path.is_dir():
        if os.name == "nt":  # folders cannot be synced there
            return
        handle = os.open(path, os.O_RDONLY)
    else:
        handle = os.open(path, os.O_RDWR)
    try:
        os.fsync(handle)
    except OSError:
        if not path.is_dir():  # some file systems cannot sync a folder
            raise
    finally:
        os.close(handle)


def _sha(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(2**20):
            digest.update(piece)
    return digest.hexdigest()


def _all(folder: Path) -> list[tuple[int, Path]]:
    found = []
    for place in folder.glob("step-*") if folder.is_dir() else ():
        number = place.name.removeprefix("step-")
        if number.isdigit():
            found.append((int(number), place))
    return found
