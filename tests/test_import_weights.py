"""Foreign checkpoints give the same scores: small random models made and saved by transformers stand in for downloads."""

from __future__ import annotations

import importlib
import inspect
import json

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from seqloom.core import BadInput
from seqloom.generate import generate
from seqloom.hub import SeqloomForCausalLM, export, import_checkpoint, load, wrap
from seqloom.hub.foreign import LAYOUTS, fla

VOCAB, WIDTH = 96, 32
SHARED = dict(vocab_size=VOCAB, hidden_size=WIDTH, num_hidden_layers=2, pad_token_id=0, bos_token_id=1, eos_token_id=2)
ATTENTION = dict(SHARED, intermediate_size=56, num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512,
                 attn_implementation="eager")


DEEP = dict(ATTENTION, num_hidden_layers=3)
QWEN = dict(DEEP, head_dim=16, layer_types=["linear_attention", "full_attention", "linear_attention"], linear_key_head_dim=6,
            linear_value_head_dim=5, linear_conv_kernel_dim=3, rms_norm_eps=0.02)


def rope(kind: str, **settings) -> dict:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 10000.0, **settings}}


CASES = {
    "llama": ("LlamaForCausalLM", dict(ATTENTION, rms_norm_eps=0.05)),
    "llama-tied-biased": ("LlamaForCausalLM", dict(ATTENTION, tie_word_embeddings=True, attention_bias=True, head_dim=12)),
    "llama-linear": ("LlamaForCausalLM", dict(ATTENTION, **rope("linear", factor=3.0))),
    "llama-llama3": ("LlamaForCausalLM", dict(ATTENTION, **rope(
        "llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=24))),
    "llama-yarn": ("LlamaForCausalLM", dict(ATTENTION, **rope("yarn", factor=4.0, original_max_position_embeddings=32))),
    "llama-yarn-mscale": ("LlamaForCausalLM", dict(ATTENTION, **rope(
        "yarn", factor=4.0, original_max_position_embeddings=32, mscale=1.2, mscale_all_dim=0.7, beta_fast=8.0,
        truncate=False))),
    "mistral": ("MistralForCausalLM", dict(ATTENTION, sliding_window=9)),
    "mistral-full": ("MistralForCausalLM", dict(ATTENTION, sliding_window=None, head_dim=16)),
    "qwen2": ("Qwen2ForCausalLM", dict(ATTENTION)),
    "qwen2-window": ("Qwen2ForCausalLM", dict(ATTENTION, use_sliding_window=True, sliding_window=7, max_window_layers=1)),
    "qwen3": ("Qwen3ForCausalLM", dict(ATTENTION, head_dim=16, rms_norm_eps=0.02)),
    "qwen3-biased": ("Qwen3ForCausalLM", dict(ATTENTION, head_dim=8, attention_bias=True, tie_word_embeddings=True)),
    "mamba": ("MambaForCausalLM", dict(SHARED, state_size=5, layer_norm_epsilon=0.05)),
    "mamba-biased": ("MambaForCausalLM", dict(
        SHARED, state_size=8, expand=1, conv_kernel=3, use_bias=True, use_conv_bias=False, time_step_rank=7,
        tie_word_embeddings=False)),
    "mamba2": ("Mamba2ForCausalLM", dict(
        SHARED, state_size=8, num_heads=4, head_dim=16, n_groups=2, chunk_size=16, layer_norm_epsilon=0.05)),
    "mamba2-biased": ("Mamba2ForCausalLM", dict(
        SHARED, state_size=6, num_heads=4, head_dim=8, expand=1, n_groups=1, use_bias=True, use_conv_bias=False, conv_kernel=2,
        tie_word_embeddings=True, time_step_limit=(0.01, 0.5))),
    "falcon_mamba": ("FalconMambaForCausalLM", dict(SHARED, state_size=5, layer_norm_epsilon=0.05, mixer_rms_eps=0.02)),
    "jamba": ("JambaForCausalLM", dict(
        DEEP, num_experts=1, attn_layer_period=3, attn_layer_offset=1, mamba_d_state=5, mamba_dt_rank=7, rms_norm_eps=0.02)),
    "jamba-biased": ("JambaForCausalLM", dict(
        DEEP, num_experts=4, expert_layer_period=9, expert_layer_offset=8, attn_layer_period=2, attn_layer_offset=0,
        mamba_d_state=4, mamba_expand=1, mamba_d_conv=3, mamba_conv_bias=False, mamba_proj_bias=True,
        tie_word_embeddings=True)),
    "bamba": ("BambaForCausalLM", dict(
        DEEP, attn_layer_indices=[1], mamba_n_heads=8, mamba_n_groups=2, mamba_d_state=6, mamba_chunk_size=16,
        rms_norm_eps=0.02)),
    "bamba-biased": ("BambaForCausalLM", dict(
        DEEP, attn_layer_indices=[0, 2], mamba_n_heads=4, mamba_d_head=8, mamba_expand=1, mamba_d_state=5, mamba_proj_bias=True,
        attention_bias=True, time_step_limit=(0.01, 0.5), tie_word_embeddings=True)),
    "qwen3_next": ("Qwen3NextForCausalLM", dict(QWEN, num_experts=0, linear_num_key_heads=2, linear_num_value_heads=4)),
    "qwen3_next-biased": ("Qwen3NextForCausalLM", dict(
        QWEN, num_experts=4, decoder_sparse_step=2, mlp_only_layers=[1], linear_num_key_heads=3, linear_num_value_heads=3,
        attention_bias=True, tie_word_embeddings=True)),
    "qwen3_5_text": ("Qwen3_5ForCausalLM", dict(QWEN, linear_num_key_heads=2, linear_num_value_heads=6)),
}


def made(case: str):
    """A foreign model with every parameter off its usual start, so that none can be mistaken for another."""
    name, settings = CASES[case]
    cls = getattr(transformers, name)
    model = cls(cls.config_class(**settings)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


@pytest.fixture(autouse=True)
def plain_delta_rule(monkeypatch):
    """transformers hands the delta rule to flash-linear-attention where that is installed, whose kernels need a GPU."""
    for kind in ("qwen3_next", "qwen3_5"):
        module = importlib.import_module(f"transformers.models.{kind}.modeling_{kind}")
        for name in ("torch_chunk_gated_delta_rule", "torch_recurrent_gated_delta_rule"):
            monkeypatch.setattr(module, name, inspect.unwrap(getattr(module, name)))


@pytest.fixture(params=sorted(CASES))
def checkpoint(request, tmp_path):
    model = made(request.param)
    model.save_pretrained(tmp_path)
    return model, tmp_path


def scores(model, ids):
    with torch.no_grad():
        return model(ids).logits.double()


@pytest.mark.peer
def test_the_scores_are_the_same(checkpoint):
    theirs, folder = checkpoint
    ours, spec = import_checkpoint(folder)
    ids = torch.randint(0, VOCAB, (2, 37))
    want, got = scores(theirs, ids), scores(ours, ids)
    assert spec == ours.spec and not ours.training and want.std() > 0.1
    assert (got - want).abs().max() <= 1e-4 * max(1.0, float(want.abs().max()))


@pytest.mark.peer
def test_every_setting_matters(checkpoint):
    """The comparison above would see a wrong spec: an importer that read another model's settings would fail it."""
    theirs, folder = checkpoint
    config = json.loads((folder / "config.json").read_text())
    altered = {
        "rms_norm_eps": lambda value: 0.5, "layer_norm_epsilon": lambda value: 0.5, "mixer_rms_eps": lambda value: 0.5,
        "sliding_window": lambda value: 3 if value else value,
        "rope_parameters": lambda value: {**value, "rope_theta": 20.0},
    }
    ids = torch.randint(0, VOCAB, (1, 37))
    want = scores(theirs, ids)
    for name, change in altered.items():
        if config.get(name) and change(config[name]) != config[name]:
            (folder / "config.json").write_text(json.dumps({**config, name: change(config[name])}))
            assert (scores(import_checkpoint(folder)[0], ids) - want).abs().max() > 1e-3, name


def test_it_generates_and_is_saved_as_ours(checkpoint, tmp_path):
    _, folder = checkpoint
    ours, _ = import_checkpoint(folder, dtype=torch.float64)
    prompts = [[5, 6, 7, 8, 9], [11, 12]]
    export(ours, None, tmp_path / "ours")
    again, tokenizer = load(tmp_path / "ours")
    assert tokenizer is None and again.spec == ours.spec and {p.dtype for p in again.parameters()} == {torch.float64}
    assert generate(again, prompts, max_new_tokens=6) == generate(ours, prompts, max_new_tokens=6)
    loaded, _ = load(folder, dtype=torch.float64)
    assert generate(loaded, prompts, max_new_tokens=6) == generate(ours, prompts, max_new_tokens=6)


def test_as_a_transformers_model_it_scores_padded_batches_like_single_rows(checkpoint):
    _, folder = checkpoint
    model = wrap(import_checkpoint(folder, dtype=torch.float64)[0])
    assert isinstance(model, SeqloomForCausalLM)
    ids = torch.randint(0, VOCAB, (1, 9))
    padded = torch.cat([torch.zeros(1, 4, dtype=torch.int64), ids], 1)
    mask = torch.cat([torch.zeros(1, 4, dtype=torch.int64), torch.ones_like(ids)], 1)
    torch.testing.assert_close(model(padded, attention_mask=mask).logits[:, 4:], model(ids).logits, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", ["mamba", "mamba2"])
@pytest.mark.parametrize("tied", [True, False])
def test_the_original_state_spaces_layout(kind, tied, tmp_path):
    name, settings = CASES[kind]
    settings = dict(settings, tie_word_embeddings=tied, layer_norm_epsilon=1e-5)
    cls = getattr(transformers, name)
    theirs = cls(cls.config_class(**settings)).eval()
    theirs.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors = {key.replace("embeddings.", "embedding."): value for key, value in tensors.items()}
    tensors["lm_head.weight"] = (tensors["backbone.embedding.weight"] if tied else tensors["lm_head.weight"]).clone()
    save_file(tensors, tmp_path / "model.safetensors")
    inner = {"d_state": settings["state_size"], "dt_min": 0.001}
    if kind == "mamba2":
        inner |= {"layer": "Mamba2", "headdim": settings["head_dim"], "ngroups": settings["n_groups"], "chunk_size": 16}
    config = {"d_model": WIDTH, "n_layer": 2, "vocab_size": VOCAB - 3, "ssm_cfg": inner, "rms_norm": True,
              "residual_in_fp32": True, "fused_add_norm": True, "pad_vocab_size_multiple": 8, "tie_embeddings": tied}
    (tmp_path / "config.json").write_text(json.dumps(config))
    ours, spec = import_checkpoint(tmp_path)
    ids = torch.randint(0, VOCAB, (2, 21))
    assert spec.head.tie is tied
    torch.testing.assert_close(scores(ours, ids), scores(theirs, ids), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["mamba", "mamba2-biased"])
def test_names_of_settings_in_flash_linear_attention(kind, tmp_path):
    made(kind).save_pretrained(tmp_path)
    _, spec = import_checkpoint(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    renamed = {"layer_norm_epsilon": "norm_eps", "time_step_limit": "dt_limit"}
    config = {renamed.get(name, name): value for name, value in config.items()}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert import_checkpoint(tmp_path)[1] == spec
    change(tmp_path, norm_before_gate=True)
    with pytest.raises(BadInput, match="norm_before_gate = False"):
        import_checkpoint(tmp_path)


def test_half_precision_checkpoints_keep_marked_parameters_wide(tmp_path):
    made("llama").to(torch.bfloat16).save_pretrained(tmp_path)
    assert {p.dtype for p in import_checkpoint(tmp_path)[0].parameters()} == {torch.bfloat16}
    made("mamba2").to(torch.bfloat16).save_pretrained(tmp_path / "mamba2")
    layer, _ = import_checkpoint(tmp_path / "mamba2")
    wide = {name.rpartition(".")[2] for name, p in layer.named_parameters() if p.dtype == torch.float32}
    assert wide == {"A_log", "D", "dt_bias"}


def test_sharded_checkpoints_are_read(tmp_path):
    theirs = made("llama")
    theirs.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    ids = torch.randint(0, VOCAB, (1, 9))
    torch.testing.assert_close(scores(import_checkpoint(tmp_path)[0], ids), scores(theirs, ids), rtol=1e-4, atol=1e-4)
    next(iter(sorted(tmp_path.glob("*.safetensors")))).unlink()
    with pytest.raises(BadInput, match=r"has no model-00001-of"):
        import_checkpoint(tmp_path)


# -- what is refused ---------------------------------------------------------------------------------------------

@pytest.fixture
def llama(tmp_path):
    made("llama").save_pretrained(tmp_path)
    return tmp_path


def change(folder, **settings):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **settings}))


@pytest.mark.parametrize(("settings", "message"), [
    ({"model_type": "bert", "architectures": ["BertModel"]}, r"model_type 'bert' \(BertModel\), which is not read; seqloom, l"),
    ({"hidden_act": "gelu"}, "hidden_act = 'silu' or 'swish', and this one has 'gelu'"),
    ({"mlp_bias": True}, "mlp_bias = False"),
    ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}, "rope_type 'dynamic' is not read"),
    ({"num_hidden_layers": 3}, r"has no tensor model\.layers\.2\.\S+, which its config\.json calls for"),
    ({"num_hidden_layers": 1}, r"has 9 tensors that its config\.json does not call for, such as model\.layers\.1\."),
    ({"tie_word_embeddings": False, "vocab_size": 97}, r"is \[96, 32\], and the model .* needs \[97, 32\]"),
    ({"num_key_value_heads": 3}, "do not share 3 key heads"),
    ({"hidden_size": "wide"}, "config.json is not one of a llama model"),
])
def test_what_cannot_be_read_is_said_in_one_sentence(llama, settings, message):
    change(llama, **settings)
    with pytest.raises(BadInput, match=message) as found:
        import_checkpoint(llama)
    assert str(llama) in str(found.value) and "\n" not in str(found.value)


def test_original_settings_without_counterpart_are_refused(llama):
    base = {"d_model": WIDTH, "n_layer": 2, "vocab_size": VOCAB}
    for extra, message in [
        ({"d_intermediate": 64}, "d_intermediate = 0"), ({"rms_norm": False}, "rms_norm = True"),
        ({"ssm_cfg": {"layer": "Mamba3"}}, "'Mamba1' or 'Mamba2'"), ({"attn_layer_idx": [1]}, "attn_layer_idx"),
        ({"ssm_cfg": {"d_statte": 3}}, "ssm_cfg.d_statte are not read"),
    ]:
        (llama / "config.json").write_text(json.dumps({**base, **extra}))
        with pytest.raises(BadInput, match=message):
            import_checkpoint(llama)


def test_pickled_weights_are_never_loaded(llama):
    (llama / "model.safetensors").rename(llama / "pytorch_model.bin")
    with pytest.raises(BadInput, match=r"pytorch_model\.bin is a pickle, which is never loaded"):
        import_checkpoint(llama)


def test_damaged_weights_are_named(llama):
    file = llama / "model.safetensors"
    file.write_bytes(file.read_bytes()[:500])
    with pytest.raises(BadInput, match=r"model\.safetensors is damaged \("):
        import_checkpoint(llama)


def test_the_table_covers_what_the_cases_try():
    assert set(LAYOUTS) - set(fla.LAYOUTS) == {case.split("-")[0] for case in CASES}
