"""Checkpoints of flash-linear-attention's models: a table of families, each its mixer's settings and its names.

x + mixer(RMSNorm x), then x + SwiGLU(RMSNorm x); at the layers that `attn` lists, softmax attention instead of the family's
mixer. Their library is not needed: what a config.json leaves out has the value its configuration class gives it. Convolutions
and projections that we stack are separate there (q, k and v).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from seqloom.core import BadInput, Spec
from seqloom.hub.foreign.layout import Config, Layout, Made, Names, Rules, Source, bare, model, only
from seqloom.mixers import (
    HGRN,
    DeltaNet,
    DeltaProduct,
    GatedDeltaNet,
    GatedLinearAttention,
    GatedSlotAttention,
    LinearAttention,
    MixtureOfMemories,
    Retention,
    SoftmaxAttention,
)
from seqloom.models import Block, SequenceModel
from seqloom.parts import SwiGLU

NORM_EPS = 1e-5  # of their norms where a model does not hand on its own


class Family(NamedTuple):
    """One of their kinds of model.

    key:      our mixer's, in the table of mixers
    mixer:    settings -> that mixer
    names:    ours -> theirs, in a block
    defaults: what its configuration class has where config.json says nothing (see SHARED for the rest)
    only:     settings of which only these values have a counterpart
    top:      ours -> theirs, outside the blocks
    note:     what is read and what is not
    """

    key: str
    mixer: Callable[[Config], Spec]
    names: Rules
    defaults: Mapping[str, Any]
    only: Mapping[str, tuple] = {}
    top: Rules = {}
    note: str = ""


SHARED = {
    "hidden_size": 2048, "num_hidden_layers": 24, "vocab_size": 32000, "hidden_ratio": 4, "intermediate_size": None,
    "hidden_act": "swish", "norm_eps": 1e-6, "tie_word_embeddings": False, "attn": None, "attnres_block_size": None,
}
ALWAYS = {"hidden_act": ("swish", "silu"), "attnres_block_size": (None,), "elementwise_affine": (True, None)}


def hidden(config: Config) -> int:
    """The inner width of the channel mixer: two thirds of hidden_ratio times the width, up to a multiple of 256."""
    plain = int(config["hidden_size"] * (config["hidden_ratio"] or 4) * 2 / 3)
    return config["intermediate_size"] or -(-plain // 256) * 256


def expanded(config: Config) -> dict[str, Any]:
    """Heads, and their widths as shares of the model's."""
    heads = config["num_heads"]
    width = lambda share: round(config["hidden_size"] * share) // heads  # noqa: E731
    return {"heads": heads, "key_dim": width(config["expand_k"]), "value_dim": width(config["expand_v"])}


def fixed(config: Config) -> dict[str, Any]:
    """Heads of head_dim channels, those of values expand_v times as wide."""
    key = config["head_dim"]
    return {"heads": config["num_heads"], "key_dim": key, "value_dim": round(key * config["expand_v"])}


def conv(config: Config) -> int:
    return config["conv_size"] if config["use_short_conv"] else 0


def _gate(on: bool) -> Any:
    return "silu" if on else "none"


def _called(activation: str) -> Any:
    """Our name of a function of theirs."""
    return {"identity": "none", "swish": "silu"}.get(activation, activation)


# Mixers ---------------------------------------------------------------------------------------------------------------

def attention(config: Config, found: Mapping[str, Any]) -> SoftmaxAttention:
    """Softmax attention with these settings of a hybrid's `attn`, or of a model of attention alone."""
    return SoftmaxAttention(
        heads=found["num_heads"], kv_heads=found.get("num_kv_heads"), window=found.get("window_size"),
        rope_theta=float(found.get("rope_theta") or 10000.0), bias="qkv" if found.get("qkv_bias") else "none",
        qk_norm="rms" if found.get("qk_norm") else "none", norm_eps=NORM_EPS,
    )


def gla(c: Config) -> Spec:
    return GatedLinearAttention(**expanded(c), conv=conv(c), norm_eps=c["norm_eps"])


def retnet(c: Config) -> Spec:
    return Retention(**expanded(c), gate=_gate(c["use_output_gate"]), norm_eps=c["norm_eps"])


def linear_attn(c: Config) -> Spec:
    return LinearAttention(**expanded(c), feature=_called(c["feature_map"]), norm="rms", norm_eps=c["norm_eps"],
                           normaliser="sum" if c["norm_feature_map"] else "none")


def delta_net(c: Config) -> Spec:
    return DeltaNet(
        **expanded(c), conv=conv(c), activation=_called(c["qk_activation"]), key_norm=c["qk_norm"],
        beta="learned" if c["use_beta"] else "one", neg_eigval=c["allow_neg_eigval"], gate=_gate(c["use_gate"]),
        norm_eps=c["norm_eps"],
    )


def gated_deltanet(c: Config) -> Spec:
    sizes = fixed(c)
    if (c["num_v_heads"] or c["num_heads"]) != c["num_heads"]:
        sizes |= {"heads": c["num_v_heads"], "key_heads": c["num_heads"]}
    return GatedDeltaNet(**sizes, conv=conv(c), neg_eigval=c["allow_neg_eigval"], gate=_gate(c["use_gate"]),
                         norm_eps=c["norm_eps"])


def gated_deltaproduct(c: Config) -> Spec:
    return DeltaProduct(**fixed(c), steps=c["num_householder"], conv=conv(c), neg_eigval=c["allow_neg_eigval"],
                        decay=c["use_forget_gate"], gate=_gate(c["use_output_gate"]), norm_eps=c["norm_eps"])


def hgrn(c: Config) -> Spec:
    return HGRN(recurrence="real", norm="rms", bias=False, lower_bounds="shifted" if c["use_lower_bound"] else "none",
                expand=c["expand_ratio"] or 1, conv=conv(c), norm_eps=c["norm_eps"])


def gsa(c: Config) -> Spec:
    # its norm is fused with the output map and keeps that function's own epsilon, whatever norm_eps says
    sizes = expanded(c)
    return GatedSlotAttention(
        **sizes, kv_heads=c["num_kv_heads"], slots=c["num_slots"] or sizes["key_dim"], feature=_called(c["feature_map"]),
        tau=float(c["gate_logit_normalizer"]), scale=1.0, norm_eps=NORM_EPS,
    )


def mom(c: Config) -> Spec:
    return MixtureOfMemories(
        **fixed(c), memories=c["num_memories"], active=c["topk"], shared=c["shared_mem"], single_kv=c["single_kv_proj"],
        conv=conv(c), gate=_gate(c["use_output_gate"]), balance=c["aux_loss_scale"], norm_eps=c["norm_eps"],
    )


# Names ----------------------------------------------------------------------------------------------------------------

QKV: Rules = {
    "mixer.qkv": tuple(f"attn.{name}_proj" for name in "qkv"), "mixer.conv": tuple(f"attn.{name}_conv1d" for name in "qkv"),
    "mixer.g_proj": "attn.g_proj", "mixer.o_norm": "attn.o_norm", "mixer.o_proj": "attn.o_proj",
}
GATED_NORM: list[Any] = ["attn.g_norm_swish_gate", "attn.g_norm"]  # one fused with the gate, or not
DELTA: Rules = {**QKV, **{f"mixer.{name}": f"attn.{name}" for name in ("b_proj", "a_proj", "A_log", "dt_bias")}}
ATTENTION: Rules = {"mixer.qkv": QKV["mixer.qkv"], "mixer.out": "attn.o_proj", "mixer.q_norm": "attn.q_norm",
                    "mixer.k_norm": "attn.k_norm"}


def memories(letter: str) -> Callable[[MixtureOfMemories], Source]:
    """A projection to each memory's keys (values, ..), the shared one last; or the one that all memories have in common."""

    def names(mixer: MixtureOfMemories) -> Source:
        own = () if mixer.single_kv else tuple(f"attn.{letter}_proj.{m}" for m in range(mixer.memories))
        return own + ((f"attn.shared_{letter}",) if mixer.single_kv or mixer.shared else ())

    return names


# Families -------------------------------------------------------------------------------------------------------------

EXPANDED = {"num_heads": 4, "num_kv_heads": None, "expand_k": 1.0, "expand_v": 1.0, "use_short_conv": False, "conv_size": 4}
FIXED = {"num_heads": 6, "head_dim": 256, "expand_v": 2.0, "num_hidden_layers": 21, "use_short_conv": True, "conv_size": 4,
         "allow_neg_eigval": False}

FAMILIES = {
    "gla": Family(
        "gated_linear", gla, {**QKV, "mixer.a_proj": "attn.gk_proj", "mixer.o_norm": GATED_NORM},
        {**EXPANDED, "expand_k": 0.5}, only={"num_kv_heads": (None,), "feature_map": (None,), "clamp_min": (None,),
                                             "use_output_gate": (True,)},
    ),
    "retnet": Family(
        "retention", retnet, {**QKV, "mixer.o_norm": GATED_NORM},
        {**EXPANDED, "num_heads": 8, "expand_v": 2.0, "hidden_ratio": 2, "use_output_gate": True},
        only={"num_kv_heads": (None,), "feature_map": (None,)},
    ),
    "linear_attn": Family(
        "linear", linear_attn, {"mixer.qkv": QKV["mixer.qkv"], "mixer.out": "attn.o_proj", "mixer.o_norm": "attn.norm"},
        {**EXPANDED, "norm_feature_map": False},
        only={"num_kv_heads": (None,), "feature_map": ("elu", "relu", "identity"), "norm_q": (False,), "norm_k": (False,)},
    ),
    "delta_net": Family(
        "delta", delta_net, DELTA,
        {**EXPANDED, "num_heads": 16, "use_short_conv": True, "allow_neg_eigval": False, "use_gate": False, "use_beta": True,
         "qk_norm": "l2", "qk_activation": "silu"},
        only={"qk_norm": ("l2", "sum"), "qk_activation": ("silu", "relu", "elu", "identity")},
    ),
    "gated_deltanet": Family(
        "gated_delta", gated_deltanet, DELTA, {**FIXED, "num_v_heads": None, "use_gate": True},
        only={"output_gate_activation": ("swish", "silu")},
    ),
    "gated_deltaproduct": Family(
        "delta_product", gated_deltaproduct, DELTA,
        {**FIXED, "num_householder": 1, "use_forget_gate": False, "use_output_gate": True},
    ),
    "hgrn": Family(
        "hgrn", hgrn,
        {**{f"mixer.{name}": f"attn.{name}" for name in ("i_proj", "f_proj", "g_proj", "g_norm", "o_proj")},
         "mixer.conv": ("attn.i_conv1d", "attn.f_conv1d")},
        {"expand_ratio": 1, "use_short_conv": False, "conv_size": 4, "use_lower_bound": True},
        top={"stack.shared": Made(("model.lower_bounds",), bare)},
    ),
    "gsa": Family(
        "gated_slot", gsa,
        {**QKV, "mixer.f_proj": "attn.f_proj", "mixer.o_norm": "attn.g_norm", "mixer.feature": "attn.feature_map.layer"},
        {**EXPANDED, "num_slots": 64, "feature_map": "swish", "gate_logit_normalizer": 8},
        only={"use_short_conv": (False,), "expand_v": (1,), "feature_map": ("swish", "relu", "t2r")},
        note="its short convolution would apply SiLU twice",
    ),
    "mom": Family(
        "mom", mom,
        {**DELTA, **{f"mixer.{letter}_proj": memories(letter) for letter in "kvba"}, "mixer.q_proj": "attn.q_proj",
         "mixer.router": "attn.gate"},
        {**FIXED, "num_heads": 4, "expand_v": 1.0, "num_hidden_layers": 24, "use_output_gate": True, "num_memories": 4,
         "topk": 2, "shared_mem": True, "single_kv_proj": False, "aux_loss_scale": 0.01},
        only={"mom_backend": ("gated_deltanet",), "use_short_conv": (True,)},
    ),
    "transformer": Family(
        "softmax", lambda c: attention(c, c), ATTENTION,
        {"num_heads": 32, "num_kv_heads": None, "qkv_bias": False, "qk_norm": False, "window_size": None, "rope_theta": 1e4},
    ),
}


def spec_of(kind: str, family: Family) -> Callable[[Config], SequenceModel]:
    def spec(config: Config) -> SequenceModel:
        config = {**SHARED, **family.defaults, **config}
        if "expand_k" in family.defaults and config["num_kv_heads"] == config["num_heads"]:
            config["num_kv_heads"] = None  # the same said otherwise
        only(config, kind, **ALWAYS, **family.only)
        eps, mlp, mixer = config["norm_eps"], SwiGLU(hidden=hidden(config)), family.mixer(config)
        mixers = [mixer] * config["num_hidden_layers"]
        listed = config["attn"] or []
        for found in [listed] if isinstance(listed, Mapping) else listed:
            for i in found["layers"]:
                if not 0 <= i < len(mixers):
                    raise BadInput(f"attn lists layer {i} of a model of {len(mixers)}")
                mixers[i] = attention(config, found)
        return model(config, (Block(mixer=each, mlp=mlp, norm_eps=eps) for each in mixers), eps)

    return spec


def names_of(family: Family) -> Names:
    return Names(
        top={"stem": "model.embeddings", "stack.norm": "model.norm", "head": "lm_head", **family.top},
        layer="model.layers.{}",
        block={
            "mixer_norm": "attn_norm", "mlp_norm": "mlp_norm", "mlp.down": "mlp.down_proj",
            "mlp.gate_up": [("mlp.gate_proj", "mlp.up_proj"), "mlp.gate_proj"],  # files of 2024 have both in one
        },
        mixers={family.key: family.names, "softmax": ATTENTION}, ignored=("rotary.inv_freq",),
    )


def note_of(family: Family) -> str:
    """What is read of a family: the settings that have one value here."""
    said = [f"{name} {' or '.join(map(str, values))}" for name, values in family.only.items()]
    return ("with " + ", ".join(said) if said else "") + (f"; {family.note}" if family.note else "")


LAYOUTS = {
    kind: Layout(spec_of(kind, family), names_of(family), "flash-linear-attention", note_of(family))
    for kind, family in FAMILIES.items()
}
