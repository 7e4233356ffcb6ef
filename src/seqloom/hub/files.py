"""Folders with a model: read with clear errors, and written whole or not at all."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch import Tensor, nn

from seqloom.core import BadInput, FailedRun
from seqloom.core.marks import NAME as MARKS
from seqloom.core.marks import marks
from seqloom.data import tokenizer as tokenizers
from seqloom.hub.card import model_card
from seqloom.hub.config import SeqloomConfig
from seqloom.hub.modeling import SeqloomPreTrainedModel, wrap
from seqloom.models import SequenceModel
from seqloom.models.sequence import SequenceModelLayer

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
AUTO = {
    "SeqloomForCausalLM": "AutoModelForCausalLM", "SeqloomForMaskedLM": "AutoModelForMaskedLM",
    "SeqloomForSequenceClassification": "AutoModelForSequenceClassification",
    "SeqloomForTokenClassification": "AutoModelForTokenClassification",
}


def load(path: str | Path, *, dtype: torch.dtype | None = None) -> tuple[SequenceModelLayer, Tokenizer | None]:
    """The model of a folder, as a plain layer in evaluation mode, and its tokenizer if it has one.

    Reads folders written by `export` or `save_pretrained`, and foreign checkpoints (`hub.foreign`). dtype None: as stored.
    Raises: BadInput, in one sentence, for a folder that is missing or incomplete, a newer format, a damaged file, tensors
    that do not fit.
    """
    from seqloom.hub import foreign

    folder = Path(path)
    config = read_config(folder)
    if config.get("model_type") != SeqloomConfig.model_type:
        layer, _ = foreign.import_checkpoint(folder, dtype=dtype)
    else:
        try:
            spec = SeqloomConfig.from_dict(config).spec
        except BadInput as error:
            raise BadInput(f"{folder / CONFIG}: {error}") from error
        layer = filled(spec, {_plain(name): value for name, value in read_tensors(folder).items()}, folder, dtype)
    found = tokenizers.load(folder) if (folder / "tokenizer.json").is_file() else None
    return layer.eval(), found


def _plain(name: str) -> str:
    """A parameter's name in a `SequenceModel`, from that in a transformers model."""
    first, _, rest = name.partition(".")
    return rest if first == "model" else f"head.{rest}" if first in ("lm_head", "score") else name


def read_config(folder: Path) -> dict[str, Any]:
    """config.json. Raises: BadInput if there is none, or it is not JSON."""
    if not folder.is_dir():
        raise BadInput(f"{folder} is {'a file' if folder.exists() else 'not there'}; a folder with a saved model is expected")
    file = folder / CONFIG
    if not file.is_file():
        raise BadInput(f"{folder} has no {CONFIG}, so it is not a saved model; name the folder that holds one")
    try:
        config = json.loads(file.read_text(encoding="utf-8"), object_hook=_number)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise BadInput(f"{file} is not valid JSON: {error}") from error
    if not isinstance(config, dict):
        raise BadInput(f"{file} must hold a JSON object, found {type(config).__name__}")
    return config


def _number(data: dict[str, Any]) -> Any:
    """transformers writes infinities as {"__float__": "Infinity"}."""
    return float(data["__float__"]) if data.keys() == {"__float__"} else data


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder's safetensors files, sharded or not. Raises: BadInput if one is missing or damaged."""
    names = [WEIGHTS]
    if (folder / INDEX).is_file():
        try:
            names = sorted(set(json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"].values()))
        except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, AttributeError) as error:
            raise BadInput(f"{folder / INDEX} is not an index of weight files: {error}") from error
    tensors: dict[str, Tensor] = {}
    for name in names:
        file = folder / name
        if not file.is_file():
            pickled = sorted(each.name for each in folder.glob("*.bin"))
            hint = f"; {pickled[0]} is a pickle, which is never loaded: save it as safetensors" if pickled else ""
            raise BadInput(f"{folder} has no {name}{hint}")
        try:
            tensors.update(load_file(file))
        except (SafetensorError, OSError) as error:
            raise BadInput(f"{file} is damaged ({error}); copy or save it again") from error
    return tensors


def filled(spec: SequenceModel, tensors: Mapping[str, Tensor], folder: Path,
           dtype: torch.dtype | None = None) -> SequenceModelLayer:
    """The layer of `spec` with `tensors` as its parameters, all of them and no others; tied ones may be stored once.

    The layer is made without memory and the tensors are put in, so that nothing is initialised or held twice.
    dtype None: that of the stored tensors. Parameters marked keep_float32 stay float32 or wider.
    Raises: BadInput naming what is missing, unexpected, or of another shape.
    """
    with torch.device("meta"):
        layer = spec.build()
    wanted: dict[str, Tensor] = {**dict(layer.named_parameters()), **layer_buffers(layer)}
    tied = {name for name, _ in layer.named_parameters(remove_duplicate=False)} - wanted.keys()
    missing, unknown = sorted(wanted.keys() - tensors.keys()), sorted(tensors.keys() - wanted.keys() - tied)
    if missing or unknown:
        said = [f"lacks {len(missing)} of the model's tensors (such as {missing[0]})"] if missing else []
        said += [f"has {len(unknown)} it does not know (such as {unknown[0]})"] if unknown else []
        raise BadInput(f"the weights in {folder} do not fit the model that its {CONFIG} describes: the file "
                       f"{' and '.join(said)}")
    for name, value in wanted.items():
        if value.shape != tensors[name].shape:
            raise BadInput(f"{name} in {folder} is {list(tensors[name].shape)}, and the model that its {CONFIG} describes "
                           f"needs {list(value.shape)}")
    stored = [tensor.dtype for tensor in tensors.values() if tensor.is_floating_point()]
    dtype = dtype or max(stored, key=stored.count, default=torch.float32)
    made: dict[int, Tensor] = {}
    for name, value in wanted.items():
        tensor = tensors[name]
        if value.is_floating_point():
            tensor = tensor.to(torch.promote_types(dtype, torch.float32) if marks(value)["keep_float32"] else dtype)
        if isinstance(value, nn.Parameter):
            tensor = nn.Parameter(tensor, requires_grad=value.requires_grad)
            if hasattr(value, MARKS):
                setattr(tensor, MARKS, getattr(value, MARKS))
        made[id(value)] = tensor
    for module in layer.modules():
        for own in (module._parameters, module._buffers):
            own.update((name, made[id(value)]) for name, value in own.items() if id(value) in made)
    return layer


def layer_buffers(layer: nn.Module) -> dict[str, Tensor]:
    """The buffers that are saved."""
    kept = layer.state_dict().keys()
    return {name: buffer for name, buffer in layer.named_buffers() if name in kept}


def export(model: SequenceModelLayer | SeqloomPreTrainedModel, tokenizer: Any, path: str | Path,
           card: Mapping[str, Any] | None = None) -> Path:
    """Write a folder that `load` and the Auto classes read: config.json, model.safetensors, the tokenizer, README.md.

    tokenizer: a `tokenizers.Tokenizer`, a transformers tokenizer, or None. card: facts for the model card.
    The files are made beside their place and moved in at the end, so that a failure leaves what was there.
    Raises: FailedRun if the folder cannot be written.
    """
    folder = Path(path)
    if not isinstance(model, SeqloomPreTrainedModel):
        name = tokenizers.start_name(tokenizer) if isinstance(tokenizer, Tokenizer) else None
        start = None if name is None else tokenizer.token_to_id(name)
        special = {name: getattr(tokenizer, name, start) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
        model = wrap(model, **special)
    draft = folder / f".export-{os.getpid()}"
    try:
        draft.mkdir(parents=True)
        model.save_pretrained(draft)
        if isinstance(tokenizer, Tokenizer):
            tokenizers.save(tokenizer, draft)
        elif tokenizer is not None:
            tokenizer.save_pretrained(draft)
        auto = AUTO.get(type(model).__name__, "AutoModel")
        text = model_card(model, model.config.spec, name=folder.resolve().name, auto_class=auto, facts=card,
                          tokenizer=tokenizer is not None)
        (draft / "README.md").write_text(text, encoding="utf-8")
        # the configuration last: without it a folder is not a saved model
        for file in sorted(draft.iterdir(), key=lambda file: (file.name == CONFIG, file.name)):
            os.replace(file, folder / file.name)
    except (OSError, SafetensorError) as error:
        raise FailedRun(f"the model could not be written to {folder}: {getattr(error, 'strerror', None) or error}") from error
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return folder
