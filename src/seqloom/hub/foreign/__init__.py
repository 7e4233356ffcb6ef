"""Checkpoints of other libraries as our models, with the same scores: one table from model_type to how it is read.

Only safetensors files are read, and no code of a checkpoint is run. A tensor that the model has no place for, or a parameter
that the files do not fill, is an error that names it.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch

from seqloom.core import BadInput
from seqloom.hub.files import filled, read_config, read_tensors
from seqloom.hub.foreign import fla, hybrid, llama, mamba
from seqloom.hub.foreign.layout import Layout, Tensors, read
from seqloom.models import SequenceModel
from seqloom.models.sequence import SequenceModelLayer

LAYOUTS: dict[str, Layout] = {**llama.LAYOUTS, **mamba.LAYOUTS, **hybrid.LAYOUTS, **fla.LAYOUTS}

# Kinds of checkpoint with a recurrence that are refused, and what they need that is not here. Transformers' kinds first.
REFUSED = {
    "recurrent_gemma": "the RG-LRU, with gates by blocks of channels; GeGLU, scaled embeddings, a soft cap on the scores",
    "rwkv": "RWKV-4's average by channel under a running maximum, and token shift",
    "xlstm": "mLSTM with exponential gates, soft caps on gates and scores",
    "zamba": "attention blocks shared between layers, which read the embeddings beside the stream",
    "zamba2": "attention blocks shared between layers with adapters of their own, which read the embeddings beside the stream",
    "falcon_h1": "attention and Mamba-2 side by side in a block, and a multiplier on every stream",
    "nemotron_h": "blocks that are a mixer or a squared-ReLU MLP alone",
    "granitemoehybrid": "multipliers on embeddings, residual sums, attention and scores",
    "lfm2": "gated short convolutions as mixers",
    "olmo_hybrid": "blocks whose norms stand after the attention, with norms over all heads of queries and keys",
    "kimi_linear": "a delta rule with a decay per key channel, latent attention and mixtures of experts",
    "minimax": "mixtures of experts",
    "qwen3_5": "a vision tower; its language model alone (qwen3_5_text) is read",
    "qwen3_5_moe": "mixtures of experts, and a vision tower",
    "qwen3_5_moe_text": "mixtures of experts",
    "hgrn2": "gated linear attention whose keys are one minus the decay",
    "rwkv6": "token shift, and a bonus on the current token's own key and value",
    "rwkv7": "token shift, and a delta rule with a decay per key channel and removal keys of their own",
    "kda": "a delta rule with a decay per key channel",
    "comba": "a delta rule that corrects the query by the key",
    "log_linear_mamba2": "a hierarchy of states that grows with the logarithm of the length",
    "mesa_net": "a solver for the regression over all past keys in each step",
    "forgetting_transformer": "softmax attention with a decay per token in the scores",
}


class Row(NamedTuple):
    """A kind of checkpoint: its model_type, who writes it, our mixers for it (none: it is refused), what is read or missing."""

    kind: str
    writes: str
    mixers: str
    note: str

    @property
    def read(self) -> bool:
        return bool(self.mixers)


def table() -> list[Row]:
    """Every kind of checkpoint that is known, those that are read first."""
    layouts = {**LAYOUTS, "none (d_model, n_layer)": mamba.ORIGINAL}
    known = [Row(kind, layout.writes, ", ".join(layout.names.mixers), layout.note) for kind, layout in layouts.items()]
    return known + [Row(kind, "", "", f"needs {needs}") for kind, needs in REFUSED.items()]


def import_checkpoint(path: str | Path, *, dtype: torch.dtype | None = None) -> tuple[SequenceModelLayer, SequenceModel]:
    """(model, spec) of a foreign checkpoint's folder; dtype None: as stored.

    `hub.wrap(model)` is the same as a transformers model, `hub.export(model, tokenizer, folder)` saves it as ours.
    Raises: BadInput for an architecture or option that is not supported (naming what is missing, or those that are), and for
    files that are missing, damaged, or do not fit their configuration.
    """
    folder = Path(path)
    config = read_config(folder)
    kind = config.get("model_type")
    if kind in LAYOUTS:
        layout = LAYOUTS[kind]
    elif mamba.is_original(config):
        layout = mamba.ORIGINAL
    elif kind in REFUSED:
        raise BadInput(f"{folder} holds model_type {kind!r}, which needs {REFUSED[kind]}")
    else:
        names = ", ".join(config.get("architectures") or []) or "no architecture"
        raise BadInput(f"{folder} holds model_type {kind!r} ({names}), which is not read; "
                       f"seqloom, {', '.join(LAYOUTS)} and the original state-spaces layout are")
    try:
        spec = layout.spec(config)
        found = read(Tensors(read_tensors(folder), str(folder)), spec, layout.names)
    except BadInput as error:
        raise BadInput(str(error) if str(folder) in str(error) else f"{folder}: {error}") from error
    except (KeyError, TypeError, ValueError) as error:
        raise BadInput(f"{folder / 'config.json'} lacks a setting, or has one that cannot be: {error}") from error
    return filled(spec, found, folder, dtype).eval(), spec
