"""Mamba and Mamba-2 checkpoints: transformers' layout, and that of the original state-spaces repository.

x + mixer(RMSNorm x), without channel mixers. The mixers' parameters have the same names here, but the convolution's weight
is [D, W] and there [D, 1, W]. A residual stream kept in float32 under half-precision weights has no counterpart.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from seqloom.core import BadInput, BuildContext
from seqloom.hub.foreign.layout import Config, Layout, Tensors, normalised, only
from seqloom.mixers import Mamba, Mamba2
from seqloom.models import Block, SequenceModel, Stack
from seqloom.models.sequence import language_model


def _model(config: Config, mixer: Any, eps: float) -> SequenceModel:
    blocks = (Block(mixer=mixer, mlp=None, norm_eps=eps),) * config["num_hidden_layers"]
    stack = Stack(dim=config["hidden_size"], blocks=blocks, norm_eps=eps)
    return language_model(vocab=config["vocab_size"], stack=stack, tie=bool(config["tie_word_embeddings"]))


def mamba_spec(config: Config) -> SequenceModel:
    config = normalised(config, "mamba")
    only(config, "mamba", hidden_act=("silu", "swish"))
    mixer = Mamba(
        state=config["state_size"], expand=config["expand"], conv=config["conv_kernel"], dt_rank=config["time_step_rank"],
        conv_bias=config["use_conv_bias"], bias=config["use_bias"],
    )
    return _model(config, mixer, config["layer_norm_epsilon"])


def mamba2_spec(config: Config) -> SequenceModel:
    config = normalised(config, "mamba2")
    only(config, "mamba2", hidden_act=("silu", "swish"))
    low, high = config["time_step_limit"]
    mixer = Mamba2(
        state=config["state_size"], head_dim=config["head_dim"], expand=config["expand"], groups=config["n_groups"],
        conv=config["conv_kernel"], conv_bias=config["use_conv_bias"], bias=config["use_bias"],
        dt_limit=(float(low), None if math.isinf(high) else float(high)), norm_eps=config["layer_norm_epsilon"],
    )
    return _model(config, mixer, config["layer_norm_epsilon"])


def original_spec(config: Config) -> SequenceModel:
    """config.json of the original repository: d_model, n_layer, vocab_size, ssm_cfg, and what differs from its defaults."""
    only(config, "state-spaces", rms_norm=(True,), d_intermediate=(0,), attn_layer_idx=([], None))
    inner = dict(config.get("ssm_cfg") or {})
    layer = inner.pop("layer", "Mamba1")
    if layer not in ("Mamba1", "Mamba2"):
        raise BadInput(f"state-spaces checkpoints are read with ssm_cfg.layer = 'Mamba1' or 'Mamba2', found {layer!r}")
    multiple = config.get("pad_vocab_size_multiple", 8)
    plain = {
        "hidden_size": config["d_model"], "num_hidden_layers": config["n_layer"],
        "vocab_size": -(-config["vocab_size"] // multiple) * multiple,
        "tie_word_embeddings": config.get("tie_embeddings", True),
    }
    shared = {"d_state": "state", "d_conv": "conv", "expand": "expand", "conv_bias": "conv_bias", "bias": "bias"}
    if layer == "Mamba1":
        names = {**shared, "dt_rank": "dt_rank"}
    else:
        names = {**shared, "headdim": "head_dim", "ngroups": "groups"}
        only(inner, "state-spaces Mamba2", norm_before_gate=(False,), rmsnorm=(True,), D_has_hdim=(False,), d_ssm=(None,))
        for name in ("norm_before_gate", "rmsnorm", "D_has_hdim", "d_ssm"):
            inner.pop(name, None)
    # how a layer starts and which of its kernels run says nothing about trained weights
    for name in ("dt_min", "dt_max", "dt_init", "dt_scale", "dt_init_floor", "A_init_range", "use_fast_path", "chunk_size",
                 "use_mem_eff_path"):
        inner.pop(name, None)
    unknown = sorted(inner.keys() - names.keys())
    if unknown:
        raise BadInput(f"state-spaces checkpoints with ssm_cfg.{unknown[0]} are not read; {', '.join(sorted(names))} are known")
    settings = {names[name]: value for name, value in inner.items() if not (name == "dt_rank" and value == "auto")}
    return _model(plain, (Mamba if layer == "Mamba1" else Mamba2)(**settings), 1e-5)


def _reader(embedding: str) -> Any:
    def tensors(source: Tensors, spec: SequenceModel) -> dict[str, Tensor]:
        name = embedding if f"backbone.{embedding}.weight" in source else "embedding"  # either spelling is in use
        found = {
            "stem.weight": source.take(f"backbone.{name}.weight"), "stack.norm.weight": source.take("backbone.norm_f.weight"),
        }
        if not spec.head.tie:
            found["head.weight"] = source.take("lm_head.weight")
        source.drop("lm_head.weight")
        inside = _names(spec)
        for i in range(len(spec.stack.blocks)):
            ours, theirs = f"stack.blocks.{i}", f"backbone.layers.{i}"
            found[f"{ours}.mixer_norm.weight"] = source.take(f"{theirs}.norm.weight")
            for name in inside:
                tensor = source.take(f"{theirs}.mixer.{name}")
                found[f"{ours}.mixer.{name}"] = tensor.squeeze(1) if name == "conv1d.weight" else tensor
        return found

    return tensors


def _names(spec: SequenceModel) -> list[str]:
    """Names of a block's mixer's parameters."""
    with torch.device("meta"):
        layer = spec.stack.blocks[0].mixer.build(BuildContext(dim=spec.stack.dim))
    return [name for name, _ in layer.named_parameters()]


def is_original(config: Mapping[str, Any]) -> bool:
    """Whether a config.json without a model_type is one of the state-spaces repository."""
    return "model_type" not in config and {"d_model", "n_layer", "vocab_size"} <= config.keys()


LAYOUTS = {"mamba": Layout(mamba_spec, _reader("embeddings")), "mamba2": Layout(mamba2_spec, _reader("embeddings"))}
ORIGINAL = Layout(original_spec, _reader("embedding"))
