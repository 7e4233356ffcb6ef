"""Llama-type checkpoints in transformers' layout: Llama, Mistral, Qwen2 and Qwen3 (dense).

x + W_o attention(RMSNorm x), then x + SwiGLU(RMSNorm x). They differ in biases, norms of queries and keys, and windows.
Dropout of attention weights (training only) has no counterpart and is left out.
"""

from __future__ import annotations

import math
from typing import Any

from seqloom.core import BadInput
from seqloom.hub.foreign.layout import Config, Layout, Names, Rules, model, normalised, only
from seqloom.mixers import SoftmaxAttention
from seqloom.models import Block, SequenceModel
from seqloom.parts import SwiGLU
from seqloom.parts.positions import LinearScaling, Llama3Scaling, YarnScaling


def rope(config: Config) -> dict[str, Any]:
    """The settings of `SoftmaxAttention` that say how queries and keys turn."""
    found = config.get("rope_parameters") or {}
    kind = found.get("rope_type", "default")
    settings: dict[str, Any] = {
        "rope_theta": float(found.get("rope_theta", 10000.0)),
        "rope_fraction": float(found.get("partial_rotary_factor") or config.get("partial_rotary_factor") or 1.0),
    }
    if kind == "linear":
        settings["rope_scaling"] = LinearScaling(factor=float(found["factor"]))
    elif kind == "llama3":
        settings["rope_scaling"] = Llama3Scaling(
            factor=float(found["factor"]), low_freq_factor=float(found["low_freq_factor"]),
            high_freq_factor=float(found["high_freq_factor"]), original_length=found["original_max_position_embeddings"],
        )
    elif kind == "yarn":
        settings["rope_scaling"] = yarn(found, config)
    elif kind != "default":
        raise BadInput(f"rope_type {kind!r} is not read; checkpoints with default, linear, llama3 or yarn are")
    return settings


def yarn(found: Config, config: Config) -> YarnScaling:
    original = found["original_max_position_embeddings"]
    factor = found.get("factor") or config["max_position_embeddings"] / original
    grow = lambda weight: 0.1 * weight * math.log(factor) + 1 if factor > 1 else 1.0  # noqa: E731
    gain = found.get("attention_factor")
    if gain is None and found.get("mscale") and found.get("mscale_all_dim"):
        gain = grow(found["mscale"]) / grow(found["mscale_all_dim"])
    return YarnScaling(
        factor=float(factor), original_length=original, fast=float(found.get("beta_fast") or 32),
        slow=float(found.get("beta_slow") or 1), attention_gain=gain, whole_channels=found.get("truncate", True),
    )


def attention(config: Config) -> dict[str, Any]:
    """The settings of `SoftmaxAttention` that say how many heads of which width there are."""
    heads = config["num_attention_heads"]
    return {"heads": heads, "kv_heads": config["num_key_value_heads"],
            "head_dim": config.get("head_dim") or config["hidden_size"] // heads}


def windows(config: Config) -> list[int | None]:
    """The window of each layer."""
    depth, window = config["num_hidden_layers"], config.get("sliding_window")
    kinds = config.get("layer_types")
    if kinds is None:
        return [window] * depth
    known = {"full_attention": None, "sliding_attention": window}
    for kind in kinds:
        if kind not in known:
            raise BadInput(f"layer type {kind!r} is not read; full_attention and sliding_attention are")
    return [known[kind] for kind in kinds]


def spec_of(model_type: str, bias: str | None, qk_norm: str = "none") -> Any:
    """`bias`: which projections have one, or None: all of them if `attention_bias` says so."""

    def spec(config: Config) -> SequenceModel:
        config = normalised(config, model_type)
        only(config, model_type, hidden_act=("silu", "swish"), mlp_bias=(False, None))
        biased, eps = bias or ("all" if config.get("attention_bias") else "none"), config["rms_norm_eps"]
        settings = dict(attention(config), bias=biased, qk_norm=qk_norm, norm_eps=eps, **rope(config))
        mlp = SwiGLU(hidden=config["intermediate_size"])
        mixers = (SoftmaxAttention(window=window, **settings) for window in windows(config))
        return model(config, (Block(mixer=mixer, mlp=mlp, norm_eps=eps) for mixer in mixers), eps)

    return spec


# ours -> theirs, in transformers' decoders of this kind
ATTENTION: Rules = {
    "mixer.qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), "mixer.out": "self_attn.o_proj",
    "mixer.q_norm": "self_attn.q_norm", "mixer.k_norm": "self_attn.k_norm",
}
TOP: Rules = {"stem": "model.embed_tokens", "stack.norm": "model.norm", "head": "lm_head"}
BLOCK: Rules = {
    "mixer_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm",
    "mlp.gate_up": ("mlp.gate_proj", "mlp.up_proj"), "mlp.down": "mlp.down_proj",
}
NAMES = Names(top=TOP, layer="model.layers.{}", block=BLOCK, mixers={"softmax": ATTENTION}, ignored=("rotary_emb.inv_freq",))

NOTE = "rope_type default, linear, llama3 or yarn"
LAYOUTS = {
    "llama": Layout(spec_of("llama", None), NAMES, note=NOTE),
    "mistral": Layout(spec_of("mistral", "none"), NAMES, note=NOTE),
    "qwen2": Layout(spec_of("qwen2", "qkv"), NAMES, note=NOTE),
    "qwen3": Layout(spec_of("qwen3", None, "rms"), NAMES, note=NOTE),
}
