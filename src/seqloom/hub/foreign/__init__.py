"""Checkpoints of other libraries as our models, with the same scores: one table from model_type to how it is read.

Only safetensors files are read, and no code of a checkpoint is run.
"""

from __future__ import annotations

from pathlib import Path

import torch

from seqloom.core import BadInput
from seqloom.hub.files import filled, read_config, read_tensors
from seqloom.hub.foreign import llama, mamba
from seqloom.hub.foreign.layout import Tensors
from seqloom.models import SequenceModel
from seqloom.models.sequence import SequenceModelLayer

LAYOUTS = {**llama.LAYOUTS, **mamba.LAYOUTS}


def import_checkpoint(path: str | Path, *, dtype: torch.dtype | None = None) -> tuple[SequenceModelLayer, SequenceModel]:
    """(model, spec) of a foreign checkpoint's folder; dtype None: as stored.

    `hub.wrap(model)` is the same as a transformers model, `hub.export(model, tokenizer, folder)` saves it as ours.
    Raises: BadInput for an architecture or option that is not supported (naming those that are), and for files that are
    missing, damaged, or do not fit their configuration.
    """
    folder = Path(path)
    config = read_config(folder)
    kind = config.get("model_type")
    if kind in LAYOUTS:
        layout = LAYOUTS[kind]
    elif mamba.is_original(config):
        layout = mamba.ORIGINAL
    else:
        names = ", ".join(config.get("architectures") or []) or "no architecture"
        raise BadInput(f"{folder} holds model_type {kind!r} ({names}), which is not read; "
                       f"seqloom, {', '.join(LAYOUTS)} and the original state-spaces layout are")
    try:
        spec = layout.spec(config)
        source = Tensors(read_tensors(folder), str(folder))
        found = layout.tensors(source, spec)
    except BadInput as error:
        raise BadInput(str(error) if str(folder) in str(error) else f"{folder}: {error}") from error
    except (KeyError, TypeError, ValueError) as error:
        raise BadInput(f"{folder / 'config.json'} lacks a setting, or has one that cannot be: {error}") from error
    source.done()
    return filled(spec, found, folder, dtype).eval(), spec
