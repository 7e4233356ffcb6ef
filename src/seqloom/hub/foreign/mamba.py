"""Mamba, Mamba-2 and Falcon-Mamba checkpoints: transformers' layout, and that of the original state-spaces repository.

x + mixer(RMSNorm x), without channel mixers. The mixers' parameters have the same names here, but the convolution's weight
is [D, W] and there [D, 1, W]. A residual stream kept in float32 under half-precision weights has no counterpart.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from seqloom.core import BadInput
from seqloom.hub.foreign.layout import Config, Layout, Made, Names, Rules, model, normalised, ones, only
from seqloom.mixers import Mamba, Mamba2
from seqloom.models import Block, SequenceModel


def _model(config: Config, mixer: Any, eps: float) -> SequenceModel:
    return model(config, (Block(mixer=mixer, mlp=None, norm_eps=eps),) * config["num_hidden_layers"], eps)


def _normalised(config: Config, model_type: str) -> Config:
    """As transformers reads it; flash-linear-attention writes the same kinds of files with other names of two settings."""
    for theirs, name in (("norm_eps", "layer_norm_epsilon"), ("dt_limit", "time_step_limit")):
        if theirs in config:
            config = {name: config[theirs], **config}
    config = normalised(config, model_type)
    only(config, model_type, hidden_act=("silu", "swish"), rmsnorm=(True,), norm_before_gate=(False,), D_has_hdim=(False,))
    return config


def _mixer(config: Config, **settings: Any) -> Mamba:
    return Mamba(
        state=config["state_size"], expand=config["expand"], conv=config["conv_kernel"], dt_rank=config["time_step_rank"],
        conv_bias=config["use_conv_bias"], bias=config["use_bias"], **settings,
    )


def mamba_spec(config: Config) -> SequenceModel:
    config = _normalised(config, "mamba")
    return _model(config, _mixer(config), config["layer_norm_epsilon"])


def falcon_spec(config: Config) -> SequenceModel:
    config = _normalised(config, "falcon_mamba")
    mixer = _mixer(config, inner_norm="rms", norm_eps=config["mixer_rms_eps"])
    return _model(config, mixer, config["layer_norm_epsilon"])


def mamba2_spec(config: Config) -> SequenceModel:
    config = _normalised(config, "mamba2")
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


def is_original(config: Mapping[str, Any]) -> bool:
    """Whether a config.json without a model_type is one of the state-spaces repository."""
    return "model_type" not in config and {"d_model", "n_layer", "vocab_size"} <= config.keys()


NAMES = Names(
    top={"stem": ["backbone.embeddings", "backbone.embedding"], "stack.norm": "backbone.norm_f", "head": "lm_head"},
    layer="backbone.layers.{}", block={"mixer_norm": "norm"}, mixers={key: {"mixer": "mixer"} for key in ("mamba", "mamba2")},
)
# Falcon-Mamba's norms inside the mixer have no weights
FALCON: Rules = {"mixer": "mixer", **{f"mixer.{name}_layernorm": Made((), ones) for name in ("dt", "b", "c")}}

BOTH = "transformers, flash-linear-attention"
LAYOUTS = {
    "mamba": Layout(mamba_spec, NAMES._replace(mixers={"mamba": NAMES.mixers["mamba"]}), BOTH),
    "mamba2": Layout(mamba2_spec, NAMES._replace(mixers={"mamba2": NAMES.mixers["mamba2"]}), BOTH),
    "falcon_mamba": Layout(falcon_spec, NAMES._replace(mixers={"mamba": FALCON})),
}
ORIGINAL = Layout(original_spec, NAMES, "state-spaces")
