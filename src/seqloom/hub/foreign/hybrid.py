"""Checkpoints of transformers' hybrids: Jamba and Bamba (Mamba beside attention), Qwen3-Next and Qwen3.5 (gated DeltaNet beside
gated attention). Each block is x + mixer(RMSNorm x), then x + SwiGLU(RMSNorm x); where the SwiGLU is a mixture of experts
the checkpoint is refused.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from seqloom.core import BadInput, Spec
from seqloom.hub.foreign.layout import Config, Layout, Made, Names, Rules, model, normalised, only, plus_one
from seqloom.hub.foreign.llama import ATTENTION, BLOCK, NAMES, TOP, attention, rope
from seqloom.mixers import GatedDeltaNet, Mamba, Mamba2, SoftmaxAttention
from seqloom.models import Block, SequenceModel
from seqloom.parts import SwiGLU


def dense(kind: str, experts: Iterable[int]) -> None:
    """Raise BadInput if some blocks are mixtures of experts."""
    found = list(experts)
    if found:
        raise BadInput(f"{kind} checkpoints are read without mixtures of experts, and this one has them in {len(found)} blocks "
                       f"(from block {found[0]}): there is no channel mixer with routed experts")


def _model(config: Config, mixers: Iterable[Spec]) -> SequenceModel:
    eps, mlp = config["rms_norm_eps"], SwiGLU(hidden=config["intermediate_size"])
    return model(config, (Block(mixer=mixer, mlp=mlp, norm_eps=eps) for mixer in mixers), eps)


def jamba(config: Config) -> SequenceModel:
    config = normalised(config, "jamba")
    only(config, "jamba", hidden_act=("silu", "swish"))
    depth = range(config["num_hidden_layers"])
    dense("jamba", (i for i in depth if config["num_experts"] > 1
                    and i % config["expert_layer_period"] == config["expert_layer_offset"]))
    attend = SoftmaxAttention(**attention(config), position="none")
    mamba = Mamba(
        state=config["mamba_d_state"], expand=config["mamba_expand"], conv=config["mamba_d_conv"],
        dt_rank=config["mamba_dt_rank"], conv_bias=config["mamba_conv_bias"], bias=config["mamba_proj_bias"],
        inner_norm="rms", norm_eps=config["rms_norm_eps"],
    )
    return _model(config, (attend if i % config["attn_layer_period"] == config["attn_layer_offset"] else mamba for i in depth))


def bamba(config: Config) -> SequenceModel:
    config = normalised(config, "bamba")
    only(config, "bamba", hidden_act=("silu", "swish"), mlp_bias=(False, None))
    low, high = config["time_step_limit"] or (0.0, math.inf)
    attend = SoftmaxAttention(**attention(config), **rope(config), bias="all" if config["attention_bias"] else "none")
    mamba = Mamba2(
        state=config["mamba_d_state"], head_dim=config["mamba_d_head"], expand=config["mamba_expand"],
        groups=config["mamba_n_groups"], conv=config["mamba_d_conv"], conv_bias=config["mamba_conv_bias"],
        bias=config["mamba_proj_bias"], dt_limit=(float(low), None if math.isinf(high) else float(high)),
        norm_eps=config["rms_norm_eps"],
    )
    attended = config["attn_layer_indices"] or ()
    return _model(config, (attend if i in attended else mamba for i in range(config["num_hidden_layers"])))


def qwen(model_type: str) -> Callable[[Config], SequenceModel]:
    def spec(config: Config) -> SequenceModel:
        config = normalised(config, model_type)
        only(config, model_type, hidden_act=("silu", "swish"))
        step, plain = config.get("decoder_sparse_step", 1), config.get("mlp_only_layers") or ()
        depth = range(config["num_hidden_layers"])
        dense(model_type, (i for i in depth if config.get("num_experts", 0) and i not in plain and (i + 1) % step == 0))
        eps = config["rms_norm_eps"]
        kinds = {
            "full_attention": SoftmaxAttention(
                **attention(config), **rope(config), bias="all" if config["attention_bias"] else "none", qk_norm="rms",
                norm_eps=eps, gate="sigmoid",
            ),
            "linear_attention": GatedDeltaNet(
                heads=config["linear_num_value_heads"], key_heads=config["linear_num_key_heads"],
                key_dim=config["linear_key_head_dim"], value_dim=config["linear_value_head_dim"],
                conv=config["linear_conv_kernel_dim"], norm_eps=eps,
            ),
        }
        unknown = sorted(set(config["layer_types"]) - kinds.keys())
        if unknown:
            raise BadInput(f"layer type {unknown[0]!r} is not read; {' and '.join(kinds)} are")
        return _model(config, (kinds[kind] for kind in config["layer_types"]))

    return spec


# Names ----------------------------------------------------------------------------------------------------------------

BESIDE: Rules = {"mlp.gate_up": ("feed_forward.gate_proj", "feed_forward.up_proj"), "mlp.down": "feed_forward.down_proj",
          "mixer_norm": "input_layernorm", "mlp_norm": "pre_ff_layernorm"}


def beside(key: str) -> Names:
    """Names where layers of the mixer called `key` stand beside attention."""
    return Names(top={**TOP, "stack.norm": "model.final_layernorm"}, layer="model.layers.{}", block=BESIDE,
                 mixers={key: {"mixer": "mamba"}, "softmax": ATTENTION}, ignored=NAMES.ignored)


def _one_more(*names: str) -> dict[str, Made]:
    """Norms whose weights are stored as differences from 1: ours and theirs alternating."""
    pairs = zip(names[::2], names[1::2], strict=True)
    return {f"{ours}.weight": Made((f"{theirs}.weight",), plus_one) for ours, theirs in pairs}


def _queries(part: int) -> Callable[..., Tensor]:
    """q_proj holds each head's query, then its gate. Part 0 is qkv, part 1 the gate."""

    def make(parts: list[Tensor], like: Tensor, mixer: Any) -> Tensor:
        both = parts[0].unflatten(0, (mixer.heads, 2, -1))[:, part].flatten(0, 1)
        return torch.cat([both, *parts[1:]])

    return make


def _groups(which: str) -> Callable[..., Tensor]:
    """in_proj_qkvz holds, for each head of keys, q, k, and v and z of its value heads; in_proj_ba likewise b and a."""

    def make(parts: list[Tensor], like: Tensor, mixer: Any) -> Tensor:
        share = mixer.heads // mixer.key_heads
        widths = [mixer.key_dim, mixer.key_dim, share * mixer.value_dim, share * mixer.value_dim]
        names = ["q", "k", "v", "z"] if which in ("qkv", "z") else ["b", "a"]
        split = parts[0].unflatten(0, (mixer.key_heads, -1)).split(widths if len(names) == 4 else share, 1)
        found = {name: part.flatten(0, 1) for name, part in zip(names, split, strict=True)}
        return torch.cat([found[name] for name in which])

    return make


GATED_ATTENTION: Rules = {
    **{f"mixer.qkv.{kind}": Made(tuple(f"self_attn.{name}_proj.{kind}" for name in "qkv"), _queries(0))
       for kind in ("weight", "bias")},
    **{f"mixer.g_proj.{kind}": Made((f"self_attn.q_proj.{kind}",), _queries(1)) for kind in ("weight", "bias")},
    "mixer.out": "self_attn.o_proj",
    **_one_more("mixer.q_norm", "self_attn.q_norm", "mixer.k_norm", "self_attn.k_norm"),
}
DELTA: Rules = {
    "mixer.conv": "linear_attn.conv1d", "mixer.o_norm": "linear_attn.norm", "mixer.o_proj": "linear_attn.out_proj",
    "mixer.A_log": "linear_attn.A_log", "mixer.dt_bias": "linear_attn.dt_bias",
    "mixer.qkv": "linear_attn.in_proj_qkv", "mixer.g_proj": "linear_attn.in_proj_z",
    "mixer.b_proj": "linear_attn.in_proj_b", "mixer.a_proj": "linear_attn.in_proj_a",
}
JOINED = {f"mixer.{ours}.weight": Made((f"linear_attn.in_proj_{theirs}.weight",), _groups(which)) for ours, theirs, which in (
    ("qkv", "qkvz", "qkv"), ("g_proj", "qkvz", "z"), ("b_proj", "ba", "b"), ("a_proj", "ba", "a"))}
QWEN_35 = Names(
    top={**TOP, **_one_more("stack.norm", "model.norm")}, layer="model.layers.{}",
    block={**BLOCK, **_one_more("mixer_norm", "input_layernorm", "mlp_norm", "post_attention_layernorm")},
    mixers={"gated_delta": DELTA, "softmax": GATED_ATTENTION}, ignored=NAMES.ignored,
)
QWEN_NEXT = QWEN_35._replace(mixers={"gated_delta": {**DELTA, **JOINED}, "softmax": GATED_ATTENTION})

LAYOUTS = {
    "jamba": Layout(jamba, beside("mamba"), note="without mixtures of experts, num_experts 1"),
    "bamba": Layout(bamba, beside("mamba2")),
    "qwen3_next": Layout(qwen("qwen3_next"), QWEN_NEXT, note="without mixtures of experts, num_experts 0"),
    "qwen3_5_text": Layout(qwen("qwen3_5_text"), QWEN_35, note="the language model alone, as Qwen3_5ForCausalLM saves it"),
}
