"""flash-linear-attention's checkpoints: names, shapes and scores recorded from its own models (tests/fla_cpu.py), and, where
the package is installed, its models themselves."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest
import torch
from fla_cpu import CASES, KEPT, PACKAGES, RECORD, VOCAB, ids, model, plain, weights
from fla_cpu import scores as their_scores
from safetensors.torch import load_file, save_file

from seqloom.core import BadInput
from seqloom.hub import import_checkpoint, load, wrap
from seqloom.hub.foreign import LAYOUTS, REFUSED, fla, table

RECORDED = json.loads(RECORD.read_text())
PAGE = Path(__file__).parents[1] / "docs" / "checkpoints.md"


def write(folder, case: str, *, shards: int = 1):
    """A checkpoint of a recorded case."""
    found = RECORDED[case]
    (folder / "config.json").write_text(json.dumps(found["config"]))
    tensors = weights(found["tensors"])
    if shards == 1:
        save_file(tensors, folder / "model.safetensors")
        return folder
    files = {name: f"model-{i % shards}.safetensors" for i, name in enumerate(tensors)}
    for file in set(files.values()):
        save_file({name: tensors[name] for name, where in files.items() if where == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    return folder


def change(folder, tensors=None, **settings):
    """Alter config.json and, by a function of the tensors, the weights."""
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **settings}))
    if tensors is not None:
        save_file(tensors(load_file(folder / "model.safetensors")), folder / "model.safetensors")


def scores(layer):
    with torch.no_grad():
        return layer(ids()).logits


def close(got, want, tolerance: float = 3e-5):
    assert (got - want).abs().max() <= tolerance * max(1.0, float(want.abs().max()))


@pytest.mark.parametrize("case", CASES)
def test_recorded_scores(case, tmp_path):
    layer, spec = import_checkpoint(write(tmp_path, case))
    want = torch.tensor(RECORDED[case]["scores"]).view(2, KEPT, VOCAB)
    assert layer.spec == spec and not layer.training and want.std() > 1
    close(scores(layer)[:, -KEPT:], want)


@pytest.mark.parametrize("case", [case for case in CASES if RECORDED[case]["config"]["norm_eps"] == 1e-2])
def test_the_epsilon_of_norms_is_seen(case, tmp_path):
    """The comparison above would see an importer that left a norm's epsilon where it was."""
    import_checkpoint(write(tmp_path, case))
    change(tmp_path, norm_eps=0.5)
    want = torch.tensor(RECORDED[case]["scores"]).view(2, KEPT, VOCAB)
    assert (scores(import_checkpoint(tmp_path)[0])[:, -KEPT:] - want).abs().max() > 1e-2


@pytest.mark.parametrize("case", ["delta_net-hybrid", "mom", "hgrn"])
def test_sharded_saved_as_ours_and_in_half_precision(case, tmp_path):
    layer, _ = import_checkpoint(write(tmp_path, case, shards=3))
    want = scores(layer)
    wrap(layer).save_pretrained(tmp_path / "ours")
    close(scores(load(tmp_path / "ours")[0]), want, 1e-6)
    assert torch.bfloat16 in {p.dtype for p in import_checkpoint(tmp_path, dtype=torch.bfloat16)[0].parameters()}


def test_the_layout_of_2024_with_gate_and_up_projection_in_one(tmp_path):
    want = scores(import_checkpoint(write(tmp_path, "gla"))[0])

    def joined(tensors):
        for i in range(2):
            up = tensors.pop(f"model.layers.{i}.mlp.up_proj.weight")
            name = f"model.layers.{i}.mlp.gate_proj.weight"
            tensors[name] = torch.cat([tensors[name], up])
        return tensors

    change(tmp_path, joined)
    close(scores(import_checkpoint(tmp_path)[0]), want, 0)


def test_settings_that_a_file_leaves_out_have_their_defaults(tmp_path):
    _, spec = import_checkpoint(write(tmp_path, "delta_net"))
    config = json.loads((tmp_path / "config.json").read_text())
    own = ("model_type", *(name for name, value in CASES["delta_net"].items()))
    (tmp_path / "config.json").write_text(json.dumps({name: config[name] for name in own}))
    assert import_checkpoint(tmp_path)[1] == spec


# -- what is refused -----------------------------------------------------------------------------------------------

@pytest.mark.parametrize(("case", "settings", "message"), [
    ("gla", {"num_kv_heads": 1}, "gla checkpoints are read with num_kv_heads = None, and this one has 1"),
    ("gla", {"feature_map": "relu"}, "feature_map = None"), ("gla", {"clamp_min": -3.0}, "clamp_min = None"),
    ("gla", {"use_output_gate": False}, "use_output_gate = True"), ("gla", {"attnres_block_size": 2}, "attnres_block_size"),
    ("gla", {"hidden_act": "powlu"}, "hidden_act = 'swish' or 'silu'"), ("gla", {"elementwise_affine": False}, "affine = True"),
    ("retnet", {"feature_map": "swish"}, "retnet checkpoints are read with feature_map = None"),
    ("linear_attn", {"feature_map": "hedgehog"}, "'elu' or 'relu' or 'identity', and this one has 'hedgehog'"),
    ("linear_attn", {"norm_q": True}, "norm_q = False"), ("gsa", {"use_short_conv": True}, "use_short_conv = False"),
    ("delta_net", {"qk_norm": "l1"}, "qk_norm = 'l2' or 'sum'"), ("mom", {"mom_backend": "gla"}, "mom_backend"),
    ("gated_deltanet", {"output_gate_activation": "sigmoid"}, "output_gate_activation = 'swish' or 'silu'"),
    ("gated_deltanet-grouped", {"num_v_heads": 5}, "5 heads of values do not share 2 heads of keys; nearest is 1"),
    ("hgrn", {"attn": {"layers": [3], "num_heads": 2}}, "attn lists layer 3 of a model of 3"),
    ("hgrn", {"use_lower_bound": False}, r"1 tensors that its config\.json does not call for, such as model\.lower_bounds"),
    ("gsa", {"feature_map": "t2r"}, r"has no tensor model\.layers\.0\.attn\.feature_map\.layer\.weight"),
    ("mom", {"num_memories": 3}, r"2 tensors .* such as|8 tensors .* such as model\.layers\.0\.attn\.a_proj\.3\.weight"),
    ("mom", {"num_memories": 5}, r"has no tensor model\.layers\.0\.attn\.k_proj\.4\.weight"),
])
def test_settings_without_counterpart(case, settings, message, tmp_path):
    write(tmp_path, case)
    change(tmp_path, **settings)
    with pytest.raises(BadInput, match=message) as found:
        import_checkpoint(tmp_path)
    assert str(tmp_path) in str(found.value) and "\n" not in str(found.value)


@pytest.mark.parametrize("case", CASES)
def test_no_tensor_is_dropped_and_none_is_made_up(case, tmp_path):
    write(tmp_path, case)
    names = sorted(RECORDED[case]["tensors"])
    for name in (names[0], names[len(names) // 2], names[-2]):
        change(write(tmp_path, case), lambda tensors, name=name: {key: x for key, x in tensors.items() if key != name})
        with pytest.raises(BadInput, match=f"{name}"):
            import_checkpoint(tmp_path)
    change(write(tmp_path, case), lambda tensors: {**tensors, "model.layers.0.attn.extra.weight": torch.zeros(1)})
    with pytest.raises(BadInput, match=r"1 tensors .* such as model\.layers\.0\.attn\.extra\.weight"):
        import_checkpoint(tmp_path)


def test_a_tied_head_that_says_something_else_is_not_dropped(tmp_path):
    write(tmp_path, "gla-conv-tied")
    change(tmp_path, lambda tensors: {**tensors, "lm_head.weight": tensors["model.embeddings.weight"].clone()})
    assert import_checkpoint(tmp_path)[1].head.tie
    change(tmp_path, lambda tensors: {**tensors, "lm_head.weight": 2 * tensors["lm_head.weight"]})
    with pytest.raises(BadInput, match=r"its lm_head\.weight differs from them"):
        import_checkpoint(tmp_path)


@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_missing_is_said(kind, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind}))
    with pytest.raises(BadInput) as found:
        import_checkpoint(tmp_path)
    assert REFUSED[kind] in str(found.value) and kind not in LAYOUTS


@pytest.mark.parametrize(("kind", "settings", "message"), [
    ("jamba", {}, "jamba checkpoints are read without mixtures of experts, and this one has them in 16 blocks"),
    ("qwen3_next", {}, r"has them in 48 blocks \(from block 0\)"),
    ("qwen3_next", {"num_experts": 0, "layer_types": ["linear_attention", "chunked_attention"] * 24}, "chunked_attention"),
])
def test_mixtures_of_experts_are_refused(kind, settings, message, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind, **settings}))
    with pytest.raises(BadInput, match=message):
        import_checkpoint(tmp_path)


# -- the tables ----------------------------------------------------------------------------------------------------

def test_the_record_and_the_cases_cover_the_table():
    assert set(RECORDED) == set(CASES) and set(fla.LAYOUTS) == set(PACKAGES) == {case.split("-")[0] for case in CASES}


def test_the_page_says_what_the_table_says():
    lines = PAGE.read_text().splitlines()
    for row in table():
        assert any(all(f" {cell} " in line for cell in row if cell) for line in lines), row


# -- their own models ----------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def package():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip("fla", reason="flash-linear-attention is not installed")


@pytest.mark.peer
@pytest.mark.parametrize("case", CASES)
def test_their_model_gives_the_same_scores(case, package, tmp_path):
    """Every score, and the files as `save_pretrained` writes them."""
    with plain():
        theirs = model(case)
        theirs.save_pretrained(tmp_path)
        want = their_scores(theirs)
    assert {name: list(p.shape) for name, p in theirs.named_parameters()} == RECORDED[case]["tensors"]
    close(scores(import_checkpoint(tmp_path)[0]), want)
