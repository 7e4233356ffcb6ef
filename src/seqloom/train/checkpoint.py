"""Checkpoints that appear whole or not at all, without pickles.

A checkpoint is a folder `step-<n>`: model.safetensors, optimiser.safetensors, state.json, written beside its place and renamed.
The manifest, written last, lists sizes and digests; a checkpoint whose files do not match it is passed over.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict

from seqloom.core import BadInput, FailedRun

KEEP = 2
MANIFEST = "manifest.json"


class Checkpoint(NamedTuple):
    folder: Path
    step: int
    facts: dict[str, Any]


def save(folder: Path, step: int, module: nn.Module, optimiser: torch.optim.Optimizer, facts: dict[str, Any], *, main: bool = True) -> Path:
    """Write `folder/step-<step>` and drop all but the last two. Every process calls it; only `main` writes."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    model, optim = get_state_dict(module, optimiser, options=options)
    place = folder / f"step-{step}"
    if not main:
        return place
    draft = folder / f".step-{step}.draft-{os.getpid()}"
    tensors, numbers = _flatten(optim["state"])
    try:
        draft.mkdir(parents=True)
        _write(draft / "model.safetensors", lambda path: save_file(unique(model), path))
        _write(draft / "optimiser.safetensors", lambda path: save_file(tensors, path))
        random = {"random": torch.get_rng_state()}
        if torch.cuda.is_available():
            random |= {f"random.cuda.{i}": state for i, state in enumerate(torch.cuda.get_rng_state_all())}
        _write(draft / "random.safetensors", lambda path: save_file(random, path))
        state = json.dumps({"step": step, "numbers": numbers, "facts": facts})
        _write(draft / "state.json", lambda path: path.write_text(state))
        manifest = {path.name: {"bytes": path.stat().st_size, "sha256": _sha(path)} for path in sorted(draft.iterdir())}
        _write(draft / MANIFEST, lambda path: path.write_text(json.dumps(manifest)))
        if place.exists():
            shutil.rmtree(place)
        draft.rename(place)
        _sync(folder)
    except OSError as error:
        shutil.rmtree(draft, ignore_errors=True)
        last = latest(folder)
        kept = f"the last good checkpoint is {last.folder}" if last else "there is no earlier checkpoint"
        raise FailedRun(f"step {step} could not be saved in {folder}: {error.strerror or error}; {kept}") from error
    except SafetensorError as error:  # a full disk inside the library
        shutil.rmtree(draft, ignore_errors=True)
        raise FailedRun(f"step {step} could not be saved in {folder}: {error}") from error
    for old in sorted(_all(folder), key=lambda item: item[0])[:-KEEP]:
        shutil.rmtree(old[1], ignore_errors=True)
    for stale in folder.glob(".step-*.draft-*"):
        shutil.rmtree(stale, ignore_errors=True)
    return place


def latest(folder: Path) -> Checkpoint | None:
    """The newest complete checkpoint of a run."""
    for step, place in sorted(_all(folder), reverse=True):
        if complete(place):
            return Checkpoint(place, step, json.loads((place / "state.json").read_text())["facts"])
    return None


def complete(place: Path) -> bool:
    manifest = place / MANIFEST
    if not manifest.is_file():
        return False
    try:
        listed = json.loads(manifest.read_text())
        return all((place / name).stat().st_size == want["bytes"] and _sha(place / name) == want["sha256"] for name, want in listed.items())
    except (OSError, ValueError):
        return False


def restore(checkpoint: Checkpoint, module: nn.Module, optimiser: torch.optim.Optimizer) -> int:
    """Load model, optimiser and random state in place; returns the number of steps done."""
    try:
        model = load_file(checkpoint.folder / "model.safetensors")
        tensors = load_file(checkpoint.folder / "optimiser.safetensors")
        random = load_file(checkpoint.folder / "random.safetensors")
    except SafetensorError as error:
        raise BadInput(f"{checkpoint.folder} is damaged: {error}") from error
    state = json.loads((checkpoint.folder / "state.json").read_text())
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    fresh_model, optim = get_state_dict(module, optimiser, options=options)
    names = {_storage(value): name for name, value in fresh_model.items() if name in model}
    for name, value in fresh_model.items():  # tied tensors were stored once
        if name not in model:
            model[name] = model[names[_storage(value)]]
    optim["state"] = _unflatten(tensors, state["numbers"])
    set_state_dict(module, optimiser, model_state_dict=model, optim_state_dict=optim, options=options)
    torch.set_rng_state(random["random"])
    if torch.cuda.is_available():
        torch.cuda.set_rng_state_all([random[f"random.cuda.{i}"] for i in range(torch.cuda.device_count())])
    return state["step"]


def unique(model: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors by name, shared ones once (safetensors refuses them twice), contiguous."""
    seen: dict[tuple, str] = {}
    kept = {}
    for name, value in model.items():
        if seen.setdefault(_storage(value), name) == name:
            kept[name] = value.contiguous()
    return kept


def _storage(value: Tensor) -> tuple:
    return value.untyped_storage().data_ptr(), value.storage_offset(), tuple(value.shape)


def _flatten(state: dict[str, dict[str, Any]]) -> tuple[dict[str, Tensor], dict[str, dict[str, Any]]]:
    """Optimiser state by parameter name as tensors "name|slot", and what is no tensor as JSON."""
    tensors, numbers = {}, {}
    for name, slots in state.items():
        for slot, value in slots.items():
            if isinstance(value, Tensor):
                tensors[f"{name}|{slot}"] = value.contiguous()
            else:
                numbers.setdefault(name, {})[slot] = value
    return tensors, numbers


def _unflatten(tensors: dict[str, Tensor], numbers: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    state: dict[str, dict[str, Any]] = {name: dict(slots) for name, slots in numbers.items()}
    for key, value in tensors.items():
        name, _, slot = key.rpartition("|")
        state.setdefault(name, {})[slot] = value
    return state


def _write(path: Path, how: Any) -> None:
    how(path)
    _sync(path)


def _sync(path: Path) -> None:
    """Reach the disk before the rename that makes it count."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError:
        if not path.is_dir():  # some systems cannot sync a folder
            raise
    finally:
        os.close(handle)


def _sha(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else hashlib.sha256(file.read()).hexdigest()


def _all(folder: Path) -> list[tuple[int, Path]]:
    found = []
    for place in folder.glob("step-*") if folder.is_dir() else ():
        number = place.name.removeprefix("step-")
        if number.isdigit():
            found.append((int(number), place))
    return found
