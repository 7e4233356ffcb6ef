"""Folders with a model: exported, read, and refused in one sentence."""

from __future__ import annotations

import pytest
import torch
import transformers
from hub_models import HYBRID, WIDTH, close, model_of, saved
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM

from seqloom.core import BadInput, FailedRun
from seqloom.core.marks import marks
from seqloom.data import tokenizer as tokenizers
from seqloom.hub import SeqloomConfig, SeqloomForCausalLM, export, load
from seqloom.mixers import DeltaNet
from seqloom.models import Block, Stack
from seqloom.models.sequence import language_model
from seqloom.parts import SwiGLU

model = pytest.fixture(lambda: model_of(), name="model")
folder = pytest.fixture(saved, name="folder")

# -- folders -----------------------------------------------------------------------------------------------------

@pytest.fixture
def tokenizer() -> Tokenizer:
    return tokenizers.learn(["the quick brown fox", "jumps over it"] * 4, vocab=260)


@pytest.fixture
def shipped(tokenizer, tmp_path):
    blocks = tuple(Block(mixer=mixer, mlp=SwiGLU(hidden=40)) for mixer in (DeltaNet(heads=2), DeltaNet(heads=2), HYBRID[1]))
    layer = language_model(vocab=260, stack=Stack(dim=WIDTH, blocks=blocks)).build()
    facts = {"data": "a fox", "steps": 1200, "held-out bits per byte": 1.234}
    return layer, export(layer, tokenizer, tmp_path / "fox", card=facts)


def test_an_exported_folder_loads_both_ways(shipped, tokenizer):
    layer, folder = shipped
    assert {file.name for file in folder.iterdir()} == {
        "README.md", "config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
    }
    plain, found = load(folder)
    ids = torch.tensor([found.encode("the fox").ids])
    assert plain.spec == layer.spec and not plain.training and found.encode("the fox").ids == tokenizer.encode("the fox").ids
    assert plain.head.weight is plain.stem.weight
    close(plain(ids).logits, layer.eval()(ids).logits, 1e-5)
    for name, parameter in layer.named_parameters():
        assert marks(plain.get_parameter(name)) == marks(parameter)
    loaded, reader = AutoModelForCausalLM.from_pretrained(folder), transformers.AutoTokenizer.from_pretrained(folder)
    batch = reader(["the fox", "jumps"], return_tensors="pt", padding=True)
    out = loaded.generate(**batch, max_new_tokens=4, do_sample=False)
    assert loaded.generation_config.eos_token_id == found.token_to_id(tokenizers.START) and out.shape[0] == 2
    export(plain, reader, folder)
    close(load(folder)[0](ids).logits, plain(ids).logits, 1e-5)


def test_the_card_says_what_it_is_and_how_to_load_it(shipped):
    layer, folder = shipped
    card = (folder / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: transformers\n") and 'tags: ["seqloom", "delta", "softmax"]' in card
    parameters = sum(p.numel() for p in layer.parameters())
    for line in (f"| Parameters | {parameters:,} |", "| Mixers | 2 x DeltaNet, 1 x SoftmaxAttention |", "| Data | a fox |",
                 "| Steps | 1,200 |", "| Held-out bits per byte | 1.234 |", "import seqloom.hub",
                 'AutoModelForCausalLM.from_pretrained("fox")'):
        assert line in card


def test_loading_in_another_dtype_keeps_marked_parameters_wide(folder):
    layer, tokenizer = load(folder, dtype=torch.bfloat16)
    assert tokenizer is None
    for parameter in layer.parameters():
        assert parameter.dtype == (torch.float32 if marks(parameter)["keep_float32"] else torch.bfloat16)


def test_a_failed_export_leaves_what_was_there(shipped, tokenizer, monkeypatch):
    layer, folder = shipped
    before = {file.name: file.read_bytes() for file in folder.iterdir()}

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    with torch.no_grad():
        layer.stem.weight.add_(1)
    monkeypatch.setattr("seqloom.hub.files.model_card", full)
    with pytest.raises(FailedRun, match=r"could not be written to .*: No space left on device"):
        export(layer, tokenizer, folder)
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before
    with pytest.raises(FailedRun, match="could not be written to"):
        export(layer, tokenizer, folder / "README.md" / "inside")


def test_folders_that_are_not_models_are_said_so_in_one_sentence(folder, tmp_path):
    def fails(message):
        with pytest.raises(BadInput, match=message) as found:
            load(folder)
        assert "\n" not in str(found.value) and str(folder) in str(found.value)

    with pytest.raises(BadInput, match="nowhere is not there; a folder with a saved model is expected"):
        load(tmp_path / "nowhere")
    with pytest.raises(BadInput, match=r"config.json is a file; a folder"):
        load(folder / "config.json")
    with pytest.raises(BadInput, match=r"has no config\.json, so it is not a saved model"):
        load(tmp_path)
    file, config = folder / "model.safetensors", folder / "config.json"
    tensors, text = load_file(file), config.read_text()
    name = "model.stack.blocks.0.mixer.A_log"
    for changed, message in [
        ({key: value for key, value in tensors.items() if key != name}, r"lacks 1 of the model's tensors \(such as stack"),
        ({**tensors, "model.extra": torch.zeros(1)}, r"has 1 it does not know \(such as extra\)"),
        ({**tensors, name: torch.zeros(5)}, r"A_log in .* is \[5\], and the model .* needs \[2\]"),
    ]:
        save_file(changed, file)
        fails(message)
    file.write_bytes(b"no tensors at all")
    fails(r"model\.safetensors is damaged")
    file.unlink()
    fails(r"has no model\.safetensors")
    for broken, message in [
        ("{", "is not valid JSON"), ("[]", "must hold a JSON object"),
        (text.replace('"linear"', '"linaer"'), "did you mean 'linear'"), (text.replace('"heads": 2', '"hedas": 2'), "'hedas'"),
        (text.replace('"seqloom": {', '"seqloom_was": {'), "no spec"),
    ]:
        config.write_text(broken)
        fails(message)


def test_a_config_without_a_spec_makes_no_model():
    with pytest.raises(BadInput, match="has no spec"):
        SeqloomForCausalLM(SeqloomConfig())
    with pytest.raises(BadInput, match="must hold a spec and its format"):
        SeqloomConfig(seqloom="linear")
