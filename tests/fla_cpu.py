"""flash-linear-attention's own models, on a CPU: their layers as they are, with Triton's part replaced by plain functions.

What is replaced: the scans, by the package's naive functions; norms, short convolutions,
rotations and gated sums, by their definitions. Everything else, which is what an importer can get wrong, is theirs: names,
shapes, defaults, scales, orders of operations.

`python tests/fla_cpu.py` writes tests/golden/fla.json anew: for each case the saved config.json, names and shapes of the
tensors, and the last scores of a model whose weights are numbers of a seed. With it the importers are tested where the
package is not installed.
"""

from __future__ import annotations

import importlib
import json
import warnings
from pathlib import Path
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F

RECORD = Path(__file__).parent / "golden" / "fla.json"
VOCAB, WIDTH, TOKENS, KEPT = 24, 32, 21, 3
SHARED = dict(hidden_size=WIDTH, num_hidden_layers=2, vocab_size=VOCAB, intermediate_size=40)
HYBRID = dict(SHARED, num_hidden_layers=3)
PACKAGES = {"gla": "GLA", "retnet": "RetNet", "linear_attn": "LinearAttention", "delta_net": "DeltaNet",
            "gated_deltanet": "GatedDeltaNet", "gated_deltaproduct": "GatedDeltaProduct", "hgrn": "HGRN", "gsa": "GSA",
            "mom": "Mom", "transformer": "Transformer"}
CASES = {
    "gla": dict(SHARED, num_heads=2),
    "gla-conv-tied": dict(SHARED, num_heads=4, expand_k=0.75, expand_v=1.5, use_short_conv=True, conv_size=3, norm_eps=1e-2,
                          fuse_norm=False, tie_word_embeddings=True, num_kv_heads=4),
    "gla-default-mlp": dict(SHARED, num_heads=2, intermediate_size=None),
    "retnet": dict(SHARED, num_heads=4),
    "retnet-plain": dict(SHARED, num_heads=2, expand_v=1.0, use_output_gate=False, norm_eps=1e-2),
    "linear_attn": dict(SHARED, num_heads=2, feature_map="elu", norm_feature_map=True, norm_eps=1e-2),
    "linear_attn-identity": dict(SHARED, num_heads=4, feature_map="identity", expand_k=0.5, expand_v=1.5),
    "delta_net": dict(SHARED, num_heads=2),
    "delta_net-gate": dict(SHARED, num_heads=4, expand_k=0.75, expand_v=1.25, use_gate=True, allow_neg_eigval=True,
                           use_beta=False, conv_size=3, qk_activation="relu", norm_eps=1e-2),
    "delta_net-sum": dict(SHARED, num_heads=2, use_short_conv=False, qk_norm="sum", qk_activation="elu"),
    "delta_net-hybrid": dict(HYBRID, num_heads=2, attn={"layers": [1], "num_heads": 4, "num_kv_heads": 2, "window_size": 7}),
    "gated_deltanet": dict(SHARED, num_heads=2, head_dim=12),
    "gated_deltanet-grouped": dict(SHARED, num_heads=2, num_v_heads=6, head_dim=8, expand_v=1.25, use_short_conv=False,
                                   allow_neg_eigval=True, norm_eps=1e-2),
    "gated_deltanet-hybrid": dict(HYBRID, num_heads=2, head_dim=12, use_gate=False, attn=[
        {"layers": [0], "num_heads": 4, "qkv_bias": True}, {"layers": [2], "num_heads": 2, "rope_theta": 50.0}]),
    "gated_deltaproduct": dict(SHARED, num_heads=2, head_dim=12, num_householder=3, use_forget_gate=True,
                               allow_neg_eigval=True),
    "gated_deltaproduct-plain": dict(SHARED, num_heads=2, head_dim=8, expand_v=1.5, num_householder=2, use_output_gate=False,
                                     use_short_conv=False, norm_eps=1e-2),
    "hgrn": dict(HYBRID),
    "hgrn-conv": dict(SHARED, expand_ratio=2, use_short_conv=True, conv_size=3, use_lower_bound=False, norm_eps=1e-2),
    "hgrn-hybrid": dict(HYBRID, attn={"layers": [0], "num_heads": 2}, expand_ratio=2),
    "gsa": dict(SHARED, num_heads=2, num_slots=8),
    "gsa-t2r": dict(SHARED, num_heads=4, num_kv_heads=2, num_slots=None, feature_map="t2r", gate_logit_normalizer=3,
                    norm_eps=1e-2),
    "mom": dict(SHARED, num_heads=2, head_dim=8),
    "mom-single": dict(SHARED, num_heads=2, head_dim=8, expand_v=1.5, num_memories=3, topk=1, shared_mem=False,
                       single_kv_proj=True, use_output_gate=False, norm_eps=1e-2),
    "mom-shared-single": dict(SHARED, num_heads=2, head_dim=8, num_memories=3, single_kv_proj=True),
    "transformer": dict(SHARED, num_heads=4, num_kv_heads=2, qk_norm=True, qkv_bias=True, window_size=6, rope_theta=100.0),
}


# Plain functions --------------------------------------------------------------------------------------------------------

def each(function, lengths, *streams):
    """`function` on each sequence of a packed row; lengths None: on all as they are."""
    if lengths is None:
        return function(*streams)
    pieces = zip(*(x.split(lengths.diff().tolist(), 1) for x in streams), strict=True)
    return torch.cat([function(*piece) for piece in pieces], 1)


def rms(x, weight, eps):
    return F.rms_norm(x.float(), (x.shape[-1],), weight.float(), eps).to(x.dtype)


def norm(self, x, residual=None, prenorm=False, residual_in_fp32=False):
    total = x if residual is None else x + residual
    y = rms(total, self.weight, self.eps)
    return (y, total) if prenorm else y


def gated_norm(self, x, g, **_):
    return rms(x, self.weight, self.eps) * F.silu(g)


def convolution(self, x, residual=None, mask=None, cache=None, output_final_state=False, cu_seqlens=None, **_):
    width = self.weight.shape[-1]
    one = lambda x: F.conv1d(F.pad(x.mT, (width - 1, 0)), self.weight, self.bias, groups=x.shape[-1]).mT  # noqa: E731
    y = each(one, cu_seqlens, x)
    return (y if self.activation is None else F.silu(y)), None


def rotated(self, q, k, seqlen_offset=0, max_seqlen=None, **_):
    from fla.modules.rotary import ops

    self._update_cos_sin_cache(q.shape[1], device=q.device, dtype=q.dtype)
    cos, sin = (x[: q.shape[1]] for x in (self._cos_cached, self._sin_cached))
    return ops.rotary_embedding_ref(q, cos, sin), ops.rotary_embedding_ref(k, cos, sin)


def attend(q, k, v, causal, window_size):
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    age = torch.arange(q.shape[2])[:, None] - torch.arange(q.shape[2])
    seen = (age >= 0) & ((age <= window_size[0]) if window_size[0] >= 0 else True)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=seen, enable_gqa=True).transpose(1, 2)


def naive(module, name):
    return getattr(importlib.import_module(f"fla.ops.{module}.naive"), name)


def unit(x):
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-6)


def gla(*, q, k, v, gk, **_):
    return naive("gla", "naive_recurrent_gla")(q, k, v, gk)[0], None


def retention(*, q, k, v, **_):
    return naive("retention", "naive_retention")(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2), None


def linear_attention(*, q, k, v, normalize, **_):
    return naive("linear_attn", "naive_recurrent_linear_attn")(q, k, v, normalize=normalize)[0], None


def delta_rule(*, q, k, v, beta, use_qk_l2norm_in_kernel, **_):
    q, k = (unit(q), unit(k)) if use_qk_l2norm_in_kernel else (q, k)
    y, _ = naive("delta_rule", "delta_rule_recurrence")(*(x.transpose(1, 2) for x in (q, k, v, beta)))
    return y.transpose(1, 2), None


def gated_delta_rule(*, q, k, v, g, beta, cu_seqlens=None, A_log=None, dt_bias=None, use_gate_in_kernel=False,
                     use_beta_sigmoid_in_kernel=False, allow_neg_eigval=False, **_):
    if use_gate_in_kernel:
        g = -A_log.float().exp() * F.softplus(g.float() + dt_bias)
    if use_beta_sigmoid_in_kernel:
        beta = beta.sigmoid() * (2 if allow_neg_eigval else 1)
    g = torch.zeros_like(beta) if g is None else g
    q, k = (unit(x).repeat_interleave(v.shape[2] // x.shape[2], 2) for x in (q, k))
    recurrent = naive("gated_delta_rule", "naive_recurrent_gated_delta_rule")
    return each(lambda *streams: recurrent(*streams)[0], cu_seqlens, q, k, v, beta, g), None


def hgrn(*, x, g, **_):
    return naive("hgrn", "naive_recurrent_hgrn")(x, g)[0], None


def gsa(*, q, k, v, s, g, scale, **_):
    return naive("gsa", "naive_recurrent_gsa")(q, k, v, s, g, scale)[0], None


def norm_then_map(x, norm_weight, norm_bias, linear_weight, linear_bias, eps=1e-5, **_):
    return F.linear(rms(x, norm_weight, eps), linear_weight, linear_bias)


PLAIN = {
    "fla.modules.RMSNorm.forward": norm, "fla.modules.FusedRMSNormGated.forward": gated_norm,
    "fla.modules.ShortConvolution.forward": convolution, "fla.modules.RotaryEmbedding.forward": rotated,
    "fla.layers.gated_deltanet.GatedDeltaNet._use_fused_qkv_conv": lambda *_, **__: False,
    "fla.modules.mlp.SwiGLULinear.forward": lambda self, gate, up, weight, bias: F.linear(F.silu(gate) * up, weight, bias),
    "fla.layers.attn.flash_attn_func": attend, "fla.layers.gla.fused_recurrent_gla": gla,
    "fla.layers.multiscale_retention.fused_recurrent_retention": retention,
    "fla.layers.linear_attn.fused_recurrent_linear_attn": linear_attention,
    "fla.layers.delta_net.fused_recurrent_delta_rule": delta_rule,
    "fla.layers.gated_deltanet.fused_recurrent_gated_delta_rule": gated_delta_rule,
    "fla.layers.gated_deltaproduct.fused_recurrent_gated_delta_rule": gated_delta_rule,
    "fla.layers.mom.fused_recurrent_gated_delta_rule": gated_delta_rule,
    "fla.layers.hgrn.fused_recurrent_hgrn": hgrn, "fla.layers.hgrn.swiglu": lambda x, y: F.silu(x) * y,
    "fla.layers.gsa.fused_recurrent_gsa": gsa, "fla.layers.gsa.rms_norm_linear": norm_then_map,
    "fla.modules.feature_map.SwishFeatureMap.forward": lambda self, x: F.silu(x),
    # MoM sorts tokens by their memory and relies on ties staying in order, which a CPU's sort need not grant
    "torch.Tensor.argsort": lambda self, dim=-1: torch.sort(self, dim=dim, stable=True).indices,
    "fla.layers.linear_attn.elu_p1": lambda x: F.elu(x) + 1, "fla.layers.delta_net.elu_p1": lambda x: F.elu(x) + 1,
}


class plain:
    """While this is entered, their models run on a CPU."""

    def __enter__(self):
        self.patches = [mock.patch(name, function) for name, function in PLAIN.items()]
        acts = importlib.import_module("fla.modules.activations").ACT2FN
        self.patches.append(mock.patch.dict(acts, {"swish": F.silu}))
        for patch in self.patches:
            patch.start()

    def __exit__(self, *_):
        for patch in self.patches:
            patch.stop()


# Models -----------------------------------------------------------------------------------------------------------------

def weights(shapes: dict[str, list[int]]) -> dict[str, torch.Tensor]:
    """Numbers that are the same on every machine: factors near 1, rates and steps within their range, maps at fan-in scale."""
    random, found = np.random.RandomState(0), {}
    for name, shape in sorted(shapes.items()):
        x = random.standard_normal(shape)
        if "norm" in name:
            x = 1 + 0.3 * x
        elif len(shape) == 2 and "embeddings" not in name and "lower_bounds" not in name:
            x = 1.5 * x / np.sqrt(shape[1])
        found[name] = torch.from_numpy(x).float()
    return found


def ids() -> torch.Tensor:
    return torch.from_numpy(np.random.RandomState(1).randint(0, VOCAB, (2, TOKENS)))


def model(case: str):
    """Their model, with `weights`."""
    kind = case.partition("-")[0]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        package = importlib.import_module(f"fla.models.{kind}")
        config = getattr(package, f"{PACKAGES[kind]}Config")(**CASES[case])
        made = getattr(package, f"{PACKAGES[kind]}ForCausalLM")(config).eval()
    shapes = {name: list(p.shape) for name, p in made.named_parameters()}
    with torch.no_grad():
        for name, value in weights(shapes).items():
            made.get_parameter(name).copy_(value)
    return made


def scores(made) -> torch.Tensor:
    with torch.no_grad():
        return made(ids(), use_cache=False, logits_to_keep=None).logits


def record() -> None:
    found = {}
    for case in CASES:
        with plain():
            made = model(case)
            logits = scores(made)[:, -KEPT:]
        found[case] = {
            "config": json.loads(made.config.to_json_string()),
            "tensors": {name: list(p.shape) for name, p in made.named_parameters()},
            "scores": [round(x, 6) for x in logits.flatten().tolist()],
        }
        print(case, float(logits.std()))
    RECORD.write_text(json.dumps(found, indent=0, sort_keys=True) + "\n")


if __name__ == "__main__":
    record()
