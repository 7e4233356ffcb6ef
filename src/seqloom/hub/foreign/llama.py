"""Llama-type checkpoints in transformers' layout: Llama, Mistral, Qwen2 and Qwen3 (dense).

x + W_o attention(RMSNorm x), then x + SwiGLU(RMSNorm x). They differ in biases, norms of queries and keys, and windows.
Dropout of attention weights (training only) has no counterpart and is left out.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from seqloom.core import BadInput
from seqloom.hub.foreign.layout import Config, Layout, Tensors, normalised, only
from seqloom.mixers import SoftmaxAttention
from seqloom.models import Block, SequenceModel, Stack
from seqloom.models.sequence import language_model
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
        biased = bias or ("all" if config.get("attention_bias") else "none")
        eps, turn = config["rms_norm_eps"], rope(config)
        blocks = tuple(
            Block(
                mixer=SoftmaxAttention(
                    heads=config["num_attention_heads"], kv_heads=config["num_key_value_heads"],
                    head_dim=config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"],
                    window=window, bias=biased, qk_norm=qk_norm, norm_eps=eps, **turn,
                ),
                mlp=SwiGLU(hidden=config["intermediate_size"]), norm_eps=eps,
            )
            for window in windows(config)
        )
        stack = Stack(dim=config["hidden_size"], blocks=blocks, norm_eps=eps)
        return language_model(vocab=config["vocab_size"], stack=stack, tie=bool(config["tie_word_embeddings"]))

    return spec


def tensors(source: Tensors, spec: SequenceModel) -> dict[str, Tensor]:
    source.drop("rotary_emb.inv_freq")
    found = {"stem.weight": source.take("model.embed_tokens.weight"), "stack.norm.weight": source.take("model.norm.weight")}
    if not spec.head.tie:
        found["head.weight"] = source.take("lm_head.weight")
    source.drop("lm_head.weight")
    for i, block in enumerate(spec.stack.blocks):
        ours, theirs = f"stack.blocks.{i}", f"model.layers.{i}"
        for kind in ("weight", "bias"):
            if kind == "weight" or block.mixer.bias != "none":
                parts = [source.take(f"{theirs}.self_attn.{name}_proj.{kind}") for name in "qkv"]
                found[f"{ours}.mixer.qkv.{kind}"] = torch.cat(parts)
            if kind == "weight" or block.mixer.bias == "all":
                found[f"{ours}.mixer.out.{kind}"] = source.take(f"{theirs}.self_attn.o_proj.{kind}")
        if block.mixer.qk_norm == "rms":
            for name in ("q_norm", "k_norm"):
                found[f"{ours}.mixer.{name}.weight"] = source.take(f"{theirs}.self_attn.{name}.weight")
        gate_up = [source.take(f"{theirs}.mlp.{name}_proj.weight") for name in ("gate", "up")]
        found[f"{ours}.mlp.gate_up.weight"] = torch.cat(gate_up)
        found[f"{ours}.mlp.down.weight"] = source.take(f"{theirs}.mlp.down_proj.weight")
        found[f"{ours}.mixer_norm.weight"] = source.take(f"{theirs}.input_layernorm.weight")
        found[f"{ours}.mlp_norm.weight"] = source.take(f"{theirs}.post_attention_layernorm.weight")
    return found


LAYOUTS = {
    "llama": Layout(spec_of("llama", None), tensors),
    "mistral": Layout(spec_of("mistral", "none"), tensors),
    "qwen2": Layout(spec_of("qwen2", "qkv"), tensors),
    "qwen3": Layout(spec_of("qwen3", None, "rms"), tensors),
}
